"""The loop of every solver whose times are fixed beforehand: one compiled scan over rows of coefficients.

A solver computes what its steps need once, in float64 on the host, as a row for each step; the loop hands a row to
`Solver.step`. Between steps there is nothing but the state and the solver's memory of earlier steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from parallel import rng
from sde_lib import SDE, ScoreFn, State
from solvers.interface import TRANSFORM_STREAM, StepTransform, predict_data, prepare, unchanged
from solvers.noise_levels import NoiseLevels

Row = Mapping[str, Array]  # coefficients of one step
Memory = Any  # what a solver carries from step to step besides the state


@dataclass(frozen=True)
class Solver:
    """A method on a fixed grid of N steps.

    Attributes:
      rows: coefficients of all steps, arrays [N, ...] by name.
      step: (keys, x, memory, row, score_fn) -> (x, memory).
      start: x -> memory before the first step.
      evaluations: of the score in a step.
    """

    rows: Mapping[str, np.ndarray]
    step: Callable[[PRNGKeyArray, Array, Memory, Row, ScoreFn], tuple[Array, Memory]]
    start: Callable[[Array], Memory]
    evaluations: int


def as_arrays(rows: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Round rows to JAX's default type of floats."""
    return {name: jnp.asarray(values) for name, values in rows.items()}


def sample(
    key: PRNGKeyArray,
    score_fn: ScoreFn,
    x_init: State | None = None,
    transform: StepTransform | None = None,
    *,
    solver: Solver,
    grid: NoiseLevels,
    sde: SDE,
    shape: tuple[int, ...],
    noise_removal: bool,
) -> tuple[State, Int[Array, ""]]:
    """Take all steps from T to the last level and, with `noise_removal`, returns the data predicted there.

    A transform is applied after each step, at the time where it arrived, and to the predicted data.
    """
    key, x = prepare(key, x_init, sde, shape)
    key_transform = rng.fold_in(key, TRANSFORM_STREAM)
    transform = transform or unchanged
    num_steps = len(grid.t) - 1

    def step(carry: tuple[Array, Memory], inputs: tuple[Array, Array, Row]) -> tuple[tuple[Array, Memory], None]:
        (x, memory), (i, t, row) = carry, inputs
        x, memory = solver.step(rng.fold_in(key, i), x, memory, row, score_fn)
        x, _ = transform(rng.fold_in(key_transform, i), x, x, jnp.full(shape[:1], t))
        return (x, memory), None

    steps = jnp.arange(num_steps), jnp.asarray(grid.t[1:]), as_arrays(solver.rows)
    (x, _), _ = jax.lax.scan(step, (x, solver.start(x)), steps)
    nfe = num_steps * solver.evaluations
    if noise_removal:
        last = jnp.asarray(grid.t[-1]), jnp.asarray(grid.mean_coeff[-1]), jnp.asarray(grid.std[-1])
        x0 = predict_data(score_fn, x, *last)
        _, x = transform(rng.fold_in(key_transform, num_steps), x, x0, jnp.full(shape[:1], last[0]))
    return x, jnp.asarray(nfe + noise_removal, jnp.int32)
