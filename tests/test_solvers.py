"""Few-step and adaptive solvers: exact cases, orders of convergence on a mixture in float64, keys and counts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from analytic import MU, QUICK, S0, SDES, TRIANGLE, OrnsteinUhlenbeck, make_score_fn
from cases import by_default

import sampling
import solvers
from configs import base
from parallel import rng
from sde_lib import VESDE, VPSDE, expand, subVPSDE
from solvers import fixed_grid, multistep, noise_levels, ode, runge_kutta

RANDOM = {"ddim": {"eta": 1.0}, "dpmpp_sde": {}, "heun": {"s_churn": 8.0}, "stochastic_heun": {}}
FLOWS = [name for name in solvers.FIXED_GRID if name not in ("dpmpp_sde", "stochastic_heun")]
# Noise levels between which the mixture is resolved by few steps; the last time is well inside (0, T).
ORDER_SDES = {
    "vesde": VESDE(sigma_min=0.05, sigma_max=10.0, sampling_eps=1e-5),
    "vpsde": VPSDE(sampling_eps=1e-2),
    "subvpsde": subVPSDE(sampling_eps=1e-2),
}


def make_config(method, **settings):
    config = base.get_config()
    config.sampling.update(method=method, **settings)
    return config


def sample(config, sde, shape, score_fn, x_init=None, key=None):
    """Draws samples in one compiled call."""
    draw = sampling.build_sampler(config, sde, shape)
    key = jax.random.key(0) if key is None else key
    return jax.device_get(jax.jit(lambda key, x: draw(key, score_fn, x), compiler_options=QUICK)(key, x_init))


# --- a single image as the data: every solver is exact --------------------------------------------------------------


def score_of_a_point(sde, x0):
    return lambda x, t: -(x - expand(sde.mean_coeff(t), x) * jnp.asarray(x0)[None]) / expand(sde.std(t) ** 2, x)


@pytest.mark.parametrize("name", by_default(["ou"], ["ou", "subvpsde"]))
def test_the_flow_to_a_single_image_is_exact_in_any_number_of_steps(name):
    """x' = m' x0 + (s' / s) (x - m x0), whatever the solver, the grid and the number of steps."""
    sde, x0 = SDES[name], np.array([0.7, -0.2])
    x = float(sde.prior_std) * np.random.RandomState(0).standard_normal((3, 2))
    ends = noise_levels.noise_levels(sde, np.array([sde.T, sde.sampling_eps]))
    (m, m_end), (s, s_end) = ends.mean_coeff, ends.std
    exact = m_end * x0 + s_end / s * (x - m * x0)
    with jax.enable_x64(True):
        for method, denoise in itertools.product(FLOWS, (False, True)):
            num_steps, grid = (4, "karras") if denoise else (1, "uniform")
            config = make_config(method, num_steps=num_steps, time_grid=grid, noise_removal=denoise)
            got, nfe = sample(config, sde, x.shape, score_of_a_point(sde, x0), jnp.asarray(x))
            # Some add up steps of x / m, 150 at t = T; deis integrates over a step, here [0, 1], by quadrature.
            scale = ends.sigma[0] if method in ("deis", "heun", "rk4") else 1.0
            tolerance = 1e-4 if method == "deis" else 1e-9
            expected = np.broadcast_to(x0, x.shape) if denoise else exact
            np.testing.assert_allclose(got, expected, atol=tolerance * scale, err_msg=f"{method} {denoise}")
            assert nfe == num_steps * {"heun": 2, "rk4": 4}.get(method, 1) + denoise


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", ["ddim", "dpmpp_sde"])
def test_random_steps_keep_the_marginals_of_a_single_image(name, method):
    """Mean m' x0 and variance s'^2 follow from mean m x0 and variance s^2: exactly, at every step."""
    sde = SDES[name]
    levels = noise_levels.noise_levels(sde, noise_levels.time_grid(sde, 7, "log_snr"))
    solver = multistep.ddim(levels, eta=0.6) if method == "ddim" else multistep.dpmpp_sde(levels)
    keep, weights, noise = solver.rows["keep"], solver.rows["weights"], solver.rows["noise"]
    m, s = levels.mean_coeff, levels.std
    np.testing.assert_allclose(keep * m[:-1] + weights.sum(axis=1), m[1:], rtol=1e-10)
    np.testing.assert_allclose((keep * s[:-1]) ** 2 + noise**2, s[1:] ** 2, rtol=1e-10)


def test_ddim_with_eta_1_is_the_posterior_of_the_forward_chain():
    """q(x' | x, x0) by conditioning Gaussians, for VP that of DDPM: variance beta_tilde."""
    levels = noise_levels.noise_levels(VPSDE(), noise_levels.time_grid(VPSDE(), 6, "uniform"))
    rows = multistep.ddim(levels, eta=1.0).rows
    alpha_bar = levels.mean_coeff**2
    beta = 1 - alpha_bar[:-1] / alpha_bar[1:]
    np.testing.assert_allclose(rows["noise"] ** 2, beta * (1 - alpha_bar[1:]) / (1 - alpha_bar[:-1]), rtol=1e-9)
    np.testing.assert_allclose(rows["keep"], np.sqrt(1 - beta) * (1 - alpha_bar[1:]) / (1 - alpha_bar[:-1]), rtol=1e-9)
    weights = np.sqrt(alpha_bar[1:]) * beta / (1 - alpha_bar[:-1])
    np.testing.assert_allclose(rows["weights"][:, 0], weights, rtol=1e-9)


def test_weights_integrate_polynomials_exactly():
    """∫ 2 exp(2 (u - b)) p(u) du for a cubic p, against scipy's adaptive quadrature."""
    p = np.polynomial.Polynomial([0.3, -1.0, 0.7, 0.2])
    nodes = np.array([0.4, -0.1, -0.9, -1.3])
    density = lambda u: 2 * np.exp(2 * (u - 1.5))  # noqa: E731
    points = multistep.quadrature_points(0.4, 1.5)
    exact = scipy.integrate.quad(lambda u: density(u) * p(u), 0.4, 1.5, epsabs=1e-13)[0]
    assert multistep.lagrange_weights(nodes, 0.4, 1.5, density(points)) @ p(nodes) == pytest.approx(exact, rel=1e-12)


# --- convergence ----------------------------------------------------------------------------------------------------

NUM_POINTS = 32


@functools.cache
def reference_flow(name):
    """Points of the prior and where the probability-flow ODE of the mixture takes them, by DOP853 in float64."""
    sde = ORDER_SDES[name]
    start = sde.prior_std * np.random.RandomState(0).standard_normal((NUM_POINTS, 2))
    drift = jax.jit(lambda x, t: sde.reverse(TRIANGLE.score_fn(sde), probability_flow=True).sde(x, t)[0])

    def slope(t, y):
        return np.asarray(drift(y.reshape(start.shape), np.full(NUM_POINTS, t))).ravel()

    solution = scipy.integrate.solve_ivp(
        slope, (sde.T, sde.sampling_eps), start.ravel(), method="DOP853", rtol=1e-10, atol=1e-11
    )
    return start, solution.y[:, -1].reshape(start.shape)


def order_of(errors):
    """The order from errors at N and 2 N steps."""
    return np.log2(errors[0] / errors[1])


def flow_errors(name, method, num_steps=(40, 80), **settings):
    start, end = reference_flow(name)
    errors = []
    for number in num_steps:
        config = make_config(method, num_steps=number, noise_removal=False, **settings)
        x, _ = sample(config, ORDER_SDES[name], start.shape, TRIANGLE.score_fn(ORDER_SDES[name]), jnp.asarray(start))
        errors.append(np.sqrt(np.mean((x - end) ** 2)))
    return errors


ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 3, "deis": 3, "rk4": 4}


