"""Training objectives, the optimizer, and the train and eval steps.

A loss is `(key, params, x, train) -> float[B]`, one value for each image; the steps average it over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

import distributed
import rng
from models.score import get_model_fn, get_score_fn
from sde_lib import SDE, VESDE, VPSDE, expand

TRAINING_EPS = 1e-5  # smallest time that training sees, for every SDE, as in the 2021 code
ADAM_BETA2 = 0.999  # the 2021 code left it at the default of its optimizer

Params = Any


class LossFn(Protocol):
    """Loss of each image of a batch."""

    def __call__(
        self, key: PRNGKeyArray, params: Params, x: Float[Array, "B H W C"], *, train: bool
    ) -> Float[Array, "B"]:
        """Returns the loss of each image; `key` is one key, or one for each image when `train` is not set."""
        ...


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


# --- objectives ------------------------------------------------------------------------------------------------------


def _reduce(squares: Float[Array, "B H W C"], reduce_mean: bool) -> Float[Array, "B"]:
    """Averages over an image, or takes half the sum, as the 2021 code does for its published numbers."""
    return squares.mean(axis=(1, 2, 3)) if reduce_mean else 0.5 * squares.sum(axis=(1, 2, 3))


def make_continuous_loss(
    sde: SDE,
    model: nn.Module,
    *,
    reduce_mean: bool,
    likelihood_weighting: bool,
    continuous: bool = True,
    eps: float = TRAINING_EPS,
) -> LossFn:
    """Denoising score matching in continuous time, Song et al. 2021, Eq. 7.

    With t uniform on [eps, T], z standard normal and x_t = mean + std z, the loss of an image is
    ‖std s(x_t, t) + z‖², the weighting λ(t) = std(t)²; or g(t)² ‖s(x_t, t) + z / std‖² with `likelihood_weighting`
    (Song et al. 2021, "Maximum Likelihood Training of Score-Based Diffusion Models").

    Args:
      sde: forward SDE.
      model: score network.
      reduce_mean: mean over the pixels; otherwise half their sum.
      likelihood_weighting: weight by g(t)² instead of std(t)².
      continuous: label convention of the network, see `models.score`.
      eps: smallest time.
    """

    def loss(key: PRNGKeyArray, params: Params, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B"]:
        key_t, key_z, key_dropout = rng.split(key, 3)
        score_fn = get_score_fn(sde, model, params, {}, train, continuous, dropout_key=key_dropout)
        t = rng.uniform(key_t, x.shape[:1], minval=eps, maxval=sde.T)
        z = rng.normal(key_z, x.shape)
        mean, std = sde.marginal_prob(x, t)
        score = score_fn(mean + expand(std, x) * z, t)
        if not likelihood_weighting:
            return _reduce(jnp.square(score * expand(std, x) + z), reduce_mean)
        diffusion = sde.sde(jnp.zeros_like(x), t)[1]
        return jnp.square(diffusion) * _reduce(jnp.square(score + z / expand(std, x)), reduce_mean)

    return loss


def make_smld_loss(sde: VESDE, model: nn.Module, *, reduce_mean: bool) -> LossFn:
    """Denoising score matching at N discrete noise levels (SMLD), Song et al. 2021, Eq. 1 with weights sigma_i².

    The network is given the index of the level in the descending table of sigmas and returns the score itself.
    """

    def loss(key: PRNGKeyArray, params: Params, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B"]:
        key_labels, key_z, key_dropout = rng.split(key, 3)
        labels = rng.randint(key_labels, x.shape[0], sde.N)
        sigma = expand(sde.discrete_sigmas[::-1][labels], x)
        z = rng.normal(key_z, x.shape)
        score = get_model_fn(model, params, {}, train, key_dropout)(x + sigma * z, labels)
        return _reduce(jnp.square(score * sigma + z), reduce_mean)

    return loss


def make_ddpm_loss(sde: VPSDE, model: nn.Module, *, reduce_mean: bool) -> LossFn:
    """The simplified DDPM objective at N discrete times: ‖network(x_i, i) - z‖² (Ho et al. 2020, Eq. 14)."""

    def loss(key: PRNGKeyArray, params: Params, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B"]:
        key_labels, key_z, key_dropout = rng.split(key, 3)
        labels = rng.randint(key_labels, x.shape[0], sde.N)
        alpha_bar = sde.alphas_cumprod[labels]
        z = rng.normal(key_z, x.shape)
        noisy = expand(jnp.sqrt(alpha_bar), x) * x + expand(jnp.sqrt(1.0 - alpha_bar), x) * z
        noise = get_model_fn(model, params, {}, train, key_dropout)(noisy, labels)
        return _reduce(jnp.square(noise - z), reduce_mean)

    return loss


def build_loss(config: ConfigDict, sde: SDE, model: nn.Module) -> LossFn:
    """Builds the training objective that `config.training` names.

    Raises:
      ValueError: if a discrete objective is asked for with an SDE that has none, or with likelihood weighting.
    """
    training = config.training
    if training.continuous:
        return make_continuous_loss(
            sde, model, reduce_mean=training.reduce_mean, likelihood_weighting=training.likelihood_weighting
        )
    if training.likelihood_weighting:
        raise ValueError(
            "training.likelihood_weighting=True needs training.continuous=True: the discrete losses have fixed weights"
        )
    if isinstance(sde, VESDE):
        return make_smld_loss(sde, model, reduce_mean=training.reduce_mean)
    if isinstance(sde, VPSDE):
        return make_ddpm_loss(sde, model, reduce_mean=training.reduce_mean)
    raise ValueError(
        f"training.continuous=False is defined for training.sde 'vesde' (SMLD) and 'vpsde' (DDPM), "
        f"not for {training.sde!r}; set training.continuous=True"
    )


# --- optimizer -------------------------------------------------------------------------------------------------------


def make_optimizer(
    *, lr: float, beta1: float, eps: float, weight_decay: float, warmup: int, grad_clip: float
) -> optax.GradientTransformation:
    """Adam with linear warm-up from 0, clipping by the global norm and decoupled weight decay.

    Args:
      lr: learning rate after the warm-up.
      beta1: decay of the first moment; that of the second is 0.999.
      eps: added to the root of the second moment.
      weight_decay: fraction of a parameter, times the learning rate, taken from it at each step.
      warmup: steps of the warm-up; the first step has learning rate 0. 0: none.
      grad_clip: bound on the global norm of the gradient; negative: none.
    """
    # A schedule in either case: the optimizer's state, and so a checkpoint, has one structure for all settings.
    schedule = optax.linear_schedule(0.0, lr, warmup) if warmup > 0 else optax.constant_schedule(lr)
    return optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip >= 0 else optax.identity(),
        optax.scale_by_adam(b1=beta1, b2=ADAM_BETA2, eps=eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Builds the optimizer that `config.optim` describes.

    Raises:
      ValueError: if the optimizer is unknown or a setting would silently train nothing.
    """
    optim = config.optim
    if optim.optimizer != "Adam":
        raise ValueError(f"optim.optimizer={optim.optimizer!r} is unknown; known: Adam")
    if optim.grad_clip == 0:
        raise ValueError("optim.grad_clip=0 would set every gradient to zero; a negative value turns clipping off")
    if optim.lr <= 0 or optim.warmup < 0:
        raise ValueError(f"optim.lr={optim.lr}, optim.warmup={optim.warmup}; expected lr > 0 and warmup >= 0 steps")
    return make_optimizer(
        lr=optim.lr,
        beta1=optim.beta1,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        warmup=optim.warmup,
        grad_clip=optim.grad_clip,
    )


