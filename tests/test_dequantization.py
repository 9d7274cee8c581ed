"""Dequantization: the law of the noise, and the likelihood of 8-bit data against probabilities known exactly."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from analytic import QUICK
from scipy.special import logsumexp

import datasets
import dequantization
import likelihood
from configs import base
from parallel import rng
from sde_lib import VESDE, VPSDE, expand
from solvers.noise_levels import noise_levels

EPS = likelihood.LIKELIHOOD_EPS


def build(protocol, *, sde=None, centered=False, num_levels=256, intervals=False):
    config = base.get_config()
    config.likelihood.dequantization = protocol
    config.data.update(centered=centered, num_levels=num_levels, uniform_dequantization=intervals)
    scaler = datasets.build_scaler(config)
    return dequantization.build_dequantization(config, scaler, sde or VPSDE(), eps=EPS), scaler


# --- the law of the noise --------------------------------------------------------------------------------------------

GRIDS = [(True, 256, False), (False, 17, True), (False, 2, False)]


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), VESDE(sigma_min=1.0)], ids=["2_to_500", "0.2_to_50", "narrow"])
@pytest.mark.parametrize(("centered", "num_levels", "intervals"), GRIDS)
def test_truncated_normal_has_its_law(sde, centered, num_levels, intervals):
    """Distribution, range and log-density are scipy's; std and bin from the definitions, in float64."""
    dequantize, _ = build("truncated_normal", sde=sde, centered=centered, num_levels=num_levels, intervals=intervals)
    levels = np.random.RandomState(0).randint(0, num_levels, (3000, 1, 2, 2)).astype(np.uint8)
    x, log_q = jax.device_get(jax.jit(dequantize)(jax.random.key(1), levels))
    scale, bins = 2.0 if centered else 1.0, num_levels - (not intervals)
    middle = scale * (levels + 0.5 * intervals) / bins - (1.0 if centered else 0.0)
    # sigma at eps: sqrt(exp(∫beta) - 1) for VP, sigma_min (sigma_max / sigma_min)^eps for VE.
    sigma = (
        math.sqrt(math.expm1(0.1 * EPS + 19.9 * EPS**2 / 2))
        if isinstance(sde, VPSDE)
        else float(sde.sigma_min * (sde.sigma_max / sde.sigma_min) ** EPS)
    )
    half = scale / bins / 2
    law = scipy.stats.truncnorm(-half / sigma, half / sigma, scale=sigma)
    noise = x.astype(np.float64) - middle
    rounding = 2 * np.finfo(np.float32).eps  # of x, at most 1
    assert abs(noise).max() <= half + rounding
    assert scipy.stats.kstest(noise.ravel(), law.cdf).pvalue > 1e-3
    # log q is of the noise before x was rounded: its slope times the rounding of each of the four values.
    tolerance = 1e-4 + 4 * min(half, 6 * sigma) / sigma**2 * rounding
    np.testing.assert_allclose(log_q, law.logpdf(np.clip(noise, -half, half)).sum(axis=(1, 2, 3)), atol=tolerance)


def test_a_uniform_draw_of_minus_one_is_not_infinitely_far(monkeypatch):
    """One draw in 2^24: without a bound it would be 500 standard deviations off, and its log-density -1e5 nats."""
    monkeypatch.setattr(rng, "uniform", lambda key, shape, *limits: jnp.full(shape, -1.0))
    dequantize, _ = build("truncated_normal", num_levels=2)
    x, log_q = dequantize(jax.random.key(0), jnp.zeros((1, 1, 1, 1), jnp.uint8))
    sigma = noise_levels(VPSDE(), np.array([EPS])).sigma[0]
    assert -5.5 * sigma < float(x[0, 0, 0, 0]) < -5 * sigma
    assert float(log_q[0]) > -(5.5**2) / 2


