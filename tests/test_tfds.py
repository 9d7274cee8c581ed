"""Any image data set of TFDS by name: its splits and its one image, sizes fitted, decoded once, without TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tfds_files
import tiny

import datasets
from configs import base
from errors import UserError
from sources import tfds as tfds_source
from sources.pictures import Fit, fit_picture, to_levels

GENERATOR = np.random.default_rng(0)
EXACT = [GENERATOR.integers(0, 256, (4, 6, 3), dtype=np.uint8) for _ in range(12)]
MIXED = [GENERATOR.integers(0, 256, (4 + i, 9, 3), dtype=np.uint8) for i in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))


def make_config(root, dataset="tfds:tiny_own", **changes):
    config = base.get_config()
    config.data.update(dataset=dataset, path=str(root), image_size=4, image_width=6, num_channels=3, **changes)
    return config


def records(images, name="image"):
    return [{name: image, "label": i % 3} for i, image in enumerate(images)]


def write_own(root, splits, shape=(None, None, 3), **features):
    features = {"image": tfds_files.image(shape), "label": tfds_files.label()} | features
    return tfds_files.write(root, "tiny_own", features, splits)


def everything(source):
    return source.images(np.arange(len(source)))


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (["train", "test", "validation"], ("train", "test")),
        (["train", "validation", "extra"], ("train", "validation")),
        (["train", "unlabelled"], ("train", "train")),
        (["test"], ("test", "test")),
        (["full"], ("full", "full")),
    ],
)
def test_splits_are_those_of_the_data_set(known, expected):
    assert tfds_source.choose_splits(dict.fromkeys(known), "own") == expected


def test_splits_of_unknown_meaning_are_refused():
    with pytest.raises(ValueError, match="'own' has no split 'train', but a, b: which to train on is unknown"):
        tfds_source.choose_splits({"b": 0, "a": 0}, "own")


@pytest.mark.parametrize("name", ["test", "validation"])
def test_a_split_of_its_own_is_the_test_split(tmp_path, name):
    write_own(tmp_path, {"train": records(EXACT[:5]), name: records(EXACT[5:8])})
    train, test = (datasets.build_source(make_config(tmp_path), split) for split in ("train", "test"))
    np.testing.assert_array_equal(everything(train), EXACT[:5])
    np.testing.assert_array_equal(everything(test), EXACT[5:8])
    assert train.fingerprint != test.fingerprint


def test_a_part_is_held_out_where_there_is_no_test_split(tmp_path):
    """By content: turning the order around changes nothing, and every image is in one split with its own label."""
    found = []
    for folder, order in (("a", np.arange(12)), ("b", np.arange(12)[::-1])):
        write_own(tmp_path / folder, {"train": [{"image": EXACT[i], "label": int(i) % 3} for i in order]})
        config = make_config(tmp_path / folder, test_share=0.25)
        splits = [datasets.build_source(config, split) for split in ("train", "test")]
        assert [len(split) for split in splits] == [9, 3]
        for split in splits:
            places = [next(i for i in range(12) if np.array_equal(EXACT[i], image)) for image in everything(split)]
            np.testing.assert_array_equal(split.labels(np.arange(len(split))), np.array(places) % 3)
        found.append([{image.tobytes() for image in everything(split)} for split in splits])
    assert found[0] == found[1]
    assert len(found[0][0] | found[0][1]) == 12


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_of_the_configured_size_are_left_as_they_are(tmp_path):
    write_own(tmp_path, {"train": records(EXACT[:4]), "test": records(EXACT[4:6])}, shape=(4, 6, 3))
    source = datasets.build_source(make_config(tmp_path), "train")
    np.testing.assert_array_equal(everything(source), EXACT[:4])
    assert (source.preparation, source.num_classes, source.num_levels) == ("as stored", 3, 256)
    assert source.fingerprint.startswith("tiny_own/1.0.0 train (4 images, ")


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_images_of_any_size_are_fitted_like_pictures_of_a_folder(tmp_path, resize):
    write_own(tmp_path, {"train": records(MIXED), "test": records(EXACT[:1])})
    source = datasets.build_source(make_config(tmp_path, resize=resize), "train")
    fit = Fit((4, 6, 3), resize, convert_channels=True, group="data")
    expected = [to_levels(fit_picture(image.astype(np.float32) / 255, fit), 256) for image in MIXED]
    np.testing.assert_array_equal(everything(source), expected)
    assert source.preparation == fit.rule
    assert source.fingerprint.endswith(fit.rule)


def test_grey_images_are_repeated_and_levels_are_those_configured(tmp_path):
    grey = [image[..., :1] for image in EXACT[:3]]
    write_own(tmp_path, {"train": records(grey), "test": records(grey)}, shape=(4, 6, 1))
    config = make_config(tmp_path, num_levels=16)
    source = datasets.build_source(config, "train")
    expected = np.rint(np.repeat(grey, 3, axis=-1) / 255 * 15)
    np.testing.assert_array_equal(everything(source), expected)
    assert source.num_levels == 16
    assert "16 levels" in source.preparation


def test_an_image_that_does_not_fit_is_named(tmp_path):
    write_own(tmp_path, {"train": records([EXACT[0], MIXED[2]]), "test": records(EXACT[:1])})
    message = r"image 1 of tiny_own/1.0.0 train .* cannot be used: it has 6x9 pixels .* set data.resize to 'crop'"
    with pytest.raises(ValueError, match=message):
        datasets.build_source(make_config(tmp_path, resize="none"), "train")
    assert not list((tmp_path / "cache/data").glob("*/images.npy"))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": tfds_files.label()}, r"hold 0 images \(image, label\); expected one"),
        ({"mask": tfds_files.image((4, 6, 1))}, r"hold 2 images \(image, mask\); expected one"),
        ({"image": tfds_files.image((4, 6, 1), dtype=np.float32)}, "values of type float32; expected 8 or 16 bits"),
    ],
)
def test_records_without_one_usable_image_are_refused(tmp_path, features, message):
    write_own(tmp_path, {"train": records(EXACT[:1]), "test": records(EXACT[:1])}, **features)
    with pytest.raises(ValueError, match=message):
        datasets.build_source(make_config(tmp_path), "train")


@pytest.mark.parametrize("features", [{"label": tfds.features.Scalar(np.int64)}, {"other": tfds_files.label(5)}])
def test_labels_are_those_of_the_only_class_label(tmp_path, features):
    write_own(tmp_path, {"train": records(EXACT[:2]), "test": records(EXACT[:2])}, **features)
    assert datasets.build_source(make_config(tmp_path), "train").num_classes == 0


def test_secret_labels_are_none(tmp_path):
    """TFDS writes -1, as in ImageNet's test split."""
    secret = [{"image": image, "label": -1} for image in EXACT[4:6]]
    write_own(tmp_path, {"train": records(EXACT[:4]), "test": secret})
    assert [datasets.build_source(make_config(tmp_path), split).num_classes for split in ("train", "test")] == [3, 0]


