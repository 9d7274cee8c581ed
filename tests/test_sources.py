"""Data sets on disk: the resizing of the 2021 code, TFDS records, and .tfrecords files, whole or damaged."""

import contextlib
import dataclasses
import importlib.util
import os
import struct
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from reference import GOLDEN
from tensorboardX.record_writer import masked_crc32c

import datasets
import sources.tfds
from configs import base
from errors import UserError
from sources import resize, tfrecord
from sources.npz import load_npz

FLOAT32 = 5e-7  # a few roundings of values up to 1; the largest difference found is 3e-7


@pytest.fixture(scope="module")
def golden():
    """Images, and what the 2021 code made of them under TensorFlow 2.4.0."""
    with np.load(GOLDEN / "math" / "data_resize.npz") as arrays:
        return dict(arrays)


def make_config(**changes):
    config = base.get_config()
    config.data.update(num_channels=3, **changes)
    return config


# --- resizing --------------------------------------------------------------------------------------------------------


def test_celeba_is_that_of_the_2021_code(golden):
    x = resize.celeba(golden["celeba_in"], 64)
    np.testing.assert_allclose(x / 255, golden["celeba64_eager"], rtol=0, atol=FLOAT32)
    levels = resize.nearest_level(x)
    assert levels.dtype == np.uint8
    assert np.abs(levels - 255 * golden["celeba64_eager"]).max() <= 0.5 + 255 * FLOAT32


def test_lsun_is_that_of_the_2021_code_before_it_truncated(golden):
    """The 2021 code cast to uint8: it dropped the fraction, modulo 256. No value of this image overshoots."""
    x, truncated = resize.lsun(golden["lsun_in"], 32), golden["lsun_crop_resize32"].astype(float)
    assert x.min() >= 0
    assert x.max() < 256
    fraction = x - truncated
    assert fraction.min() >= -255 * FLOAT32
    assert fraction.max() < 1 + 255 * FLOAT32
    # Ours is the next level up wherever the fraction that it dropped is more than a half.
    rounded_up, is_tie = resize.nearest_level(x) - truncated, abs(fraction - 0.5) < 1e-3
    np.testing.assert_array_equal(rounded_up[~is_tie], fraction[~is_tie] > 0.5)


def test_lsun_of_128_pixels_is_that_of_the_2021_code(golden):
    x = resize.lsun_128(golden["lsun_in"], 32)
    np.testing.assert_allclose(x / 255, golden["lsun_resize_small32_eager"], rtol=0, atol=FLOAT32)


def test_overshoot_is_clipped_where_the_2021_code_wrapped_around():
    """Black and white edges: a cast to uint8 without clipping turns just the overshooting values into their opposite.

    TensorFlow 2.4.0 gave -2.99 -> 254 and 257.99 -> 1, as the cast below does.
    """
    edges = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((9, 9)))[..., None].astype(np.uint8) * 255
    x = resize.lsun(edges, 24)
    outside = (x <= -1) | (x >= 256)
    assert outside.any()
    assert not outside.all()

    def cast(value):
        return np.trunc(value).astype(int) % 256

    np.testing.assert_array_equal(cast(np.array([-2.99, 257.99])), [254, 1])
    levels = resize.nearest_level(x)
    wrapped = np.abs(cast(x) - levels.astype(int)) > 1
    np.testing.assert_array_equal(wrapped, outside)
    np.testing.assert_array_equal(levels[x < 0], 0)
    np.testing.assert_array_equal(levels[x > 255], 255)


def test_levels_are_rounded_to_the_nearest_half_to_even():
    x = np.array([[[-0.6, 0.4999, 0.5, 1.5, 254.5001, 255.7]]], np.float32)
    np.testing.assert_array_equal(resize.nearest_level(x), [[[0, 0, 0, 2, 255, 255]]])