@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize("name", by_default(["vpsde"], ORDER_SDES))
def test_ode_solvers_converge_with_their_order(name, method):
    with jax.enable_x64(True):
        errors = flow_errors(name, method)
    assert order_of(errors) == pytest.approx(ORDERS[method], abs=0.3), errors
    assert errors[1] < 0.03  # it is this flow that they converge to


@pytest.mark.parametrize("grid", ["karras", "quadratic", "uniform"])
def test_the_order_holds_on_every_grid(grid):
    with jax.enable_x64(True):
        assert order_of(flow_errors("vesde", "dpmpp_2m", time_grid=grid)) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(("method", "order"), [("deis", 1), ("deis", 2), ("unipc", 1)])
def test_solver_order_chooses_the_order(method, order):
    nominal = order + 1 if method == "unipc" else order
    with jax.enable_x64(True):
        assert order_of(flow_errors("vpsde", method, solver_order=order)) == pytest.approx(nominal, abs=0.3)


def run_solver(solver, levels, sde, start):
    run = functools.partial(
        fixed_grid.sample, solver=solver, grid=levels, sde=sde, shape=start.shape, noise_removal=False
    )
    return jax.jit(lambda x: run(jax.random.key(0), TRIANGLE.score_fn(sde), x)[0])(jnp.asarray(start))