def test_what_is_stored_in_another_mode_becomes_what_tfds_states():
    """A grey picture among colour ones, as in ImageNet and LSUN."""
    assert np.array_equal(tfds_source.decode_stored(tfds_files.png(EXACT[0][..., :1]), 3), EXACT[0][..., [0, 0, 0]])
    assert np.array_equal(tfds_source.decode_stored(tfds_files.png(EXACT[0]), 3), EXACT[0])
    assert np.array_equal(tfds_source.decode_stored(tfds_files.png(EXACT[0][..., :1]), 1), EXACT[0][..., :1])
    assert np.array_equal(tfds_source.decode_stored(tfds_files.png(EXACT[0]), None), EXACT[0])


# --- opening and keeping ---------------------------------------------------------------------------------------------


def test_nothing_is_decoded_twice(tmp_path, monkeypatch):
    folder = write_own(tmp_path, {"train": records(EXACT[:4]), "test": records(EXACT[4:5])})
    first = datasets.build_source(make_config(tmp_path), "train")
    assert isinstance(first.levels, np.memmap)
    np.testing.assert_array_equal(first.labels(np.array([3, 1])), [0, 1])
    decoded = []
    monkeypatch.setattr(
        tfds_source, "decode_picture", lambda data, name, **options: decoded.append(data) or EXACT[9] / 255
    )
    again = datasets.build_source(make_config(tmp_path), "train")
    assert len(decoded) == 1  # one image, to see its size
    np.testing.assert_array_equal(everything(again), everything(first))
    write_own(tmp_path, {"train": records(EXACT[5:9]), "test": records(EXACT[4:5])})  # the same name and version
    assert folder.exists()
    np.testing.assert_array_equal(everything(datasets.build_source(make_config(tmp_path), "train"))[0], EXACT[9])


