"""Metrics by nearest neighbours of features: improved precision and recall, density and coverage.

All four ask which images lie in balls around other images; the radius is the distance to the k-th nearest neighbour.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from errors import UserError
from metrics.metric import Metric, as_features, check_dimensions, make_metric, stderr_of_mean
from metrics.pairwise import row_blocks

PRECISION_NEIGHBORS = 3  # k of Kynkaanniemi et al. 2019
DENSITY_NEIGHBORS = 5  # k of Naeem et al. 2020


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "n m"]:
    squares = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1)[None] - 2.0 * x @ y.T
    return np.maximum(squares, 0.0)


def _squared_radii(x: np.ndarray, num_neighbors: Sequence[int]) -> Float[np.ndarray, "K n"]:
    """Return the squared distances of each row to its k-th nearest other row, for each k."""
    radii, last = np.empty((len(num_neighbors), len(x))), [k - 1 for k in num_neighbors]
    for rows in row_blocks(len(x), len(x)):
        distances = _squared_distances(x[rows], x)
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        radii[:, rows] = np.partition(distances, last, axis=1)[:, last].T
    return radii


@dataclasses.dataclass(frozen=True)
class Balls:
    """Images with balls around them that reach to their k-th nearest neighbours; computed once for many uses."""

    rows: Float[np.ndarray, "M D"]  # features minus their mean: fewer digits cancel in distances
    center: Float[np.ndarray, "D"]  # their mean
    squared_radii: Mapping[int, Float[np.ndarray, "M"]]  # of the balls, for each k

    @classmethod
    def around(
        cls,
        features: Num[np.ndarray, "M D"],
        num_neighbors: Sequence[int] = (PRECISION_NEIGHBORS, DENSITY_NEIGHBORS),
        *,
        name: str = "reference",
    ) -> Balls:
        """Compute the balls of more than max(num_neighbors) rows of finite features."""
        if min(num_neighbors) < 1:
            raise UserError(f"num_neighbors={min(num_neighbors)}; expected 1 or more")
        y = as_features(name, features, max(num_neighbors) + 1)
        center = y.mean(axis=0)
        rows = y - center
        return cls(rows, center, dict(zip(num_neighbors, _squared_radii(rows, num_neighbors), strict=True)))

    def moved(self, features: Num[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """Return other features minus the same mean."""
        x = as_features("features", features)
        check_dimensions(x.shape[1], len(self.center))
        return x - self.center


class _Inside(NamedTuple):
    """Which points lie in which balls, counted."""

    of_points: Int[np.ndarray, "n"]  # number of balls around each point
    of_balls: Int[np.ndarray, "m"]  # number of points in each ball
    owners: Int[np.ndarray, "m"]  # sum of the indices of the points in each ball; of a single one its index


def _count_inside(points: np.ndarray, centers: np.ndarray, squared_radii: np.ndarray) -> _Inside:
    inside = _Inside(*(np.zeros(n, np.int64) for n in (len(points), len(centers), len(centers))))
    for rows in row_blocks(len(points), len(centers)):
        block = _squared_distances(points[rows], centers) <= squared_radii
        inside.of_points[rows] = block.sum(axis=1)
        inside.of_balls[:] += block.sum(axis=0)
        inside.owners[:] += np.arange(rows.start, rows.stop) @ block
    return inside


def _balls(reference: np.ndarray | Balls, num_neighbors: int) -> Balls:
    return reference if isinstance(reference, Balls) else Balls.around(reference, (num_neighbors,))


def precision_recall(
    features: Num[np.ndarray, "N D"],
    reference: Num[np.ndarray, "M D"] | Balls,
    *,
    num_neighbors: int = PRECISION_NEIGHBORS,
) -> tuple[Metric, Metric]:
    """Measure improved precision and recall (Kynkaanniemi et al. 2019, Section 2), both from 0 to 1.

    Precision is the fraction of generated images within the manifold of real ones, recall the fraction of real images
    within the manifold of generated ones; a manifold is the union of the balls around its images that reach to the k-th
    nearest neighbour. k = `num_neighbors` is 3 in the paper; each set needs more images.
    """
    real = _balls(reference, num_neighbors)
    x, y = real.moved(features), real.rows
    fake_radii = Balls.around(features, (num_neighbors,), name="features").squared_radii[num_neighbors]
    return (
        _fraction("precision", _count_inside(x, y, real.squared_radii[num_neighbors]).of_points > 0, num_neighbors),
        _fraction("recall", _count_inside(y, x, fake_radii).of_points > 0, num_neighbors),
    )


def _fraction_stderr(inside: Bool[np.ndarray, "n"]) -> float:
    """Return a binomial standard error that is not 0 where the fraction is 0 or 1."""
    smoothed = (inside.sum() + 1) / (len(inside) + 2)  # Laplace's rule of succession
    return math.sqrt(smoothed * (1 - smoothed) / len(inside))


def _fraction(name: str, inside: Bool[np.ndarray, "n"], num_neighbors: int) -> Metric:
    note = (
        f"k = {num_neighbors}; binomial standard error over the images counted; it leaves out that the other set, "
        "which makes the manifold, is finite too, and is several times too small if that has few images"
    )
    return make_metric(name, inside.mean(), _fraction_stderr(inside), len(inside), note=note)


def density_coverage(
    features: Num[np.ndarray, "N D"],
    reference: Num[np.ndarray, "M D"] | Balls,
    *,
    num_neighbors: int = DENSITY_NEIGHBORS,
) -> tuple[Metric, Metric]:
    """Measure density and coverage (Naeem et al. 2020, Eqs. 4 and 5); outliers affect them less than the above.

    Density is the number of balls around real images that contain a generated image, over k: 1 on average if both sets
    come from one distribution, more where samples crowd. Coverage is the fraction of real images whose ball contains a
    generated one: 1 - C(M-1, k) / C(N+M-1, k) on average if N and M images come from one distribution, near 1 - 2⁻ᵏ if
    N = M. k = `num_neighbors` is 5 in the paper; the reference needs more images.

    The standard error of density combines the spread of the counts of both sets. That of coverage combines the binomial
    one over the real images with the jackknife over the generated ones, from the number of balls that each of them is
    alone in. Both take the radii as given; in repeated draws of Gaussians they were 0.9 to 1.8 times the spread.
    """
    real = _balls(reference, num_neighbors)
    x = real.moved(features)
    of_points, of_balls, owners = _count_inside(x, real.rows, real.squared_radii[num_neighbors])
    n, m = len(x), len(real.rows)
    note = f"k = {num_neighbors}; standard error over both sets, with the radii as given"
    density = of_points / num_neighbors
    stderr = math.hypot(stderr_of_mean(density), stderr_of_mean(of_balls * m / (num_neighbors * n)))
    covered = of_balls > 0
    alone = np.bincount(owners[of_balls == 1], minlength=n) / m  # loss of coverage without one generated image
    jackknife = math.sqrt((n - 1) / n * np.sum((alone - alone.mean()) ** 2))
    return (
        make_metric("density", density.mean(), stderr, n, note=note),
        make_metric("coverage", covered.mean(), math.hypot(_fraction_stderr(covered), jackknife), m, note=note),
    )