@pytest.mark.parametrize(("height", "width"), [(5, 7), (16, 40), (13, 16)])
@pytest.mark.parametrize(
    ("method", "name"), [(Image.Resampling.BILINEAR, "linear"), (Image.Resampling.BICUBIC, "cubic")]
)
def test_resizing_up_and_down_agrees_with_jax(height, width, method, name):
    image = np.random.RandomState(0).randint(0, 256, (13, 16, 2)).astype(np.uint8)
    expected = jax.image.resize(jnp.asarray(image, jnp.float32), (height, width, 2), name, antialias=True)
    # jax sums the weights in float32: a few roundings of 255.
    np.testing.assert_allclose(resize.resize(image, height, width, method), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("width", "expected"), [(85, 42), (86, 43), (87, 44)])
def test_the_other_side_is_rounded_half_to_even(width, expected):
    """64 x 85 pixels become 32 x 42.5, that is 42; 32 x 43.5 is 44."""
    image = np.zeros((64, width, 1))
    assert resize.resize_small_side(image, 32).shape == (32, expected, 1)
    assert resize.resize_small_side(image.transpose(1, 0, 2), 32).shape == (expected, 32, 1)


def test_the_crop_is_central():
    image = np.arange(7 * 4).reshape(7, 4, 1)
    np.testing.assert_array_equal(resize.central_crop(image, 4), image[1:5])
    with pytest.raises(ValueError, match="an image of 7x4 pixels is too small for a central crop of 5x5"):
        resize.central_crop(image, 5)


# --- TFDS ------------------------------------------------------------------------------------------------------------


