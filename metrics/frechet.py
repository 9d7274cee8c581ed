"""The Frechet distance of two sets of features, and the statistics that it needs to know of each.

In numpy float64, by symmetric eigendecompositions and singular values, so that nothing is ever complex.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Num

from metrics.metric import Metric, as_features, check_dimensions, make_metric, stderr_of_mean
from storage.files import content_hash


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of features, all that a Frechet distance needs to know of a data set.

    Attributes:
      mean: float64[D].
      cov: unbiased covariance, float64[D, D].
      num_samples: images that they come from; 0 if they are exact or it is not known.
    """

    mean: Float[np.ndarray, "D"]
    cov: Float[np.ndarray, "D D"]
    num_samples: int

    @classmethod
    def from_features(cls, features: Num[np.ndarray, "N D"]) -> FeatureStatistics:
        """Computes the statistics of two or more rows of finite features."""
        features = as_features("features", features)
        cov = np.cov(features, rowvar=False).reshape(features.shape[1], features.shape[1])
        return cls(features.mean(axis=0), cov, len(features))

    @property
    def hash(self) -> str:
        """SHA-256 in hex, to say in a report which statistics were used."""
        return content_hash(self.mean, self.cov, str(self.num_samples))


def covariance_factor(cov: np.ndarray) -> np.ndarray:
    """Returns A[D, r] with orthogonal columns and A Aᵀ = cov, r its numerical rank."""
    values, vectors = np.linalg.eigh(cov)
    keep = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def _singular_pairs(factor: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decomposes Aᵀ B = P diag(s) Qᵀ; the trace of (C1^½ C2 C1^½)^½ is the sum of s."""
    P, s, Qt = np.linalg.svd(factor.T @ other, full_matrices=False)
    return P, s, Qt.T


def _frechet_variance(
    data: np.ndarray | FeatureStatistics, shift: np.ndarray, factor: np.ndarray, P: np.ndarray, s: np.ndarray
) -> float:
    """Returns the variance that one side's finite sample gives to the Frechet distance.

    The delta method: the distance's influence function at x, with c = x - mean, d = mean - other mean and T the
    optimal-transport map from this side's Gaussian to the other's, is 2 dᵀc + cᵀ(I - T)c less its mean. In the
    coordinates that whiten this side, T is P diag(s) Pᵀ.
    """
    if isinstance(data, FeatureStatistics):  # no rows: the variance that Gaussian ones would have
        if data.num_samples == 0:
            return 0.0
        curvature = np.diag(np.sum(factor**2, axis=0)) - (P * s) @ P.T
        return float(4 * np.sum((shift @ factor) ** 2) + 2 * np.sum(curvature**2)) / data.num_samples
    centered = data - data.mean(axis=0)
    whitened = centered @ (factor / np.sum(factor**2, axis=0))
    influence = 2 * centered @ shift + np.sum(centered**2, axis=1) - (whitened @ P) ** 2 @ s
    return stderr_of_mean(influence) ** 2


FRECHET_NOTE = (
    "squared 2-Wasserstein distance of two Gaussians with the means and covariances of the features; the standard "
    "error (delta method, both sides) leaves out the upward bias of a finite sample, which is larger for fewer images, "
    "and is up to twice too large where that bias makes most of the distance"
)


def frechet_distance(
    features: Num[np.ndarray, "N D"] | FeatureStatistics,
    reference: Num[np.ndarray, "M D"] | FeatureStatistics,
    *,
    name: str = "frechet_distance",
) -> Metric:
    """Measures the Frechet distance of two sets of features; with Inception features it is FID.

    |m1 - m2|² + tr(C1 + C2 - 2 (C1^½ C2 C1^½)^½): Heusel et al. 2017, Eq. 6. Covariances may be singular. The standard
    error takes in both sides; of a side given as statistics it supposes that the features are Gaussian, and nothing
    at all if its `num_samples` is 0.

    Args:
      features: of generated images, or their statistics.
      reference: of real images, or their statistics.
      name: of the metric.

    Raises:
      UserError: if features are not finite, fewer than two, or of another dimension than the reference.
    """
    sides = [
        side if isinstance(side, FeatureStatistics) else as_features(label, side)
        for label, side in (("features", features), ("reference", reference))
    ]
    x, y = (side if isinstance(side, FeatureStatistics) else FeatureStatistics.from_features(side) for side in sides)
    check_dimensions(len(x.mean), len(y.mean))
    shift = x.mean - y.mean
    factors = covariance_factor(x.cov), covariance_factor(y.cov)
    P, s, Q = _singular_pairs(*factors)
    distance = shift @ shift + np.trace(x.cov) + np.trace(y.cov) - 2 * s.sum()
    variance = _frechet_variance(sides[0], shift, factors[0], P, s)
    variance += _frechet_variance(sides[1], -shift, factors[1], Q, s)
    return make_metric(name, max(distance, 0.0), math.sqrt(variance), x.num_samples, note=FRECHET_NOTE)
