"""SDEs against calculus in float64, closed forms and the arrays of the 2021 code."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from analytic import SDES, load, make_score_fn, sde_of

import sde_lib
from configs import base
from parallel import rng
from sde_lib import VESDE, VPSDE, build_sde, subVPSDE

NAMES = ["vesde", "vpsde", "subvpsde"]
# At t = 1e-5 and 1e-3 the reference's 1 - exp(.) has lost digits (README.md of the reference); these are compared with
# float64 in test_std_is_precise_at_small_t instead, the rest here from t = 0.1 on.
FROM = {"vesde": 0, "vpsde": 2, "subvpsde": 2}


@pytest.mark.parametrize("name", SDES)
def test_kernel_solves_the_moment_equations(name):
    """d/dt log m = a and d/dt std^2 = 2 a std^2 + g^2, where the drift is a(t) x."""
    with jax.enable_x64(True):
        sde = SDES[name]
        t = jnp.linspace(0.01, 1.0, 23)
        slope = lambda fn: jax.vmap(jax.grad(lambda s: fn(s[None])[0]))(t)  # noqa: E731
        drift, diffusion = sde.sde(jnp.ones_like(t), t)
        assert t.dtype == jnp.float64
        np.testing.assert_allclose(slope(lambda s: jnp.log(sde.mean_coeff(s))), drift, rtol=1e-12)
        expected = 2 * drift * sde.std(t) ** 2 + diffusion**2
        np.testing.assert_allclose(slope(lambda s: sde.std(s) ** 2), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(name):
    stored, meta = load(f"sde_{name}")
    sde, first = sde_of(meta), FROM[name]
    x, t = jnp.asarray(stored["x"]), jnp.asarray(stored["t"])
    ours = dict(zip(["sde_drift", "sde_diffusion"], sde.sde(x, t), strict=True))
    ours |= zip(["marginal_mean", "marginal_std"], sde.marginal_prob(x, t), strict=True)
    ours |= zip(["discretize_f", "discretize_G"], sde.discretize(x, t), strict=True)
    ours["prior_logp"] = sde.prior_logp(jnp.asarray(stored["z"]))
    for flow in (0, 1):
        reverse = sde.reverse(make_score_fn(sde, meta["score_c"]), probability_flow=bool(flow))
        ours |= zip([f"reverse_sde_drift_pf{flow}", f"reverse_sde_diffusion_pf{flow}"], reverse.sde(x, t), strict=True)
        keys = [f"reverse_discretize_f_pf{flow}", f"reverse_discretize_G_pf{flow}"]
        ours |= zip(keys, reverse.discretize(x, t), strict=True)
    for key, value in ours.items():
        expected = stored[key][first:]
        # The reference's sigma_i are 6e-7 off, its sigma_i^2 - sigma_{i-1}^2 = 0.017 sigma_i^2 then 7e-5.
        rtol = 7e-5 if name == "vesde" and "discretize" in key else 1e-5
        # Drifts are differences of near-equal numbers, with the rounding of their terms.
        atol = 3e-7 * max(np.abs(x).max(), np.abs(expected).max())
        np.testing.assert_allclose(value[first:], expected, rtol=rtol, atol=atol, err_msg=key)


@pytest.mark.parametrize("name", ["vesde", "vpsde"])
def test_tables_match_the_reference(name):
    stored, meta = load(f"sde_{name}")
    sde = sde_of(meta)
    for key in stored.files:
        if key.startswith("table_") and key != "table_alphas":
            # The reference multiplies 1,000 float32 numbers for alpha_bar, and subtracts it from 1: 1e-6 near i = 0.
            table = getattr(sde, key.removeprefix("table_"))
            np.testing.assert_allclose(table, stored[key], rtol=2e-5, atol=2e-6, err_msg=key)
            assert table.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_sampler_times_and_indices_match_the_reference(name):
    stored, meta = load(f"sde_{name}")
    sde = sde_of(meta)
    times = jnp.asarray(sde.sampling_times())
    np.testing.assert_allclose(times, stored["sampler_timesteps"], atol=6e-8)  # rounding of float32 at 1
    np.testing.assert_array_equal(sde.time_index(times), stored["sampler_index"])
    np.testing.assert_array_equal(jax.jit(sde.time_index)(times), stored["sampler_index"])


@pytest.mark.parametrize("N", [30, 500, 1086, 2000])  # at the last three rounding falls below the integer
def test_index_of_a_grid_point_survives_rounding(N):
    sde = VESDE(N=N)
    exact = np.linspace(1, sde.sampling_eps, N) * (N - 1)
    for below in (0.0, 6e-5):
        t = jnp.asarray((exact - below) / (N - 1), jnp.float32)
        np.testing.assert_array_equal(sde.time_index(t), np.arange(N)[::-1])


@pytest.mark.parametrize(("sde", "power"), [(VPSDE(), 0.5), (subVPSDE(), 1.0)])
def test_std_is_precise_at_small_t(sde, power):
    t = np.array([1e-5, 1e-4, 1e-3])
    exact = (-np.expm1(-t * 0.1 - 0.5 * t**2 * 19.9)) ** power
    np.testing.assert_allclose(sde.std(jnp.asarray(t, jnp.float32)), exact, rtol=1e-6)
    stored, _ = load(f"sde_{type(sde).__name__.lower()}")
    assert abs(stored["marginal_std"][0] / exact[0] - 1) > 5e-3  # the departure from the 2021 code is still one


@pytest.mark.parametrize("name", SDES)
def test_prior(name):
    sde = SDES[name]
    std = {"vesde": 50.0, "ou": np.sqrt(-np.expm1(-10.0))}.get(name, 1.0)
    z = std * np.linspace(-2, 2, 24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_allclose(sde.prior_logp(z), scipy.stats.norm.logpdf(z, 0, std).sum((1, 2)), rtol=1e-6)
    key, shape = jax.random.key(3), (4, 3, 2)
    np.testing.assert_allclose(sde.prior_sampling(key, shape), std * rng.normal(key, shape), rtol=1e-6)
    assert float(sde.std(jnp.ones(1))[0]) == pytest.approx(std, rel=1e-4)


def test_discretizations_compose_to_the_marginal_kernel():
    """The chains of SMLD and DDPM, run by their own f and G, have the tables' mean and variance."""
    for sde, mean, std in (
        (VESDE(N=50), np.ones(50), VESDE(N=50).discrete_sigmas),
        (VPSDE(N=50), VPSDE(N=50).sqrt_alphas_cumprod, VPSDE(N=50).sqrt_1m_alphas_cumprod),
    ):
        t = jnp.arange(50) / 49
        f, G = sde.discretize(jnp.ones(50), t)
        gain = 1 + np.asarray(f, np.float64)
        variance = 0.0
        for i in range(50):
            variance = gain[i] ** 2 * variance + float(G[i]) ** 2
            assert variance == pytest.approx(float(std[i]) ** 2, rel=1e-4)
        np.testing.assert_allclose(np.cumprod(gain), mean, rtol=1e-5)


