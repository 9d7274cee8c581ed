"""What metrics are called: FID, KID and Inception Score only where that is what they are."""

import logging

import numpy as np
import pytest

import evaluation
from evaluation import FeatureStatistics, Metric
from metrics import metric as naming
from metrics.extractors import KEYS


def test_every_extractor_has_a_name():
    assert set(naming.FEATURES) == set(KEYS)
    assert set(naming.INCEPTION) < set(KEYS)


@pytest.mark.parametrize(
    ("extractor", "samples", "reference", "name", "reason"),
    [
        ("inception", 2048, 2048, "FID", ""),
        ("tfgan", 50_000, 50_000, "FID", ""),
        ("inception", 2047, 50_000, "FD-Inception", "not called FID: 2,047 samples are fewer than the 2,048 features"),
        (
            "tfgan",
            50_000,
            500,
            "FD-Inception",
            "not called FID: 500 reference images are fewer than the 2,048 features",
        ),
        ("tfgan", 7, 5, "FD-Inception", "not called FID: 7 samples and 5 reference images are fewer than the 2,048"),
        ("inception", 50_000, 0, "FID", "the number of reference images is not known"),
        ("efficientnet_lite0", 50_000, 50_000, "FD-EfficientNet-Lite0", ""),
        ("efficientnet_lite0", 5, 5, "FD-EfficientNet-Lite0", ""),
        ("classifier", 50_000, 50_000, "FD-classifier", ""),
    ],
)
def test_a_frechet_distance_is_fid_only_of_enough_inception_features(extractor, samples, reference, name, reason):
    found = naming.frechet_name(extractor, num_samples=samples, num_reference=reference, num_features=2048)
    assert found[0] == name
    assert found[1].startswith(reason)
    assert bool(found[1]) == bool(reason)


@pytest.mark.parametrize(
    ("extractor", "labels"),
    [
        ("inception", ["FID", "FID without bias", "KID", "Inception Score", "Inception Score, 10 splits", ""]),
        (
            "efficientnet_lite0",
            [
                "FD-EfficientNet-Lite0",
                "FD-EfficientNet-Lite0 without bias",
                "KID-EfficientNet-Lite0",
                "classifier score (IS formula) by EfficientNet-Lite0",
                "classifier score (IS formula) by EfficientNet-Lite0, 10 splits",
                "",
            ],
        ),
    ],
)
def test_labels_say_by_which_features(extractor, labels):
    names = ["frechet_distance", "frechet_distance_unbiased", "kernel_distance", "inception_score"]
    metrics = [Metric(name, 1.0, 0.1, 10_000, note="n") for name in [*names, "inception_score_10", "precision"]]
    labelled = naming.with_labels(metrics, extractor=extractor, num_features=1280, num_reference=10_000)
    assert [m.label for m in labelled] == labels
    assert {m.note for m in labelled} == {"n"}
    assert labelled[-1].title == "precision"


def draw(rng, n):
    return rng.standard_normal((n, 3)), rng.standard_normal((n, 4))


def test_few_samples_are_warned_of_and_noted(caplog, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(evaluation.logging.get_absl_logger(), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="absl"):
        few = evaluation.sample_metrics(draw(rng, 20), reference=draw(rng, 30)[0], extractor="classifier")
    assert [record.getMessage() for record in caplog.records] == [f"FD-classifier of 20 samples: {naming.FEW_SAMPLES}"]
    assert few[0].note.endswith(naming.FEW_SAMPLES)
    caplog.clear()
    reference = FeatureStatistics(np.zeros(3), np.eye(3), 0)
    many = evaluation.sample_metrics(draw(rng, 10_000), reference=reference, test=draw(rng, 20), extractor="inception")
    assert not caplog.records
    assert [(m.name, m.label) for m in many[:5]] == [
        ("frechet_distance", "FID"),
        ("frechet_distance_unbiased", "FID without bias"),
        ("inception_score", "Inception Score"),
        ("inception_score_10", "Inception Score, 10 splits"),
        ("frechet_distance_test", "FID, test images"),
    ]
    assert naming.FEW_SAMPLES not in many[0].note
    assert naming.FEW_SAMPLES in many[4].note