@pytest.mark.parametrize(("centered", "num_levels", "intervals"), GRIDS)
def test_uniform_and_none(centered, num_levels, intervals):
    """Uniform noise fills [v, v + 1) / L whatever the training; none is the middle of the network's own bin."""
    levels = np.arange(num_levels, dtype=np.uint8).repeat(20).reshape(-1, 1, 2, 2)
    scale, shift = (2.0, -1.0) if centered else (1.0, 0.0)
    dequantize, _ = build("uniform", centered=centered, num_levels=num_levels, intervals=intervals)
    x, log_q = jax.device_get(dequantize(jax.random.key(0), levels))
    u = ((x - shift) / scale) * num_levels - levels
    assert scipy.stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    np.testing.assert_allclose(log_q, 4 * math.log(num_levels / scale), rtol=1e-6)
    dequantize, scaler = build("none", centered=centered, num_levels=num_levels, intervals=intervals)
    x, log_q = jax.device_get(dequantize(jax.random.key(0), levels))
    bins = num_levels if intervals else num_levels - 1
    np.testing.assert_allclose((x - shift) / scale * bins, levels + 0.5 * intervals, atol=1e-4)
    np.testing.assert_allclose(log_q, 4 * math.log(bins / scale), rtol=1e-6)
    if not intervals:
        np.testing.assert_array_equal(x, scaler.to_network(jax.random.key(1), levels))  # as in training


@pytest.mark.parametrize("protocol", dequantization.PROTOCOLS)
def test_an_image_depends_on_its_own_key_alone(protocol):
    dequantize, _ = build(protocol)
    levels = np.random.RandomState(0).randint(0, 256, (6, 2, 2, 3)).astype(np.uint8)
    keys = rng.example_keys(jax.random.key(3), 6)
    together, alone = dequantize(keys, levels), dequantize(keys[2:3], levels[2:3])
    np.testing.assert_array_equal(together[0][2:3], alone[0])
    np.testing.assert_allclose(together[1][2:3], alone[1], rtol=1e-6)


def test_an_unknown_protocol_is_refused():
    known = "known: none, truncated_normal, uniform"
    with pytest.raises(ValueError, match=f"likelihood.dequantization='gaussian' is unknown; {known}"):
        build("gaussian")


# --- 8-bit data of known probabilities -------------------------------------------------------------------------------
# The density that the ODE knows is a mixture of normals, so that the probability of each level is a sum of differences
# of distribution functions. "smooth": wide components, nothing that tells of levels. "points": a few levels without
# noise, at eps peaks of a quarter of a bin, as a network sees them that was trained without dequantization.

SDE = VPSDE(beta_min=0.4)  # at eps a std of 2e-3, half a bin being two of them
TOYS = {
    "smooth": ([0.3, 0.2, 0.2, 0.2, 0.1], [-0.01, 0.0, 0.01, 0.02, 0.03], [0.012] * 5),
    "points": ([0.1, 0.2, 0.3, 0.25, 0.15], 2 * np.array([120, 126, 127, 130, 140]) / 255 - 1, [0.0] * 5),
}
CASES = [(toy, protocol) for toy in TOYS for protocol in ("uniform", "truncated_normal")]
DRAWS = 64
SUPPORT = np.arange(110, 147)
KERNEL = noise_levels(SDE, np.array([EPS]))


def components(toy):
    """Weights, means and stds of the mixture at eps."""
    weights, means, stds = (np.asarray(a, np.float64) for a in TOYS[toy])
    return weights, KERNEL.mean_coeff * means, np.hypot(KERNEL.mean_coeff * stds, KERNEL.std)


def mixture_score(toy, x, t):
    """The exact score of a mixture, given as three arrays."""
    weights, means, stds = toy
    m, s = SDE.mean_coeff(t)[:, None], SDE.std(t)[:, None]
    variance, offset = m**2 * stds[None] ** 2 + s**2, x.reshape(-1, 1) - m * means[None]
    share = jax.nn.softmax(jnp.log(weights)[None] - jnp.log(variance) / 2 - offset**2 / (2 * variance), axis=1)
    return expand(-jnp.sum(share * offset / variance, axis=1), x) * jnp.ones_like(x)


def log_density(toy, x):
    """log p(x) at eps, in nats, in float64; x[...]."""
    weights, means, stds = components(toy)
    return logsumexp(scipy.stats.norm.logpdf(x[..., None], means, stds) + np.log(weights), axis=-1)


def bins_of(protocol):
    """Edges of the 256 bins in [-1, 1]: intervals, or what is around the points of the network's grid."""
    v, intervals = np.arange(256), protocol == "uniform"
    bins, shift = (256, 0.0) if intervals else (255, -0.5)
    return 2 * (v + shift) / bins - 1, 2 * (v + shift + 1) / bins - 1


