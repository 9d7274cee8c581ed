"""Training steps that leave the state alone when their loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from losses.steps import Batch, TrainState, TrainStep


def skip_nonfinite(train_step: TrainStep) -> TrainStep:
    """Returns the step that keeps parameters, moving average and optimizer as they were if it went wrong.

    The step is counted, so that the next one sees other data; the optimizer does not count it, nor does its warm-up.
    Loss and gradient are means over all devices, which therefore decide alike, and none of them asks the host.

    Args:
      train_step: whose metrics have "loss" and "grad_norm".
    """

    def step(key: PRNGKeyArray, state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Array]]:
        after, metrics = train_step(key, state, batch)
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state)
        return kept.replace(step=after.step), metrics

    return step