def test_ve_steps_are_precise():
    ratio = 5000 ** (1 / 999)
    sigma = 0.01 * ratio ** np.array([1, 500, 999])
    added, lower = VESDE().noise_added(jnp.asarray([1, 500, 999]) / 999)
    np.testing.assert_allclose(added, sigma * np.sqrt(1 - ratio**-2), rtol=3e-7)
    np.testing.assert_allclose(lower, sigma / ratio, rtol=3e-7)
    np.testing.assert_allclose(VESDE().noise_added(jnp.zeros(1)), [[0.01], [0.0]], rtol=3e-7)


def test_default_discretization_is_euler_maruyama():
    sde, x, t = subVPSDE(N=40), jnp.ones((3, 2)), jnp.array([0.1, 0.5, 1.0])
    (f, G), (drift, diffusion) = sde.discretize(x, t), sde.sde(x, t)
    np.testing.assert_allclose(f, drift / 40, rtol=1e-6)
    np.testing.assert_allclose(G, diffusion / np.sqrt(40), rtol=1e-6)


def test_step_alpha_agrees_between_ddpm_and_the_mean_coefficients():
    t = jnp.linspace(0.01, 1, 9)
    np.testing.assert_allclose(subVPSDE().step_alpha(t), VPSDE().step_alpha(t), atol=3e-4)  # beta_i^2 / 2 = 2e-4
    np.testing.assert_array_equal(VESDE().step_alpha(t), np.ones(9))


def test_step_alpha_of_ddpm_is_that_of_its_own_level():
    """1 - beta_i with i the level at t = i T / (N - 1), Appendix C: beta_i = (0.1 + 19.9 i / (N - 1)) / N."""
    i = np.arange(40)
    t = jnp.asarray((i + 0.25) / 39)  # beyond what rounding could truncate; 1.006 is beyond T
    np.testing.assert_allclose(VPSDE(N=40).step_alpha(t[:-1]), 1 - (0.1 + 19.9 * i[:-1] / 39) / 40, rtol=1e-6)
    np.testing.assert_allclose(VPSDE(N=40).step_alpha(jnp.ones(1)), [0.5], rtol=1e-6)


