"""Likelihoods of Gaussian data in closed form, and the arrays of the 2021 code with their probes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from analytic import GOLDEN, MIX, MU, QUICK, S0, SDES, Mixture, load, make_score_fn, sde_of
from cases import by_default

import likelihood
from configs import base
from parallel import rng
from sde_lib import VESDE, VPSDE
from solvers import ode

SHAPE = (6, 2, 2, 3)
DIMS = 12
X = MU + S0 * np.random.RandomState(0).standard_normal(SHAPE).astype(np.float32)
ALL_AXES = (1, 2, 3)


def measure(sde, score_fn, x, key=None, *, centered=False, num_levels=256, eps=likelihood.LIKELIHOOD_EPS, **settings):
    config = base.get_config()
    config.data.update(centered=centered, num_levels=num_levels)
    config.likelihood.update(settings)
    run = likelihood.build_likelihood(config, sde, eps=eps)
    key = jax.random.key(0) if key is None else key
    run_jit = jax.jit(lambda key, x: run(key, score_fn, x), compiler_options=QUICK)
    return jax.device_get(run_jit(key, x))  # numpy from here on: JAX would compile every operation


def moments(sde, t):
    """Mean and std of Gaussian data at t, in float64."""
    with jax.enable_x64(True):
        m, std = float(sde.mean_coeff(jnp.array([t]))[0]), float(sde.std(jnp.array([t]))[0])
    return m * MU, np.hypot(m * S0, std)


@pytest.mark.parametrize("trace", by_default(["rademacher", "exact"], likelihood.TRACES))
@pytest.mark.parametrize("name", by_default(["vesde"], SDES))
def test_agrees_with_the_density_of_gaussian_data(name, trace):
    """The Jacobian of the Gaussian score is a multiple of the identity: Rademacher probes are exact, too."""
    sde, num_probes = SDES[name], 500 if trace == "gaussian" else 1
    result = measure(sde, make_score_fn(sde), X, trace=trace, num_probes=num_probes)
    (mean0, std0), (mean1, std1) = moments(sde, likelihood.LIKELIHOOD_EPS), moments(sde, 1.0)
    latent = mean1 + std1 / std0 * (X - mean0)
    np.testing.assert_allclose(result.latent, latent, rtol=1e-4, atol=1e-4 * std1)
    # What the flow defines, its prior included: to the solver's tolerance, 4 standard errors for Gaussian probes.
    exact = np.asarray(sde.prior_logp(latent), np.float64) + DIMS * np.log(std1 / std0)
    tolerance = 4 * np.asarray(result.stderr) * np.log(2) if trace == "gaussian" else 0.0
    assert (abs(result.nats - exact) / DIMS < 3e-4 + tolerance).all()
    # The true density differs by the mismatch of the prior, 6e-3 |z| nats per dimension for VE.
    true = scipy.stats.norm.logpdf(X, MU, S0).sum(axis=ALL_AXES)
    assert (abs(result.nats - true) / DIMS < 1e-2 + tolerance).all()


@pytest.mark.parametrize("name", by_default(["vpsde"], ["vpsde", "subvpsde"]))
def test_exact_trace_of_data_centred_on_the_prior(name):
    """With mean 0 the prior fits to 1e-5, so the true density is met to 1e-3 nats per dimension and much better."""
    sde = SDES[name]
    score_fn = lambda x, t: make_score_fn(sde)(x + MU * sde.mean_coeff(t).reshape(-1, 1, 1, 1), t)  # noqa: E731
    result = measure(sde, score_fn, X - MU, trace="exact")
    true = scipy.stats.norm.logpdf(X - MU, 0, S0).sum(axis=ALL_AXES)
    np.testing.assert_allclose(result.nats / DIMS, true / DIMS, atol=3e-4)


@pytest.mark.parametrize(
    "name",
    by_default(
        [f"likelihood_{name}_c0.1_Rademacher" for name in ("vesde", "vpsde", "subvpsde")],
        sorted(path.stem for path in GOLDEN.glob("likelihood_*.npz")),
    ),
)
def test_matches_the_reference(name, monkeypatch):
    stored, meta = load(name)
    sde, centered = sde_of(meta), meta["inverse_scaler"] == "(x+1)/2"
    probe = jnp.asarray(stored["epsilon"])[:, None]
    trace = meta["hutchinson"].lower()
    monkeypatch.setitem(likelihood.TRACES, trace, lambda key, shape: probe.reshape(shape))
    result = measure(
        sde, make_score_fn(sde, meta["score_c"]), stored["data"], trace=trace, centered=centered, eps=meta["eps"]
    )
    # Two solvers at tolerance 1e-5; a Gaussian probe multiplies the trace, and its error, by |e|^2 / D.
    np.testing.assert_allclose(result.bpd, stored["bpd"], atol=1e-4)
    np.testing.assert_allclose(result.latent, stored["z"], rtol=1e-4, atol=1e-4 * sde.prior_std)
    assert int(result.nfe) < 1.5 * meta["nfe"]


# Two clusters and their mirror images, so that the mean is 0 and the prior fits at t = T, too; 12 dimensions.
CLUSTERS = Mixture(
    means=np.concatenate([sign * np.random.RandomState(1).standard_normal((2, DIMS)) for sign in (0.5, -0.5)]),
    weights=np.array([0.35, 0.15, 0.35, 0.15]),
    std=0.3,
)


def draw_from(mixture, num, seed=0):
    random = np.random.RandomState(seed)
    component = random.choice(len(mixture.weights), num, p=mixture.weights)
    return mixture.means[component] + mixture.std * random.standard_normal((num, mixture.means.shape[1]))


@pytest.mark.parametrize("name", by_default(["vpsde"], SDES))
def test_exact_trace_of_a_mixture(name):
    """Within 1e-3 nats per dimension of log p(x) of the mixture, noised to the time where the integration starts."""
    x = draw_from(CLUSTERS, 16).astype(np.float32).reshape(16, 2, 2, 3)
    result = measure(SDES[name], CLUSTERS.score_fn(SDES[name]), x, trace="exact")
    with jax.enable_x64(True):
        t = jnp.array([likelihood.LIKELIHOOD_EPS], jnp.float64)
        at_start = float(SDES[name].mean_coeff(t)[0]), float(SDES[name].std(t)[0])
        noised = np.asarray(CLUSTERS.log_density(jnp.asarray(x, jnp.float64), *at_start))
        clean = np.asarray(CLUSTERS.log_density(jnp.asarray(x, jnp.float64)))
    assert np.abs(noised - clean).max() / DIMS < 3e-3  # sigma is 0.01 there for VE, where the data have 0.3
    assert np.abs(result.nats - noised).max() / DIMS < 1e-3


@pytest.mark.parametrize("trace", by_default(["rademacher"], ["rademacher", "gaussian"]))
def test_probes_are_within_three_of_their_own_standard_errors(trace):
    """In at least 99 of 100 seeded cases: ten mixtures' images with ten keys each, 32 probes."""
    sde, x = VPSDE(), draw_from(CLUSTERS, 10).astype(np.float32).reshape(10, 2, 2, 3)
    exact = measure(sde, CLUSTERS.score_fn(sde), x, trace="exact").bpd
    keys = jax.random.split(jax.random.key(11), 100)
    probed = measure(sde, CLUSTERS.score_fn(sde), np.tile(x, (10, 1, 1, 1)), keys, trace=trace, num_probes=32)
    deviations = (probed.bpd - np.tile(exact, 10)) / probed.stderr
    assert (np.abs(deviations) < 3).sum() >= 99
    assert 0.8 < np.sqrt(np.mean(deviations**2)) < 1.2  # and they are not far too large either: 1 within 2.8 sigma