class Records(list):
    """Records in the shape that TFDS gives."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def serve(monkeypatch, *images):
    """Puts images in the place of prepared data; returns the list of what is then asked for."""
    asked = []

    def load(name, split, path=""):
        asked.append((name, split, path))
        return sources.tfds.TfdsSource(Records({"image": image} for image in images), num_classes=0)

    monkeypatch.setattr(sources.tfds, "load_tfds", load)
    return asked


def test_tfds_records_are_read_by_index():
    records = Records({"image": np.full((2, 2, 3), i, np.uint8), "label": i % 3} for i in range(5))
    source = sources.tfds.TfdsSource(records, num_classes=3)
    images = source.images(np.array([4, 0, 2]))
    np.testing.assert_array_equal(images[:, 0, 0, 0], [4, 0, 2])
    np.testing.assert_array_equal(source.labels(np.array([4, 0, 2])), [1, 0, 2])
    assert dataclasses.is_dataclass(source)
    assert len(source) == 5


def test_celeba_is_read_from_tfds_cropped_and_resized(monkeypatch, golden):
    asked = serve(monkeypatch, np.zeros((218, 178, 3), np.uint8), golden["celeba_in"])
    config = make_config(dataset="CELEBA", image_size=64, path="folder")
    source = datasets.build_source(config, "train")
    datasets.build_source(config, "test")
    assert asked == [("celeb_a", "train", "folder"), ("celeb_a", "validation", "folder")]
    images = source.images(np.array([1, 0, 1]))
    assert np.abs(images[0] - 255 * golden["celeba64_eager"]).max() <= 0.5 + 255 * FLOAT32
    np.testing.assert_array_equal(images[1], 0)
    with pytest.raises(ValueError, match="the images of this data set carry no labels"):
        source.labels(np.array([0]))


@pytest.mark.parametrize("size", [32, 128])
def test_lsun_is_read_from_tfds_and_128_pixels_have_a_recipe_of_their_own(monkeypatch, golden, size):
    wide = golden["lsun_in"]
    asked = serve(monkeypatch, wide, wide.transpose(1, 0, 2))
    config = make_config(dataset="LSUN", image_size=size, category="church_outdoor")
    source = datasets.build_source(config, "train")
    datasets.build_source(config, "test")
    assert asked == [("lsun/church_outdoor", "train", ""), ("lsun/church_outdoor", "validation", "")]
    recipe = resize.lsun_128 if size == 128 else resize.lsun
    other = resize.lsun if size == 128 else resize.lsun_128
    images = source.images(np.array([0, 1]))
    np.testing.assert_array_equal(images[0], resize.nearest_level(recipe(wide, size)))
    np.testing.assert_array_equal(images[1], resize.nearest_level(recipe(wide.transpose(1, 0, 2), size)))
    assert np.any(images[0] != resize.nearest_level(other(wide, size)))


@pytest.mark.parametrize("category", ["", "bedrom"])
def test_a_scene_that_lsun_does_not_have_is_refused(category):
    message = rf"data.category='{category}' is no scene of LSUN; set it to one of .*bedroom, .*church_outdoor"
    with pytest.raises(ValueError, match=message):
        datasets.build_source(make_config(dataset="LSUN", category=category), "train")


@pytest.mark.parametrize(
    ("dataset", "builder"), [("LSUN", "lsun/bedroom"), ("CELEBA", "celeb_a"), ("SVHN", "svhn_cropped")]
)
def test_data_that_are_not_prepared_are_named(tmp_path, dataset, builder):
    config = make_config(dataset=dataset, category="bedroom", path=str(tmp_path))
    with pytest.raises(UserError, match=f"'{builder}' is not prepared as ArrayRecord files in .*--mode prepare"):
        datasets.build_source(config, "train")


# --- .tfrecords files ------------------------------------------------------------------------------------------------


def header(length):
    return struct.pack("<QI", length, masked_crc32c(struct.pack("<Q", length)))


def frame(data):
    return header(len(data)) + data + bytes(4)


def example(shape=None, data=None):
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    if shape is not None:
        message.features.feature["shape"].int64_list.value.extend(shape)
    if data is not None:
        message.features.feature["data"].bytes_list.value.append(data)
    return message.SerializeToString(deterministic=True)


def record(image):
    return frame(example(image.transpose(2, 0, 1).shape, image.transpose(2, 0, 1).tobytes()))


IMAGES = np.random.RandomState(0).randint(0, 256, (5, 4, 4, 3)).astype(np.uint8)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "r02.tfrecords"
    path.write_bytes(b"".join(map(record, IMAGES)))
    return path


@pytest.mark.parametrize("dataset", ["FFHQ", "CelebAHQ"])
def test_tfrecords_are_read_by_index(path, dataset):
    config = make_config(dataset=dataset, image_size=4, tfrecords_path=str(path))
    for split in ("train", "test"):  # one file for both, as in 2021
        source = datasets.build_source(config, split)
        assert (len(source), source.num_classes) == (5, 0)
        np.testing.assert_array_equal(source.images(np.array([3, 0, 4, 3])), IMAGES[[3, 0, 4, 3]])
    with pytest.raises(ValueError, match=r"the images of this data set carry no labels"):
        source.labels(np.array([0]))


def test_a_home_folder_is_found(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    assert len(tfrecord.load_tfrecord("~/r02.tfrecords", (4, 4, 3))) == 5


def test_checksums_are_those_of_rfc_3720():
    """Appendix B.4: 32 bytes of zeros, of ones, and ascending; stored rotated, plus a constant."""
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)):
        rotated = (masked_crc32c(data) - 0xA282EAD8) % 2**32
        assert (rotated << 15 | rotated >> 17) % 2**32 == crc


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: "", ValueError, "data.tfrecords_path is empty; set it to the data set's .tfrecords file"),
        (lambda path: f"{path}x", UserError, r"data.tfrecords_path='.*r02.tfrecordsx' is not a file; set it"),
        (lambda path: str(path.parent), UserError, "is not a file; set it"),
    ],
    ids=["empty", "missing", "folder"],
)
def test_a_file_that_is_not_there_is_named(path, make, error, message):
    with pytest.raises(error, match=message):
        datasets.build_source(make_config(dataset="FFHQ", tfrecords_path=make(path)), "train")


def test_images_of_another_size_are_refused(path):
    message = r"record 0 of .*r02.tfrecords is an image of .* \(4, 4, 3\), but data.image_size.* say \(8, 8, 3\); set"
    with pytest.raises(ValueError, match=message):
        datasets.build_source(make_config(dataset="FFHQ", image_size=8, tfrecords_path=str(path)), "train")
    path.write_bytes(record(IMAGES[0]) + record(IMAGES[1, :2]))
    source = datasets.build_source(make_config(dataset="FFHQ", image_size=4, tfrecords_path=str(path)), "train")
    with pytest.raises(ValueError, match=r"record 1 of .* is an image of .* \(2, 4, 3\)"):
        source.images(np.array([1]))


def test_a_file_that_was_cut_anywhere_is_refused(path):
    """All but at the end of a record, where a shorter file is a whole one."""
    whole, size = path.read_bytes(), len(record(IMAGES[0]))
    for cut in range(1, 2 * size):
        path.write_bytes(whole[:cut])
        if cut == size:
            assert len(tfrecord.load_tfrecord(str(path), (4, 4, 3))) == 1
            continue
        with pytest.raises(ValueError, match=rf"r02.tfrecords is cut off in the \w+ of record {cut // size}; get"):
            tfrecord.load_tfrecord(str(path), (4, 4, 3))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"r02.tfrecords is empty; get it again"):
        tfrecord.load_tfrecord(str(path), (4, 4, 3))


def test_another_kind_of_file_is_refused(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" * 9)
    with pytest.raises(ValueError, match=r"r02.tfrecords is damaged at byte 0, or not a .tfrecords file; get it again"):
        tfrecord.load_tfrecord(str(path), (4, 4, 3))
    first = record(IMAGES[0])
    path.write_bytes(first + bytes([record(IMAGES[1])[0] ^ 1]) + record(IMAGES[1])[1:])
    with pytest.raises(ValueError, match=f"is damaged at byte {len(first)}"):
        tfrecord.load_tfrecord(str(path), (4, 4, 3))


@pytest.mark.parametrize("length", [1 << 33, (1 << 63) - 16, (1 << 64) - 1])
def test_a_length_beyond_the_file_takes_no_memory(path, length):
    path.write_bytes(header(length) + bytes(50))
    tracemalloc.start()
    with pytest.raises(ValueError, match="is cut off in the data of record 0"):
        tfrecord.load_tfrecord(str(path), (4, 4, 3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_opening_a_file_reads_no_image(path):
    """Two records of a gigabyte, holes on disk; finding them must not take their size."""
    with path.open("wb") as file:
        for _ in range(2):
            file.write(header(1 << 30))
            file.seek(1 << 30, os.SEEK_CUR)
            file.write(bytes(4))
    tracemalloc.start()
    assert len(tfrecord.load_tfrecord(str(path), (4, 4, 3))) == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_that_changed_is_read_anew(path):
    assert len(tfrecord.load_tfrecord(str(path), (4, 4, 3))) == 5
    path.write_bytes(record(IMAGES[0]))
    assert len(tfrecord.load_tfrecord(str(path), (4, 4, 3))) == 1


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        (None, None, r"its feature 'shape' is \[\] and 'data' has 0 values; expected \(C, H, W\) and 1"),
        (None, 48, r"its feature 'shape' is \[\] and 'data' has 1 values"),
        ([3, 4, 4], None, r"its feature 'shape' is \[3, 4, 4\] and 'data' has 0 values"),
        ([3, -4, -4], 48, r"its feature 'shape' is \[3, -4, -4\]"),
        ([3, 16], 48, r"its feature 'shape' is \[3, 16\]"),
        ([3, 4, 4], 47, r"its feature 'data' has 47 bytes; expected 48 for \(3, 4, 4\)"),
        ([1 << 40, 1 << 40, 3], 48, "its feature 'data' has 48 bytes"),
    ],
)
def test_a_record_without_an_image_is_named(path, shape, data, message):
    path.write_bytes(record(IMAGES[0]) + frame(example(shape, None if data is None else bytes(data))))
    source = tfrecord.load_tfrecord(str(path), (4, 4, 3))
    with pytest.raises(ValueError, match=r"record 1 of .*s holds no image, write the file again: " + message):
        source.images(np.array([1]))


def test_a_record_of_another_kind_is_named(path):
    path.write_bytes(frame(b"\xff" * 40))
    source = tfrecord.load_tfrecord(str(path), (4, 4, 3))
    with pytest.raises(ValueError, match=r"record 0 of .*: its data are not a tf.train.Example"):
        source.images(np.array([0]))


def test_damaged_records_never_do_worse_than_a_value_error():
    """A thousand records with a few bytes changed: each is an image or a refusal."""
    generator, data = np.random.RandomState(0), np.frombuffer(example([3, 4, 4], bytes(48)), np.uint8)
    outcomes = []
    for _ in range(1000):
        damaged = data.copy()
        damaged[generator.randint(len(data), size=3)] = generator.randint(256, size=3)
        try:
            outcomes.append(tfrecord.decode_image(damaged.tobytes()).size == 48)
        except ValueError:
            outcomes.append(None)
    assert set(outcomes) == {True, None}


WRITE = """
import sys
import numpy as np
import tensorflow as tf

