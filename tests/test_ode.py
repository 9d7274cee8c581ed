"""The adaptive solver against scipy in float64 and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from solvers import ode

RATES = jnp.array([0.5, 3.0, 20.0])  # one example slow, one fast


def pendulum(t, y):
    """A pendulum that is shaken at a rate of its own in each example: non-linear, and with t for each example."""
    rate = RATES[: len(y)]
    return jnp.stack([y[:, 1], -jnp.sin(y[:, 0]) + rate * jnp.sin(rate * t)], axis=1)


def solve(y, t0=0.0, t1=3.0, fn=pendulum, **kwargs):
    settings = {"t0": t0, "t1": t1, "rtol": 1e-6, "atol": 1e-6} | kwargs
    return jax.jit(lambda y: ode.integrate(fn, y, **settings))(y)


def test_matches_scipy_in_both_directions():
    start = jnp.array([[1.0, 0.5], [-0.3, 2.0], [0.1, 0.0]])
    solution = solve(start)
    for i, rate in enumerate(np.asarray(RATES, np.float64)):
        field = lambda t, y: (y[1], -np.sin(y[0]) + rate * np.sin(rate * t))  # noqa: B023, E731
        exact = scipy.integrate.solve_ivp(field, (0, 3), np.asarray(start[i], np.float64), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(solution.y[i], exact.y[:, -1], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(solve(solution.y, 3.0, 0.0).y, start, atol=5e-5)


def test_takes_about_as_many_evaluations_as_scipy():
    fn = lambda t, y: jnp.stack([y[:, 1], (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], axis=1)  # noqa: E731
    field = lambda t, y: (y[1], (1 - y[0] ** 2) * y[1] - y[0])  # noqa: E731
    theirs = scipy.integrate.solve_ivp(field, (0, 20), [2.0, 0.0], method="RK45", rtol=1e-5, atol=1e-5).nfev
    ours = int(solve(jnp.array([[2.0, 0.0]]), 0.0, 20.0, fn, rtol=1e-5, atol=1e-5).nfe)
    assert 0.9 < ours / theirs < 1.1


def test_each_example_takes_its_own_steps():
    start = jnp.array([[1.0, 0.5], [-0.3, 2.0], [0.1, 0.0]])
    together, alone = solve(start), solve(start[:1])
    np.testing.assert_allclose(together.y[:1], alone.y, rtol=5e-6)  # float32; the steps themselves are the same
    assert alone.nfe < together.nfe  # the slow example needs fewer steps than the fast one


def test_steps_of_the_batch_are_scipys():
    """One norm over the batch: as many evaluations as SciPy, fewer than the slowest example alone needs."""
    start = jnp.array([[1.0, 0.5], [-0.3, 2.0], [0.1, 0.0]])
    batch, each = (solve(start, step_control=control) for control in ("batch", "sample"))
    rates = np.asarray(RATES, np.float64)[:, None]

    def field(t, y):
        y = y.reshape(3, 2)
        return np.concatenate([y[:, 1:], -np.sin(y[:, :1]) + rates * np.sin(rates * t)], axis=1).ravel()

    theirs = scipy.integrate.solve_ivp(field, (0, 3), np.asarray(start).ravel(), rtol=1e-6, atol=1e-6)
    assert 0.9 < int(batch.nfe) / theirs.nfev < 1.1
    assert batch.nfe < each.nfe
    np.testing.assert_allclose(batch.y, each.y, atol=2e-5)


def test_global_error_is_of_order_five():
    """The error of a step is held at the tolerance, so five digits more cost 10^(5/5) times the evaluations."""
    with jax.enable_x64(True):
        fn = lambda t, y: jnp.stack([y[:, 1], -y[:, 0]], axis=1)  # noqa: E731
        start = jnp.array([[1.0, 0.0]])
        runs = [solve(start, 0.0, 20.0, fn, rtol=tol, atol=tol) for tol in (1e-5, 1e-10)]
        errors = [float(jnp.abs(run.y[0, 0] - np.cos(20.0))) for run in runs]
        assert errors[0] < 1e-3
        assert errors[1] < 1e-8
        assert 7 < runs[1].nfe / runs[0].nfe < 13  # (1e5)^(1/5) = 10


def test_counts_every_evaluation():
    calls = []

    def fn(t, y):
        jax.debug.callback(lambda: calls.append(1))
        return -y

    solution = solve(jnp.ones((2, 1)), 0.0, 1.0, fn)
    jax.effects_barrier()
    assert int(solution.nfe) == len(calls)
    assert (int(solution.nfe) - 1) % 6 == 0  # one at the start, then six for each attempted step
    np.testing.assert_allclose(solution.y, np.exp(-1.0), rtol=1e-6)


def test_failure_is_visible():
    fn = lambda t, y: jnp.where(t[:, None] > 0.5, jnp.nan, -y) * jnp.array([[1.0], [0.0]])  # noqa: E731
    start = jnp.ones((2, 1))
    broken = solve(start, 0.0, 1.0, fn)  # NaN * 0 is NaN: both
    assert np.isnan(broken.y).all()
    exhausted = solve(jnp.array([[1.0, 0.5], [0.1, 0.0]]), max_steps=3)
    assert np.isnan(exhausted.y).all()
    assert int(exhausted.nfe) == 1 + 3 * 6
    with pytest.raises(ode.SolverError, match="bits/dim: the solver gave up on 1 of 2 examples"):
        ode.require_solved(np.array([[1.0], [np.nan]]), "bits/dim")
    ode.require_solved(np.ones(2), "bits/dim")


@pytest.mark.parametrize("last", [1.0, 1.0 - 6e-8, 1 / 3])
def test_arrives_exactly(last):
    fn = lambda t, y: jnp.ones_like(y)  # noqa: E731
    np.testing.assert_allclose(solve(jnp.zeros((1, 1)), 1e-5, last, fn).y, last - 1e-5, rtol=1e-6)
