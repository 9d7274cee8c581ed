"""EfficientNet-Lite0 with its real weights: equal to a PyTorch implementation, on images of any size and levels."""

import dataclasses
import importlib.util

import efficientnet_oracle as oracle
import inception_oracle
import numpy as np
import pytest
import tiny
from oracle_runs import assert_repeated
from PIL import Image

from metrics import efficientnet
from metrics.extractors import build_extractor
from sources.resize import resize

PATH = tiny.ROOT / "tests/golden/efficientnet_lite0.npz"
needs_weights = pytest.mark.skipif(not efficientnet.is_installed(), reason=f"{efficientnet.PACKAGE} is not installed")


@pytest.fixture(scope="module")
def extractor():
    return dataclasses.replace(build_extractor("efficientnet_lite0", num_levels=256), batch_size=2)


@pytest.fixture(scope="module")
def golden():
    with np.load(PATH) as file:
        return dict(file)


@needs_weights
def test_features_and_class_scores_are_those_of_pytorch(extractor, golden):
    features, logits = extractor(oracle.levels())
    assert (features.dtype, features.shape, logits.shape) == (np.float64, (2, 1280), (2, 1000))
    for found, expected in ((features, golden["features"]), (logits, golden["logits"])):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.std(expected))


@needs_weights
def test_the_report_can_say_what_it_is(extractor):
    assert (extractor.key, extractor.num_features, extractor.accuracy) == ("efficientnet_lite0", 1280, None)
    assert extractor.hash == "1f12ccbef98dd6ce39394c6330cb154df7b950658bf24e9a0645bb92b03adafb"


def test_resizing_is_antialiased_bicubic():
    x = inception_oracle.levels((2, 300, 40, 3))
    found = np.asarray(efficientnet.preprocess(x.astype(np.float32)))
    expected = np.stack([resize(image, 224, 224, Image.Resampling.BICUBIC) for image in x])
    # A position is a float32: it may be wrong by 2^-24 of 300 pixels, the value by 255 times that.
    np.testing.assert_allclose(128.0 * found + 127.0, expected, atol=255 * 300 * 2.0**-24)


@pytest.mark.exhaustive
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="efficientnet_lite_pytorch is not installed"
)
def test_the_recorded_values_are_what_pytorch_computes(golden, tmp_path):
    assert_repeated("efficientnet_oracle.py", golden, tmp_path)