def test_half_of_the_quadratic_term_would_be_of_order_two():
    """DPM-Solver++(3M) as published has phi_3 times the second divided difference, where twice it would be right."""
    sde = ORDER_SDES["vpsde"]
    start, end = reference_flow("vpsde")
    errors = []
    with jax.enable_x64(True):
        for number in (40, 80):
            levels = noise_levels.noise_levels(sde, noise_levels.time_grid(sde, number, "log_snr"))
            h = np.diff(levels.log_snr)[0]  # the same for all steps of this grid
            phi_1 = np.expm1(-h)
            phi_2 = phi_1 / h + 1
            phi_3 = phi_2 / h - 0.5
            # With equal steps D1 = 3/2 m0 - 2 m1 + 1/2 m2 and D2 = (m0 - 2 m1 + m2) / 2.
            d1, d2 = np.array([1.5, -2, 0.5]), np.array([0.5, -1, 0.5])
            published = np.array([-phi_1, 0, 0]) + phi_2 * d1 - phi_3 * d2
            ours = np.array([-phi_1, 0, 0]) + phi_2 * d1 - 2 * phi_3 * d2
            solver = multistep.dpmpp_3m(levels)
            weights = solver.rows["weights"] / levels.mean_coeff[1:, None]
            np.testing.assert_allclose(weights[2:], np.broadcast_to(ours, weights[2:].shape), rtol=1e-6, atol=1e-9)
            weights = levels.mean_coeff[1:, None] * np.concatenate(
                [weights[:2], np.broadcast_to(published, weights[2:].shape)]
            )
            solver = fixed_grid.Solver({**solver.rows, "weights": weights}, solver.step, solver.start, 1)
            errors.append(np.sqrt(np.mean((run_solver(solver, levels, sde, start) - end) ** 2)))
    assert order_of(errors) == pytest.approx(2, abs=0.3)


NUM_DRAWS = 60_000
WEAK = {
    # (nominal weak order, numbers of steps at which the error is well above the standard error of the mean)
    "ddim": (1, (20, 40)),
    "dpmpp_sde": (2, (12, 24)),
    "heun": (2, (10, 20)),
    "stochastic_heun": (2, (12, 24)),
}