def test_data_too_large_to_keep_are_decoded_when_read(tmp_path):
    write_own(tmp_path, {"train": records(EXACT[:4]), "test": records(EXACT[4:5])})
    source = datasets.build_source(make_config(tmp_path, cache_gib=1e-9), "train")
    assert isinstance(source, tfds_source.TfdsSource)
    kept = datasets.build_source(make_config(tmp_path), "train")
    np.testing.assert_array_equal(source.images(np.array([2, 0, 2])), kept.images(np.array([2, 0, 2])))
    np.testing.assert_array_equal(source.labels(np.array([2, 0])), [2, 0])
    assert source.fingerprint == kept.fingerprint


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ("tfds:mnist", UserError, r"'mnist' is not prepared as ArrayRecord files in .*--mode prepare --config"),
        ("MNIST", UserError, "'mnist' is not prepared"),
        ("FASHION_MNIST", UserError, "'fashion_mnist' is not prepared"),
        ("tfds:nonesuch", ValueError, r"tensorflow-datasets .* has no data set 'nonesuch', and .* none of that name"),
        ("tfds:imagenete/320px", ValueError, "has no data set 'imagenete/320px'.*; did you mean imagenette?"),
        ("tfds:", ValueError, "data.dataset='tfds:' is unknown; known: .*, tfds:NAME"),
        ("tfds:imagenette/3px", ValueError, "cannot open 'imagenette/3px' of .*BuilderConfig 3px not found"),
        ("tfds:cifar10:1.0.0", ValueError, "cannot open 'cifar10:1.0.0' of .*cannot be loaded at version 1.0.0"),
    ],
)
def test_data_that_cannot_be_opened_are_named(tmp_path, dataset, error, message):
    with pytest.raises(error, match=message):
        datasets.build_source(make_config(tmp_path, dataset), "train")


def test_the_sets_of_the_2021_code_are_kept_too(tmp_path):
    """And an image of another size than configured is refused before any is decoded."""
    features = {"image": tfds_files.image((4, 6, 3)), "label": tfds_files.label()}
    splits = {"train": records(EXACT[:3]), "test": records(EXACT[3:5])}
    for name in ("cifar10", "svhn_cropped"):
        tfds_files.write(tmp_path, name, features, splits)
    root = tmp_path / "cifar10"
    (root / "1.0.0").rename(root / "3.0.2")
    info = root / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace("1.0.0", "3.0.2"))
    config = make_config(tmp_path, "CIFAR10")
    source = datasets.build_source(config, "train")
    assert isinstance(source.levels, np.memmap)
    np.testing.assert_array_equal(everything(source), EXACT[:3])
    config.data.image_width = 4
    with pytest.raises(ValueError, match=r"CIFAR10 has images of \(height, width, channels\) \(4, 6, 3\)"):
        datasets.build_source(config, "train")


READ = """
import sys
import numpy as np
import datasets
from configs import base

config = base.get_config()
config.data.update(dataset="tfds:tiny_own", path=sys.argv[1], image_size=4, image_width=6, num_channels=3)
source = datasets.build_source(config, "train")
print(source.images(np.arange(2)).sum(), "tensorflow" in sys.modules)
"""


def test_tensorflow_is_not_needed(tmp_path):
    write_own(tmp_path, {"train": records(MIXED), "test": records(EXACT[:1])})
    result = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)],
        cwd=tiny.ROOT,
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    assert result.stdout.split()[-1] == "False", result.stderr[-2000:]