@pytest.mark.parametrize("sde", [VESDE(N=50), VPSDE(N=50)])
def test_a_discretization_in_other_steps_is_that_of_another_n(sde):
    """The grid belongs to the algorithm: with `num_steps` the process steps as one whose N that is."""
    other, t = dataclasses.replace(sde, N=30), jnp.asarray(sde.sampling_times(30))
    x = score = jnp.ones((30, 2))
    for name, arguments in (("discretize", (x, t)), ("ancestral_step", (x, t, score)), ("step_alpha", (t,))):
        ours, theirs = getattr(sde, name)(*arguments, 30), getattr(other, name)(*arguments)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    np.testing.assert_array_equal(sde.time_index(t, 30), np.arange(30)[::-1])
    assert sde.reverse(None, num_steps=30).N == 30


@pytest.mark.parametrize("sde", [VESDE(N=50), VPSDE(N=50)])
def test_ancestral_steps_undo_the_chain(sde):
    """For data that are one point, the mean of p(x_{i-1} | x_i) leads from the mean of x_i to that of x_{i-1}."""
    i, x0 = jnp.arange(1, 50), jnp.full((49, 1), 0.7)
    labels = 49 - i if isinstance(sde, VESDE) else i
    (mean, std, _), (before, _, _) = (
        sde.discrete_kernel(x0, labels - step) for step in ((0, -1) if isinstance(sde, VESDE) else (0, 1))
    )
    x = mean + 2 * std[:, None]
    got, added = sde.ancestral_step(x, i / 49, -(x - mean) / std[:, None] ** 2)
    ratio = np.asarray(added)[:, None] if isinstance(sde, VPSDE) else np.asarray(sde.discretize(x, i / 49)[1])[:, None]
    gain = np.sqrt(1 - ratio**2) if isinstance(sde, VPSDE) else 1.0
    np.testing.assert_allclose(got, before + (2 * std[:, None] - 2 * ratio**2 / std[:, None]) / gain, rtol=1e-4)


def test_an_sde_without_a_chain_is_refused_where_one_is_needed():
    with pytest.raises(ValueError, match="subVPSDE has none: use 'reverse_diffusion'"):
        subVPSDE().check_steps(ancestral=True)
    subVPSDE().check_steps(3)
    assert [sde.has_chain for sde in SDES.values()] == [True, True, False, False]


def test_no_other_file_asks_for_the_type_of_an_sde():
    root = pathlib.Path(sde_lib.__file__).parent
    skipped = {"tests", ".venv", "tools"}
    for path in root.glob("**/*.py"):
        if path.relative_to(root).parts[0] not in skipped | {"sde_lib.py"}:
            assert not re.search(r"isinstance\([^)]*\b(VE|VP|subVP)SDE", path.read_text()), path


def test_values_are_hashable_and_compare_by_their_fields():
    assert len({VPSDE(), VPSDE(), VPSDE(N=10), VESDE(), subVPSDE()}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        VPSDE().N = 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vesde", VESDE(0.02, 30.0, 7)),
        ("vpsde", VPSDE(0.2, 15.0, 7)),
        ("subvpsde", subVPSDE(0.2, 15.0, 7)),
    ],
)
def test_build_sde(name, expected):
    config = base.get_config()
    config.training.sde = name
    config.model.update(num_scales=7, sigma_min=0.02, sigma_max=30.0, beta_min=0.2, beta_max=15.0)
    assert build_sde(config) == expected


def test_refuses_bad_settings():
    config = base.get_config()
    config.training.sde = "vpsd"
    with pytest.raises(ValueError, match=r"training\.sde='vpsd' is unknown; known: subvpsde, vesde, vpsde"):
        build_sde(config)
    with pytest.raises(ValueError, match="sigma_min=2, sigma_max=1: expected 0 < sigma_min < sigma_max"):
        VESDE(sigma_min=2, sigma_max=1)
    with pytest.raises(ValueError, match="beta_min=3, beta_max=2: expected 0 < beta_min <= beta_max"):
        subVPSDE(beta_min=3, beta_max=2)
    with pytest.raises(ValueError, match="N=0 steps: expected at least 1"):
        VPSDE(N=0)
    with pytest.raises(ValueError, match=r"sampling_eps=1\.5: expected a time between 0 and T=1"):
        VPSDE(sampling_eps=1.5)
    with pytest.raises(ValueError, match=r"in N=16 steps has beta_i up to beta_max / N = 1.25, expected at most 1"):
        VPSDE(N=16).discretize(jnp.ones((1, 1)), jnp.ones(1))
    # At beta_i = 1 the chain forgets everything in a step: the limit, in which the 2021 code runs too.
    f, G = VPSDE(N=20).discretize(jnp.ones((1, 1)), jnp.ones(1))
    assert (float(f[0, 0]), float(G[0])) == (-1.0, 1.0)
