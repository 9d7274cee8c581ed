"""Metrics of generated images as pure functions of feature arrays, each with its standard error.

The door to metrics/, with the Inception Score, bits/dim of a Gaussian, and all metrics of samples at once. Where
features come from is no concern of this module (extractors.py).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from absl import logging
from jaxtyping import Float, Integer, Num
from scipy.special import softmax, xlogy

from errors import UserError
from metrics.frechet import FeatureStatistics, frechet_distance
from metrics.frechet_unbiased import frechet_distance_unbiased
from metrics.metric import Metric, as_features, make_metric, mean_metric, stderr_of_mean
from metrics.naming import FEW_SAMPLES, PUBLISHED_SAMPLES, TEST_SUFFIX, with_labels
from metrics.neighbors import DENSITY_NEIGHBORS, PRECISION_NEIGHBORS, Balls, density_coverage, precision_recall
from metrics.pairwise import kernel_distance, kernel_distance_blocks, kernel_distance_subsets
from storage.files import content_hash

__all__ = [
    "FeatureStatistics",
    "Metric",
    "PreparedReference",
    "content_hash",
    "density_coverage",
    "floor_metrics",
    "frechet_distance",
    "frechet_distance_unbiased",
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
      UserError: if a row is no distribution, or there are fewer than two images in a split.
    """
    if num_splits < 1:
        raise UserError(f"num_splits={num_splits}; expected 1 or more")
    p = as_features("probabilities", probabilities, min_samples=2 * num_splits)
    if p.min() < 0.0 or np.abs(p.sum(axis=1) - 1.0).max() > 1e-3:  # float32 softmax is good to 1e-6
        raise UserError(
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
      UserError: if a split has fewer than two images, their shapes differ, or a level is out of range.
    """
    train, test = (np.asarray(levels) for levels in (train_levels, test_levels))
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"training images have shape {train.shape[1:]}, test images {test.shape[1:]}; expected one")
    y_train, y_test = (as_features("images", y.reshape(len(y), -1)) / num_levels for y in (train, test))
    if any(np.min(y) < 0.0 or np.max(y) >= 1.0 for y in (y_train, y_test)):
        raise UserError(f"num_levels={num_levels}, but levels are not all in 0 .. {num_levels - 1}; give the data's")
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


@dataclasses.dataclass(frozen=True)
class PreparedReference:
    """What samples are compared with, and what takes long to compute of it, for any number of sample_metrics.

    Attributes:
      rows: features of each image; None if only their statistics are known.
      statistics: of the features.
      balls: around the images; None without rows, or if these are too few.
    """

    rows: np.ndarray | None
    statistics: FeatureStatistics
    balls: Balls | None

    @classmethod
    def of(cls, reference: np.ndarray | FeatureStatistics | PreparedReference) -> PreparedReference:
        """Prepares features of real images, or their statistics."""
        if isinstance(reference, PreparedReference):
            return reference
        if isinstance(reference, FeatureStatistics):
            return cls(None, reference, None)
        balls = Balls.around(reference) if len(reference) > DENSITY_NEIGHBORS else None
        return cls(reference, FeatureStatistics.from_features(reference), balls)


def _shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    """Returns rows in a random order, always the same: data sets often stand in the order of their classes."""
    return np.random.Generator(np.random.Philox(seed)).permutation(rows)


def _kernel_distance(features: np.ndarray, rows: np.ndarray) -> Metric:
    """Measures the kernel distance over all pairs, or of many images over blocks of images in random order."""
    if max(len(features), len(rows)) <= FULL_KERNEL_IMAGES:
        return kernel_distance(features, rows)
    return kernel_distance_blocks(_shuffled(features, 0), _shuffled(rows, 1))


def _of_rows(features: np.ndarray, rows: np.ndarray, balls: Balls | None) -> list[Metric]:
    """Measures what needs the features of each real image."""
    distance = _kernel_distance(features, rows)
    if balls is not None and len(features) > PRECISION_NEIGHBORS:
        return [distance, *precision_recall(features, balls), *density_coverage(features, balls)]
    note = f"not measured: {len(features)} and {len(rows)} images are too few to have such neighbours"
    names = ("precision", "recall", "density", "coverage")
    return [distance, *(Metric(name, None, None, len(features), note=note) for name in names)]


def _against(images: tuple[np.ndarray, np.ndarray], real: PreparedReference, extractor: str) -> tuple[Metric, ...]:
    features, logits = images
    metrics = [
        frechet_distance(features, real.statistics if real.rows is None else real.rows),
        frechet_distance_unbiased(features, real.statistics),
        inception_score_from_logits(logits),
    ]
    if len(logits) >= PUBLISHED_SAMPLES:
        splits = _shuffled(logits, 0)
        metrics.append(inception_score_from_logits(splits, num_splits=10, name="inception_score_10"))
    if real.rows is not None:
        metrics += _of_rows(features, real.rows, real.balls)
    return with_labels(
        metrics,
        extractor=extractor,
        num_features=len(real.statistics.mean),
        num_reference=real.statistics.num_samples,
    )


def _of_test(metric: Metric) -> Metric:
    label = f"{metric.label}, test images" if metric.label else ""
    return dataclasses.replace(metric, name=metric.name + TEST_SUFFIX, label=label)


def floor_metrics(
    test: tuple[Float[np.ndarray, "L D"], Float[np.ndarray, "L K"]],
    *,
    reference: Float[np.ndarray, "M D"] | FeatureStatistics | PreparedReference,
    extractor: str,
) -> tuple[Metric, ...]:
    """Measures real images that no network has seen in the place of samples: what a perfect network would reach.

    Arguments are as of `sample_metrics`; names have "_test" at their ends. The Frechet distance is called the floor.
    """
    return tuple(map(_of_test, _against(test, PreparedReference.of(reference), extractor)))


def sample_metrics(
    samples: tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]],
    *,
    reference: Float[np.ndarray, "M D"] | FeatureStatistics | PreparedReference,
    test: tuple[Float[np.ndarray, "L D"], Float[np.ndarray, "L K"]] | None = None,
    extractor: str,
) -> tuple[Metric, ...]:
    """Measures samples against real images, and `floor_metrics` of others.

    Args:
      samples: (features, logits) of generated images.
      reference: features of real images; of their statistics only Frechet distances and inception_score are measured.
      test: (features, logits) of real images that are not in the reference; None: none are measured.
      extractor: key of what computed the features.

    Returns:
      frechet_distance, frechet_distance_unbiased, inception_score, inception_score_10 (in 10 splits, as published, of
      10,000 images or more), kernel_distance, precision, recall, density, coverage; and those of `test`. Their labels
      say FID, KID and Inception Score only where that is true: metrics.naming.

    Raises:
      UserError: if features are not finite, of different dimensions or too few, or the extractor is unknown.
    """
    real = PreparedReference.of(reference)
    metrics = _against(samples, real, extractor)
    if metrics[0].num_samples < PUBLISHED_SAMPLES:
        logging.warning("%s of %d samples: %s", metrics[0].label, metrics[0].num_samples, FEW_SAMPLES)
    return metrics if test is None else metrics + floor_metrics(test, reference=real, extractor=extractor)
