"""The score of a network; what differs between SDEs, the time label and the factor 1/std, are methods of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
from jaxtyping import Array, Int, PRNGKeyArray

from sde_lib import SDE, Scalars, ScoreFn, State, expand

ModelFn = Callable[[State, Array], State]


def get_model_fn(
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    train: bool,
    dropout_key: PRNGKeyArray | None = None,
    class_labels: Int[Array, "B"] | None = None,
) -> ModelFn:
    """Bind a network to its parameters: (x, time labels) -> output; arguments as in `get_score_fn`."""
    rngs = {"dropout": dropout_key} if train and dropout_key is not None else None
    condition: dict[str, Any] = {} if class_labels is None else {"class_labels": class_labels}

    def model_fn(x: State, labels: Array) -> State:
        return cast(Array, model.apply({"params": params}, x, labels, train=train, rngs=rngs, **condition))

    return model_fn


def get_score_fn(
    sde: SDE,
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    train: bool,
    continuous: bool,
    dropout_key: PRNGKeyArray | None = None,
    class_labels: Int[Array, "B"] | None = None,
) -> ScoreFn:
    """Return score(x, t) = grad log p_t(x), or grad log p_t(x | label), as the network estimates it.

    VE: the network's output, at the label sigma(t), or for a discretely trained model at the level's index, 0 for
    sigma_max. VP, sub-VP and any other SDE: -output / std(t), at the label 999 t / T; for a discretely trained VP
    model -output / sqrt(1 - alpha_bar_i) at the label t (N - 1), with i that label truncated. A sub-VP model has no
    discrete levels, and `continuous` makes no difference.

    Args:
      sde: the SDE the network was trained for; its N gives the discrete levels.
      model: network called as model(x, labels, train=...).
      params: its parameters.
      train: apply dropout.
      continuous: the network was trained in continuous time; see `config.training.continuous`.
      dropout_key: one key for the whole batch; needed in training if the network has dropout.
      class_labels: of the examples, for a class-conditional network; None: no labels.
    """
    model_fn = get_model_fn(model, params, train=train, dropout_key=dropout_key, class_labels=class_labels)

    def score_fn(x: State, t: Scalars) -> State:
        scale = expand(sde.score_scale(t, continuous=continuous), x)
        return scale * model_fn(x, sde.time_label(t, continuous=continuous))

    return score_fn
