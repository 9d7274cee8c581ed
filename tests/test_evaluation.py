"""Metrics against closed forms, scipy, brute force, tensorflow_gan, and the spread of repeated experiments."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import tfgan_oracle

import datasets
import evaluation
from evaluation import FeatureStatistics
from metrics import pairwise

TESTS = Path(__file__).parent
TFGAN = json.loads((TESTS / "golden" / "tfgan_metrics.json").read_text())


def random_covariance(rng, dimension):
    factor = rng.standard_normal((dimension, dimension))
    return factor @ factor.T / dimension


def spread(measure, draw, repeats):
    """Returns (standard deviation, mean stated standard error) of a metric over repeated experiments."""
    metrics = [measure(*draw()) for _ in range(repeats)]
    return np.std([m.value for m in metrics], ddof=1), np.mean([m.stderr for m in metrics])


def tfgan_metrics():
    x, y, logits = tfgan_oracle.features()
    blocks = evaluation.kernel_distance_blocks(x, y, max_block_size=100)
    return {
        "frechet_distance": evaluation.frechet_distance(x, y).value,
        "kernel_distance": evaluation.kernel_distance(x, y).value,
        "kernel_distance_blocks": blocks.value,
        "kernel_distance_blocks_stderr": blocks.stderr,
        "inception_score": evaluation.inception_score_from_logits(logits).value,
    }


def test_metrics_are_those_of_tensorflow_gan():
    assert tfgan_metrics() == pytest.approx(TFGAN, rel=1e-9)


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("tensorflow_gan") is None, reason="tensorflow_gan is not installed")
def test_the_recorded_values_are_what_tensorflow_gan_computes():
    command = [sys.executable, TESTS / "tfgan_oracle.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) == pytest.approx(TFGAN, rel=1e-9)


def test_the_metrics_load_no_tensorflow_and_drawing_no_pyplot():
    code = """