@pytest.mark.parametrize("method", by_default(["ddim", "dpmpp_sde"], WEAK))
@pytest.mark.parametrize("name", by_default(["vpsde"], ORDER_SDES))
def test_weak_error_of_sde_solvers_falls_with_their_order(name, method):
    """E|x|^2 of the mixture, from its exact marginal at T; the error falls at least 2^(order - 0.4) times."""
    sde, (order, numbers) = ORDER_SDES[name], WEAK[method]
    with jax.enable_x64(True):
        ends = noise_levels.noise_levels(sde, np.array([sde.T, sde.sampling_eps]))
        random = np.random.RandomState(0)
        component = random.choice(3, NUM_DRAWS, p=TRIANGLE.weights)
        x0 = TRIANGLE.means[component] + TRIANGLE.std * random.standard_normal((NUM_DRAWS, 2))
        start = ends.mean_coeff[0] * x0 + ends.std[0] * random.standard_normal(x0.shape)
        exact, errors = TRIANGLE.second_moment(ends.mean_coeff[1], ends.std[1]), []
        for number in numbers:
            config = make_config(method, num_steps=number, noise_removal=False, **RANDOM[method])
            x, _ = sample(config, sde, x0.shape, TRIANGLE.score_fn(sde), jnp.asarray(start))
            squares = np.sum(x**2, axis=1)
            errors.append(abs(squares.mean() - exact))
    noise = squares.std() / np.sqrt(NUM_DRAWS)
    assert errors[0] > 5 * noise  # otherwise this would say nothing
    assert errors[1] < errors[0] / 2 ** (order - 0.4) + 2 * noise, errors


# --- Gaussian data: moments of the samples --------------------------------------------------------------------------

SHAPE = (500, 4, 4, 1)  # 8,000 independent numbers: the standard error of their std is 0.8 %


def moment_cases():
    """Every solver on the SDE that is defined here by its primitives alone; those that draw noise on all."""
    for method in (*solvers.FIXED_GRID, "adaptive_sde"):
        for name in SDES if method in RANDOM or method == "adaptive_sde" else ("ou",):
            marks = [] if name == "ou" else [pytest.mark.exhaustive]
            yield pytest.param(name, method, id=f"{method}-{name}", marks=marks)


@pytest.mark.parametrize(("name", "method"), list(moment_cases()))
def test_samples_have_the_moments_of_the_data(name, method):
    settings = {"num_steps": 1000 if method == "ddim" else 80} | RANDOM.get(method, {})
    x, _ = sample(make_config(method, **settings), SDES[name], SHAPE, make_score_fn(SDES[name]))
    assert abs(x.mean() - MU) < 4 * S0 / np.sqrt(x.size)
    # The data predicted at the end are less spread than the data, by the noise that is left there: 2 % for "ou".
    sigma = noise_levels.noise_levels(SDES[name], np.array([SDES[name].sampling_eps])).sigma[0]
    std = S0**2 / np.hypot(S0, sigma)
    assert x.std() == pytest.approx(std, rel=0.03)
    for means in (x.mean(axis=0), x.mean(axis=(1, 2, 3))):  # independent within an image and between images
        expected = std / np.sqrt(x.size / means.size)
        assert means.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * means.size))


@pytest.mark.exhaustive
def test_adaptive_steps_follow_the_tolerance():
    """Looser tolerances take fewer evaluations; the tolerance counts grey levels of the network's range."""
    score_fn, results = make_score_fn(VPSDE()), {}
    for levels in (0.5, 1.0, 8.0):
        config = make_config("adaptive_sde", adaptive_levels=levels, adaptive_rtol=0.0)
        results[levels] = sample(config, VPSDE(), (16, 4, 4, 1), score_fn)
    assert results[0.5][1] > results[1.0][1] > results[8.0][1]
    config = make_config("adaptive_sde", adaptive_levels=0.5, adaptive_rtol=0.0)
    config.data.centered = True  # the range is twice as wide: half a level is what a whole one was
    x, nfe = sample(config, VPSDE(), (16, 4, 4, 1), score_fn)
    np.testing.assert_array_equal(x, results[1.0][0])
    assert nfe == results[1.0][1]


