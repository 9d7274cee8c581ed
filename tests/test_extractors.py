"""Extractors by name: what "auto" stands for, and which images a network takes."""

import pytest

from metrics import efficientnet, inception
from metrics.extractors import resolve_extractor


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
