"""The Frechet distance against closed forms, scipy, the bootstrap, and the spread of repeated experiments."""

import numpy as np
import pytest
import scipy.linalg
from repeats import spread

import evaluation
from evaluation import FeatureStatistics


def random_covariance(rng, dimension):
    factor = rng.standard_normal((dimension, dimension))
    return factor @ factor.T / dimension


class TestFrechetDistance:
    def test_of_commuting_gaussians_is_the_closed_form(self):
        mean, a, b = np.array([1.0, -2.0, 0.5]), np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
        x, y = FeatureStatistics(mean, np.diag(a), 0), FeatureStatistics(np.zeros(3), np.diag(b), 0)
        expected = mean @ mean + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
        metric = evaluation.frechet_distance(x, y)
        assert metric.value == pytest.approx(expected, rel=1e-13)
        assert metric.stderr == 0.0  # both sides exact

    def test_of_any_gaussians_is_that_of_scipy(self):
        rng = np.random.default_rng(1)
        means, covs = rng.standard_normal((2, 8)), [random_covariance(rng, 8) for _ in range(2)]
        root = scipy.linalg.sqrtm(covs[0] @ covs[1])
        expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covs[0] + covs[1] - 2 * root.real)
        x, y = (FeatureStatistics(mean, cov, 0) for mean, cov in zip(means, covs, strict=True))
        assert evaluation.frechet_distance(x, y).value == pytest.approx(expected, rel=1e-9)

    def test_does_not_change_with_rotation_and_constant_features(self):
        rng = np.random.default_rng(2)
        x, y = rng.standard_normal((40, 4)) + 0.5, 2.0 * rng.standard_normal((30, 4))
        rotation = np.linalg.qr(rng.standard_normal((60, 60)))[0]
        embed = lambda z: np.hstack([z, np.full((len(z), 56), 3.0)]) @ rotation  # noqa: E731
        few, many = evaluation.frechet_distance(x, y), evaluation.frechet_distance(embed(x), embed(y))
        assert many.value == pytest.approx(few.value, rel=1e-9)
        assert many.stderr == pytest.approx(few.stderr, rel=1e-9)

    def test_of_fewer_images_than_features_is_finite_and_zero_to_itself(self):
        x = np.random.default_rng(3).standard_normal((5, 50))
        assert evaluation.frechet_distance(x, x).value == pytest.approx(0.0, abs=1e-12)
        metric = evaluation.frechet_distance(x, np.ones((3, 50)))  # a covariance of zeros
        assert metric.value == pytest.approx(np.sum((x.mean(0) - 1) ** 2) + np.cov(x.T).trace(), rel=1e-12)
        assert metric.stderr > 0

    def test_standard_error_is_that_of_the_bootstrap(self):
        rng = np.random.default_rng(4)
        # Skewed on purpose: of symmetric features the sign of the shift would not matter.
        x = rng.exponential(size=(300, 3)) @ rng.standard_normal((3, 3)) + 0.7
        y = rng.exponential(size=(200, 3))
        resample = lambda z: z[rng.integers(len(z), size=len(z))]  # noqa: E731
        values = [evaluation.frechet_distance(resample(x), resample(y)).value for _ in range(400)]
        # 400 replicates know the standard deviation to 3.5 %; three of these, and the bootstrap's own bias.
        assert evaluation.frechet_distance(x, y).stderr == pytest.approx(np.std(values), rel=0.12)

    def test_and_its_standard_error_are_those_of_the_sides_exchanged(self):
        rng = np.random.default_rng(7)
        x, y = rng.exponential(size=(50, 3)), 2.0 * rng.exponential(size=(40, 3))
        one, other = evaluation.frechet_distance(x, y), evaluation.frechet_distance(y, x)
        assert (one.value, one.stderr) == pytest.approx((other.value, other.stderr), rel=1e-10)

    @pytest.mark.parametrize("known", [False, True])
    def test_standard_error_is_the_spread_of_repeated_experiments(self, known):
        rng = np.random.default_rng(5)
        factor = np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.2, 0.0, 0.7]])
        draw_x = lambda: rng.standard_normal((250, 3)) @ factor + 0.5  # noqa: E731
        exact = FeatureStatistics(np.zeros(3), np.eye(3), 0)
        draw = lambda: (draw_x(), exact if known else rng.standard_normal((150, 3)))  # noqa: E731
        deviation, stated = spread(evaluation.frechet_distance, draw, 400)
        assert stated == pytest.approx(deviation, rel=0.12)  # 3 standard errors of a deviation from 400 values

    def test_standard_error_from_statistics_is_that_from_gaussian_rows(self):
        rng = np.random.default_rng(6)
        x, y = rng.standard_normal((4000, 3)) + 0.3, 1.5 * rng.standard_normal((3000, 3))
        rows = evaluation.frechet_distance(x, y).stderr
        statistics = [FeatureStatistics.from_features(z) for z in (x, y)]
        assert evaluation.frechet_distance(*statistics).stderr == pytest.approx(rows, rel=0.05)
        assert evaluation.frechet_distance(statistics[0], y).stderr == pytest.approx(rows, rel=0.05)


def test_statistics_are_numpys_mean_and_covariance():
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    statistics = FeatureStatistics.from_features(x)
    np.testing.assert_allclose(statistics.mean, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.cov, np.cov(x.astype(np.float64).T), rtol=1e-14)
    assert statistics.num_samples == 20
    assert statistics.hash != FeatureStatistics(statistics.mean, statistics.cov, 21).hash
