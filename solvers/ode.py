"""Adaptive integration of ordinary differential equations on the device, with a step size for each example or batch.
from sde_lib import Scalars

diffrax does the work: Dormand and Prince's pair of orders 5 and 4, the method of scipy's RK45 that the paper used.
By default every example takes its own steps, so that its result does not depend on its batch mates or on the device
that it is on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from errors import UserError
from parallel import distributed
from sde_lib import Scalars

if TYPE_CHECKING:
    import diffrax

VectorField = Callable[[Scalars, Float[Array, "B F"]], Float[Array, "B F"]]  # (t, y) -> dy/dt

MAX_STEPS = 4096  # attempted steps; the probability-flow ODE of a trained network takes some tens
FIRST_STEP = 0.01  # of the interval; the controller corrects it
_SLOPES_AT_START = 1
_SLOPES_OF_A_STEP = 6  # seven stages, of which the last is the first of the next step


class Solution(NamedTuple):
    """State at the end of the interval; NaN for an example that did not get there."""

    y: Float[Array, "B F"]
    nfe: Int[Array, ""]  # evaluations of the right-hand side, each for the whole batch


def _slope_of_an_example(fn: VectorField, batch: Float[Array, "B F"]) -> Callable[..., Array]:
    """Return the slope of one example, which under `jax.vmap` over the batch is one call of `fn` on the batch.

    So diffrax may step each example by itself, while `fn` always sees the whole batch in its order, and may close
    over what belongs to it, such as labels.
    """
    # What `fn` closes over must be an argument: a rule of custom_vmap may not see the tracers around it.
    pure_fn = eqx.filter_closure_convert(fn, batch[:, 0], batch)
    captured, rest = eqx.partition(pure_fn, eqx.is_array)

    @jax.custom_batching.custom_vmap
    def slope(t: Float[Array, ""], y: Float[Array, "F"], captured: Any) -> Float[Array, "F"]:
        return eqx.combine(captured, rest)(jnp.full(len(batch), t), jnp.broadcast_to(y, batch.shape))[0]

    @slope.def_vmap
    def _(axis_size: int, is_batched: Any, t: Array, y: Array, captured: Any) -> tuple[Float[Array, "B F"], bool]:
        t = t if is_batched[0] else jnp.full(axis_size, t)
        y = y if is_batched[1] else jnp.broadcast_to(y, batch.shape)
        return eqx.combine(captured, rest)(t, y), True

    return lambda t, y, _: slope(jnp.asarray(t, y.dtype), y, captured)


def integrate(
    fn: VectorField,
    y: Float[Array, "B F"],
    *,
    t0: float,
    t1: float,
    rtol: float,
    atol: float,
    max_steps: int = MAX_STEPS,
    step_control: str = "sample",
) -> Solution:
    """Integrate dy/dt = fn(t, y) from t0 to t1, in either direction.

    The error norm and the step are each example's own, or with `step_control` "batch" one norm over the global batch
    as SciPy's and the 2021 code's: fewer evaluations, but a result then depends on its batch mates.

    Examples must not interact in `fn`. The state at t1 is NaN where the `max_steps` attempted steps of an example ran
    out or its step vanished (see `require_solved`).
    """
    import diffrax  # 0.3 s of the start of every run, of which few solve an equation

    if step_control == "batch":
        controller = diffrax.PIDController(rtol=rtol, atol=atol, norm=_norm_of_batch)
        slope = lambda t, y, _: fn(jnp.full(len(y), t, y.dtype), y)  # noqa: E731
        end, num_steps = _solve(slope, controller, y, t0=t0, t1=t1, max_steps=max_steps)
    else:
        controller = diffrax.PIDController(rtol=rtol, atol=atol)
        solve = functools.partial(_solve, _slope_of_an_example(fn, y), controller, t0=t0, t1=t1, max_steps=max_steps)
        end, num_steps = jax.vmap(solve)(y)
    # The examples of a batch step together until the slowest has arrived.
    return Solution(end, _SLOPES_AT_START + _SLOPES_OF_A_STEP * num_steps.max())


def _norm_of_batch(y: Float[Array, "B F"]) -> Float[Array, ""]:
    """Return the root mean square over the batches of all devices, which so take the same steps."""
    return jnp.sqrt(distributed.mean(jnp.mean(jnp.square(y))))


def _solve(
    slope: Callable[..., Array],
    controller: diffrax.AbstractAdaptiveStepSizeController,
    y: Array,
    *,
    t0: float,
    t1: float,
    max_steps: int,
) -> tuple[Array, Int[Array, ""]]:
    """Return the state at t1, NaN if it was not reached, and the number of attempted steps."""
    import diffrax

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(slope),
        diffrax.Dopri5(scan_kind="lax"),
        t0,
        t1,
        dt0=FIRST_STEP * (t1 - t0),
        y0=y,
        stepsize_controller=controller,
        max_steps=max_steps,
        adjoint=diffrax.ForwardMode(),  # nothing here is differentiated through
        throw=False,
    )
    solved = solution.result == diffrax.RESULTS.successful
    return jnp.where(solved, solution.ys[0], jnp.nan), solution.stats["num_steps"]


class SolverError(UserError):
    """An integration did not reach the end of its interval."""


def require_solved(values: Array | np.ndarray, what: str) -> None:
    """Check that an array of the host, a row for each example, holds no NaN, the mark of a failed integration.

    Raises:
      SolverError: if there is a NaN; `what` was integrated.
    """
    failed = np.isnan(np.asarray(values).reshape(len(values), -1)).any(axis=1)
    if failed.any():
        raise SolverError(
            f"{what}: the solver gave up on {failed.sum()} of {len(failed)} examples within {MAX_STEPS} steps; check "
            "that the network's output is finite, or raise rtol and atol"
        )
