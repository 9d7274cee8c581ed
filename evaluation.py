"""Metrics of generated images as pure functions of feature arrays, each with its standard error.

All in numpy float64, by symmetric eigendecompositions and singular values, so that nothing is ever complex. Where
features come from is no concern of this module (extractors.py); metrics that compare all pairs are in pairwise.py.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer, Num
from scipy.special import softmax, xlogy

from files import content_hash, read_npz, write_atomically
from metrics.metric import (
    Metric,
    as_features,
    check_dimensions,
    check_finite,
    make_metric,
    mean_metric,
    stderr_of_mean,
)
from metrics.pairwise import kernel_distance, kernel_distance_blocks, kernel_distance_subsets, precision_recall

__all__ = [
    "FeatureStatistics",
    "Metric",
    "content_hash",
    "frechet_distance",
    "gaussian_bits_per_dim",
    "inception_score",
    "inception_score_from_logits",
    "kernel_distance",
    "kernel_distance_blocks",
    "kernel_distance_subsets",
    "mean_metric",
    "precision_recall",
    "sample_metrics",
]

FULL_KERNEL_IMAGES = 10_000  # up to which KID takes all pairs; above, disjoint blocks

# --- Frechet distance ------------------------------------------------------------------------------------------------


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

    def save(self, path: str | Path) -> None:
        """Writes an .npz file, whole or not at all."""
        write_atomically(path, lambda file: np.savez(file, **dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Reads an .npz file of `save`, or one with "mu" and "sigma" as other FID programs write it.

        Raises:
          ValueError: if it cannot be read as one, or its arrays do not fit together.
        """
        file = read_npz(path)
        mean, cov = file.get("mean", file.get("mu")), file.get("cov", file.get("sigma"))
        if mean is None or cov is None:
            raise ValueError(f"{path} holds {sorted(file)}; expected mean and cov, or mu and sigma")
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"{path} has mean {mean.shape} and covariance {cov.shape}; expected [D] and [D, D]")
        check_finite(str(path), mean)
        check_finite(str(path), cov)
        return cls(mean.astype(np.float64), cov.astype(np.float64), int(file.get("num_samples", 0)))


