"""Statistics of pixels: against numpy on all of them at once; the largest distance against scipy's of all pairs."""

from fractions import Fraction

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from metrics import pixels
from metrics.pixels import LevelCounts, farthest_pair, mean_and_variance, radii_from

GENERATOR = np.random.default_rng(0)
LEVELS = GENERATOR.integers(0, 256, (120, 4, 5, 3), dtype=np.uint8)
LEVELS[..., 1] //= 2


@pytest.mark.parametrize("batch", [1, 7, 120])
def test_means_and_variances_are_numpys_to_rounding_and_do_not_depend_on_batches(batch):
    counts = LevelCounts(3)
    for start in range(0, 120, batch):
        counts.add(LEVELS[start : start + batch])
    assert counts.counts.sum() == LEVELS.size
    for (mean, variance), channel in zip(counts.channels(), np.moveaxis(LEVELS, 3, 0).astype(np.float64), strict=True):
        assert mean == pytest.approx(channel.mean(), rel=1e-13)
        assert variance == pytest.approx(channel.var(), rel=1e-12)
    assert counts.all() == pytest.approx((LEVELS.mean(dtype=np.float64), LEVELS.var(dtype=np.float64)), rel=1e-12)


def test_a_constant_image_has_exactly_no_variance():
    counts = LevelCounts(1)
    counts.add(np.full((3, 8, 8, 1), 253, np.uint8))
    assert counts.all() == (253.0, 0.0)


def test_moments_are_rounded_once():
    """Of a thousand million values that differ in three the floats' difference would keep no digit."""
    counts = np.zeros(256, np.int64)
    counts[254], counts[255] = 3, 10**9
    number = 10**9 + 3
    assert mean_and_variance(counts) == (
        float(Fraction(254 * 3 + 255 * 10**9, number)),
        float(Fraction(3 * 10**9, number**2)),
    )


def find(levels, center=None, **options):
    center = levels[: len(levels) // 2].astype(np.float64).mean(axis=0).round().astype(np.int64)
    return farthest_pair(lambda rows: levels[rows], radii_from(levels, center), **options)


def all_distances(levels):
    return squareform(pdist(levels.reshape(len(levels), -1).astype(np.float64)))


@pytest.mark.parametrize("block", [1, 5, 64, 256])
def test_the_largest_distance_is_scipys(monkeypatch, block):
    monkeypatch.setattr(pixels, "BLOCK_IMAGES", block)
    found, distances = find(LEVELS), all_distances(LEVELS)
    assert found.distance == pytest.approx(distances.max(), rel=1e-14)
    assert distances[found.pair] == distances.max()
    assert (found.bound, found.is_exact, found.num_compared) == (found.distance, True, 120)


def test_what_cannot_be_farther_is_not_computed(monkeypatch):
    """Two opposite corners and many images in the middle: one block of pairs settles it."""
    levels = GENERATOR.integers(100, 140, (400, 4, 4, 1), dtype=np.uint8)
    levels[17], levels[301] = 0, 255
    monkeypatch.setattr(pixels, "BLOCK_IMAGES", 2)
    computed, multiply = [], np.unravel_index
    monkeypatch.setattr(pixels.np, "unravel_index", lambda *a: computed.append(0) or multiply(*a))
    assert find(levels).distance == all_distances(levels).max()
    assert len(computed) == 1
    few = find(levels, compared=2)  # enough: all others are nearer to the centre
    assert (few.distance, few.is_exact, few.num_compared) == (find(levels).distance, True, 2)
    assert set(few.pair) == {17, 301}


@pytest.mark.parametrize("compared", [2, 10, 50])
def test_too_many_images_give_a_bracket_that_holds(compared):
    """Distances of independent images are alike: those with the largest radii need not be the farthest pair."""
    found, largest = find(LEVELS, compared=compared), all_distances(LEVELS).max()
    assert found.distance <= largest * (1 + 1e-14)
    assert found.bound >= largest
    assert not found.is_exact
    assert found.distance == pytest.approx(all_distances(LEVELS)[found.pair], rel=1e-14)
    assert found.num_compared == compared


def test_memory_bounds_the_images_that_are_compared():
    assert find(LEVELS, compared_bytes=60 * 10).num_compared == 10
    assert find(LEVELS, compared_bytes=1).num_compared == 2


def test_equal_images_have_no_distance_and_one_image_is_refused():
    assert find(np.full((5, 2, 2, 1), 9, np.uint8)).distance == 0.0
    with pytest.raises(ValueError, match=r"1 image\(s\) have no distance"):
        farthest_pair(lambda rows: LEVELS[rows], np.ones(1))
