"""Metrics against closed forms, brute force, tensorflow_gan, and the spread of repeated experiments."""

import doctest
import functools
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tfgan_oracle
from repeats import spread

import datasets
import evaluation
from evaluation import FeatureStatistics
from metrics import pairwise
from storage.files import content_hash

TESTS = Path(__file__).parent
TFGAN = json.loads((TESTS / "golden" / "tfgan_metrics.json").read_text())


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


@pytest.mark.exhaustive
def test_the_example_of_the_module_works():
    result = doctest.testmod(evaluation)
    assert (result.failed, result.attempted) == (0, 9)


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
import sys, evaluation
from report import plots
print([name for name in ("tensorflow", "matplotlib") if name in sys.modules])
plots.figure_bytes(plots.metric_figure([1, 2], [1.0, 2.0], [0.1, None], label="FD"))
print([name for name in ("tensorflow", "matplotlib.pyplot") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=TESTS.parent)
    assert run.stdout.split("\n")[:2] == ["[]", "[]"], run.stderr


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
    assert len({content_hash(*variant) for variant in variants}) == len(variants)
    assert content_hash(a[::2]) == content_hash(np.array([0, 2, 4]))


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


def split_of(rng, n, shift=0.0):
    return rng.standard_normal((n, 4)) + shift, rng.standard_normal((n, 3))


def test_sample_metrics_measures_the_test_split_in_the_place_of_samples():
    rng = np.random.default_rng(0)
    samples, train, test = split_of(rng, 60, 0.5), rng.standard_normal((90, 4)), split_of(rng, 40)
    measured = evaluation.sample_metrics(samples, reference=train, test=test, extractor="classifier")
    metrics = {m.name: m for m in measured}
    names = ["frechet_distance", "frechet_distance_unbiased", "inception_score", "kernel_distance"]
    names += ["precision", "recall", "density", "coverage"]
    assert list(metrics) == names + [f"{name}_test" for name in names]
    assert metrics["frechet_distance_test"].value == evaluation.frechet_distance(test[0], train).value
    assert metrics["recall"] == evaluation.precision_recall(samples[0], train)[1]
    assert metrics["coverage"] == evaluation.density_coverage(samples[0], train)[1]
    assert metrics["inception_score_test"].num_samples == 40
    prepared = evaluation.PreparedReference.of(train)
    again = evaluation.sample_metrics(samples, reference=prepared, extractor="classifier")
    floor = evaluation.floor_metrics(test, reference=prepared, extractor="classifier")
    assert [*again, *floor] == list(metrics.values())


def test_sample_metrics_measures_what_statistics_allow():
    rng = np.random.default_rng(2)
    samples, train = split_of(rng, 60, 0.5), rng.standard_normal((90, 4))
    statistics = FeatureStatistics.from_features(train)
    metrics = evaluation.sample_metrics(samples, reference=statistics, extractor="classifier")
    assert [m.name for m in metrics] == ["frechet_distance", "frechet_distance_unbiased", "inception_score"]
    assert metrics[0].value == pytest.approx(evaluation.frechet_distance(samples[0], train).value, rel=1e-12)
    with pytest.raises(ValueError, match="extractor='vgg' is unknown"):
        evaluation.sample_metrics(samples, reference=statistics, extractor="vgg")


def test_sample_metrics_leaves_out_neighbours_of_too_few_images():
    rng = np.random.default_rng(3)
    few = rng.standard_normal((5, 4))
    metrics = evaluation.sample_metrics(split_of(rng, 11), reference=few, extractor="classifier")
    assert [m.name for m in metrics if m.value is None] == ["precision", "recall", "density", "coverage"]
    assert metrics[-1].note == "not measured: 11 and 5 images are too few to have such neighbours"


def test_sample_metrics_takes_blocks_of_large_sets(monkeypatch):
    rng = np.random.default_rng(1)
    monkeypatch.setattr(evaluation, "FULL_KERNEL_IMAGES", 50)
    x = rng.standard_normal((60, 4))
    metrics = evaluation.sample_metrics((x, x), reference=x, extractor="classifier")
    assert ["disjoint blocks" in m.note for m in metrics if m.name == "kernel_distance"] == [True]


def test_sample_metrics_do_not_depend_on_the_order_of_the_images(monkeypatch):
    """Folders give images class after class: consecutive blocks and splits would hold one class each."""
    rng = np.random.default_rng(4)
    blocks_of = evaluation.kernel_distance_blocks
    monkeypatch.setattr(evaluation, "FULL_KERNEL_IMAGES", 500)
    monkeypatch.setattr(evaluation, "PUBLISHED_SAMPLES", 1000)
    monkeypatch.setattr(evaluation, "kernel_distance_blocks", functools.partial(blocks_of, max_block_size=200))
    classes = np.repeat(np.arange(4), 300)

    def features(order):
        return 3.0 * np.eye(4)[order] + rng.standard_normal((1200, 4))

    x, logits = features(rng.permutation(classes)), 5.0 * np.eye(4)[classes]
    metrics = evaluation.sample_metrics((x, logits), reference=features(classes), extractor="classifier")
    values = {m.name: m for m in metrics}
    whole, ten = values["inception_score"], values["inception_score_10"]
    assert ten.value == pytest.approx(whole.value, rel=0.02)
    blocks = values["kernel_distance"]
    assert abs(blocks.value) < 5 * blocks.stderr
    assert blocks.stderr < 0.1 * blocks_of(x, features(classes), max_block_size=200).value