def feature(image):
    shape = tf.train.Feature(int64_list=tf.train.Int64List(value=image.shape))
    data = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()]))
    return tf.train.Example(features=tf.train.Features(feature={"shape": shape, "data": data}))

with tf.io.TFRecordWriter(sys.argv[1]) as writer:
    for image in np.random.RandomState(0).randint(0, 256, (5, 4, 4, 3)).astype(np.uint8):
        writer.write(feature(image.transpose(2, 0, 1)).SerializeToString())
"""


WRITTEN = np.load(GOLDEN / "tfrecord.npz")["bytes"].tobytes()


def test_what_tensorflow_wrote_is_read(path):
    path.write_bytes(WRITTEN)
    np.testing.assert_array_equal(tfrecord.load_tfrecord(str(path), (4, 4, 3)).images(np.arange(5)), IMAGES)


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")
def test_tensorflow_still_writes_the_same(path):
    result = tiny.run([sys.executable, "-c", WRITE, str(path)])
    assert result.returncode == 0, result.stderr[-2000:]
    assert path.read_bytes() == WRITTEN


# --- .npz files of one's own -----------------------------------------------------------------------------------------


def npz_config(folder, **changes):
    return make_config(dataset="npz", path=str(folder), image_size=2, **changes)


def write_npz(folder, **arrays):
    images = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    np.savez(folder / "train.npz", **({"images": images} | arrays))
    return images


def test_images_and_labels_of_an_npz_file(tmp_path):
    images = write_npz(tmp_path, labels=np.array([2, 0, 1], np.uint8), num_classes=4)
    source = datasets.build_source(npz_config(tmp_path), "train")
    np.testing.assert_array_equal(source.images(np.array([2, 0])), images[[2, 0]])
    np.testing.assert_array_equal(source.labels(np.array([2, 0])), [1, 2])
    assert source.num_classes == 4
    write_npz(tmp_path, labels=np.array([2, 0, 1]))
    assert datasets.build_source(npz_config(tmp_path), "train").num_classes == 3
    write_npz(tmp_path)
    assert datasets.build_source(npz_config(tmp_path), "train").num_classes == 0


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        ({}, {"folder": ""}, "data.path is empty; set --config.data.path"),
        ({"labels": np.zeros(2, int)}, {}, r"labels of .*train.npz are int64 of shape \(2,\); expected .*\(3,\)"),
        ({"labels": np.array([0, -1, 1])}, {}, "expected whole numbers from 0"),
        ({"labels": np.array([0, 5, 1]), "num_classes": 3}, {}, "go up to 5, but its num_classes is 3"),
        ({"images": np.zeros((0, 2, 2, 3), np.uint8)}, {}, "train.npz has no images"),
    ],
)
def test_bad_npz_data_are_refused(tmp_path, arrays, changes, message):
    write_npz(tmp_path, **arrays)
    with pytest.raises(ValueError, match=message):
        datasets.build_source(npz_config(**({"folder": tmp_path} | changes)), "train")


def test_missing_npz_data_say_what_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"test.npz does not exist; data.dataset='npz' reads train.npz and"):
        datasets.build_source(npz_config(tmp_path), "test")


def test_npz_data_are_mapped_and_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))
    images = write_npz(tmp_path)
    first = datasets.build_source(npz_config(tmp_path), "train")
    again = datasets.build_source(npz_config(tmp_path), "train")
    assert isinstance(first.levels, np.memmap)
    assert first.levels.filename == again.levels.filename
    np.testing.assert_array_equal(again.images(np.array([2, 0])), images[[2, 0]])
    assert write_npz(tmp_path, images=images[::-1]) is not None
    changed = datasets.build_source(npz_config(tmp_path), "train")
    np.testing.assert_array_equal(changed.levels, images[::-1])
    assert changed.fingerprint != first.fingerprint == again.fingerprint


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_a_single_file_is_split_by_content(tmp_path, monkeypatch, suffix):
    """Turning the order around changes no split; every image is in one of them, with its own label."""
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (9, 2, 2, 3), dtype=np.uint8)
    found = []
    for order in (np.arange(9), np.arange(9)[::-1]):
        path = tmp_path / f"own.{suffix}"
        if suffix == "npz":
            np.savez(path, images=images[order], labels=order)
        else:
            np.save(path, images[order])
        config = npz_config(path, test_share=0.3)
        splits = [datasets.build_source(config, split) for split in ("train", "test")]
        assert [len(split) for split in splits] == [6, 3]
        found.append([{image.tobytes() for image in split.images(np.arange(len(split)))} for split in splits])
        if suffix == "npz":
            for split in splits:
                labels = split.labels(np.arange(len(split)))
                np.testing.assert_array_equal(split.images(np.arange(len(split))), images[labels])
    assert found[0] == found[1]
    assert found[0][0] | found[0][1] == {image.tobytes() for image in images}


def test_a_damaged_npz_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))
    images = write_npz(tmp_path)
    content = bytearray((tmp_path / "train.npz").read_bytes())
    content[content.index(images.tobytes()) + 5] ^= 1
    (tmp_path / "train.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"train.npz is damaged: array 'images': Bad CRC-32"):
        datasets.build_source(npz_config(tmp_path), "train")
    assert list((tmp_path / "cache/data").iterdir()) == []


# --- labels ----------------------------------------------------------------------------------------------------------


def npz_with_labels(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=np.zeros((len(labels), 8, 8, 1), np.uint8), labels=np.array(labels))


@pytest.mark.parametrize(("labels", "message"), [((0, 1, 5), "go up to 5"), ((0, 1, 3), "go up to 3"), ((0, 1), "")])
def test_test_labels_that_the_network_does_not_know_are_refused(tmp_path, labels, message):
    npz_with_labels(tmp_path / "train.npz", (0, 1, 2))
    npz_with_labels(tmp_path / "test.npz", labels)
    changes = {"data__dataset": "npz", "data__path": str(tmp_path), "model__num_classes": 3}
    config = tiny.make_config(**changes)
    datasets.build_source(config, "train")
    refused = pytest.raises(ValueError, match=message) if message else contextlib.nullcontext()
    with refused:
        datasets.build_source(config, "test")


@pytest.mark.parametrize(("labels", "told"), [((1, 2, 10), "11 classes, of which 0 to 0"), ((0, 10), "")])
def test_labels_that_do_not_begin_at_0_are_told(tmp_path, caplog, labels, told):
    npz_with_labels(tmp_path / "all.npz", labels)
    source = load_npz(tmp_path / "all.npz", (8, 8, 1), 17)
    assert source.num_classes == 11
    assert ("labels count from 0" in caplog.text) == bool(told)
    assert told in caplog.text