# --- steps -----------------------------------------------------------------------------------------------------------


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
) -> Callable[[PRNGKeyArray, TrainState, Array], tuple[TrainState, Mapping[str, Array]]]:
    """Builds one training step, for use inside a mapped function or outside one.

    Args:
      loss_fn: loss of each image.
      optimizer: see `make_optimizer`.
      ema_rate: decay of the moving average of the parameters.
      prepare: turns a batch of stored levels into the network's input.

    Returns:
      `(key, state, batch) -> (state, metrics)`. `key` is the same for the whole run: the noise of a step follows from
      (key, state.step). `metrics` has the mean `loss` and the `grad_norm` before clipping.
    """

    def train_step(key: PRNGKeyArray, state: TrainState, batch: Array) -> tuple[TrainState, Mapping[str, Array]]:
        key_data, key_loss = jax.random.split(jax.random.fold_in(key, state.step))
        x = prepare(key_data, batch)
        objective = lambda params: loss_fn(key_loss, params, x, train=True).mean()  # noqa: E731
        loss, grads = distributed.mean(jax.value_and_grad(objective)(state.params))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params_ema = update_ema(state.params_ema, params, ema_rate)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, params_ema, opt_state), metrics

    return train_step


def make_train_steps(
    train_step: Callable[[PRNGKeyArray, TrainState, Array], tuple[TrainState, Mapping[str, Array]]],
) -> Callable[[PRNGKeyArray, TrainState, Array], tuple[TrainState, Mapping[str, Array]]]:
    """Chains training steps over the leading axis of `batches` in one compiled loop; metrics gain that axis."""

    def train_steps(key: PRNGKeyArray, state: TrainState, batches: Array) -> tuple[TrainState, Mapping[str, Array]]:
        return jax.lax.scan(lambda carry, batch: train_step(key, carry, batch), state, batches)

    return train_steps