import sys, evaluation, plots, report
from metrics import classifier
print([name for name in ("tensorflow", "matplotlib") if name in sys.modules])
plots.figure_bytes(plots.metric_figure([1, 2], [1.0, 2.0], [0.1, None], label="FD"))
print([name for name in ("tensorflow", "matplotlib.pyplot") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=TESTS.parent)
    assert run.stdout.split("\n")[:2] == ["[]", "[]"], run.stderr


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


class TestFeatureStatistics:
    def test_are_numpys_mean_and_covariance_and_survive_a_file(self, tmp_path):
        x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
        statistics = FeatureStatistics.from_features(x)
        np.testing.assert_allclose(statistics.mean, x.astype(np.float64).mean(0), rtol=1e-14)
        np.testing.assert_allclose(statistics.cov, np.cov(x.astype(np.float64).T), rtol=1e-14)
        statistics.save(tmp_path / "folder" / "statistics.npz")
        loaded = FeatureStatistics.load(tmp_path / "folder" / "statistics.npz")
        assert loaded.hash == statistics.hash
        assert loaded.num_samples == 20
        assert loaded.hash != FeatureStatistics(loaded.mean, loaded.cov, 21).hash

    def test_of_other_programs_can_be_read(self, tmp_path):
        np.savez(tmp_path / "fid.npz", mu=np.ones(2), sigma=2 * np.eye(2))
        loaded = FeatureStatistics.load(tmp_path / "fid.npz")
        assert (loaded.mean.sum(), loaded.cov.trace(), loaded.num_samples) == (2.0, 4.0, 0)

    def test_errors_name_the_file(self, tmp_path):
        path = tmp_path / "broken.npz"
        path.write_bytes(b"PK\x03\x04 half a file")
        with pytest.raises(ValueError, match=r"broken.npz is damaged or not an .npz file"):
            FeatureStatistics.load(path)
        np.savez(path, mu=np.ones(2))
        with pytest.raises(ValueError, match=r"broken.npz holds \['mu'\]; expected mean and cov, or mu and sigma"):
            FeatureStatistics.load(path)
        np.savez(path, mu=np.ones(2), sigma=np.eye(3))
        with pytest.raises(ValueError, match=r"broken.npz has mean \(2,\) and covariance \(3, 3\)"):
            FeatureStatistics.load(path)
        np.savez(path, mu=np.ones(2), sigma=np.full((2, 2), np.nan))
        with pytest.raises(ValueError, match=r"broken.npz has 4 values that are NaN"):
            FeatureStatistics.load(path)


class TestInceptionScore:
    def test_is_the_number_of_classes_at_best_and_one_at_worst(self):
        certain = np.eye(5)[np.arange(100) % 5]
        assert evaluation.inception_score(certain).value == pytest.approx(5.0, rel=1e-13)
        assert evaluation.inception_score(certain).stderr == pytest.approx(0.0, abs=1e-13)
        assert evaluation.inception_score(np.full((10, 5), 0.2)).value == pytest.approx(1.0, rel=1e-13)

    def test_of_logits_survives_large_ones(self):
        logits = 1e4 * np.eye(4)[np.arange(40) % 4]
        assert evaluation.inception_score_from_logits(logits).value == pytest.approx(4.0, rel=1e-13)

    def test_of_splits_is_their_mean(self):
        p = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 103)
        parts = [evaluation.inception_score(part).value for part in np.array_split(p, 10)]
        metric = evaluation.inception_score(p, num_splits=10)
        assert metric.value == pytest.approx(np.mean(parts), rel=1e-13)
        assert metric.stderr == pytest.approx(np.std(parts, ddof=1) / math.sqrt(10), rel=1e-13)

    def test_standard_error_is_the_spread_of_repeated_experiments(self):
        rng = np.random.default_rng(1)
        draw = lambda: (rng.dirichlet(np.full(4, 0.4), 200),)  # noqa: E731
        deviation, stated = spread(evaluation.inception_score, draw, 400)
        assert stated == pytest.approx(deviation, rel=0.12)

    def test_refuses_what_is_no_distribution(self):
        with pytest.raises(ValueError, match="do not sum to 1; give class scores to inception_score_from_logits"):
            evaluation.inception_score(np.ones((4, 3)))
        with pytest.raises(ValueError, match="num_splits=0; expected 1 or more"):
            evaluation.inception_score(np.full((4, 2), 0.5), num_splits=0)
        with pytest.raises(ValueError, match="probabilities has 4 rows; expected 20 or more"):
            evaluation.inception_score(np.full((4, 2), 0.5), num_splits=10)


