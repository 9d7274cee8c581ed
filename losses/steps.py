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


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_rate: float,
    prepare: Callable[[PRNGKeyArray, Array], Array] = lambda key, x: x,
) -> TrainStep:
    """Builds one training step, for use inside a mapped function or outside one.

    Args:
      loss_fn: loss of each image.
      optimizer: see `make_optimizer`.
      ema_rate: decay of the moving average of the parameters.
      prepare: turns a batch of stored levels into the network's input.

    Returns:
      `(key, state, batch) -> (state, metrics)`. `key` is the same for the whole run: the noise of a step follows from
      (key, state.step). A batch is levels, or (levels, class labels). `metrics` has the mean `loss` and the `grad_norm`
      before clipping.
    """

    def train_step(key: PRNGKeyArray, state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Array]]:
        key_data, key_loss = jax.random.split(jax.random.fold_in(key, state.step))
        levels, told = (batch[0], {"class_labels": batch[1]}) if isinstance(batch, tuple) else (batch, {})
        x = prepare(key_data, levels)
        objective = lambda params: loss_fn(key_loss, params, x, train=True, **told).mean()  # noqa: E731
        loss, grads = distributed.mean(jax.value_and_grad(objective)(state.params))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params_ema = update_ema(state.params_ema, params, ema_rate)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, params_ema, opt_state), metrics

    return train_step


def make_train_steps(train_step: TrainStep) -> TrainStep:
    """Chains training steps over the leading axis of `batches` in one compiled loop; metrics gain that axis."""

    def train_steps(key: PRNGKeyArray, state: TrainState, batches: Batch) -> tuple[TrainState, Mapping[str, Array]]:
        return jax.lax.scan(functools.partial(train_step, key), state, batches)

    return train_steps
