"""The Frechet distance without the bias of a finite number of samples, and its confidence interval by the bootstrap.

The distance of n samples is too large by about b / n (Chong & Forsyth 2020, "Effectively Unbiased FID and Inception
Score and Where to Find Them", Section 3). Here it is measured of parts of the samples, too, and extrapolated.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg
import scipy.special
from jaxtyping import Float, Int, Num

from metrics.frechet import FeatureStatistics, covariance_factor
from metrics.metric import Metric, as_features, check_dimensions, make_metric

NAME = "frechet_distance_unbiased"
LEVEL = 0.95  # of the confidence interval
MANY_UP_TO = 256  # features; with more, an eigenvalue problem is so dear that fewer are solved:
MANY_ORDERS, FEW_ORDERS = 3, 1  # random orders in which the samples are divided
MANY_RESAMPLES, FEW_RESAMPLES = 200, 20
BLOCK_ROWS = 4096  # of features, weighted at once


@dataclasses.dataclass(frozen=True)
class _Distances:
    """Frechet distances of weighted samples to one reference, for an eigenvalue problem of the rank of the latter.

    With C2 = R Rᵀ, the trace of (C1^½ C2 C1^½)^½ is the sum of the square roots of the eigenvalues of Rᵀ C1 R, which is
    the covariance of the samples times R.

    Attributes:
      samples: features less the mean of the reference, float64[N, D].
      projected: the same times R, float64[N, r].
      trace: of the covariance of the reference.
    """

    samples: Float[np.ndarray, "N D"]
    projected: Float[np.ndarray, "N r"]
    trace: float

    @classmethod
    def to(cls, reference: FeatureStatistics, features: Float[np.ndarray, "N D"]) -> _Distances:
        centered = features - reference.mean
        return cls(centered, centered @ covariance_factor(reference.cov), float(np.trace(reference.cov)))

    def of(self, weights: Int[np.ndarray, "N"]) -> float:
        """Measures the samples of which each is there so many times."""
        n, rank = int(weights.sum()), self.projected.shape[1]
        second, squares = np.zeros((rank, rank)), 0.0
        for start in range(0, len(weights), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            used, root = weights[block] > 0, np.sqrt(weights[block][weights[block] > 0])[:, None]
            z = self.projected[block][used] * root
            second += z.T @ z
            squares += np.sum((self.samples[block][used] * root) ** 2)
        shift, mean = weights @ self.samples / n, weights @ self.projected / n
        cov = (second - n * np.outer(mean, mean)) / (n - 1)
        trace = (squares - n * shift @ shift) / (n - 1)
        roots = np.sqrt(np.maximum(scipy.linalg.eigvalsh(cov), 0.0))
        return float(shift @ shift + trace + self.trace - 2.0 * roots.sum())


def _parts(order: Int[np.ndarray, "N"]) -> list[list[np.ndarray]]:
    """Returns parts of the samples at three sizes: halves, all but a third, all; each image as often as any other.

    Sizes near N, since 1 / n is all of the bias only where n is large.
    """
    thirds = np.array_split(order, 3)
    without_third = [np.concatenate(thirds[:left_out] + thirds[left_out + 1 :]) for left_out in range(3)]
    return [np.array_split(order, 2), without_third, [order]]


def _extrapolate(distances: _Distances, generator: np.random.Generator) -> float:
    """Fits a line to distance against 1 / n, and returns its value at 0."""
    num_samples = len(distances.samples)
    ones = np.ones(num_samples, np.int64)
    points = [(1.0 / num_samples, distances.of(ones))]
    num_orders = MANY_ORDERS if distances.samples.shape[1] <= MANY_UP_TO else FEW_ORDERS
    orders = [generator.permutation(num_samples) for _ in range(num_orders)]
    for size in (0, 1):
        parts = [part for order in orders for part in _parts(order)[size]]
        values = [distances.of(np.bincount(part, minlength=num_samples)) for part in parts]
        points.append((float(np.mean([1.0 / len(part) for part in parts])), float(np.mean(values))))
    inverse, mean = np.array(points).T
    return float(np.polynomial.Polynomial.fit(inverse, mean, 1)(0.0))


def _bootstrap(distances: _Distances, generator: np.random.Generator) -> Float[np.ndarray, "B"]:
    """Returns the distances of samples drawn from the samples with replacement."""
    num_samples, dimension = distances.samples.shape
    resamples = MANY_RESAMPLES if dimension <= MANY_UP_TO else FEW_RESAMPLES
    draws = (generator.integers(num_samples, size=num_samples) for _ in range(resamples))
    return np.array([distances.of(np.bincount(draw, minlength=num_samples)) for draw in draws])


def frechet_distance_unbiased(
    features: Num[np.ndarray, "N D"],
    reference: Num[np.ndarray, "M D"] | FeatureStatistics,
    *,
    seed: int = 0,
    name: str = NAME,
) -> Metric:
    """Measures the Frechet distance extrapolated to infinitely many samples, with a 95 % confidence interval.

    Distances of halves of the samples, of all but a third and of all are fitted by a line in 1 / n; its value at 0 is
    what Chong & Forsyth 2020 call FID_infinity. It may be below 0. The reference is taken as it is: the distance is to
    those images, or statistics, and not to what they were drawn from.

    What is left of the bias is of order 1 / n². Of Gaussians with equal variances, the worst case, it was -5 % of what
    is taken away for 6 samples to a feature and -18 % for 2.5.

    The bootstrap draws as many of the samples with replacement. Such a set is too far from the reference twice, by its
    own bias and by that of the samples, so that its distances say nothing of where the value is: only their spread is
    used, the standard error, with Student's t for the interval. It is right where the distance is clear of 0, and up
    to 1.7 times too large (2.6 times for 2.5 samples to a feature) where samples and reference hardly differ; of
    repeated experiments, intervals held the true distance in 94 to 100 %.

    Args:
      features: of generated images.
      reference: features of real images or their statistics.
      seed: of the parts and of the bootstrap.
      name: of the metric.

    Returns:
      The metric; its value is None, and its note says why, if half of the samples are not more than features: then the
      bias is not proportional to 1 / n.

    Raises:
      UserError: if features are not finite, fewer than two, or of another dimension than the reference.
    """
    x = as_features("features", features)
    exact = reference if isinstance(reference, FeatureStatistics) else FeatureStatistics.from_features(reference)
    check_dimensions(x.shape[1], len(exact.mean))
    n, dimension = x.shape
    if n // 2 <= dimension:
        note = (
            f"not measured: {n:,} samples; {2 * dimension + 2:,} are needed to extrapolate with {dimension:,} features"
        )
        return Metric(name, None, None, n, note=note)
    distances = _Distances.to(exact, x)
    generator = np.random.Generator(np.random.Philox(seed))
    value, resampled = _extrapolate(distances, generator), _bootstrap(distances, generator)
    stderr = float(resampled.std(ddof=1))
    half = float(scipy.special.stdtrit(len(resampled) - 1, 0.5 + LEVEL / 2)) * stderr
    note = (
        "Frechet distance extrapolated to 1 / n = 0 from n = N / 2, 2 N / 3 and N samples; the reference is taken as "
        f"exact; standard error of {len(resampled)} bootstrap resamples of the samples"
    )
    return make_metric(name, value, stderr, n, note=note, interval=(value - half, value + half))
