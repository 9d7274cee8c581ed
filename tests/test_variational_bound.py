"""The variational bound of Gaussian and Gaussian-mixture data, whose exact value is an integral over one variable."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from analytic import QUICK, SDES
from cases import by_default
from scipy.special import logsumexp

import variational_bound
from configs import base
from parallel import rng
from sde_lib import VESDE, VPSDE, expand
from solvers.noise_levels import noise_levels, time_of_log_snr

EPS = 1e-5
# Two that end far from their prior, or at data that are far from forgotten.
SDES = SDES | {"short_vp": VPSDE(beta_max=1.0), "short_ve": VESDE(sigma_max=1.0)}
SPREADS = np.array([0.1, 0.3, 0.5, 0.7], np.float32).reshape(4, 1, 1, 1)
X = 0.2 + SPREADS * np.random.RandomState(0).randn(4, 2, 2, 3).astype(np.float32)
DIMS, REPLICATES, NUM_TIMES = 12, 200, 32
# Weights, means and stds of each of the independent values of an image.
GAUSSIAN = ([1.0], [0.3], [0.5])
MIXTURE = ([0.4, 0.6], [-0.5, 0.4], [0.3, 0.15])


def components(data, m, s):
    """The mixture under the kernel N(m x0, s^2)."""
    weights, means, stds = (np.asarray(a, np.float64) for a in data)
    return weights, m * means, np.hypot(m * stds, s)


def mixture_score(sde, data, scale, x, t):
    """The exact score of the data under `sde`, times `scale`."""
    weights, means, stds = (jnp.asarray(a, jnp.float32).reshape(1, 1, 1, 1, -1) for a in data)
    m, s = (expand(a, x)[..., None] for a in (sde.mean_coeff(t), sde.std(t)))
    variance, offset = m**2 * stds**2 + s**2, x[..., None] - m * means
    share = jax.nn.softmax(jnp.log(weights) - jnp.log(variance) / 2 - offset**2 / (2 * variance), axis=-1)
    return -scale * jnp.sum(share * offset / variance, axis=-1)


@functools.cache
def compiled(name, data, scale, settings):
    """A program of (keys, x) for the given SDE, data and settings."""
    config, sde = base.get_config(), SDES[name]
    config.update_from_flattened_dict({"likelihood.bound_num_times": NUM_TIMES, "data.num_levels": 8} | dict(settings))
    bound = variational_bound.build_variational_bound(config, sde, eps=EPS)
    data = {"gaussian": GAUSSIAN, "mixture": MIXTURE}[data]
    score_fn = functools.partial(mixture_score, sde, data, scale)
    return jax.jit(lambda key, x: bound(key, score_fn, x, jnp.full(x.shape[0], 2.5)), compiler_options=QUICK)


def measure(name, data="gaussian", scale=1.0, *, key=None, x=None, **settings):
    """The bound of X, REPLICATES times each: a BoundResult of numpy [REPLICATES, 4]."""
    settings = tuple((name.replace("__", "."), value) for name, value in settings.items())
    key = jax.random.key(0) if key is None else key
    x = np.tile(X, (REPLICATES, 1, 1, 1)) if x is None else x
    result = jax.device_get(compiled(name, data, scale, settings)(key, x))
    return jax.tree.map(lambda a: a.reshape(-1, 4) if a.size >= 4 else a, result)


def mean_and_stderr(values):
    return values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(len(values))


def mean_log_density(data, m, s, x, prior_std=None):
    """E_z log p(m x + s z) less, if given, that of the prior; summed over the values of an image, in float64."""
    z = np.linspace(-9, 9, 2001)
    state = m * x[..., None].astype(np.float64) + s * z
    weights, means, stds = components(data, m, s)
    log_p = logsumexp(scipy.stats.norm.logpdf(state[..., None], means, stds) + np.log(weights), axis=-1)
    if prior_std is not None:
        log_p -= scipy.stats.norm.logpdf(state, 0, prior_std)
    return np.sum(log_p * scipy.stats.norm.pdf(z) * (z[1] - z[0]), axis=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("name", "data"),
    by_default(
        [("vpsde", "gaussian"), ("short_ve", "gaussian"), ("vesde", "mixture")],
        [(name, "gaussian") for name in SDES] + [("vpsde", "mixture"), ("vesde", "mixture")],
    ),
)
def test_exact_score_makes_the_bound_tight(name, data):
    """It is the mean of -log p_eps over the noise of the decoder, and the mismatch of the prior, for each image."""
    sde, mixture = SDES[name], {"gaussian": GAUSSIAN, "mixture": MIXTURE}[data]
    ends = noise_levels(sde, np.array([EPS, sde.T]))
    exact = -mean_log_density(mixture, ends.mean_coeff[0], ends.std[0], X) - DIMS * np.log(ends.mean_coeff[0])
    exact += mean_log_density(mixture, ends.mean_coeff[1], ends.std[1], X, float(sde.prior_std))
    result = measure(name, data)
    mean, stderr = mean_and_stderr(result.nats)
    assert (abs(mean - exact) < 4 * stderr).all()
    assert (stderr / DIMS < 0.1).all()
    np.testing.assert_allclose(result.bpd, (result.nats + 2.5) / (DIMS * math.log(2)), rtol=1e-5)
    assert int(result.nfe) == NUM_TIMES


def excess_of_scaled_score(sde, scale, x):
    """∫ E ||c s score + z||^2 - E ||s score + z||^2 d log sigma for Gaussian data, in float64."""
    ends = noise_levels(sde, np.array([EPS, sde.T]))
    log_sigma = np.linspace(*-ends.log_snr, 4001)
    levels = noise_levels(sde, time_of_log_snr(sde, -log_sigma))
    m, s = levels.mean_coeff, levels.std
    variance = components(GAUSSIAN, m, s)[2] ** 2
    squares = np.sum((x.astype(np.float64) - GAUSSIAN[1][0]) ** 2, axis=(1, 2, 3))[:, None]

    def error(c):
        return (c * s * m / variance) ** 2 * squares + DIMS * (1 - c * s**2 / variance) ** 2

    return np.trapezoid(error(scale) - error(1.0), log_sigma)


@pytest.mark.parametrize("name", by_default(["vpsde"], ["vesde", "vpsde", "subvpsde"]))
def test_a_wrong_score_costs_what_the_formula_says(name):
    right, wrong = measure(name), measure(name, scale=0.6)
    mean, stderr = mean_and_stderr(wrong.nats - right.nats)  # of the same noise
    excess = excess_of_scaled_score(SDES[name], 0.6, X)
    assert excess.mean() > 5  # an image far from all data may gain
    assert (abs(mean - excess) < 4 * stderr).all()


@pytest.mark.parametrize("settings", [{}, {"likelihood__bound_num_times": 2}], ids=["many", "two"])
def test_reports_its_own_standard_error(settings):
    """The mean of its square is the variance of the estimate, or with few strata, whose means differ, above it."""
    result = measure("vpsde", **settings)
    variance = result.bpd.var(axis=0, ddof=1)
    ratio = np.mean(result.stderr**2, axis=0) / variance
    # Of 200 replicates a variance has a standard error of 10 %, and more for heavy tails.
    assert (ratio > 0.7).all()
    if not settings:
        assert (ratio < 1.5).all()


def test_times_are_drawn_from_all_of_a_stratum():
    """Two strata of half the range each have the mean of many narrow ones."""
    few, many = (mean_and_stderr(measure("vpsde", likelihood__bound_num_times=n).nats) for n in (2, NUM_TIMES))
    assert (abs(few[0] - many[0]) < 4 * np.hypot(few[1], many[1])).all()


def test_variance_is_far_below_that_of_uniform_times():
    """Against as many independent times uniform on [eps, T], weighted by g^2 / (2 s^2) as the integral over t is."""
    sde, settings = VPSDE(), functools.partial(mixture_score, VPSDE(), GAUSSIAN, 1.0)

    def estimate(key, x):
        def at(key):
            key_t, key_z = rng.split(key)
            t = EPS + (sde.T - EPS) * rng.uniform(key_t, x.shape[:1])
            z, (mean, std) = rng.normal(key_z, x.shape), sde.marginal_prob(x, t)
            error = expand(std, x) * settings(mean + expand(std, x) * z, t) + z
            return (sde.T - EPS) * (sde.sde(x, t)[1] / std) ** 2 / 2 * jnp.sum(error**2, axis=(1, 2, 3))

        return jnp.mean(jax.lax.map(at, jax.random.split(key, NUM_TIMES)), axis=0)

    x = np.tile(X, (REPLICATES, 1, 1, 1))
    uniform = np.asarray(jax.jit(estimate, compiler_options=QUICK)(jax.random.key(0), x)).reshape(-1, 4)
    assert (uniform.var(axis=0) > 30 * measure("vpsde").nats.var(axis=0)).all()


def test_the_control_variate_takes_variance_and_no_mean():
    """Its coefficient is best for data that are white noise as wide as a bin, here 1 / 2; with 256 levels it is 0."""
    with_it, without = (measure("vpsde", data__num_levels=levels).nats for levels in (2, 256))
    assert (with_it.var(axis=0) < 0.5 * without.var(axis=0)).all()
    (mean, stderr), (other, other_stderr) = mean_and_stderr(with_it), mean_and_stderr(without)
    assert (abs(mean - other) < 4 * np.hypot(stderr, other_stderr)).all()


@pytest.mark.exhaustive
def test_an_example_depends_on_its_own_key_alone():
    keys = rng.example_keys(jax.random.key(3), 8)
    x = np.tile(X, (2, 1, 1, 1))
    together, again = measure("vpsde", key=keys, x=x), measure("vpsde", key=jax.random.key(3), x=x)
    alone = measure("vpsde", key=keys[4:], x=x[4:])
    np.testing.assert_allclose(alone.nats[0], together.nats[1], rtol=2e-6)
    np.testing.assert_allclose(alone.stderr[0], together.stderr[1], rtol=2e-5)
    np.testing.assert_array_equal(again.nats, together.nats)


@pytest.mark.parametrize(
    ("num_times", "eps", "message"),
    [
        (7, EPS, "likelihood.bound_num_times=7: expected an even number, 0 or more"),
        (-2, EPS, "likelihood.bound_num_times=-2: expected an even number, 0 or more"),
        (0, EPS, "likelihood.bound_num_times=0 stands for no bound"),
        (4, 2.0, "eps=2.0: expected a time between 0 and T=1.0"),
    ],
)
def test_refuses_when_built(num_times, eps, message):
    config = base.get_config()
    config.likelihood.bound_num_times = num_times
    with pytest.raises(ValueError, match=message):
        variational_bound.build_variational_bound(config, VPSDE(), eps=eps)
