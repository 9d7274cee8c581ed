"""Pixel statistics of a data set: means and standard deviations, and the two images that differ most.

Exact: levels are integers, and so are their sums and squared distances. Nothing depends on the batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int64, UInt8

from errors import UserError

MAX_LEVELS = 256  # of uint8
COMPARED = 5000  # images of which all pairs are compared, at most
COMPARED_BYTES = 2**30  # the same, in bytes of their levels
BLOCK_BYTES = 2**25  # of float64 levels that are multiplied at a time
BLOCK_IMAGES = 256  # the same, in images, at most


class LevelCounts:
    """Counts how often each channel has each level."""

    def __init__(self, num_channels: int):
        self.counts = np.zeros((num_channels, MAX_LEVELS), np.int64)

    def add(self, levels: UInt8[np.ndarray, "N H W C"]) -> None:
        """Count a batch of images."""
        for channel, counts in enumerate(self.counts):
            counts += np.bincount(levels[..., channel].ravel(), minlength=MAX_LEVELS)

    def channels(self) -> list[tuple[float, float]]:
        """Return mean and variance of each channel, in levels."""
        return [mean_and_variance(counts) for counts in self.counts]

    def all(self) -> tuple[float, float]:
        """Return mean and variance of all values together, in levels."""
        return mean_and_variance(self.counts.sum(axis=0))


def mean_and_variance(counts: Int64[np.ndarray, "L"]) -> tuple[float, float]:
    """Return mean and (biased) variance of levels 0 .. L - 1 from their counts, each rounded once."""
    by_level = list(enumerate(counts.tolist()))  # Python's integers do not overflow
    number = sum(count for _, count in by_level)
    total = sum(level * count for level, count in by_level)
    squares = sum(level**2 * count for level, count in by_level)
    return total / number, (number * squares - total**2) / number**2


def radii_from(levels: UInt8[np.ndarray, "N H W C"], center: Int64[np.ndarray, "H W C"]) -> Float[np.ndarray, "N"]:
    """Return the Euclidean distance of each image from a centre, in levels."""
    difference = levels.reshape(len(levels), -1).astype(np.float64) - center.ravel()
    return np.sqrt(np.einsum("ij,ij->i", difference, difference))


@dataclasses.dataclass(frozen=True)
class FarthestPair:
    """The largest Euclidean distance of two images that was found, and a bound on any larger one."""

    distance: float  # in levels
    bound: float  # no two images of the data set are farther apart; equal to `distance` if that is exact
    pair: tuple[int, int]  # indices of the two images
    num_compared: int  # images of which all pairs were compared

    @property
    def is_exact(self) -> bool:
        """Whether this is the largest distance of the whole data set."""
        return self.distance == self.bound


def farthest_pair(
    read: Callable[[np.ndarray], UInt8[np.ndarray, "n H W C"]],
    radii: Float[np.ndarray, "N"],
    *,
    compared: int = COMPARED,
    compared_bytes: int = COMPARED_BYTES,
) -> FarthestPair:
    """Find the largest Euclidean distance between two images.

    By the triangle inequality, two images are no farther apart than the sum of their radii, the distances from any
    centre. All pairs of the images with the largest radii are compared, except those that cannot be farther than the
    best one so far; any other pair is bounded by the sum of the largest radius and the largest one not compared. If the
    best pair reaches that bound, or all images were compared, it is exact.

    Args:
      read: returns the images of some indices.
      radii: distance of each image from a centre, in levels.
      compared: images of which all pairs are compared, at most.
      compared_bytes: the same, in bytes of their levels; two images are always compared.
    """
    if len(radii) < 2:
        raise UserError(f"{len(radii)} image(s) have no distance from each other; give two or more")
    order = np.argsort(-radii, kind="stable")
    size = read(order[:1]).nbytes
    chosen = order[: max(2, min(compared, compared_bytes // size))]
    squared, (i, j) = _largest_of(read(chosen).reshape(len(chosen), -1), radii[chosen] * (1 + 1e-12))
    distance, bound = float(np.sqrt(squared)), 0.0
    if len(chosen) < len(order):
        bound = float(radii[order[0]] + radii[order[len(chosen)]]) * (1 + 1e-12)  # not below for rounding
    return FarthestPair(distance, max(distance, bound), (int(chosen[i]), int(chosen[j])), len(chosen))


def _largest_of(levels: UInt8[np.ndarray, "k D"], radii: Float[np.ndarray, "k"]) -> tuple[float, tuple[int, int]]:
    """Return the largest squared distance and its pair, of images sorted by falling radii.

    |x - y|² = |x|² + |y|² - 2 x·y, of integers far below 2^53, is exact in float64.
    """
    size = max(1, min(BLOCK_IMAGES, BLOCK_BYTES // (8 * levels.shape[1])))
    starts = range(0, len(levels), size)
    best, pair = -1.0, (0, 0)
    for start in starts:
        if (radii[start] + radii[0]) ** 2 <= best:
            break
        x = levels[start : start + size].astype(np.float64)
        for other in starts[: start // size + 1]:
            if (radii[start] + radii[other]) ** 2 <= best:
                break
            y = x if other == start else levels[other : other + size].astype(np.float64)
            norms = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)
            squares = norms - 2.0 * (x @ y.T)
            if squares.max() > best:
                best = float(squares.max())
                row, column = np.unravel_index(squares.argmax(), squares.shape)
                pair = (other + int(column), start + int(row))
    return best, pair