def linear_score(x, t):
    """A score whose Jacobian is not a multiple of the identity, and is not symmetric: x A with A from MIX."""
    return -x + 0.5 * (x @ MIX) + 0 * t.reshape(-1, 1, 1, 1)


def test_exact_trace_of_an_asymmetric_jacobian():
    """∫ div f dt = ∫ a D - g^2/2 tr J dt in closed form; and probes agree with it within their standard error."""
    sde = VPSDE()
    exact = measure(sde, linear_score, X, trace="exact")
    trace_j = -DIMS + 0.5 * 4 * np.trace(MIX.astype(np.float64))
    integral_of_beta = lambda t: 0.1 * t + 19.9 * t**2 / 2  # noqa: E731
    half = (integral_of_beta(1.0) - integral_of_beta(likelihood.LIKELIHOOD_EPS)) / 2
    change = -half * DIMS - half * trace_j
    expected = np.asarray(sde.prior_logp(exact.latent)) + change
    np.testing.assert_allclose(exact.nats, expected, rtol=1e-5)
    np.testing.assert_array_equal(exact.stderr, np.zeros(6))
    for trace in ("rademacher", "gaussian"):
        probed = measure(sde, linear_score, X, trace=trace, num_probes=64)
        np.testing.assert_allclose(probed.latent, exact.latent, rtol=2e-4, atol=2e-4)
        deviation = np.asarray(probed.bpd - exact.bpd) / np.asarray(probed.stderr)
        assert (abs(deviation) < 4).all()
        assert 0.3 < np.sqrt(np.mean(deviation**2)) < 2  # of six draws of a standard normal


