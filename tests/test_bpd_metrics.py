"""bits/dim of a data set: what is averaged first, what the standard error is of, and what the note says."""

import types

import numpy as np
import pytest
import tiny

from metrics.metric import make_metric
from modes.evaluate import evaluate as eval_loop
from report.page import number_text

GAUSSIAN = make_metric("gaussian_bits_per_dim", 2.949, 0.019, 297)


def metrics_of(monkeypatch, measured, **changes):
    evaluator = types.SimpleNamespace(config=tiny.make_config(**changes), gaussian=GAUSSIAN, no_gaussian="")
    measured = {"nfe": np.full_like(measured["bpd"], 100.0), "nats": -10 * measured["bpd"]} | measured
    if "bound" in measured:
        measured["bound_nats"] = -10 * measured["bound"]
    monkeypatch.setattr(eval_loop, "measure_bpd", lambda *_: measured)
    return {metric.name: metric for metric in eval_loop._bpd_metrics(evaluator, None, None)}


def draws(num_draws, *, image_std=0.3, own_std=0.1, num_images=2000):
    random = np.random.RandomState(0)
    images = 2.99 + image_std * random.randn(num_images)
    return images + own_std * random.randn(num_draws, num_images)


def test_images_are_averaged_over_draws_first(monkeypatch):
    """Then the standard error is over images, sqrt(image^2 + own^2 / draws) / sqrt(N), whatever makes them vary."""
    bpd = draws(4)
    found = metrics_of(monkeypatch, {"bpd": bpd, "stderr": np.full_like(bpd, np.nan)}, eval__bpd_num_draws=4)
    metric = found["bits_per_dim"]
    assert metric.value == pytest.approx(bpd.mean())
    assert metric.num_samples == 2000
    assert metric.stderr == pytest.approx(np.sqrt((0.3**2 + 0.1**2 / 4) / 2000), rel=0.05)
    assert number_text(metric.value, metric.stderr) == f"{metric.value:.4f} ± {metric.stderr:.4f}"
    assert "4 draw(s) of dequantization uniform" in metric.note
    # sqrt(0.1^2 / 4) = 0.05, as the spread of 4 draws estimates it: 8 % less for few of them.
    assert "own standard error over its draws and probes is 0.045 on average" in metric.note
    assert list(found) == ["bits_per_dim", "log_likelihood", "gaussian_bits_per_dim"]
    assert found["log_likelihood"].value == pytest.approx(-10 * metric.value)
    assert found["log_likelihood"].stderr == pytest.approx(10 * metric.stderr)
    assert found["log_likelihood"].unit == "nats"


def test_one_draw_shows_the_error_over_probes(monkeypatch):
    bpd = draws(1)
    note = metrics_of(monkeypatch, {"bpd": bpd, "stderr": np.full_like(bpd, 0.031)})["bits_per_dim"].note
    assert "own standard error over its probes alone is 0.031 on average" in note
    for unknown in (np.nan, 0.0):  # one probe; the exact trace
        metric = metrics_of(monkeypatch, {"bpd": bpd, "stderr": np.full_like(bpd, unknown)})["bits_per_dim"]
        assert "own standard error" not in metric.note


def test_the_bound_stands_beside_with_its_own_error(monkeypatch):
    bpd, bound = draws(1), draws(1) + 0.2
    found = metrics_of(
        monkeypatch,
        {"bpd": bpd, "stderr": np.full_like(bpd, np.nan), "bound": bound, "bound_stderr": np.full_like(bpd, 0.11)},
    )
    in_nats, in_bits = ("log_likelihood", "log_likelihood_bound"), ("bits_per_dim", "bits_per_dim_bound")
    assert set(found) == {*in_bits, *in_nats, "gaussian_bits_per_dim"}
    assert found["log_likelihood_bound"].value == pytest.approx(-10 * bound.mean())
    assert found["bits_per_dim_bound"].value == pytest.approx(bound.mean())
    assert "over its times alone is 0.11 on average" in found["bits_per_dim_bound"].note
    assert "4 network evaluations" in found["bits_per_dim_bound"].note


def test_without_noise_the_number_is_said_to_be_no_bound(monkeypatch):
    bpd = draws(1)
    found = metrics_of(
        monkeypatch, {"bpd": bpd, "stderr": np.full_like(bpd, np.nan)}, likelihood__dequantization="none"
    )
    assert "this is no bound on the bits/dim of the levels" in found["bits_per_dim"].note
    assert list(found) == ["bits_per_dim", "log_likelihood"]  # nothing to compare it with
