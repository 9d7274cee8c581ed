"""The objective of a classifier of noisy images, whose gradient guides sampling (Song et al. 2021, Appendix I.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from losses import DrawTimes, LossFn, Params, make_uniform_times
from models.wideresnet import LogitFn, make_logit_fn
from parallel import rng
from sde_lib import SDE, Images, Scalars, expand

Labels = Int[Array, "B"]


def classify_noisy(
    key: PRNGKeyArray, logit_fn: LogitFn, sde: SDE, x: Images, labels: Labels, t: Scalars
) -> tuple[Scalars, Bool[Array, "B"]]:
    """Classify images as the SDE leaves them at time t: in the classifier's coordinates x_t / m = x + std / m z.

    Args:
      key: one key, or one for each image.
      logit_fn: (x_t / m, std / m) -> logits.
      sde: forward SDE, with the kernel N(m x, std² I).
      x: clean images, in the network's range.
      labels: their classes.
      t: times.

    Returns:
      The cross-entropy -log p_t(label | x_t), in nats, and whether the likeliest class is the label.
    """
    sigma = sde.std(t) / sde.mean_coeff(t)
    logits = logit_fn(x + expand(sigma, x) * rng.normal(key, x.shape), sigma)
    log_probabilities = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]
    return cross_entropy, logits.argmax(axis=1) == labels


def make_classifier_loss(
    sde: SDE, model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], draw_times: DrawTimes | None = None
) -> LossFn:
    """The cross-entropy of a classifier at the noise levels that the score is trained at, in nats.

    Args:
      sde: forward SDE of the score network.
      model: classifier called as model(x, sigmas).
      mean: of each channel of the training images, in the network's range.
      std: of each channel.
      draw_times: t and its weight; by default uniform on [1e-5, T], as of the score network.
    """
    draw_times = draw_times or make_uniform_times(sde)

    def loss(
        key: PRNGKeyArray, params: Params, x: Images, *, train: bool, class_labels: Labels | None = None
    ) -> Scalars:
        assert class_labels is not None  # the trainer of a classifier gives them
        key_t, key_z = rng.split(key)
        t, weight = draw_times(key_t, len(x))
        logit_fn = make_logit_fn(model, params, mean=mean, std=std)
        return weight * classify_noisy(key_z, logit_fn, sde, x, class_labels, t)[0]

    return loss
