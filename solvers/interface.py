"""What all samplers have in common: their type, their first state, and the prediction of the data from a score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from errors import UserError
from parallel import rng
from sde_lib import SDE, ScoreFn, State

# x and x_mean, both float[B, ...]: the new state, and the same before the step's noise was added.
StepResult = tuple[State, State]
# (key, x, x_mean, t) -> (x, x_mean): what controllable generation does to the result of a step.
StepTransform = Callable[[PRNGKeyArray, Array, Array, Array], StepResult]

TRANSFORM_STREAM = 2**32 - 1  # number of the draw from which step transforms derive theirs; no step comes so far


class Sampler(Protocol):
    """What `sampling.build_sampler` returns."""

    def __call__(
        self, key: PRNGKeyArray, score_fn: ScoreFn, x_init: State | None = None, transform: StepTransform | None = None
    ) -> tuple[State, Int[Array, ""]]:
        """Draw samples.

        Args:
          key: one key, from which example i of the global batch derives its own, or one key for each example.
          score_fn: score(x, t); any function.
          x_init: state at t = T; drawn from the prior if it is not given.
          transform: applied to the result of each step, by a method that has steps of its own.

        Returns:
          Samples in the network's range, and the number of evaluations of `score_fn`, each for the whole batch.
        """


def prepare(key: PRNGKeyArray, x_init: State | None, sde: SDE, shape: tuple[int, ...]) -> tuple[PRNGKeyArray, State]:
    """Return a key for each example, for what follows, and the state at t = T."""
    key_prior, key = rng.split(rng.example_keys(key, shape[0]))
    if x_init is None:
        return key, sde.prior_sampling(key_prior, shape)
    if x_init.shape != shape:
        raise UserError(f"x_init has shape {x_init.shape}; this sampler was built for {shape}")
    return key, x_init


def unchanged(key: PRNGKeyArray, x: Array, x_mean: Array, t: Array) -> StepResult:
    """The step transform that changes nothing."""
    del key, t
    return x, x_mean


def refuse_transform(method: str, transform: StepTransform | None) -> None:
    """Raise a UserError if there is a transform, for a method whose steps differ between examples or are internal."""
    if transform is not None:
        raise UserError(
            f"sampling.method={method!r} has no steps that a transform could change; set sampling.method='pc'"
        )


def predict_noise(score_fn: ScoreFn, x: State, t: Float[Array, ""], std: Float[Array, ""]) -> State:
    """Return the noise z in x = m x0 + s z that the score stands for: -s score(x, t)."""
    return -std * score_fn(x, jnp.full(x.shape[:1], t))


def predict_data(score_fn: ScoreFn, x: State, t: Float[Array, ""], m: Float[Array, ""], std: Float[Array, ""]) -> State:
    """Return E[x0 | x] as the score has it, by Tweedie's formula: (x + std^2 score(x, t)) / m."""
    return (x - std * predict_noise(score_fn, x, t, std)) / m
