"""Solvers that choose their own steps: Runge-Kutta for the probability-flow ODE, and one for the reverse SDE."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from parallel import rng
from sde_lib import SDE, ReverseSDE, Scalars, ScoreFn, State, expand
from solvers import ode
from solvers.interface import StepTransform, predict_data, prepare, refuse_transform

FIRST_STEP = 0.01  # of `adaptive_sde`, in units of t (Jolicoeur-Martineau et al. 2021, Algorithm 1)
SAFETY = 0.9  # theta there
EXPONENT = 0.9  # r there


def integrate_flow(
    score_fn: ScoreFn,
    x: State,
    *,
    sde: SDE,
    t0: float,
    t1: float,
    rtol: float,
    atol: float,
    step_control: str = "sample",
) -> ode.Solution:
    """Integrate the probability-flow ODE (Song et al. 2021, Eq. 13) from t0 to t1; see `ode.integrate`."""
    flow = sde.reverse(score_fn, probability_flow=True)

    def drift(t: Scalars, y: Float[Array, "B F"]) -> Float[Array, "B F"]:
        return flow.sde(y.reshape(x.shape), t)[0].reshape(y.shape)

    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    solution = ode.integrate(drift, flat, t0=t0, t1=t1, rtol=rtol, atol=atol, step_control=step_control)
    return ode.Solution(solution.y.reshape(x.shape), solution.nfe)


def sample_ode(
    key: PRNGKeyArray,
    score_fn: ScoreFn,
    x_init: State | None = None,
    transform: StepTransform | None = None,
    *,
    sde: SDE,
    shape: tuple[int, ...],
    noise_removal: bool,
    rtol: float,
    atol: float,
    step_control: str,
) -> tuple[State, Int[Array, ""]]:
    """Integrate the probability-flow ODE (Eq. 13) from T to eps with Dormand and Prince's method."""
    refuse_transform("ode", transform)
    _, x = prepare(key, x_init, sde, shape)
    t0, t1 = sde.T, sde.sampling_eps
    x, nfe = integrate_flow(score_fn, x, sde=sde, t0=t0, t1=t1, rtol=rtol, atol=atol, step_control=step_control)
    if not noise_removal:
        return x, nfe
    # As the original: one reverse-diffusion step without its noise.
    denoised = x - sde.reverse(score_fn).discretize(x, jnp.full(shape[:1], sde.sampling_eps))[0]
    return denoised, nfe + 1


class _State(NamedTuple):
    """Where the examples of a batch are in `sample_adaptive_sde`, each at a time and with a step of its own."""

    x: State
    x_before: State  # first-order state of the last accepted step
    t: Scalars
    step: Scalars
    num_accepted: Int[Array, "B"]
    num_attempts: Int[Array, ""]


def _improved_step(reverse_sde: ReverseSDE, x: State, t: Scalars, step: Scalars, z: Array) -> tuple[State, State]:
    """Return the step -`step` of Euler-Maruyama, and that of the stochastic improved Euler method with its noise."""
    drift, diffusion = reverse_sde.sde(x, t)
    euler = x - expand(step, x) * drift + expand(jnp.sqrt(step) * diffusion, x) * z
    drift, diffusion = reverse_sde.sde(euler, t - step)
    other = x - expand(step, x) * drift + expand(jnp.sqrt(step) * diffusion, x) * z
    return euler, (euler + other) / 2


def _advance(state: _State, key: PRNGKeyArray, reverse_sde: ReverseSDE, *, rtol: float, atol: float) -> _State:
    """Attempt a step for every example that has not arrived, and accept it where its error is within tolerance."""
    end = reverse_sde.forward.sampling_eps
    # A rejected step keeps its noise: drawing again would favour small noise.
    z = rng.normal(rng.fold_in(key, state.num_accepted), state.x.shape)
    euler, improved = _improved_step(reverse_sde, state.x, state.t, state.step, z)
    scale = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(euler), jnp.abs(state.x_before)))
    error = jnp.sqrt(jnp.mean(jnp.square((euler - improved) / scale), axis=tuple(range(1, euler.ndim))))
    is_accepted = (error <= 1) & (state.t > end)
    # The last step ends at eps to the bit, so that it is the last.
    t = jnp.where(is_accepted, jnp.where(state.step >= state.t - end, end, state.t - state.step), state.t)
    step = jnp.minimum(SAFETY * state.step * jnp.maximum(error, 1e-6) ** -EXPONENT, t - end)
    choose = lambda new, old: jnp.where(expand(is_accepted, old), new, old)  # noqa: E731
    return _State(
        x=choose(improved, state.x),
        x_before=choose(euler, state.x_before),
        t=t,
        step=step,
        num_accepted=state.num_accepted + is_accepted,
        num_attempts=state.num_attempts + 1,
    )


def sample_adaptive_sde(
    key: PRNGKeyArray,
    score_fn: ScoreFn,
    x_init: State | None = None,
    transform: StepTransform | None = None,
    *,
    sde: SDE,
    shape: tuple[int, ...],
    noise_removal: bool,
    rtol: float,
    atol: float,
) -> tuple[State, Int[Array, ""]]:
    """Solve the reverse SDE with a step size for each example (Jolicoeur-Martineau et al. 2021, Algorithm 1).

    Two evaluations an attempt: Euler-Maruyama and, as the result, the stochastic improved Euler method; their distance
    is the error, with the tolerances `rtol` (epsilon_rel) and `atol` (epsilon_abs, in units of the network's range).
    Ends on Tweedie's formula with `noise_removal`. A sample is NaN if its attempts ran out. A transform is refused:
    each example has times of its own.
    """
    refuse_transform("adaptive_sde", transform)
    key, x = prepare(key, x_init, sde, shape)
    reverse_sde, end = sde.reverse(score_fn), sde.sampling_eps

    def continues(state: _State) -> Bool[Array, ""]:
        is_on_its_way = (state.t > end) & ~jnp.isnan(state.step)  # a step is NaN after a score that was
        return jnp.any(is_on_its_way) & (state.num_attempts < ode.MAX_STEPS)

    start = _State(
        x=x,
        x_before=x,
        t=jnp.full(shape[:1], sde.T),
        step=jnp.full(shape[:1], min(FIRST_STEP, sde.T - end)),
        num_accepted=jnp.zeros(shape[:1], jnp.int32),
        num_attempts=jnp.zeros((), jnp.int32),
    )
    state = jax.lax.while_loop(continues, lambda state: _advance(state, key, reverse_sde, rtol=rtol, atol=atol), start)
    x = jnp.where(expand(state.t > end, x), jnp.nan, state.x)
    if noise_removal:
        t = jnp.full((1,), end)
        x = predict_data(score_fn, x, t[0], sde.mean_coeff(t)[0], sde.std(t)[0])
    return x, 2 * state.num_attempts + noise_removal
