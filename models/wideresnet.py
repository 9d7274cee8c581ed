"""Wide ResNet (Zagoruyko & Komodakis 2016) that classifies noisy images, conditioned on the noise level.

What guides class-conditional generation in Song et al. 2021, Appendix I.1: log p_t(y | x) and its gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import initializers, resample
from models.convolution import Conv
from models.layers import Dense, FourierFeatures, call_block
from models.normalization import GroupNorm
from models.precision import add_to_channels, at_least_float32

BASE_WIDTHS = (16, 32, 64)  # channels of the three groups, times the multiplier
NUM_FREQUENCIES, FOURIER_SCALE = 128, 16.0
EMBEDDING_WIDTH = 512
EPSILON = 1e-5  # of the group normalization

# Means and standard deviations of CIFAR-10's channels in [0, 1], by which images are normalized outside the network.
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)

LogitFn = Callable[[Float[Array, "B H W C"], Float[Array, "B"]], Float[Array, "B K"]]

_Conv = functools.partial(Conv, kernel_init=initializers.kaiming_normal, bias_init=None)
_Dense = functools.partial(Dense, kernel_init=initializers.lecun_normal)


def _norm_relu(x: Array, name: str) -> Array:
    return jax.nn.relu(GroupNorm(epsilon=EPSILON, name=name)(x))


class WideBlock(nn.Module):
    """Two convolutions after normalization, the first given the noise level, and a shortcut without parameters."""

    features: int  # output channels
    stride: int = 1  # of the first convolution
    is_first: bool = False  # first block of the network: its shortcut starts after the normalization

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], embedding: Float[Array, "B E"]) -> Float[Array, "B P Q O"]:
        h = _norm_relu(x, "norm1")
        shortcut = h if self.is_first else x
        h = _Conv(self.features, stride=self.stride, name="conv1")(h)
        h = add_to_channels(h, _Dense(self.features, name="embedding")(jax.nn.swish(embedding)))
        h = _Conv(self.features, name="conv2")(_norm_relu(h, "norm2"))
        if self.stride > 1:
            shortcut = resample.downsample_mean(shortcut)
        added = self.features - shortcut.shape[-1]
        return h + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, added)))


class WideGroup(nn.Module):
    """Blocks of one width, of which the first may halve the image; attributes as in `WideBlock` and `WideResNet`."""

    num_blocks: int
    features: int
    stride: int = 1
    is_first: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], embedding: Float[Array, "B E"]) -> Float[Array, "B P Q O"]:
        for i in range(self.num_blocks):
            stride, is_first = (self.stride, self.is_first) if i == 0 else (1, False)
            block = WideBlock(self.features, stride, is_first, name=f"block{i}")
            x = call_block(block, x, embedding, remat=self.remat)
        return x


class WideResNet(nn.Module):
    """Noise-conditional classifier."""

    blocks_per_group: int  # blocks of each of the three groups
    channel_multiplier: int  # width, in multiples of 16, 32 and 64 channels
    num_classes: int  # classes that it tells apart
    remat: bool = False  # blocks are computed again in the gradient, see `layers.call_block`
    dtype: jnp.dtype | None = None  # of the features; None: that of the images

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], sigmas: Float[Array, "B"], train: bool = False
    ) -> Float[Array, "B K"]:
        """Return the logits of the classes.

        Args:
          x: noisy images, normalized by the channels' mean and standard deviation.
          sigmas: noise levels.
          train: makes no difference; the network has no dropout.
        """
        mean, variance = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
        # The bound before the root: the gradient of the root is infinite at the variance of a flat image, 0.
        x = (x - mean) / jnp.sqrt(jnp.maximum(variance, 1 / math.prod(x.shape[1:])))
        embedding = FourierFeatures(NUM_FREQUENCIES, FOURIER_SCALE, name="fourier")(jnp.log(sigmas))
        embedding = _Dense(EMBEDDING_WIDTH, name="embedding1")(embedding)
        embedding = _Dense(EMBEDDING_WIDTH, name="embedding2")(jax.nn.swish(embedding))
        h = _Conv(BASE_WIDTHS[0], name="input")(x.astype(self.dtype or x.dtype))
        for i, width in enumerate(BASE_WIDTHS):
            stride, is_first = (1, True) if i == 0 else (2, False)
            features = width * self.channel_multiplier
            h = WideGroup(self.blocks_per_group, features, stride, is_first, self.remat, name=f"group{i}")(h, embedding)
        h = at_least_float32(_norm_relu(h, "output_norm")).mean((1, 2))
        return Dense(self.num_classes, kernel_init=initializers.uniform_by_outputs, name="output")(h)


def make_logit_fn(
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    mean: tuple[float, ...] = CIFAR10_MEAN,
    std: tuple[float, ...] = CIFAR10_STD,
) -> LogitFn:
    """Return (x, sigma) -> logits of noisy images, with the channels' normalization.

    Args:
      model: classifier called as model(x, sigmas).
      params: its parameters.
      mean: of each channel of the training images, in the range that x is in; by default of CIFAR-10's in [0, 1].
      std: of each channel.
    """

    def logit_fn(x: Float[Array, "B H W C"], sigmas: Float[Array, "B"]) -> Float[Array, "B K"]:
        normalized = (x - jnp.asarray(mean)[None, None, None, :]) / jnp.asarray(std)[None, None, None, :]
        return cast(Array, model.apply({"params": params}, normalized, sigmas))

    return logit_fn


def make_classifier_grad_fn(
    logit_fn: LogitFn,
) -> Callable[[Float[Array, "B H W C"], Float[Array, "B"], Int[Array, "B"]], Float[Array, "B H W C"]]:
    """Return (x, sigma, labels) -> grad_x log p(label | x), what is added to the score (Eq. 14)."""

    def log_probability(x: Array, sigmas: Array, labels: Array) -> Array:
        log_probabilities = jax.nn.log_softmax(logit_fn(x, sigmas))
        return jnp.take_along_axis(log_probabilities, labels[:, None], 1).sum()

    return jax.grad(log_probability)