@pytest.mark.exhaustive
def test_standard_error_needs_two_probes():
    result = measure(VPSDE(), linear_score, X, num_probes=1)
    assert np.isnan(result.stderr).all()
    assert np.isfinite(result.bpd).all()


@pytest.mark.parametrize(
    ("centered", "num_levels", "offset"),
    by_default([(True, 32, 4.0)], [(False, 256, 8.0), (True, 256, 7.0), (True, 32, 4.0)]),
)
def test_bits_per_dimension_of_the_data(centered, num_levels, offset):
    sde = VPSDE()
    result = measure(sde, make_score_fn(sde), X, centered=centered, num_levels=num_levels, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(result.bpd, offset - result.nats / DIMS / np.log(2), rtol=1e-5)


@pytest.mark.exhaustive
def test_bits_per_dimension_of_uniform_data_are_those_of_the_levels():
    """Dequantized data that fill [0, 1] evenly have density 1 there, and so log2(num_levels) bits; N(y; 1/2, s) less.

    Independent of how x is scaled: x = y and x = 2 y - 1 give one number.
    """
    sde, y = VPSDE(), X
    plain = measure(sde, make_score_fn(sde), y, trace="exact")

    def centered_score(x, t):
        m = sde.mean_coeff(t).reshape(-1, 1, 1, 1)
        variance = 4 * S0**2 * m**2 + sde.std(t).reshape(-1, 1, 1, 1) ** 2
        return -(x - m * (2 * MU - 1)) / variance

    centered = measure(sde, centered_score, 2 * y - 1, trace="exact", centered=True)
    # The prior's mismatch differs by the data's mean, 0.3 or -0.4, times m(T) = 0.007; and eps is 1e-3 wide.
    np.testing.assert_allclose(centered.bpd, plain.bpd, atol=5e-3)


def test_an_example_depends_on_its_own_key_alone():
    sde, keys = VPSDE(), rng.example_keys(jax.random.key(3), 6)
    x = X * np.array([0.1, 1, 1, 1, 1, 8], np.float32).reshape(6, 1, 1, 1)  # the last needs other steps
    together = measure(sde, make_score_fn(sde, 0.1), x, keys, num_probes=2)
    alone = measure(sde, make_score_fn(sde, 0.1), x[1:2], keys[1:2], num_probes=2)
    np.testing.assert_allclose(alone.bpd[0], together.bpd[1], rtol=2e-6)
    np.testing.assert_allclose(alone.latent[0], together.latent[1], rtol=1e-5, atol=1e-5)
    again = measure(sde, make_score_fn(sde, 0.1), x, jax.random.key(3), num_probes=2)
    np.testing.assert_array_equal(again.bpd, together.bpd)


@pytest.mark.exhaustive
def test_counts_one_evaluation_of_the_score_for_drift_and_divergence():
    sde, calls = VESDE(), []

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return make_score_fn(sde)(x, t)

    result = measure(sde, score_fn, X[:2], num_probes=3, rtol=1e-3, atol=1e-3)
    jax.effects_barrier()
    assert int(result.nfe) == len(calls)


@pytest.mark.exhaustive
def test_a_network_with_its_own_reverse_rule_is_differentiated():
    """Convolutions carry a custom_vjp, which forward mode refuses."""

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
    sde, settings = VPSDE(), {"num_probes": 2, "rtol": 1e-3, "atol": 1e-3}
    expected = measure(sde, make_score_fn(sde), X, **settings)
    result = measure(sde, lambda x, t: double(make_score_fn(sde)(x, t)) / 2, X, **settings)
    np.testing.assert_allclose(result.bpd, expected.bpd, rtol=1e-6)


def test_a_failed_integration_is_nan():
    score_fn = lambda x, t: jnp.where(jnp.arange(6).reshape(6, 1, 1, 1) == 2, jnp.nan, -x)  # noqa: E731
    result = measure(VPSDE(), score_fn, X, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(np.isnan(result.bpd), np.arange(6) == 2)
    with pytest.raises(ode.SolverError, match="bits/dim: the solver gave up on 1 of 6 examples"):
        ode.require_solved(result.bpd, "bits/dim")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trace": "sphere"}, "likelihood.trace='sphere' is unknown; known: exact, gaussian, rademacher"),
        ({"num_probes": 0}, "likelihood.num_probes=0: expected 1 or more"),
        ({"rtol": 0.0}, "likelihood.rtol=0.0: expected a positive number"),
        ({"atol": -1.0}, "likelihood.atol=-1.0: expected a positive number"),
        ({"eps": 2.0}, "eps=2.0: expected a time between 0 and T=1.0"),
    ],
)
def test_refuses_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        measure(VPSDE(), linear_score, X, **settings)