def test_adaptive_steps_are_those_of_the_algorithm():
    """Algorithm 1 of Jolicoeur-Martineau et al. 2021 written out for one number in float64, with the same noise."""
    sde, atol, rtol = VPSDE(), 1 / 256, 0.02
    key = rng.example_keys(jax.random.key(3), 1)
    config = make_config("adaptive_sde", noise_removal=False)
    got, nfe = sample(config, sde, (1, 1), make_score_fn(sde), key=key)
    key_prior, key = rng.split(key)
    x = before = float(sde.prior_sampling(key_prior, (1, 1))[0, 0])
    noise = lambda i: float(rng.normal(rng.fold_in(key, i), (1, 1))[0, 0])  # noqa: E731

    def fields(x, t):
        log_m = -0.25 * t**2 * 19.9 - 0.05 * t
        m, beta = np.exp(log_m), 0.1 + 19.9 * t
        score = -(x - m * MU) / (m**2 * S0**2 - np.expm1(2 * log_m))
        return -0.5 * beta * x - beta * score, np.sqrt(beta)

    t, h, accepted, attempts = 1.0, 0.01, 0, 0
    while t > 1e-3:
        z, attempts = noise(accepted), attempts + 1
        drift, diffusion = fields(x, t)
        euler = x - h * drift + np.sqrt(h) * diffusion * z
        drift, diffusion = fields(euler, t - h)
        improved = (euler + x - h * drift + np.sqrt(h) * diffusion * z) / 2
        error = abs(euler - improved) / max(atol, rtol * max(abs(euler), abs(before)))
        if error <= 1:
            x, before, t, accepted = improved, euler, t - h, accepted + 1
            t = 1e-3 if t - 1e-3 < 1e-7 else t
        h = min(0.9 * h * max(error, 1e-6) ** -0.9, t - 1e-3)
    assert nfe == 2 * attempts
    assert got[0, 0] == pytest.approx(x, abs=2e-4)  # float32 over some hundred steps


def test_exhausted_steps_are_visible(monkeypatch):
    monkeypatch.setattr(ode, "MAX_STEPS", 3)
    x, nfe = sample(make_config("adaptive_sde"), VPSDE(), (2, 2), make_score_fn(VPSDE()))
    assert np.isnan(x).all()
    assert nfe == 2 * 3 + 1


def test_a_score_that_is_nan_ends_the_adaptive_solver_at_once():
    score_fn = lambda x, t: make_score_fn(VPSDE())(x, t).at[1].set(jnp.where(t[0] < 0.5, jnp.nan, 0.0))  # noqa: E731
    x, nfe = sample(make_config("adaptive_sde", adaptive_levels=8.0), VPSDE(), (2, 2), score_fn)
    np.testing.assert_array_equal(np.isnan(x).all(axis=1), [False, True])
    assert nfe < 500


