"""What training carries from step to step, and the step itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

import distributed
from losses.objectives import LossFn, Params
from losses.optimizer import global_norm

Batch = Array | tuple[Array, Array]  # levels, or levels and the labels of their classes


@flax.struct.dataclass
class TrainState:
    """All that training carries from one step to the next.

    Attributes:
      step: steps taken, int32.
      params: of the network.
      params_ema: their exponential moving average, which samples, likelihoods and metrics use.
      opt_state: of the optimizer.
    """

    step: Int[Array, ""]
    params: Params
    params_ema: Params
    opt_state: optax.OptState


# (key, state, batch) -> (state, metrics)
TrainStep = Callable[[PRNGKeyArray, TrainState, Batch], tuple[TrainState, Mapping[str, Array]]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; the moving average starts as the parameters."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, params_ema=params, opt_state=optimizer.init(params))


def update_ema(params_ema: Params, params: Params, ema_rate: float) -> Params:
    """Returns the exponential moving average after one more step: rate * average + (1 - rate) * params."""
    return jax.tree.map(lambda ema, p: ema_rate * ema + (1.0 - ema_rate) * p, params_ema, params)


# (params, batch) -> the mean loss of the batch and its gradient
Gradient = Callable[[Params, Batch], tuple[Array, Params]]


def accumulate(gradient: Gradient, num_parts: int) -> Gradient:
    """Returns the same mean loss and gradient, computed of one part of the batch after the other.

    The activations of one part at a time are in memory. Each example draws what it draws in the whole batch, see
    `distributed.part_of_batch`, and the loss of a batch is the mean of that of its examples, none of which looks at
    another: so the result is that of the whole batch, up to the order of the sum.

    Args:
      gradient: of a batch.
      num_parts: of equal size; they must divide the batch.
    """

    def accumulated(params: Params, batch: Batch) -> tuple[Array, Params]:
        def add(total: tuple[Array, Params], part: tuple[Array, Batch]) -> tuple[tuple[Array, Params], None]:
            with distributed.part_of_batch(part[0], num_parts):
                return jax.tree.map(jnp.add, total, gradient(params, part[1])), None

        split = lambda array: array.reshape(num_parts, -1, *array.shape[1:])  # noqa: E731
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zero, (jnp.arange(num_parts), jax.tree.map(split, batch)))
        return jax.tree.map(lambda leaf: leaf / num_parts, total)

    return gradient if num_parts == 1 else accumulated


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_rate: float,
    prepare: Callable[[PRNGKeyArray, Array], Array] = lambda key, x: x,
    microbatches: int = 1,
) -> TrainStep:
    """Builds one training step, for use inside a mapped function or outside one.

    Args:
      loss_fn: loss of each image.
      optimizer: see `make_optimizer`.
      ema_rate: decay of the moving average of the parameters.
      prepare: turns a batch of stored levels into the network's input.
      microbatches: parts of a device's batch that are computed one after the other; they must divide it.

    Returns:
      `(key, state, batch) -> (state, metrics)`. `key` is the same for the whole run: the noise of a step follows from
      (key, state.step). A batch is levels, or (levels, class labels). `metrics` has the mean `loss` and the `grad_norm`
      before clipping.
    """

    def train_step(key: PRNGKeyArray, state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Array]]:
        key_data, key_loss = jax.random.split(jax.random.fold_in(key, state.step))

        def mean_loss(params: Params, batch: Batch) -> Array:
            levels, told = (batch[0], {"class_labels": batch[1]}) if isinstance(batch, tuple) else (batch, {})
            return loss_fn(key_loss, params, prepare(key_data, levels), train=True, **told).mean()

        gradient = accumulate(jax.value_and_grad(mean_loss), microbatches)
        loss, grads = distributed.mean(gradient(state.params, batch))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # Stored before the average is made of them: else that would read the old ones, and these be copied for it.
        params = jax.tree.map(jax.lax.optimization_barrier, optax.apply_updates(state.params, updates))
        params_ema = update_ema(state.params_ema, params, ema_rate)
        metrics = {"loss": loss, "grad_norm": global_norm(grads)}
        return TrainState(state.step + 1, params, params_ema, opt_state), metrics

    return train_step


def make_train_steps(train_step: TrainStep) -> TrainStep:
    """Chains training steps over the leading axis of `batches` in one compiled loop; metrics gain that axis."""

    def train_steps(key: PRNGKeyArray, state: TrainState, batches: Batch) -> tuple[TrainState, Mapping[str, Array]]:
        # A mapped function's arguments and results have a device axis. Unless the state is stored without it, XLA fuses
        # the change of shape into the update, takes this for no longer in place, and copies all of the state.
        state = jax.lax.optimization_barrier(state)
        return jax.lax.optimization_barrier(jax.lax.scan(functools.partial(train_step, key), state, batches))

    return train_steps
