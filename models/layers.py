"""Layers that several networks share: linear maps, dropout, attention, embeddings of the noise level."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models import cpu, initializers
from models.convolution import convolve
from models.cpu import dropout as on_cpu
from models.initializers import Initializer
from models.normalization import GroupNorm, NormFactory
from models.precision import add_to_channels, at_least_float32
from parallel import rng
from sde_lib import VESDE, expand

Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
    "elu": jax.nn.elu,
    "relu": jax.nn.relu,
    "lrelu": lambda x: jax.nn.leaky_relu(x, 0.2),
    "swish": jax.nn.swish,
}

MAX_PERIOD = 10_000.0  # ratio of the slowest to the fastest sine of the timestep embedding


def residual_sum(x: Array, h: Array, rescale: bool) -> Array:
    """Add a branch h to its input x; divide by sqrt(2), which keeps the variance, if `rescale`."""
    return (x + h) / math.sqrt(2.0) if rescale else x + h


def call_block(block: nn.Module, *inputs: Any, remat: bool, **options: Any) -> Array:
    """Call a block of a network; with `remat`, its gradient computes all of it again and keeps only the inputs.

    On a CPU the gradient computes what is cheap again in any case, see `cpu.recompute_cheap`. Parameters, random
    streams and numbers are the same.

    Args:
      block: a layer that belongs to the network that calls it.
      inputs: arrays, or lists of them, that it is called with.
      remat: compute the convolutions and matrix products again, too.
      options: keywords that it is called with, which are no arrays.
    """
    if not remat and not cpu.is_target():
        return cast(Array, block(*inputs, **options))
    call = lambda block, *inputs: block(*inputs, **options)  # noqa: E731
    return nn.remat(call, policy=None if remat else cpu.recompute_cheap)(block, *inputs)


class Dense(nn.Module):
    """Linear map of the last axis, in the dtype of its input."""

    features: int  # output channels
    kernel_init: Initializer = initializers.default_init()  # law of the initial kernel [in, out]

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B O"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # As a convolution of 1x1 taps, which has fast gradients.
        pixels, taps = x.reshape(1, 1, -1, x.shape[-1]), kernel.astype(x.dtype).reshape(1, 1, *kernel.shape)
        product = convolve(pixels, taps).reshape(*x.shape[:-1], self.features)
        return cpu.keep(add_to_channels(product, bias))


class NIN(Dense):
    """Linear map of the channels of an image ("network in network"), which starts small."""

    kernel_init: Initializer = initializers.default_init(0.1)


def drop(key: PRNGKeyArray, x: Float[Array, "B *S"], rate: float) -> Float[Array, "B *S"]:
    """Set values to 0 with probability `rate` and divide the others by 1 - rate.

    Example i draws from its own key, so that what is dropped does not depend on the number of devices.
    """
    kept = 1.0 - rate
    draw = on_cpu.bernoulli if cpu.is_target() else rng.bernoulli
    mask = cpu.keep(draw(key, kept, x.shape))
    return jnp.where(mask, x / kept, 0.0)


class Dropout(nn.Module):
    """Dropout in training with probability `rate`, in [0, 1), from the random stream "dropout"; see `drop`."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B *S"], train: bool) -> Float[Array, "B *S"]:
        return drop(self.make_rng("dropout"), x, self.rate) if train and self.rate > 0 else x


class LabelEmbedding(nn.Module):
    """A vector for each class, and one for "no label": the unconditional score (Ho and Salimans 2022)."""

    num_classes: int  # K; the label K is "no label"
    features: int  # width of a vector

    @nn.compact
    def __call__(self, class_labels: Int[Array, "B"] | None, num_examples: int) -> Float[Array, "B F"]:
        """Return the vector of each example's label, 0 .. K; of "no label" for all of them without any."""
        shape = (self.num_classes + 1, self.features)
        embedding = self.param("embedding", initializers.normal_init(0.0, 1.0), shape)
        return embedding[jnp.full(num_examples, self.num_classes) if class_labels is None else class_labels]


class Attention(nn.Module):
    """Self-attention of one head over all pixels, with a residual connection."""

    init_scale: float = 0.0  # scale of the last layer's initial variance
    skip_rescale: bool = False  # divide the residual sum by sqrt(2)
    norm: NormFactory = GroupNorm  # makes the normalization

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Add softmax(q kᵀ / √C) v to x."""
        B, H, W, C = x.shape
        h = self.norm(name="norm")(x).reshape(B, H * W, C)
        q, k, v = (NIN(C, name=name)(h) for name in ("query", "key", "value"))
        logits = at_least_float32(jnp.einsum("bqc,bkc->bqk", q, k)) / math.sqrt(C)
        weights = jax.nn.softmax(logits).astype(v.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(B, H, W, C)
        return residual_sum(x, NIN(C, initializers.default_init(self.init_scale), name="output")(h), self.skip_rescale)


def timestep_embedding(t: Float[Array, "B"], dimension: int) -> Float[Array, "B D"]:
    """Return sines, then cosines of t at frequencies 1 to 1/10000, geometrically spaced.

    The sinusoidal position embedding of transformers (Vaswani et al. 2017) as DDPM (Ho et al. 2020) uses it.

    Args:
      t: labels of the noise level.
      dimension: width of the embedding, at least 4; if odd, the last column is 0.
    """
    half = dimension // 2
    frequencies = jnp.exp(jnp.arange(half) * (-math.log(MAX_PERIOD) / (half - 1)))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)
    return jnp.pad(embedding, ((0, 0), (0, dimension % 2)))


class FourierFeatures(nn.Module):
    """Random Fourier features of a number (Tancik et al. 2020); the frequencies are drawn once and not trained."""

    num_frequencies: int  # half the width of the result
    scale: float  # standard deviation of the frequencies

    @nn.compact
    def __call__(self, x: Float[Array, "B"]) -> Float[Array, "B 2*F"]:
        """Return sines, then cosines of 2 π frequencies x."""
        frequencies = self.param("frequencies", nn.initializers.normal(self.scale), (self.num_frequencies,))
        angles = 2 * jnp.pi * x[:, None] * jax.lax.stop_gradient(frequencies)[None, :]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)


def divide_by_sigma(h: Float[Array, "B H W C"], labels: Array, levels: VESDE | None) -> Float[Array, "B H W C"]:
    """Divide a network's output by its noise level.

    Args:
      h: output of the last layer.
      labels: sigma itself, or the index of the level counted down from sigma_max, [B].
      levels: the levels that the index counts; None if the label is sigma.
    """
    sigma = labels if levels is None else jnp.flip(levels.discrete_sigmas)[labels.astype(jnp.int32)]
    return h / expand(sigma, h)
