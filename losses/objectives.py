"""Training objectives: what is minimized."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

import rng
from models.score import get_model_fn, get_score_fn
from sde_lib import SDE, VESDE, VPSDE, expand

TRAINING_EPS = 1e-5  # smallest time that training sees, for every SDE, as in the 2021 code

Params = Any


class LossFn(Protocol):
    """Loss of each image of a batch."""

    def __call__(
        self, key: PRNGKeyArray, params: Params, x: Float[Array, "B H W C"], *, train: bool
    ) -> Float[Array, "B"]:
        """Returns the loss of each image; `key` is one key, or one for each image when `train` is not set."""
        ...


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
