"""What metrics are called: only features of the Inception network, of enough images, make a Frechet distance FID."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import checks
from metrics.metric import Metric

# Keys of metrics.extractors.KEYS, as they stand in the name of a metric; that module would load every network.
FEATURES = {
    "inception": "Inception",
    "tfgan": "Inception",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "classifier": "classifier",
}
INCEPTION = ("inception", "tfgan")
TEST_SUFFIX = "_test"  # at the end of the names of metrics of real test images in the place of samples
PUBLISHED_SAMPLES = 10_000  # below which a Frechet distance is compared with no published one
FEW_SAMPLES = (
    "fewer than 10,000 samples: the bias of a finite sample raises it so much that it is comparable only with that of "
    "as many samples"
)


def frechet_name(extractor: str, *, num_samples: int, num_reference: int, num_features: int) -> tuple[str, str]:
    """Returns what a Frechet distance is called, and a reason if one could think that it is called otherwise.

    Args:
      extractor: key of what computed the features.
      num_samples: generated images.
      num_reference: real images; 0 if it is not known.
      num_features: dimension of the features.

    Returns:
      ("FID", "") for features of the Inception network of at least as many images of both sides as there are features;
      with fewer ("FD-Inception", reason); for other features such as ("FD-classifier", "").
    """
    name = f"FD-{FEATURES[extractor]}"
    if extractor not in INCEPTION:
        return name, ""
    few = [
        f"{count:,} {images}"
        for count, images in ((num_samples, "samples"), (num_reference, "reference images"))
        if count < num_features and (count or images == "samples")
    ]
    if few:
        return name, f"not called FID: {' and '.join(few)} are fewer than the {num_features:,} features"
    return "FID", "" if num_reference else "the number of reference images is not known"


def score_name(extractor: str) -> str:
    """Returns what exp(mean KL) of class scores is called: Inception Score only of the Inception network's classes."""
    if extractor in INCEPTION:
        return "Inception Score"
    return "classifier score (IS formula)" + ("" if extractor == "classifier" else f" by {FEATURES[extractor]}")


def with_labels(
    metrics: Iterable[Metric], *, extractor: str, num_features: int, num_reference: int
) -> tuple[Metric, ...]:
    """Gives metrics of samples the names by which reports call them, and notes what is unusual about them.

    Args:
      metrics: named as evaluation.sample_metrics does, all of one set of images.
      extractor: key of what computed the features.
      num_features: dimension of the features.
      num_reference: images of the reference; 0 if it is not known.

    Raises:
      UserError: if the extractor is unknown.
    """
    checks.one_of("extractor", extractor, tuple(FEATURES))
    return tuple(
        _with_label(each, extractor, num_features=num_features, num_reference=num_reference) for each in metrics
    )


def _with_label(metric: Metric, extractor: str, *, num_features: int, num_reference: int) -> Metric:
    if metric.name.startswith("frechet_distance"):
        label, reason = frechet_name(
            extractor, num_samples=metric.num_samples, num_reference=num_reference, num_features=num_features
        )
        if metric.name == "frechet_distance_unbiased":
            return dataclasses.replace(metric, label=f"{label} without bias")
        few = FEW_SAMPLES if metric.num_samples < PUBLISHED_SAMPLES else ""
        return dataclasses.replace(metric, label=label, note="; ".join(filter(None, (metric.note, reason, few))))
    if metric.name == "kernel_distance":
        return dataclasses.replace(metric, label="KID" if extractor in INCEPTION else f"KID-{FEATURES[extractor]}")
    if metric.name.startswith("inception_score"):
        splits = ", 10 splits" if metric.name == "inception_score_10" else ""
        return dataclasses.replace(metric, label=score_name(extractor) + splits)
    return metric