class TestKernelDistance:
    def test_is_the_mean_over_pairs_of_different_images(self):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 1.0
        kernel = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
        within = [np.mean([kernel(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
        across = np.mean([kernel(a, b) for a, b in itertools.product(x, y)])
        assert evaluation.kernel_distance(x, y).value == pytest.approx(sum(within) - 2 * across, rel=1e-12)

    def test_does_not_depend_on_the_size_of_blocks_in_memory(self, monkeypatch):
        rng = np.random.default_rng(1)
        x, y = rng.standard_normal((50, 3)), rng.standard_normal((31, 3)) + 0.5
        whole = evaluation.kernel_distance(x, y)
        monkeypatch.setattr(pairwise, "BLOCK_ELEMENTS", 100)
        blocked = evaluation.kernel_distance(x, y)
        assert (blocked.value, blocked.stderr) == pytest.approx((whole.value, whole.stderr), rel=1e-10)

    def test_is_unbiased_and_its_standard_error_true(self):
        rng = np.random.default_rng(2)
        draw = lambda: (rng.standard_normal((120, 4)) + 0.6, rng.standard_normal((80, 4)))  # noqa: E731
        deviation, stated = spread(evaluation.kernel_distance, draw, 300)
        assert stated == pytest.approx(deviation, rel=0.15)  # 300 values: 4.1 %, and the kernel has heavy tails

    def test_of_one_distribution_is_zero_on_average_and_its_standard_error_on_the_safe_side(self):
        rng = np.random.default_rng(3)
        metrics = [
            evaluation.kernel_distance(rng.standard_normal((60, 8)), rng.standard_normal((90, 8))) for _ in range(300)
        ]
        values, stated = np.array([m.value for m in metrics]), np.mean([m.stderr for m in metrics])
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(300)
        assert 0.95 < stated / values.std() < 1.35

    def test_of_whole_subsets_is_that_of_all_pairs(self):
        rng = np.random.default_rng(4)
        x, y = rng.standard_normal((30, 3)), rng.standard_normal((30, 3)) + 1.0
        metric = evaluation.kernel_distance_subsets(x, y, subset_size=30, num_subsets=3)
        assert metric.value == pytest.approx(evaluation.kernel_distance(x, y).value, rel=1e-10)

    def test_of_subsets_is_near_that_of_all_pairs_and_follows_its_seed(self):
        rng = np.random.default_rng(5)
        x, y = rng.standard_normal((400, 3)), rng.standard_normal((400, 3)) + 0.5
        measure = lambda seed: evaluation.kernel_distance_subsets(x, y, subset_size=100, seed=seed)  # noqa: E731
        assert measure(0) == measure(0)
        assert measure(0).value != measure(1).value
        assert abs(measure(0).value - evaluation.kernel_distance(x, y).value) < 3 * measure(0).stderr
        small = evaluation.kernel_distance_subsets(x, y, subset_size=1000, num_subsets=2)
        assert small.stderr is None  # not even one subset of that size

    def test_refuses_blocks_without_two_images(self):
        x = np.zeros((100, 2))
        with pytest.raises(ValueError, match="makes 50 blocks, too many for 100 and 20 images; use larger blocks"):
            evaluation.kernel_distance_blocks(x, x[:20], max_block_size=2)
        with pytest.raises(ValueError, match="max_block_size=1; expected 2 or more"):
            evaluation.kernel_distance_blocks(x, x, max_block_size=1)
        with pytest.raises(ValueError, match="subset_size=1, num_subsets=100; expected 2 or more"):
            evaluation.kernel_distance_subsets(x, x, subset_size=1)


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


class TestGaussianBitsPerDim:
    def test_of_the_digits_is_that_of_dequantized_images(self):
        train, test = (datasets.load_digits(split).levels.reshape(-1, 64) for split in ("train", "test"))
        rng = np.random.default_rng(0)
        fit = (np.tile(train, (40, 1)) + rng.random((40 * len(train), 64))) / 17
        gaussian = scipy.stats.multivariate_normal(fit.mean(0), np.cov(fit.T, ddof=0))
        draws = [-gaussian.logpdf((test + rng.random(test.shape)) / 17).mean() for _ in range(20)]
        metric = evaluation.gaussian_bits_per_dim(train.reshape(-1, 8, 8, 1), test.reshape(-1, 8, 8, 1), 17)
        # The 20 draws are uncertain by 0.0005; the fit to 40 draws of each training image by less.
        assert metric.value == pytest.approx(np.mean(draws) / (64 * math.log(2)) + math.log2(17), abs=0.003)
        assert metric.value == pytest.approx(2.949, abs=0.0005)  # what the README states
        assert metric.num_samples == 297

    def test_of_uniform_noise_is_little_more_than_the_bits_of_a_level(self):
        levels = np.random.default_rng(1).integers(0, 4, (4000, 2, 2, 1))
        metric = evaluation.gaussian_bits_per_dim(levels[:2000], levels[2000:], 4)
        # A Gaussian of variance 1/12 in place of a uniform density on [0, 1): 1/2 ln(2 pi e / 12) nats more.
        expected = 2.0 + 0.5 * math.log2(2 * math.pi * math.e / 12)
        assert abs(metric.value - expected) < 4 * metric.stderr + 0.002

    def test_refuses_wrong_levels_and_shapes(self):
        levels = np.zeros((5, 2, 2, 1), np.uint8)
        with pytest.raises(ValueError, match=r"num_levels=2, but levels are not all in 0 .. 1"):
            evaluation.gaussian_bits_per_dim(levels, levels + 2, 2)
        with pytest.raises(ValueError, match=r"training images have shape \(2, 2, 1\), test images \(2, 1, 1\)"):
            evaluation.gaussian_bits_per_dim(levels, levels[:, :, :1], 2)
        with pytest.raises(ValueError, match="images has 1 rows; expected 2 or more"):
            evaluation.gaussian_bits_per_dim(levels[:1], levels, 2)


def test_mean_metric_is_a_mean_with_its_standard_error():
    metric = evaluation.mean_metric("loss", np.array([1.0, 2.0, 6.0]), unit="nats")
    assert (metric.value, metric.num_samples, metric.unit) == (3.0, 3, "nats")
    assert metric.stderr == pytest.approx(math.sqrt(7.0 / 3.0), rel=1e-14)
    with pytest.raises(ValueError, match="loss has 1 values that are NaN or infinite"):
        evaluation.mean_metric("loss", np.array([1.0, np.inf]))
    with pytest.raises(ValueError, match=r"loss has shape \(1,\); expected \[N\] with N >= 2"):
        evaluation.mean_metric("loss", np.array([1.0]))


def test_content_hash_tells_apart_shape_type_value_and_order():
    a = np.arange(6)
    variants = [(a,), (a.reshape(2, 3),), (a.astype(np.int32),), (a[::-1],), (a, a), ("a", "b"), ("ab",)]
    assert len({evaluation.content_hash(*variant) for variant in variants}) == len(variants)
    assert evaluation.content_hash(a[::2]) == evaluation.content_hash(np.array([0, 2, 4]))


@pytest.mark.parametrize(
    "measure", [evaluation.frechet_distance, evaluation.kernel_distance, evaluation.precision_recall]
)
def test_bad_features_are_refused(measure):
    good = np.random.default_rng(0).standard_normal((10, 3))
    bad = good.copy()
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match="features has 1 values that are NaN or infinite"):
        measure(bad, good)
    with pytest.raises(ValueError, match=r"reference has 1 rows; expected \d or more images"):
        measure(good, good[:1])
    with pytest.raises(ValueError, match="features have 3 dimensions, the reference 2; use the same extractor"):
        measure(good, good[:, :2])
    with pytest.raises(ValueError, match=r"features has shape \(10,\); expected \[N, D\]"):
        measure(good[:, 0], good)


def test_sample_metrics_measures_the_test_split_in_the_place_of_samples():
    rng = np.random.default_rng(0)
    split = lambda n, shift: (rng.standard_normal((n, 4)) + shift, rng.standard_normal((n, 3)))  # noqa: E731
    samples, train, test = split(60, 0.5), rng.standard_normal((90, 4)), split(40, 0.0)
    metrics = {m.name: m for m in evaluation.sample_metrics(samples, train=train, test=test)}
    names = ["frechet_distance", "kernel_distance", "inception_score", "precision", "recall"]
    assert list(metrics) == names + [f"{name}_test" for name in names]
    assert metrics["frechet_distance_test"].value == evaluation.frechet_distance(test[0], train).value
    assert metrics["recall"] == evaluation.precision_recall(samples[0], train)[1]
    assert metrics["inception_score_test"].num_samples == 40


def test_sample_metrics_takes_blocks_of_large_sets(monkeypatch):
    rng = np.random.default_rng(1)
    monkeypatch.setattr(evaluation, "FULL_KERNEL_IMAGES", 50)
    x = rng.standard_normal((60, 4))
    metrics = {m.name: m for m in evaluation.sample_metrics((x, x), train=x, test=(x[:30], x[:30]))}
    assert "disjoint blocks" in metrics["kernel_distance"].note
