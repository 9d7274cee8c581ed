"""Residual blocks of DDPM and BigGAN, and the resampling layers between them, that make up NCSN++."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from models import cpu, initializers, resample
from models.convolution import Conv
from models.layers import ACTIVATIONS, NIN, Activation, Dense, Dropout, residual_sum
from models.normalization import GroupNorm, NormFactory
from models.precision import add_to_channels


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What all residual blocks of a network have in common."""

    kind: str = "biggan"  # "biggan" or "ddpm"
    nonlinearity: str = "swish"  # name of the activation
    dropout: float = 0.0  # probability that a feature is dropped in training
    skip_rescale: bool = True  # divide every residual sum by sqrt(2)
    init_scale: float = 0.0  # scale of the initial variance of each block's last layer
    fir_kernel: tuple[float, ...] | None = None  # taps of the resampling filter; None for nearest and mean
    resample_with_conv: bool = True  # a convolution in the resampling layers between "ddpm" blocks
    norm: NormFactory = GroupNorm  # makes the normalization
    remat: bool = False  # blocks are computed again in the gradient, see `layers.call_block`

    @property
    def act(self) -> Activation:
        """The activation function."""
        return ACTIVATIONS[self.nonlinearity]


# --- resampling ------------------------------------------------------------------------------------------------------


class ResamplingConv(nn.Module):
    """A 3x3 convolution fused with FIR resampling by 2, `direction` "up" or "down"."""

    features: int
    direction: str
    fir_kernel: tuple[float, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B P Q O"]:
        kernel = self.param("kernel", initializers.default_init(), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        apply = resample.upsample_convolve if self.direction == "up" else resample.convolve_downsample
        return add_to_channels(apply(x, kernel.astype(x.dtype), self.fir_kernel), bias)


def upsample(x: Array, fir_kernel: tuple[float, ...] | None) -> Array:
    """Upsample by 2, with the filter if there is one."""
    return resample.upsample_nearest(x) if fir_kernel is None else resample.upsample_fir(x, fir_kernel)


def downsample(x: Array, fir_kernel: tuple[float, ...] | None) -> Array:
    """Downsample by 2, with the filter if there is one."""
    return resample.downsample_mean(x) if fir_kernel is None else resample.downsample_fir(x, fir_kernel)


class Upsample(nn.Module):
    """Upsampling by 2."""

    fir_kernel: tuple[float, ...] | None  # taps of the filter; None for nearest
    features: int | None = None  # output channels of a convolution; None for no convolution

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W O"]:
        if self.features is None:
            return upsample(x, self.fir_kernel)
        if self.fir_kernel is None:
            return Conv(self.features, name="conv")(upsample(x, None))
        return ResamplingConv(self.features, "up", self.fir_kernel, name="conv")(x)


class Downsample(nn.Module):
    """Downsampling by 2; attributes as `Upsample`, mean for no filter."""

    fir_kernel: tuple[float, ...] | None
    features: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 O"]:
        if self.features is None:
            return downsample(x, self.fir_kernel)
        if self.fir_kernel is None:
            return Conv(self.features, stride=2, name="conv")(x)
        return ResamplingConv(self.features, "down", self.fir_kernel, name="conv")(x)


class Combine(nn.Module):
    """Join of an image pyramid and features, by "sum", or by "cat" with the features behind the image's channels."""

    method: str

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"], h: Float[Array, "B H W F"]) -> Float[Array, "B H W O"]:
        """Join the image, brought to the features' channels by a 1x1 convolution."""
        projected = Conv(h.shape[-1], size=1, name="conv")(image)
        return projected + h if self.method == "sum" else jnp.concatenate([projected, h], -1)


# --- residual blocks -------------------------------------------------------------------------------------------------

Features = Array | list[Array]  # features, or several whose channels are concatenated


class _ResidualBlock(nn.Module):
    """Two normalized convolutions, the first conditioned on the noise level, and a shortcut."""

    features: int
    options: BlockOptions

    def _convolve(
        self, x: Features, embedding: Array | None, train: bool, change: Callable[[Array], Array] = lambda x: x
    ) -> tuple[Array, Array]:
        """Return the input of the shortcut and the result of the convolutions; `change` resamples both."""
        # Stored so that the cotangents of all parts are: otherwise XLA computes that of a skip where it is needed next,
        # on the way down, and keeps in memory what it is made of.
        x = jnp.concatenate(cpu.store(x), -1) if isinstance(x, list) else x
        h, x = change(self.options.act(self.options.norm(name="norm1")(x))), change(x)
        h = Conv(self.features, name="conv1")(h)
        if embedding is not None:
            h = add_to_channels(h, Dense(self.features, name="embedding")(self.options.act(embedding)))
        h = self.options.act(self.options.norm(name="norm2")(h))
        h = Dropout(self.options.dropout, name="dropout")(h, train)
        kernel_init = initializers.default_init(self.options.init_scale)
        return x, Conv(self.features, kernel_init=kernel_init, name="conv2")(h)


class DDPMBlock(_ResidualBlock):
    """Residual block of DDPM (Ho et al. 2020); its shortcut to other channels is linear, or a 3x3 convolution."""

    conv_shortcut: bool = False

    @nn.compact
    def __call__(
        self, x: Features, embedding: Float[Array, "B E"] | None = None, train: bool = False
    ) -> Float[Array, "B H W O"]:
        x, h = self._convolve(x, embedding, train)
        if x.shape[-1] != self.features:
            x = (Conv if self.conv_shortcut else NIN)(self.features, name="shortcut")(x)
        return residual_sum(x, h, self.options.skip_rescale)


class BigGANBlock(_ResidualBlock):
    """Residual block of BigGAN (Brock et al. 2019), which can resample by 2: direction "up", "down" or "none"."""

    direction: str = "none"

    @nn.compact
    def __call__(
        self, x: Features, embedding: Float[Array, "B E"] | None = None, train: bool = False
    ) -> Float[Array, "B P Q O"]:
        changes = {"none": lambda x, fir_kernel: x, "up": upsample, "down": downsample}
        change = functools.partial(changes[self.direction], fir_kernel=self.options.fir_kernel)
        x, h = self._convolve(x, embedding, train, change)
        if x.shape[-1] != self.features or self.direction != "none":
            x = Conv(self.features, size=1, name="shortcut")(x)
        return residual_sum(x, h, self.options.skip_rescale)
