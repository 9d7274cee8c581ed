"""Precision, recall, density and coverage against counting by hand, scipy's distances, and repeated experiments."""

import math

import numpy as np
import pytest
import scipy.spatial

import evaluation
from metrics import pairwise
from metrics.neighbors import Balls


class TestPrecisionRecall:
    def test_of_points_on_a_line_is_what_one_counts(self):
        real = np.array([[0.0], [1.0], [2.0], [10.0]])  # with k = 1: balls of radius 1, 1, 1, 8
        fake = np.array([[-0.5], [2.5], [30.0], [40.0]])  # radius 3, 3, 10, 10
        precision, recall = evaluation.precision_recall(fake, real, num_neighbors=1)
        assert (precision.value, recall.value) == (0.5, 0.75)
        assert (precision.num_samples, recall.num_samples) == (4, 4)

    def test_is_that_of_scipys_distances_whatever_the_blocks_in_memory(self, monkeypatch):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((60, 4)) + 100.7, 1.4 * rng.standard_normal((45, 4)) + 100.0

        def share(points, centers):
            radii = np.sort(scipy.spatial.distance.cdist(centers, centers), axis=1)[
                :, 3
            ]  # column 0 is the point itself
            return (scipy.spatial.distance.cdist(points, centers) <= radii).any(axis=1).mean()

        monkeypatch.setattr(pairwise, "BLOCK_ELEMENTS", 100)
        precision, recall = evaluation.precision_recall(x, y)
        assert (precision.value, recall.value) == (share(x, y), share(y, x))
        assert 0.2 < recall.value < precision.value < 1.0

    def test_is_all_or_nothing_at_the_ends_but_never_certain(self):
        x = np.random.default_rng(1).standard_normal((50, 2))
        for other, expected in ((x, 1.0), (x + 100.0, 0.0)):
            for metric in evaluation.precision_recall(other, x):
                assert metric.value == expected
                assert 0.01 < metric.stderr < 0.03  # one success in 52 would be 0.019

    def test_needs_more_images_than_neighbors(self):
        with pytest.raises(ValueError, match="features has 3 rows; expected 4 or more images"):
            evaluation.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
        with pytest.raises(ValueError, match="num_neighbors=0; expected 1 or more"):
            evaluation.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)), num_neighbors=0)


def test_balls_computed_once_give_the_same():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((30, 3)), rng.standard_normal((40, 3)) + 100.5
    balls = Balls.around(y)
    assert evaluation.precision_recall(x + 100.0, balls) == evaluation.precision_recall(x + 100.0, y)
    assert evaluation.density_coverage(x + 100.0, balls) == evaluation.density_coverage(x + 100.0, y)
    with pytest.raises(ValueError, match="features have 2 dimensions, the reference 3"):
        evaluation.density_coverage(x[:, :2], balls)


class TestDensityCoverage:
    def test_of_points_on_a_line_is_what_one_counts(self):
        real = np.array([[0.0], [1.0], [2.0], [10.0]])  # with k = 1: balls of radius 1, 1, 1, 8
        fake = np.array([[-0.5], [1.5], [2.5]])  # in the balls of 0; of 1, 2; of 2, 10
        density, coverage = evaluation.density_coverage(fake, real, num_neighbors=1)
        assert (density.value, coverage.value) == (pytest.approx(5 / 3, rel=1e-15), 1.0)
        density, coverage = evaluation.density_coverage(fake[:2], real, num_neighbors=2)  # radii 2, 1, 2, 9
        assert (density.value, coverage.value) == (5 / 4, 1.0)
        density, coverage = evaluation.density_coverage(fake[:2] - 3, real, num_neighbors=1)
        assert (density.value, coverage.value) == (0.0, 0.0)
        assert (density.num_samples, coverage.num_samples) == (2, 4)

    def test_is_that_of_scipys_distances_whatever_the_blocks_in_memory(self, monkeypatch):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((80, 3)), rng.standard_normal((60, 3)) + 1.0
        radii = np.sort(scipy.spatial.distance.cdist(y, y))[:, 5]  # column 0 is the point itself
        inside = scipy.spatial.distance.cdist(x, y) <= radii
        monkeypatch.setattr(pairwise, "BLOCK_ELEMENTS", 100)
        density, coverage = evaluation.density_coverage(x, y)
        assert density.value == pytest.approx(inside.sum() / (5 * 80), rel=1e-14)
        assert coverage.value == inside.any(axis=0).mean()
        # The jackknife of coverage, one generated image left out at a time.
        without = [np.delete(inside, each, axis=0).any(axis=0).mean() for each in range(80)]
        over_samples = 79 / 80 * np.sum((without - np.mean(without)) ** 2)
        share = (60 * coverage.value + 1) / 62
        assert coverage.stderr == pytest.approx(math.sqrt(share * (1 - share) / 60 + over_samples), rel=1e-12)

    def test_of_one_distribution_are_known_and_their_standard_errors_on_the_safe_side(self):
        rng = np.random.default_rng(1)
        draw = lambda: evaluation.density_coverage(rng.standard_normal((40, 2)), rng.standard_normal((30, 2)))  # noqa: E731
        pairs = [draw() for _ in range(400)]
        exact = 1.0, 1 - math.comb(29, 5) / math.comb(69, 5)
        for metrics, expected in zip(zip(*pairs, strict=True), exact, strict=True):
            values = np.array([m.value for m in metrics])
            assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values))
            assert 0.9 < np.mean([m.stderr for m in metrics]) / values.std() < 2.5

    def test_needs_more_real_images_than_neighbors(self):
        with pytest.raises(ValueError, match="reference has 5 rows; expected 6 or more images"):
            evaluation.density_coverage(np.zeros((9, 2)), np.zeros((5, 2)))
        with pytest.raises(ValueError, match="num_neighbors=0; expected 1 or more"):
            evaluation.density_coverage(np.zeros((3, 2)), np.zeros((9, 2)), num_neighbors=0)
