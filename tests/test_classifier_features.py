"""The small classifier: what it reaches on the digits, what its features are, and when it is trained anew."""

import dataclasses

import numpy as np
import pytest

import datasets
from metrics import classifier
from metrics.classifier import ClassifierSettings, build_feature_extractor

TRAIN, TEST = (datasets.load_digits(split) for split in ("train", "test"))
SHORT = ClassifierSettings(num_steps=3)  # the same compiled functions as the full training


def build(folder, *, seed=0, settings=SHORT, num_levels=17, **changes):
    data = {"train_levels": TRAIN.levels, "train_labels": TRAIN.classes}
    data |= {"test_levels": TEST.levels, "test_labels": TEST.classes} | changes
    return build_feature_extractor(**data, num_levels=num_levels, folder=folder, seed=seed, settings=settings)


@pytest.fixture(scope="module")
def extractor(digits_features):
    return build(digits_features, seed=42, settings=None)


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(classifier.logging, "warning", lambda text, *values: said.append(text % values))
    return said


def test_the_digits_are_classified_and_the_accuracy_is_that_of_the_test_split(extractor):
    _, logits = extractor(TEST.levels)
    rights = sum(int(np.argmax(row)) == label for row, label in zip(logits, TEST.classes, strict=True))
    assert extractor.accuracy == rights / 297
    assert extractor.accuracy >= 0.97


def test_features_are_what_the_last_layer_sees_at_mean_square_one(extractor):
    found, logits = extractor(TRAIN.levels[:300])
    assert (found.dtype, found.shape, logits.shape) == (np.float64, (300, 64), (300, 10))
    last = extractor.params["network"]["Dense_1"]
    expected = (found / extractor.params["scale"]) @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    assert np.mean(extractor(TRAIN.levels)[0] ** 2) == pytest.approx(1.0, rel=1e-5)


def test_features_do_not_depend_on_the_batch(extractor):
    levels = TRAIN.levels[:300]  # one whole batch and a part of one
    whole = extractor(levels)[0]
    singles = np.concatenate([extractor(levels[i : i + 1])[0] for i in (0, 255, 256, 299)])
    np.testing.assert_allclose(whole[[0, 255, 256, 299]], singles, rtol=1e-5, atol=1e-6)
    assert np.abs(whole[0] - whole[1]).max() > 0.1


@pytest.mark.exhaustive
def test_training_is_repeated_to_the_last_bit_and_follows_the_seed(tmp_path):
    first, again, other = build(tmp_path / "a"), build(tmp_path / "b"), build(tmp_path / "b", seed=1)
    assert first.hash == again.hash != other.hash
    np.testing.assert_array_equal(first(TEST.levels)[0], again(TEST.levels)[0])


def test_the_cache_is_used(digits_features, extractor, monkeypatch):
    monkeypatch.setattr(classifier, "_train", None)  # to call it is an error
    cached = build(digits_features, seed=42, settings=None)
    assert (cached.hash, cached.accuracy, cached.name) == (extractor.hash, extractor.accuracy, extractor.name)
    np.testing.assert_array_equal(cached(TEST.levels)[0], extractor(TEST.levels)[0])


def test_the_cache_knows_data_labels_settings_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "_train", lambda model, *_: {"network": {}, "scale": np.float32(1)})
    monkeypatch.setattr(classifier, "_apply", lambda model, params, x, num_levels: (None, np.zeros((len(x), 10))))
    levels, labels = TRAIN.levels.copy(), TRAIN.classes.copy()
    levels[5, 4, 4, 0] = 3 if levels[5, 4, 4, 0] != 3 else 4
    labels[7] = (labels[7] + 1) % 10
    variants = [{}, {"train_levels": levels}, {"train_labels": labels}, {"seed": 1}, {"num_levels": 18}]
    variants += [{"test_levels": TEST.levels[:-1], "test_labels": TEST.classes[:-1]}]
    variants += [{"settings": dataclasses.replace(SHORT, num_features=32)}]
    for variant in (*variants, {}):
        build(tmp_path, **variant)
    assert len(list(tmp_path.iterdir())) == len(variants)


def test_a_damaged_cache_is_named_and_trained_anew(tmp_path, warnings):
    first = build(tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert build(tmp_path).hash == first.hash
    assert f"cached in {path} is damaged" in warnings[0]
    assert path.read_bytes() == content
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["params/network/Dense_1/bias"] = arrays["params/network/Dense_1/bias"] + 1e-6
    np.savez(path, **arrays)
    assert build(tmp_path).hash == first.hash
    assert "do not have the hash that it states" in warnings[1]
    arrays.pop("accuracy")
    np.savez(path, **arrays)
    assert build(tmp_path).hash == first.hash
    assert len(warnings) == 3


def test_every_image_comes_once_before_any_comes_twice():
    settings = ClassifierSettings(num_steps=7, batch_size=4)
    batches = list(classifier._batches(14, settings, seed=0))
    assert [len(batch) for batch in batches] == [4] * 7
    order = np.concatenate(batches)
    assert sorted(order[:14]) == sorted(order[14:]) == list(range(14))
    assert list(order[:14]) != list(order[14:])


def test_larger_images_have_a_bounded_number_of_parameters():
    import jax

    for side, colours in ((8, 1), (28, 1), (32, 3)):
        model = classifier.Classifier(16, 64, 10)
        shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, side, side, colours), np.float32))
        dense = shapes["params"]["Dense_0"]["kernel"].shape
        assert dense[1] == 64
        assert dense[0] <= 7 * 7 * 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": None}, r"train_labels is empty: .* data set with labels, or set eval.enable_sampling=False"),
        ({"test_labels": np.array([])}, "test_labels is empty"),
        ({"train_labels": TRAIN.classes[:-1]}, r"train_labels is int64\[1499\]; expected integers .* of 1500 images"),
        ({"train_labels": TRAIN.classes * 1.0}, r"train_labels is float64\[1500\]; expected integers"),
        ({"train_labels": TRAIN.classes - 1}, "train_labels is .*; expected integers from 0"),
        (
            {"train_levels": TRAIN.levels / 16},
            r"train_levels is float64\[1500, 8, 8, 1\]; expected uint8\[N, H, W, C\]",
        ),
        ({"test_levels": TEST.levels[..., 0]}, r"test_levels is uint8\[297, 8, 8\]; expected"),
        ({"num_levels": 16}, "train_levels has level 16, not below num_levels=16; give the data's levels"),
    ],
)
def test_bad_data_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_images_of_another_shape_or_range_are_refused(extractor):
    with pytest.raises(ValueError, match=r"images have shape \(8, 9, 1\); the classifier .* takes \(8, 8, 1\)"):
        extractor(np.zeros((2, 8, 9, 1), np.uint8))
    with pytest.raises(ValueError, match="levels has level 17, not below num_levels=17"):
        extractor(np.full((2, 8, 8, 1), 17, np.uint8))
    with pytest.raises(ValueError, match=r"levels is uint8\[0, 8, 8, 1\]; expected .* with N >= 1"):
        extractor(np.zeros((0, 8, 8, 1), np.uint8))
