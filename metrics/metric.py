"""What a metric is: a number with its uncertainty; and the checks that all metrics share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Num

from errors import UserError
from storage import guards


@dataclasses.dataclass(frozen=True)
class Metric:
    """A measured number with its uncertainty.

    Attributes:
      name: of the metric.
      value: None if it was not measured or is not a number.
      stderr: standard error of the value; None if it is not known.
      num_samples: images that the value is computed from.
      unit: of value and standard error; empty if they have none.
      note: how it was computed, and what the standard error leaves out.
      label: what it is called in a report; empty: the name.
      interval: lower and upper end of the 95 % confidence interval; None if it is not known.
    """

    name: str
    value: float | None
    stderr: float | None
    num_samples: int
    unit: str = ""
    note: str = ""
    label: str = ""
    interval: tuple[float, float] | None = None

    @property
    def title(self) -> str:
        """The label, or the name if there is none."""
        return self.label or self.name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metric:
        """Builds a metric from what dataclasses.asdict made of one and JSON gave back; ValueError for other fields."""
        return guards.build(cls, values)


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
    """Returns a metric, with None in the place of a value or standard error that is not finite."""
    finite = lambda x: float(x) if math.isfinite(x) else None  # noqa: E731
    return Metric(name, finite(value), finite(stderr), num_samples, unit, note, interval=interval)


def mean_metric(name: str, values: Num[np.ndarray, "N"], *, unit: str = "", note: str = "") -> Metric:
    """Returns the mean of one value for each image, with its standard error.

    Args:
      name: of the metric.
      values: such as losses or bits/dim; average several draws of an image first.
      unit: of the values.
      note: how they were computed.

    Raises:
      UserError: if a value is not finite, or there are fewer than two.
    """
    values = np.asarray(values, np.float64)
    check_finite(name, values)
    if values.ndim != 1 or len(values) < 2:
        raise UserError(f"{name} has shape {values.shape}; expected [N] with N >= 2, one value for each image")
    return make_metric(name, values.mean(), stderr_of_mean(values), len(values), unit=unit, note=note)


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises a ValueError if a value is NaN or infinite."""
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise UserError(f"{name} has {bad} values that are NaN or infinite; look for images that are not finite")


def as_features(name: str, features: Num[np.ndarray, "N D"], min_samples: int = 2) -> np.ndarray:
    """Returns features as float64[N, D]; raises a ValueError if they are not that, too few or not finite."""
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
    """Returns two sets of features of the same dimension as float64; raises a ValueError if they are not."""
    x, y = as_features("features", features, min_samples), as_features("reference", reference, min_samples)
    check_dimensions(x.shape[1], y.shape[1])
    return x, y


def check_dimensions(features: int, reference: int) -> None:
    """Raises a ValueError if the two numbers of dimensions differ."""
    if features != reference:
        raise UserError(
            f"features have {features} dimensions, the reference {reference}; use the same extractor for both"
        )


def stderr_of_mean(values: Num[np.ndarray, "N"]) -> float:
    """Returns the standard error of the mean of independent values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
