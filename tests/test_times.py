"""Times of training: their law in closed form, and that weights make up for it whatever the density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from analytic import SDES, OrnsteinUhlenbeck

import losses
from parallel import rng

EPS = losses.TRAINING_EPS


def log_variance_ratio(name, t):
    """log(std² / mean_coeff²) in float64, up to a constant: what importance-sampled times are uniform in."""
    integral = 0.1 * t + 19.9 * t**2 / 2  # of beta
    return {
        "vesde": lambda: 2 * t * np.log(5000.0),
        "vpsde": lambda: np.log(np.expm1(integral)),
        "subvpsde": lambda: 2 * np.log(np.sinh(integral / 2)),
        "ou": lambda: np.log(np.expm1(2 * OrnsteinUhlenbeck().rate * t)),
    }[name]()


def closed_form_cdf(name, t):
    first, last = (log_variance_ratio(name, np.float64(end)) for end in (EPS, 1.0))
    return (log_variance_ratio(name, t) - first) / (last - first)


def draw_at(monkeypatch, draw_times, u):
    """Draws with given uniform numbers on [0, 1)."""
    monkeypatch.setattr(rng, "uniform", lambda *args, **kwargs: jnp.asarray(u, jnp.float32))
    return [np.asarray(array, np.float64) for array in draw_times(jax.random.key(0), len(u))]


def test_uniform_times_begin_at_eps():
    t, weight = losses.make_uniform_times(SDES["vpsde"], eps=0.4)(jax.random.key(0), 10_000)
    assert scipy.stats.kstest(np.asarray(t), "uniform", (0.4, 0.6)).statistic < 1.63 / 100
    np.testing.assert_array_equal(weight, 1)


@pytest.mark.parametrize("name", SDES)
def test_importance_sampled_times_follow_the_closed_form_law(name):
    """p(t) ∝ g² / std²; for VP the distribution function is log(exp(∫beta) - 1), scaled; for VE t is uniform."""
    t, weight = losses.make_importance_times(SDES[name])(jax.random.key(0), 100_000)
    t = np.asarray(t, np.float64)
    assert (t.min() >= EPS * (1 - 1e-6), t.max() <= 1.0) == (True, True)
    # 1 % of seeds would exceed 1.63 / sqrt(n).
    assert scipy.stats.kstest(closed_form_cdf(name, t), "uniform").statistic < 1.63 / np.sqrt(len(t))
    if name == "vesde":
        np.testing.assert_allclose(weight, 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", SDES)
def test_importance_sampled_times_invert_their_law(monkeypatch, name):
    """Also near eps in float32: within a piece the law is linear in t, off by at most (length in log-SNR)² / 8."""
    u = np.linspace(0, 1, 20_001)[:-1]
    t, _ = draw_at(monkeypatch, losses.make_importance_times(SDES[name]), u)
    np.testing.assert_allclose(closed_form_cdf(name, t), np.float32(u), atol=2e-6)


@pytest.mark.parametrize("num_pieces", [1, 3, 4096])
@pytest.mark.parametrize("name", SDES)
def test_weighted_means_are_those_of_uniform_times_for_any_number_of_pieces(monkeypatch, name, num_pieces):
    """With u on a fine grid in place of random numbers: midpoints, 16 a piece or more."""
    u = (np.arange(3 * 2**16) + 0.5) / (3 * 2**16)
    t, weight = draw_at(monkeypatch, losses.make_importance_times(SDES[name], num_pieces=num_pieces), u)
    assert weight.mean() == pytest.approx(1.0, rel=1e-5)
    assert (weight * t**2).mean() == pytest.approx((1 - EPS**3) / 3 / (1 - EPS), rel=1e-5)
    assert (weight / (t + 0.01)).mean() == pytest.approx(np.log(1.01 / (EPS + 0.01)) / (1 - EPS), rel=1e-5)


@pytest.mark.parametrize("name", SDES)
def test_the_weight_levels_the_factor_of_the_likelihood_weighting(name):
    """weight * g² / std² is its mean over [eps, T], 2 (log_snr(eps) - log_snr(T)) / (T - eps), to half a piece."""
    sde = SDES[name]
    t, weight = losses.make_importance_times(sde)(jax.random.key(1), 10_000)
    factor = weight * jnp.square(sde.sde(jnp.zeros((len(t), 1)), t)[1] / sde.std(t))
    rise = log_variance_ratio(name, np.float64(1.0)) - log_variance_ratio(name, np.float64(EPS))
    np.testing.assert_allclose(factor, rise / (1 - EPS), rtol=0.6 * rise / 4096)
    uniform, ones = losses.make_uniform_times(sde)(jax.random.key(1), 10_000)
    np.testing.assert_array_equal(ones, 1.0)
    assert scipy.stats.kstest(uniform, "uniform").statistic < 1.63 / np.sqrt(len(uniform))


def test_a_time_depends_on_its_own_key_alone():
    draw_times = losses.make_importance_times(SDES["vpsde"])
    keys = rng.example_keys(jax.random.key(2), 5)
    together, alone = draw_times(keys, 5), draw_times(keys[3:4], 1)
    for all_five, one in zip(together, alone, strict=True):
        assert float(one[0]) == float(all_five[3])
