"""Metrics of generated images, from Python: the features of images, and metrics of features with their uncertainty.

An extractor turns images (uint8[N, H, W, C]) into features and logits; metrics are pure functions of such arrays.
`sample_metrics` measures all of them. For example, the test digits in place of samples:

>>> import tempfile
>>> import evaluation
>>> from sources.digits import load_digits
>>> train, test = load_digits("train"), load_digits("test")
>>> extractor = evaluation.build_feature_extractor(
...     train.levels, train.classes, test.levels, test.classes, num_levels=17, folder=tempfile.mkdtemp()
... )
>>> reference, _ = extractor(train.levels)
>>> metrics = evaluation.sample_metrics(extractor(test.levels), reference=reference, extractor=extractor.key)
>>> print([metric.title for metric in metrics[:3]])
['FD-classifier', 'FD-classifier without bias', 'classifier score (IS formula)']
>>> evaluation.frechet_distance(reference, reference).value < 1e-6
True

For RGB photographs, `build_extractor("inception", num_levels=256)` gives the features of FID. docs/extractors.md and
docs/metrics.md describe extractors and metrics.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from absl import logging
from jaxtyping import Float, Integer, Num
from scipy.special import softmax, xlogy

from errors import UserError
from metrics.classifier import build_feature_extractor
from metrics.extractors import Extractor, build_extractor, resolve_extractor
from metrics.frechet import FeatureStatistics, frechet_distance, frechet_distance_unbiased
from metrics.metric import (
    FEW_SAMPLES,
    PUBLISHED_SAMPLES,
    TEST_SUFFIX,
    Metric,
    as_features,
    make_metric,
    mean_metric,
    stderr_of_mean,
    with_labels,
)
from metrics.neighbors import DENSITY_NEIGHBORS, PRECISION_NEIGHBORS, Balls, density_coverage, precision_recall
from metrics.pairwise import kernel_distance, kernel_distance_blocks, kernel_distance_subsets
from metrics.reference import load_reference

__all__ = [
    "Extractor",
    "FeatureStatistics",
    "Metric",
    "PreparedReference",
    "build_extractor",
    "build_feature_extractor",
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
    "load_reference",
    "mean_metric",
    "precision_recall",
    "resolve_extractor",
    "sample_metrics",
]

FULL_KERNEL_IMAGES = 10_000  # KID takes all pairs of up to as many images; of more, disjoint blocks

# --- Inception Score -------------------------------------------------------------------------------------------------


def inception_score(
    probabilities: Num[np.ndarray, "N K"], *, num_splits: int = 1, name: str = "inception_score"
) -> Metric:
    """Measure exp(mean over images of KL(p(y|x) || p(y))), p(y) being the mean of p(y|x).

    Salimans et al. 2016, Section 4. With one split the standard error is the delta method's: the influence function of
    the score's logarithm is KL(p(y|x) || p(y)) minus its mean. With more, the score is the mean over that many
    consecutive parts, as commonly published with 10; its standard error comes from their spread.

    Args:
      probabilities: of the classes, for each image; rows sum to 1.
      num_splits: number of parts; more than one needs images in random order.
      name: of the metric.
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
    """Measure the Inception Score of class scores before the softmax; otherwise as `inception_score`."""
    return inception_score(softmax(as_features("logits", logits), axis=1), num_splits=num_splits, name=name)


# --- bits/dim of a Gaussian ------------------------------------------------------------------------------------------


