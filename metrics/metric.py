"""A metric: a number with its uncertainty and its name; and checks that all metrics use.

Only features of the Inception network, of enough images, make a Fréchet distance FID (`with_labels`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Num

import checks
from errors import UserError
from storage import untrusted


@dataclasses.dataclass(frozen=True)
class Metric:
    """A measured number with its uncertainty."""

    name: str
    value: float | None  # None if it was not measured or is not finite
    stderr: float | None  # standard error of the value; None if unknown
    num_samples: int  # images that the value is computed from
    unit: str = ""  # of value and standard error; empty: none
    note: str = ""  # how it was computed, and what the standard error leaves out
    label: str = ""  # its name in a report, such as FID; empty: use `name`
    interval: tuple[float, float] | None = None  # lower and upper end of the 95 % confidence interval; None if unknown

    @property
    def title(self) -> str:
        """The label, or the name without one."""
        return self.label or self.name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metric:
        """Build a metric from the JSON of `dataclasses.asdict`; ValueError for other fields."""
        return untrusted.build(cls, values)


def make_metric(
    name: str,
    value: Any,
    stderr: Any,
    num_samples: int,
    *,
    unit: str = "",
    note: str = "",
    interval: tuple[float, float] | None = None,
) -> Metric:
    """Return a metric whose value and standard error are None where they are not finite."""
    finite = lambda x: float(x) if math.isfinite(x) else None  # noqa: E731
    return Metric(name, finite(value), finite(stderr), num_samples, unit, note, interval=interval)


def mean_metric(name: str, values: Num[np.ndarray, "N"], *, unit: str = "", note: str = "") -> Metric:
    """Return the mean of one value per image, with its standard error; average several draws of an image first."""
    values = np.asarray(values, np.float64)
    check_finite(name, values)
    if values.ndim != 1 or len(values) < 2:
        raise UserError(f"{name} has shape {values.shape}; expected [N] with N >= 2, one value for each image")
    return make_metric(name, values.mean(), stderr_of_mean(values), len(values), unit=unit, note=note)


def stderr_of_mean(values: Num[np.ndarray, "N"]) -> float:
    """Return the standard error of the mean of independent values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


# --- checks ----------------------------------------------------------------------------------------------------------


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise a UserError if a value is NaN or infinite."""
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise UserError(f"{name} has {bad} values that are NaN or infinite; look for images that are not finite")


def as_features(name: str, features: Num[np.ndarray, "N D"], min_samples: int = 2) -> np.ndarray:
    """Return features as float64[N, D]; raise a UserError if there are too few or they are not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise UserError(f"{name} has shape {features.shape}; expected [N, D], one row for each image")
    if len(features) < min_samples:
        raise UserError(f"{name} has {len(features)} rows; expected {min_samples} or more images")
    check_finite(name, features)
    return features


def as_feature_pair(
    features: Num[np.ndarray, "N D"], reference: Num[np.ndarray, "M D"], min_samples: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Return two sets of features of the same dimension as float64 (see `as_features`)."""
    x, y = as_features("features", features, min_samples), as_features("reference", reference, min_samples)
    check_dimensions(x.shape[1], y.shape[1])
    return x, y


def check_dimensions(features: int, reference: int) -> None:
    """Raise a UserError if the two dimensions differ."""
    if features != reference:
        raise UserError(
            f"features have {features} dimensions, the reference {reference}; use the same extractor for both"
        )


# --- names -----------------------------------------------------------------------------------------------------------

# Keys of metrics.extractors.KEYS, as they appear in the name of a metric; that module would load every network.
FEATURES = {
    "inception": "Inception",
    "tfgan": "Inception",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "classifier": "classifier",
}
INCEPTION = ("inception", "tfgan")
TEST_SUFFIX = "_test"  # ends the names of metrics of real test images in place of samples
PUBLISHED_SAMPLES = 10_000  # a Fréchet distance of fewer is not comparable with published ones
FEW_SAMPLES = (
    "fewer than 10,000 samples: the bias of a finite sample raises it so much that it is comparable only with that of "
    "as many samples"
)


def frechet_name(extractor: str, *, num_samples: int, num_reference: int, num_features: int) -> tuple[str, str]:
    """Return the name of a Fréchet distance, and a reason where another name could be expected.

    Args:
      extractor: key of what computed the features.
      num_samples: generated images.
      num_reference: real images; 0 if unknown.
      num_features: dimension of the features.

    Returns:
      ("FID", "") for Inception features of at least as many images on both sides as there are features,
      ("FD-Inception", reason) with fewer, such as ("FD-classifier", "") for other features.
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
    """Return the name of exp(mean KL) of class scores: Inception Score only for the Inception network's classes."""
    if extractor in INCEPTION:
        return "Inception Score"
    return "classifier score (IS formula)" + ("" if extractor == "classifier" else f" by {FEATURES[extractor]}")


def with_labels(
    metrics: Iterable[Metric], *, extractor: str, num_features: int, num_reference: int
) -> tuple[Metric, ...]:
    """Label metrics of one set of samples as reports call them, and note what is unusual about them.

    Args:
      metrics: named as in `evaluation.sample_metrics`.
      extractor: key of what computed the features.
      num_features: dimension of the features.
      num_reference: images of the reference; 0 if unknown.
    """
    checks.one_of("extractor", extractor, tuple(FEATURES))

    def label(metric: Metric) -> Metric:
        if metric.name.startswith("frechet_distance"):
            name, reason = frechet_name(
                extractor, num_samples=metric.num_samples, num_reference=num_reference, num_features=num_features
            )
            if metric.name == "frechet_distance_unbiased":
                return dataclasses.replace(metric, label=f"{name} without bias")
            few = FEW_SAMPLES if metric.num_samples < PUBLISHED_SAMPLES else ""
            return dataclasses.replace(metric, label=name, note="; ".join(filter(None, (metric.note, reason, few))))
        if metric.name == "kernel_distance":
            return dataclasses.replace(metric, label="KID" if extractor in INCEPTION else f"KID-{FEATURES[extractor]}")
        if metric.name.startswith("inception_score"):
            splits = ", 10 splits" if metric.name == "inception_score_10" else ""
            return dataclasses.replace(metric, label=score_name(extractor) + splits)
        return metric

    return tuple(map(label, metrics))