def _covariance_factor(cov: np.ndarray) -> np.ndarray:
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
      ValueError: if features are not finite, fewer than two, or of another dimension than the reference.
    """
    sides = [
        side if isinstance(side, FeatureStatistics) else as_features(label, side)
        for label, side in (("features", features), ("reference", reference))
    ]
    x, y = (side if isinstance(side, FeatureStatistics) else FeatureStatistics.from_features(side) for side in sides)
    check_dimensions(len(x.mean), len(y.mean))
    shift = x.mean - y.mean
    factors = _covariance_factor(x.cov), _covariance_factor(y.cov)
    P, s, Q = _singular_pairs(*factors)
    distance = shift @ shift + np.trace(x.cov) + np.trace(y.cov) - 2 * s.sum()
    variance = _frechet_variance(sides[0], shift, factors[0], P, s)
    variance += _frechet_variance(sides[1], -shift, factors[1], Q, s)
    return make_metric(name, max(distance, 0.0), math.sqrt(variance), x.num_samples, note=FRECHET_NOTE)


# --- Inception Score -------------------------------------------------------------------------------------------------


def inception_score(
    probabilities: Num[np.ndarray, "N K"], *, num_splits: int = 1, name: str = "inception_score"
) -> Metric:
    """Measures exp(mean over images of KL(p(y|x) || p(y))), p(y) being the mean of p(y|x).

    Salimans et al. 2016, Section 4. With one split the standard error is the delta method's: the influence function of
    the score's logarithm is KL(p(y|x) || p(y)) less its mean. With more, the score is the mean over that many
    consecutive parts, as commonly published with 10; its standard error comes from their spread.

    Args:
      probabilities: of the classes, for each image; rows sum to 1.
      num_splits: parts; images must be in random order if there are more than one.
      name: of the metric.

    Raises:
      ValueError: if a row is no distribution, or there are fewer than two images in a split.
    """
    if num_splits < 1:
        raise ValueError(f"num_splits={num_splits}; expected 1 or more")
    p = as_features("probabilities", probabilities, min_samples=2 * num_splits)
    if p.min() < 0.0 or np.abs(p.sum(axis=1) - 1.0).max() > 1e-3:  # float32 softmax is good to 1e-6
        raise ValueError(
            "probabilities are negative or do not sum to 1; give class scores to inception_score_from_logits"
        )
    divergences = [(xlogy(q, q) - xlogy(q, q.mean(axis=0))).sum(axis=1) for q in np.array_split(p, num_splits)]
    scores = np.exp([kl.mean() for kl in divergences])
    if num_splits == 1:
        note = "standard error by the delta method; it leaves out the bias of a finite sample"
        return make_metric(name, scores[0], scores[0] * stderr_of_mean(divergences[0]), len(p), note=note)
    note = f"mean of {num_splits} splits; standard error from their spread, without the bias of small splits"
    return make_metric(name, scores.mean(), stderr_of_mean(scores), len(p), note=note)


def inception_score_from_logits(
    logits: Num[np.ndarray, "N K"], *, num_splits: int = 1, name: str = "inception_score"
) -> Metric:
    """Measures the Inception Score of class scores before the softmax; otherwise as `inception_score`."""
    return inception_score(softmax(as_features("logits", logits), axis=1), num_splits=num_splits, name=name)


# --- bits/dim of a Gaussian ------------------------------------------------------------------------------------------


def gaussian_bits_per_dim(
    train_levels: Integer[np.ndarray, "N ..."], test_levels: Integer[np.ndarray, "M ..."], num_levels: int
) -> Metric:
    """Measures bits/dim of the Gaussian with full covariance that fits the training images best.

    What a network must beat. Both splits are dequantized as for the network, y = (level + u) / num_levels with u
    uniform on [0, 1); all that u does to the fit and to the mean log-density is known in closed form, since it adds
    I / (12 num_levels²) to every covariance. bits/dim = -log2 p(y) / D + log2(num_levels).

    Args:
      train_levels: integers 0 .. num_levels - 1.
      test_levels: the same, other images.
      num_levels: of the data.

    Returns:
      The mean over the test images, in bits/dim, with its standard error over them.

    Raises:
      ValueError: if a split has fewer than two images, their shapes differ, or a level is out of range.
    """
    train, test = (np.asarray(levels) for levels in (train_levels, test_levels))
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(f"training images have shape {train.shape[1:]}, test images {test.shape[1:]}; expected one")
    y_train, y_test = (as_features("images", y.reshape(len(y), -1)) / num_levels for y in (train, test))
    if any(np.min(y) < 0.0 or np.max(y) >= 1.0 for y in (y_train, y_test)):
        raise ValueError(f"num_levels={num_levels}, but levels are not all in 0 .. {num_levels - 1}; give the data's")
    D, u_variance = y_train.shape[1], 1.0 / (12.0 * num_levels**2)  # variance of u / num_levels
    centered = y_train - y_train.mean(axis=0)
    cov = centered.T @ centered / len(centered) + u_variance * np.eye(D)  # what maximizes the training likelihood
    values, vectors = np.linalg.eigh(cov)
    # The mean of u / num_levels shifts the data and the fit alike, and cancels.
    squares = (((y_test - y_train.mean(axis=0)) @ vectors) ** 2 + u_variance) / values
    nats = 0.5 * (squares + np.log(2.0 * np.pi * values)).sum(axis=1)
    note = "closed form; the standard error is over the test images"
    bpd = nats / (D * math.log(2.0)) + math.log2(num_levels)
    return mean_metric("gaussian_bits_per_dim", bpd, unit="bits/dim", note=note)


# --- all of them -----------------------------------------------------------------------------------------------------


def _against(train: np.ndarray, features: np.ndarray, logits: np.ndarray, suffix: str) -> list[Metric]:
    kernel = kernel_distance if max(len(features), len(train)) <= FULL_KERNEL_IMAGES else kernel_distance_blocks
    metrics = [
        frechet_distance(features, train),
        kernel(features, train),
        inception_score_from_logits(logits),
        *precision_recall(features, train),
    ]
    return [dataclasses.replace(each, name=each.name + suffix) for each in metrics]


def sample_metrics(
    samples: tuple[np.ndarray, np.ndarray], *, train: np.ndarray, test: tuple[np.ndarray, np.ndarray]
) -> tuple[Metric, ...]:
    """Measures samples against the training split, and the test split in their place.

    What the test split scores, real images that no network has seen, is what a perfect network would reach with as
    many samples. Its metrics have "_test" at the end of their names; its Frechet distance is called the floor.

    Args:
      samples: (features float[N, D], logits float[N, K]).
      train: features float[M, D] of the training split.
      test: (features, logits) of the test split.

    Returns:
      frechet_distance, kernel_distance, inception_score, precision, recall, and the same five of the test split.
    """
    return (*_against(train, *samples, ""), *_against(train, *test, "_test"))
