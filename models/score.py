"""The score of a network: the one place that knows its signs, its labels of the noise level and its 1/std."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

import sde_lib
from sde_lib import SDE, VESDE, VPSDE, ScoreFn, expand

ModelFn = Callable[[Float[Array, "B ..."], Array], Float[Array, "B ..."]]

LABEL_OF_T = 999.0  # label of t = T for continuously trained VP and sub-VP models: that of DDPM's last level


def get_model_fn(
    model: nn.Module,
    params: Mapping[str, Any],
    model_state: Mapping[str, Any],
    train: bool,
    dropout_key: PRNGKeyArray | None = None,
    class_labels: Int[Array, "B"] | None = None,
) -> ModelFn:
    """Binds a network to its variables: (x, labels) -> output, labels being those of the noise level.

    Args:
      model: network called as model(x, labels, train=...).
      params: its parameters.
      model_state: its other collections of variables; empty for every network here.
      train: apply dropout, drawn from `dropout_key`.
      dropout_key: one key for the whole batch; needed in training if the network has dropout.
      class_labels: what a network that is told classes is told, a keyword of its call; None: nothing.
    """
    variables = {"params": params, **model_state}
    rngs = {"dropout": dropout_key} if train and dropout_key is not None else None
    told: dict[str, Any] = {} if class_labels is None else {"class_labels": class_labels}

    def model_fn(x: Float[Array, "B ..."], labels: Array) -> Float[Array, "B ..."]:
        return cast(Array, model.apply(variables, x, labels, train=train, rngs=rngs, **told))

    return model_fn


def _labels(sde: SDE, t: Float[Array, "B"], continuous: bool) -> Array:
    """Returns what the network is told of the noise level at t."""
    if isinstance(sde, VESDE):
        # sigma, of which the network takes the logarithm; or the index of the level, counted down from sigma_max.
        return sde.std(t) if continuous else jnp.round((sde.T - t) * (sde.N - 1)).astype(jnp.int32)
    if isinstance(sde, VPSDE) and not continuous:
        # Not an integer between DDPM's levels, though training used integers: as the original samples.
        return t * (sde.N - 1)
    return t * (LABEL_OF_T / sde.T)


def _score_scale(sde: SDE, t: Float[Array, "B"], continuous: bool) -> Float[Array, "B"]:
    """Returns the score's factor on the network's output, which for VP predicts the noise."""
    if isinstance(sde, VESDE):
        return jnp.ones_like(t)  # the network itself divides by sigma
    if isinstance(sde, VPSDE) and not continuous:
        return -1 / sde.sqrt_1m_alphas_cumprod[sde.time_index(t)]
    return -1 / sde.std(t)


def get_score_fn(
    sde: sde_lib.SDE,
    model: nn.Module,
    params: Mapping[str, Any],
    model_state: Mapping[str, Any],
    train: bool,
    continuous: bool,
    dropout_key: PRNGKeyArray | None = None,
    class_labels: Int[Array, "B"] | None = None,
) -> ScoreFn:
    """Returns score(x, t) = grad log p_t(x), or grad log p_t(x | label), as the network estimates it.

    VE: the network's output, at the label sigma(t), or for a discretely trained model at the level's index, 0 for
    sigma_max. VP, sub-VP and any other SDE: -output / std(t), at the label 999 t / T; for a discretely trained VP
    model -output / sqrt(1 - alpha_bar_i) at the label t (N - 1), with i that label truncated. A sub-VP model has no
    discrete levels, and `continuous` makes no difference.

    Args:
      sde: the SDE the network was trained for; its N gives the discrete levels.
      model: network called as model(x, labels, train=...).
      params: its parameters.
      model_state: its other collections of variables; {} for every network here.
      train: apply dropout.
      continuous: the network was trained in continuous time; see `config.training.continuous`.
      dropout_key: one key for the whole batch, for training.
      class_labels: of the examples of the batch, for a network that is told classes; None: no labels.
    """
    model_fn = get_model_fn(model, params, model_state, train, dropout_key, class_labels)

    def score_fn(x: Float[Array, "B ..."], t: Float[Array, "B"]) -> Float[Array, "B ..."]:
        return expand(_score_scale(sde, t, continuous), x) * model_fn(x, _labels(sde, t, continuous))

    return score_fn
