"""Metrics by nearest neighbours of features: improved precision and recall, density and coverage.

All four ask which images lie in balls around other images that reach to those images' k-th nearest neighbours.
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
    """Returns the squared distances of each row to its k-th nearest other row, for each k."""
    radii, last = np.empty((len(num_neighbors), len(x))), [k - 1 for k in num_neighbors]
    for rows in row_blocks(len(x), len(x)):
        distances = _squared_distances(x[rows], x)
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        radii[:, rows] = np.partition(distances, last, axis=1)[:, last].T
    return radii


@dataclasses.dataclass(frozen=True)
class Balls:
    """Images with the balls around them that reach to their k-th nearest neighbours; computed once for many uses.

    Attributes:
      rows: features less their mean, float64[M, D]: distances come from products, and fewer digits cancel near 0.
      center: their mean.
      squared_radii: of the balls, for each k.
    """

    rows: Float[np.ndarray, "M D"]
    center: Float[np.ndarray, "D"]
    squared_radii: Mapping[int, Float[np.ndarray, "M"]]

    @classmethod
    def around(
        cls,
        features: Num[np.ndarray, "M D"],
        num_neighbors: Sequence[int] = (PRECISION_NEIGHBORS, DENSITY_NEIGHBORS),
        *,
        name: str = "reference",
    ) -> Balls:
        """Computes the radii; raises a ValueError if features are not finite or not more than neighbours."""
        if min(num_neighbors) < 1:
            raise UserError(f"num_neighbors={min(num_neighbors)}; expected 1 or more")
        y = as_features(name, features, max(num_neighbors) + 1)
        center = y.mean(axis=0)
        rows = y - center
        return cls(rows, center, dict(zip(num_neighbors, _squared_radii(rows, num_neighbors), strict=True)))

    def moved(self, features: Num[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """Returns other features less the same mean; raises a ValueError if they are of another dimension."""
        x = as_features("features", features)
        check_dimensions(x.shape[1], len(self.center))
        return x - self.center


class _Inside(NamedTuple):
    """Which points lie in which balls, counted.

    Attributes:
      of_points: balls that each point lies in.
      of_balls: points in each ball.
      owners: sum of the numbers of the points in each ball: the number of the point where there is just one.
    """

    of_points: Int[np.ndarray, "n"]
    of_balls: Int[np.ndarray, "m"]
    owners: Int[np.ndarray, "m"]


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
    """Measures improved precision and recall (Kynkaanniemi et al. 2019, Section 2).

    Precision is the share of generated images within the manifold of real ones, recall the share of real images
    within the manifold of generated ones; a manifold is the union of the balls around its images that reach to the
    k-th nearest neighbour.

    Args:
      features: of generated images.
      reference: of real images, or the balls around them.
      num_neighbors: k; the paper's is 3.

    Returns:
      (precision, recall), both from 0 to 1.

    Raises:
      UserError: as `kernel_distance`, or if a set does not have more than `num_neighbors` images.
    """
    real = _balls(reference, num_neighbors)
    x, y = real.moved(features), real.rows
    fake_radii = Balls.around(features, (num_neighbors,), name="features").squared_radii[num_neighbors]
    return (
        _share("precision", _count_inside(x, y, real.squared_radii[num_neighbors]).of_points > 0, num_neighbors),
        _share("recall", _count_inside(y, x, fake_radii).of_points > 0, num_neighbors),
    )


def _share_stderr(inside: Bool[np.ndarray, "n"]) -> float:
    """Returns a binomial standard error of a share that is not 0 where the share is 0 or 1."""
    smoothed = (inside.sum() + 1) / (len(inside) + 2)  # Laplace's rule of succession
    return math.sqrt(smoothed * (1 - smoothed) / len(inside))


def _share(name: str, inside: Bool[np.ndarray, "n"], num_neighbors: int) -> Metric:
    note = (
        f"k = {num_neighbors}; binomial standard error over the images counted; it leaves out that the other set, "
        "which makes the manifold, is finite too, and is several times too small if that has few images"
    )
    return make_metric(name, inside.mean(), _share_stderr(inside), len(inside), note=note)


def density_coverage(
    features: Num[np.ndarray, "N D"],
    reference: Num[np.ndarray, "M D"] | Balls,
    *,
    num_neighbors: int = DENSITY_NEIGHBORS,
) -> tuple[Metric, Metric]:
    """Measures density and coverage (Naeem et al. 2020, Eqs. 4 and 5): unlike precision and recall, not by outliers.

    Density counts in how many balls around real images a generated image lies, over k: 1 on average if both sets come
    from one distribution, more where samples crowd. Coverage is the share of real images whose ball holds a generated
    one: 1 - C(M-1, k) / C(N+M-1, k) on average if N and M images come from one distribution, near 1 - 2⁻ᵏ if N = M.

    The standard error of density has a part of each set, the spread of the counts of its images. That of coverage is
    binomial over the real images, and the jackknife's over the generated ones, which knows how many balls each of them
    is alone in. Both take the radii as given; of repeated drawings of Gaussians they were 0.9 to 1.8 times the spread.

    Args:
      features: of generated images.
      reference: of real images, or the balls around them.
      num_neighbors: k; the paper's is 5.

    Returns:
      (density, coverage).

    Raises:
      UserError: as `kernel_distance`, or if the reference does not have more than `num_neighbors` images.
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
        make_metric("coverage", covered.mean(), math.hypot(_share_stderr(covered), jackknife), m, note=note),
    )
