"""Kernel distances of two sets of features (KID), which compare all pairs of images.

Matrices of pairs are formed in blocks, so that 50,000 images of 2,048 features fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from errors import UserError
from metrics.metric import Metric, as_feature_pair, make_metric, stderr_of_mean

BLOCK_ELEMENTS = 2**24  # of a block of a matrix of all pairs: 128 MiB of float64


def row_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Return the rows of the blocks in which a matrix of all pairs is formed."""
    step = max(1, BLOCK_ELEMENTS // num_columns)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _kernel(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "n m"]:
    """Return the polynomial kernel (xᵀy / D + 1)³ of all pairs (Binkowski et al. 2018, Section 4)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


class _KernelMeans(NamedTuple):
    """Means over the pairs of two sets, or over the pairs of different rows of one."""

    of_rows: Float[np.ndarray, "n"]  # mean kernel of each row of the first set with the second
    of_columns: Float[np.ndarray, "m"]  # mean kernel of each row of the second set with the first
    mean_square: float  # mean squared kernel of a pair

    @property
    def interaction(self) -> float:
        """Variance of the kernel that neither row of the pair explains alone."""
        rows, columns = self.of_rows, self.of_columns
        return self.mean_square - np.mean(rows**2) - np.mean(columns**2) + rows.mean() * columns.mean()


def _means_across(x: np.ndarray, y: np.ndarray) -> _KernelMeans:
    of_x, of_y, squares = np.empty(len(x)), np.zeros(len(y)), 0.0
    for rows in row_blocks(len(x), len(y)):
        block = _kernel(x[rows], y)
        of_x[rows] = block.mean(axis=1)
        of_y += block.sum(axis=0)
        squares += np.vdot(block, block)
    return _KernelMeans(of_x, of_y / len(x), squares / (len(x) * len(y)))


def _means_within(x: np.ndarray) -> _KernelMeans:
    """Leave out the pairs of a row with itself."""
    n, all_pairs = len(x), _means_across(x, x)
    own = (np.sum(x**2, axis=1) / x.shape[1] + 1.0) ** 3
    means = (all_pairs.of_rows * n - own) / (n - 1)
    return _KernelMeans(means, means, (all_pairs.mean_square * n - np.mean(own**2)) / (n - 1))


def _unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the unbiased squared maximum mean discrepancy and its standard error.

    The value is a mean over pairs (a U-statistic), whose variance has a part of each row and a part of each pair. The
    spread of the rows' means counts the second part twice, which matters where the value is near zero.
    """
    n, m = len(x), len(y)
    in_x, in_y, across = _means_within(x), _means_within(y), _means_across(x, y)
    value = in_x.of_rows.mean() + in_y.of_rows.mean() - 2.0 * across.of_rows.mean()
    of_rows = stderr_of_mean(in_x.of_rows - across.of_rows) ** 2 + stderr_of_mean(in_y.of_rows - across.of_columns) ** 2
    of_pairs = 2.0 * in_x.interaction / (n * (n - 1)) + 2.0 * in_y.interaction / (m * (m - 1))
    of_pairs = max(of_pairs + 4.0 * across.interaction / (n * m), 0.0)
    return float(value), math.sqrt(max(4.0 * of_rows - of_pairs, of_pairs))


def kernel_distance(
    features: Num[np.ndarray, "N D"], reference: Num[np.ndarray, "M D"], *, name: str = "kernel_distance"
) -> Metric:
    """Measure the squared maximum mean discrepancy over all pairs; with Inception features it is KID.

    The unbiased estimate with the kernel (xᵀy / D + 1)³ (Binkowski et al. 2018): zero on average, and so below zero
    half the time, if both sets come from one distribution.
    """
    x, y = as_feature_pair(features, reference)
    note = "unbiased, so it may be below 0; mean over all pairs, standard error of both sides"
    return make_metric(name, *_unbiased_mmd2(x, y), len(x), note=note)


def _mmd2_of_parts(
    x: np.ndarray, y: np.ndarray, parts: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Float[np.ndarray, "n"]:
    return np.array([_unbiased_mmd2(x[of_x], y[of_y])[0] for of_x, of_y in parts])


def kernel_distance_blocks(
    features: Num[np.ndarray, "N D"],
    reference: Num[np.ndarray, "M D"],
    *,
    max_block_size: int = 1024,
    name: str = "kernel_distance",
) -> Metric:
    """Measure the kernel distance as the mean over disjoint blocks, as TF-GAN does; cheaper than all pairs.

    Both sets must be in random order. `max_block_size` is the largest number of images of either set in a block.
    """
    x, y = as_feature_pair(features, reference)
    if max_block_size < 2:
        raise UserError(f"max_block_size={max_block_size}; expected 2 or more")
    num_blocks = math.ceil(max(len(x), len(y)) / max_block_size)
    if min(len(x), len(y)) < 2 * num_blocks:
        raise UserError(
            f"max_block_size={max_block_size} makes {num_blocks} blocks, too many for {len(x)} and {len(y)} images; "
            "use larger blocks, or kernel_distance"
        )
    parts = [_consecutive_parts(len(z), num_blocks) for z in (x, y)]
    values = _mmd2_of_parts(x, y, list(zip(*parts, strict=True)))
    stderr = stderr_of_mean(values) if num_blocks > 1 else math.nan
    note = f"unbiased, mean over {num_blocks} disjoint blocks; standard error from their spread"
    return make_metric(name, values.mean(), stderr, len(x), note=note)


def _consecutive_parts(num_rows: int, num_parts: int) -> list[np.ndarray]:
    """Split rows into consecutive parts; the later ones may be longer by one (TF-GAN's order)."""
    longer = num_rows % num_parts
    sizes = np.full(num_parts, num_rows // num_parts)
    sizes[num_parts - longer :] += 1
    return np.split(np.arange(num_rows), np.cumsum(sizes)[:-1])


def kernel_distance_subsets(
    features: Num[np.ndarray, "N D"],
    reference: Num[np.ndarray, "M D"],
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 0,
    name: str = "kernel_distance",
) -> Metric:
    """Measure the kernel distance as the mean over random subsets, as KID is commonly published.

    Binkowski et al. 2018 take 100 subsets of 1,000 images of either set, drawn without replacement (all of a smaller
    set). Subsets overlap, so their mean is less certain than that of independent ones: the standard error counts only
    as many as could be disjoint.
    """
    x, y = as_feature_pair(features, reference)
    if subset_size < 2 or num_subsets < 2:
        raise UserError(f"subset_size={subset_size}, num_subsets={num_subsets}; expected 2 or more of both")
    generator = np.random.Generator(np.random.Philox(seed))
    draw = lambda z: generator.choice(len(z), min(subset_size, len(z)), replace=False)  # noqa: E731
    values = _mmd2_of_parts(x, y, [(draw(x), draw(y)) for _ in range(num_subsets)])
    disjoint = min(num_subsets, min(len(x), len(y)) // subset_size)
    stderr = np.std(values, ddof=1) / math.sqrt(disjoint) if disjoint else math.nan
    note = f"unbiased, mean over {num_subsets} subsets of {subset_size}; standard error of {disjoint} disjoint ones"
    return make_metric(name, values.mean(), stderr, len(x), note=note)
