"""The Frechet distance without bias against closed forms, and its interval against repeated experiments."""

import math

import numpy as np
import pytest

import evaluation
from evaluation import FeatureStatistics
from metrics import frechet


def distances_of(x, reference):
    return frechet._Distances.to(FeatureStatistics.from_features(reference), x)


def test_distances_of_weighted_samples_are_those_of_repeated_ones(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.exponential(size=(40, 5)) + 3.0, rng.standard_normal((30, 5))
    y[:, 4] = y[:, 0]  # a covariance of rank 4
    monkeypatch.setattr(frechet, "BLOCK_ROWS", 7)
    for weights in (np.ones(40, int), rng.integers(3, size=40)):
        expected = evaluation.frechet_distance(np.repeat(x, weights, axis=0), y).value
        assert distances_of(x, y).of(weights) == pytest.approx(expected, rel=1e-7)


def test_parts_have_every_image_equally_often():
    sets = frechet._parts(np.random.default_rng(0).permutation(60))
    assert [[len(part) for part in parts] for parts in sets] == [[30, 30], [40, 40, 40], [60]]
    for parts, times in zip(sets, (1, 2, 1), strict=True):
        assert np.array_equal(np.bincount(np.concatenate(parts)), np.full(60, times))


def test_a_line_in_one_over_n_is_extrapolated_exactly(monkeypatch):
    monkeypatch.setattr(frechet._Distances, "of", lambda self, weights: 0.7 + 5.0 / weights.sum())
    distances = distances_of(np.random.default_rng(0).standard_normal((61, 2)), np.eye(2))
    assert frechet._extrapolate(distances, np.random.default_rng(1)) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_value_is_the_true_distance_and_the_interval_holds_it(monkeypatch, shift):
    monkeypatch.setattr(frechet, "MANY_RESAMPLES", 60)  # for speed
    rng, repeats, n, dimension = np.random.default_rng(1), 100, 100, 6
    reference = FeatureStatistics(np.zeros(dimension), np.eye(dimension), 0)
    scale = 1.0 + shift / 2
    truth = dimension * (shift**2 + (scale - 1.0) ** 2)
    draws = [scale * rng.standard_normal((n, dimension)) + shift for _ in range(repeats)]
    metrics = [evaluation.frechet_distance_unbiased(x, reference) for x in draws]
    values = np.array([m.value for m in metrics])
    plain = np.array([evaluation.frechet_distance(x, reference).value for x in draws])
    uncertainty = values.std() / math.sqrt(repeats)
    bias = plain.mean() - truth
    assert bias > 8 * uncertainty  # there is something to take away,
    assert abs(values.mean() - truth) < 4 * uncertainty + 0.06 * bias  # and it is: the rest is of order 1 / n^2
    assert values.std() < 1.35 * plain.std()  # without making it much noisier
    held = np.mean([low <= truth <= high for low, high in (m.interval for m in metrics)])
    assert held >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / repeats)
    stated = np.mean([m.stderr for m in metrics])
    # Right where the distance is clear of 0, and on the safe side where it is 0.
    assert 0.9 < stated / values.std() < (1.3 if shift else 2.0)


def test_is_the_same_for_rows_and_their_statistics_and_follows_its_seed():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((60, 3)), rng.standard_normal((50, 3))
    metric = evaluation.frechet_distance_unbiased(x, y)
    assert metric == evaluation.frechet_distance_unbiased(x, FeatureStatistics.from_features(y))
    assert metric.value != evaluation.frechet_distance_unbiased(x, y, seed=1).value
    assert metric.interval[0] < metric.value < metric.interval[1]
    assert (metric.name, metric.num_samples) == ("frechet_distance_unbiased", 60)


def test_is_left_out_where_the_bias_is_not_proportional_to_one_over_n():
    x = np.random.default_rng(3).standard_normal((21, 10))
    metric = evaluation.frechet_distance_unbiased(x, x)
    assert (metric.value, metric.stderr, metric.interval) == (None, None, None)
    assert metric.note == "not measured: 21 samples; 22 are needed to extrapolate with 10 features"
    assert evaluation.frechet_distance_unbiased(np.vstack([x, x[:1] + 1.0]), x).value is not None
    with pytest.raises(ValueError, match="features have 10 dimensions, the reference 9"):
        evaluation.frechet_distance_unbiased(x, x[:, :9])