def gaussian_bits_per_dim(
    train_levels: Integer[np.ndarray, "N ..."], test_levels: Integer[np.ndarray, "M ..."], num_levels: int
) -> Metric:
    """Measure bits/dim of the Gaussian with full covariance that fits the training images best: a network's baseline.

    Both splits are dequantized as for the network, y = (level + u) / num_levels with u uniform on [0, 1). The effect of
    u on the fit and on the mean log-density is known in closed form, since it adds I / (12 num_levels²) to every
    covariance. bits/dim = -log2 p(y) / D + log2(num_levels), averaged over the test images, with its standard error
    over them.
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
    """Real images to compare samples with, and what is slow to compute from them, for repeated `sample_metrics`."""

    rows: np.ndarray | None  # features of each image; None if only their statistics are known
    statistics: FeatureStatistics  # of the features
    balls: Balls | None  # around the images; None without rows, or if there are too few

    @classmethod
    def of(cls, reference: np.ndarray | FeatureStatistics | PreparedReference) -> PreparedReference:
        """Prepare features of real images, or their statistics."""
        if isinstance(reference, PreparedReference):
            return reference
        if isinstance(reference, FeatureStatistics):
            return cls(None, reference, None)
        balls = Balls.around(reference) if len(reference) > DENSITY_NEIGHBORS else None
        return cls(reference, FeatureStatistics.from_features(reference), balls)


def _against(images: tuple[np.ndarray, np.ndarray], real: PreparedReference, extractor: str) -> tuple[Metric, ...]:
    # Data sets are often sorted by class: splits and blocks need a random order, always the same one.
    shuffled = lambda rows, seed: np.random.Generator(np.random.Philox(seed)).permutation(rows)  # noqa: E731
    (features, logits), rows = images, real.rows
    metrics = [
        frechet_distance(features, real.statistics if rows is None else rows),
        frechet_distance_unbiased(features, real.statistics),
        inception_score_from_logits(logits),
    ]
    if len(logits) >= PUBLISHED_SAMPLES:
        splits = shuffled(logits, 0)
        metrics.append(inception_score_from_logits(splits, num_splits=10, name="inception_score_10"))
    if rows is not None:
        if max(len(features), len(rows)) <= FULL_KERNEL_IMAGES:
            metrics.append(kernel_distance(features, rows))
        else:
            metrics.append(kernel_distance_blocks(shuffled(features, 0), shuffled(rows, 1)))
        if real.balls is not None and len(features) > PRECISION_NEIGHBORS:
            metrics += [*precision_recall(features, real.balls), *density_coverage(features, real.balls)]
        else:
            note = f"not measured: {len(features)} and {len(rows)} images are too few to have such neighbours"
            names = ("precision", "recall", "density", "coverage")
            metrics += [Metric(name, None, None, len(features), note=note) for name in names]
    return with_labels(
        metrics, extractor=extractor, num_features=len(real.statistics.mean), num_reference=real.statistics.num_samples
    )


def floor_metrics(
    test: tuple[Float[np.ndarray, "L D"], Float[np.ndarray, "L K"]],
    *,
    reference: Float[np.ndarray, "M D"] | FeatureStatistics | PreparedReference,
    extractor: str,
) -> tuple[Metric, ...]:
    """Measure real images that no network has seen in place of samples: what a perfect network would reach.

    Arguments as in `sample_metrics`; names end in "_test". This Fréchet distance is called the floor.
    """
    metrics = _against(test, PreparedReference.of(reference), extractor)
    label = lambda metric: f"{metric.label}, test images" if metric.label else ""  # noqa: E731
    return tuple(dataclasses.replace(each, name=each.name + TEST_SUFFIX, label=label(each)) for each in metrics)


def sample_metrics(
    samples: tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]],
    *,
    reference: Float[np.ndarray, "M D"] | FeatureStatistics | PreparedReference,
    test: tuple[Float[np.ndarray, "L D"], Float[np.ndarray, "L K"]] | None = None,
    extractor: str,
) -> tuple[Metric, ...]:
    """Measure samples against real images, and `floor_metrics` of held-out ones.

    Args:
      samples: (features, logits) of generated images.
      reference: features of real images; with their statistics alone only Fréchet distances and inception_score.
      test: (features, logits) of real images that are not in the reference; None: do not measure the floor.
      extractor: key of what computed the features.

    Returns:
      frechet_distance, frechet_distance_unbiased, inception_score, inception_score_10 (in 10 splits, as published, of
      10,000 images or more), kernel_distance, precision, recall, density, coverage; and those of `test`. Labels are
      FID, KID and Inception Score only where that is true (see `metrics.metric.with_labels`).
    """
    real = PreparedReference.of(reference)
    metrics = _against(samples, real, extractor)
    if metrics[0].num_samples < PUBLISHED_SAMPLES:
        logging.warning("%s of %d samples: %s", metrics[0].label, metrics[0].num_samples, FEW_SAMPLES)
    return metrics if test is None else metrics + floor_metrics(test, reference=real, extractor=extractor)