def probabilities(case):
    toy, protocol = case
    weights, means, stds = components(toy)
    low, high = (scipy.stats.norm.cdf(edge[:, None], means, stds) for edge in bins_of(protocol))
    every = (high - low) @ weights
    assert every.sum() == pytest.approx(1, abs=1e-9)
    return every[SUPPORT]


def expected_bits(case):
    """E_q[log2 q - log2 p] of each level by the midpoint rule in float64."""
    toy, protocol = case
    low, high = bins_of(protocol)
    offset = (high - low)[0] * ((np.arange(1000) + 0.5) / 1000 - 0.5)
    half, sigma = (high - low)[0] / 2, KERNEL.sigma[0]
    truncated = scipy.stats.truncnorm(-half / sigma, half / sigma, scale=sigma)
    log_q = truncated.logpdf(offset) if protocol == "truncated_normal" else np.full(1000, -np.log(2 * half))
    log_p = log_density(toy, (low + high)[:, None] / 2 + offset)
    return np.mean(np.exp(log_q) * 2 * half * (log_q - log_p), axis=1)[SUPPORT] / math.log(2)


@pytest.fixture(scope="module")
def measured():
    """bits/dim, nats and x of every draw, [levels, DRAWS], for each case.

    Of the levels in SUPPORT: the others have a probability of less than 1e-9 together, and cost many steps.
    """
    config = base.get_config()
    config.data.update(centered=True)
    config.likelihood.update(trace="exact", rtol=1e-6, atol=1e-7)  # peaks are 2e-3 wide
    run = likelihood.build_likelihood(config, SDE)
    levels = SUPPORT.astype(np.uint8).repeat(DRAWS).reshape(-1, 1, 1, 1)
    program = jax.jit(
        lambda toy, x, log_q: run(jax.random.key(0), functools.partial(mixture_score, toy), x, log_q),
        compiler_options=QUICK,
    )
    results = {}
    for case in CASES:
        dequantize, _ = build(case[1], sde=SDE, centered=True)
        x, log_q = dequantize(jax.random.key(5), levels)
        toy = [np.asarray(a, np.float32) for a in TOYS[case[0]]]
        result = program(toy, x, log_q)
        results[case] = [np.asarray(a, np.float64).reshape(-1, DRAWS) for a in (result.bpd, result.nats, x)]
    return results


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_estimates_the_probability_of_each_level_without_bias(measured, case):
    """The mean of p(x) / q(x | v) is P(v), and the sum over the 256 levels is 1."""
    bits, nats, x = measured[case]
    exact_nats, exact = log_density(case[0], x), probabilities(case)
    likely = exact_nats > -20
    np.testing.assert_allclose(nats[likely], exact_nats[likely], atol=5e-3)
    ratio = 2.0**-bits
    mean, stderr = ratio.mean(axis=1), ratio.std(axis=1, ddof=1) / math.sqrt(DRAWS)
    seen = exact > 1e-3  # below, the tail of a bin makes all of it, and 64 draws may not meet it
    assert (abs(mean - exact)[seen] < 4.5 * stderr[seen] + 5e-3 * exact[seen]).all()
    assert abs(mean.sum() - 1) < 4 * math.hypot(*stderr) + 5e-3


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_mean_bits_are_above_those_of_the_level_by_the_divergence_of_the_noise(measured, case):
    bits = measured[case][0]
    exact, expected = probabilities(case), expected_bits(case)
    seen = exact > 1e-3
    assert (expected[seen] > -np.log2(exact[seen])).all()
    mean, stderr = bits.mean(axis=1), bits.std(axis=1, ddof=1) / math.sqrt(DRAWS)
    assert (abs(mean - expected)[seen] < 4.5 * stderr[seen] + 1e-2).all()


def test_noise_is_best_where_it_is_the_models_own(measured):
    """Bits lost on average by each: none by uniform noise in a smooth density, none by normal noise around points."""
    lost = {}
    for case in CASES:
        exact = probabilities(case)
        seen = exact > 0.04  # in "points", those that hold one, and not their neighbours
        excess = measured[case][0].mean(axis=1)[seen] + np.log2(exact[seen])
        lost[case] = np.average(excess, weights=exact[seen])
    assert lost["smooth", "uniform"] < 0.05 < lost["smooth", "truncated_normal"]
    assert lost["points", "truncated_normal"] < 0.02 < 0.1 < lost["points", "uniform"]