# --- keys, counts, transforms, refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", by_default(["dpmpp_sde", "adaptive_sde"], [*solvers.FIXED_GRID, "adaptive_sde"]))
def test_a_sample_depends_on_its_own_key_alone(method):
    """A batch of 8 equals 8 batches of 1; and the count is that of the calls."""
    sde, calls = VPSDE(), []
    settings = {"num_steps": 5} | RANDOM.get(method, {})
    config = make_config(method, adaptive_levels=8.0, **settings)
    keys = rng.example_keys(jax.random.key(7), 8)

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(len(x)))
        return make_score_fn(sde)(x, t)

    together, nfe = sample(config, sde, (8, 2, 2, 1), score_fn, key=keys)
    jax.effects_barrier()
    assert len(calls) == nfe
    draw = sampling.build_sampler(config, sde, (1, 2, 2, 1))
    alone = jax.jit(lambda key: draw(key, make_score_fn(sde))[0], compiler_options=QUICK)
    for i in range(8):
        np.testing.assert_allclose(alone(keys[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_churn_stays_within_its_bounds():
    """Only levels between s_tmin and s_tmax rise, none above the first, by S_churn / N but at most sqrt(2) - 1."""
    sde = VESDE(sigma_max=10.0)
    levels = noise_levels.noise_levels(sde, noise_levels.time_grid(sde, 10, "log_snr"))
    raised = lambda **settings: np.hypot(1, runge_kutta.heun(levels, sde, **settings).rows["noise"] / levels.sigma[:-1])  # noqa: E731
    np.testing.assert_allclose(raised(s_churn=2.0)[1:], 1.2, rtol=1e-9)
    assert raised(s_churn=2.0)[0] == 1.0
    np.testing.assert_allclose(raised(s_churn=99.0)[1:], np.sqrt(2), rtol=1e-9)
    inside = raised(s_churn=2.0, s_tmin=0.1, s_tmax=1.0) > 1.1
    np.testing.assert_array_equal(inside, (levels.sigma[:-1] >= 0.1) & (levels.sigma[:-1] <= 1.0))
    quiet = runge_kutta.heun(levels, sde, s_churn=2.0, s_noise=0.5).rows["noise"]
    np.testing.assert_allclose(quiet, runge_kutta.heun(levels, sde, s_churn=2.0).rows["noise"] / 2)


def test_a_transform_is_applied_where_each_step_arrives():
    sde, times = VPSDE(), []
    levels = noise_levels.time_grid(sde, 4, "log_snr")

    def transform(key, x, x_mean, t):
        jax.debug.callback(lambda t: times.append(float(t[0])), t, ordered=True)
        return x.at[:, 0].set(5.0), x_mean.at[:, 0].set(7.0)

    draw = sampling.build_sampler(make_config("dpmpp_2m", num_steps=4), sde, (2, 3))
    x, _ = jax.jit(lambda key: draw(key, make_score_fn(sde), None, transform))(jax.random.key(0))
    jax.effects_barrier()
    np.testing.assert_allclose(times, [*levels[1:], levels[-1]], rtol=1e-6)
    np.testing.assert_array_equal(x[:, 0], [7.0, 7.0])
    assert (np.asarray(x)[:, 1:] != 7.0).all()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ddim", {"time_grid": "cosine"}, "sampling.time_grid='cosine' is unknown; known: karras, log_snr, quad"),
        ("ddim", {"num_steps": -1}, "sampling.num_steps=-1: expected 0 or more"),
        ("ddim", {"eta": -0.1}, "sampling.eta=-0.1: expected 0 or more"),
        (
            "ddim",
            {"eta": 1.5, "num_steps": 5},
            "sampling.eta=1.5: expected 0 .determ.* to 1.* with these 5 steps",
        ),
        ("deis", {"solver_order": 4}, "sampling.solver_order=4: expected 0 to 3"),
        ("unipc", {"solver_order": -1}, "sampling.solver_order=-1: expected 0 to 3"),
        ("heun", {"s_churn": -1.0}, "sampling.s_churn=-1.0: expected 0 or more"),
        ("adaptive_sde", {"adaptive_levels": 0.0}, "sampling.adaptive_levels=0.0: expected a positive number"),
        ("adaptive_sde", {"adaptive_rtol": -1.0}, "sampling.adaptive_rtol=-1.0: expected 0 or more"),
        ("ode", {"step_control": "all"}, "sampling.step_control='all' is unknown; known: batch, sample"),
        ("pc", {"pc_order": "both"}, "sampling.pc_order='both' is unknown; known: corrector_first, predictor_first"),
    ],
)
def test_refuses_when_built(method, settings, message):
    with pytest.raises(ValueError, match=message):
        sampling.build_sampler(make_config(method, **settings), OrnsteinUhlenbeck(), (2, 2))


@pytest.mark.parametrize("method", ["adaptive_sde", "ode"])
def test_adaptive_methods_refuse_a_transform(method):
    draw = sampling.build_sampler(make_config(method), VPSDE(), (2, 2))
    with pytest.raises(ValueError, match=f"sampling.method='{method}' has no steps that a transform could change"):
        draw(jax.random.key(0), make_score_fn(VPSDE()), None, lambda key, x, x_mean, t: (x, x_mean))
