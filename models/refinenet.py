"""Blocks of RefineNet (Lin et al. 2017) on a dilated residual network, of which NCSN and NCSNv2 are made.

NCSN conditions every normalization on the label of the noise level, NCSNv2 none (Song & Ermon 2019 and 2020). A block
serves both: `RefineOptions.num_classes` says which.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models import initializers, resample
from models.convolution import Conv
from models.layers import ACTIVATIONS, Activation, call_block
from models.normalization import ConditionalInstanceNormPlus, InstanceNormPlus, NormFactory

POOL_SIZE = 5  # of chained residual pooling, in pixels
NUM_STAGES = 2  # convolutions of a residual unit, and poolings of a chain

# A convolution of these networks: kernel and bias by NCSN's law. The others have Flax's default kernel, or no bias.
RefineConv = functools.partial(Conv, kernel_init=initializers.ncsn_init, bias_init=initializers.ncsn_bias)
BiaslessConv = functools.partial(Conv, kernel_init=initializers.ncsn_init, bias_init=None)


@dataclasses.dataclass(frozen=True)
class RefineOptions:
    """What all blocks of a network have in common."""

    nonlinearity: str = "elu"  # name of the activation
    interpolation: str = "bilinear"  # of feature maps that are merged: "bilinear" or "nearest"
    norm: NormFactory = InstanceNormPlus  # makes the normalization where there is no condition
    num_classes: int = 0  # labels that the normalization is conditioned on; 0: it is not
    remat: bool = False  # blocks are computed again in the gradient, see `layers.call_block`

    @property
    def act(self) -> Activation:
        """The activation function."""
        return ACTIVATIONS[self.nonlinearity]

    @property
    def is_conditional(self) -> bool:
        """Return whether normalization depends on the label."""
        return self.num_classes > 0

    def normalize(self, x: Array, labels: Array, name: str) -> Array:
        """Normalize x in a layer called `name`, given the labels if they count."""
        if self.is_conditional:
            return ConditionalInstanceNormPlus(self.num_classes, name=name)(x, labels)
        return self.norm(name=name)(x)

    def normalize_if_conditional(self, x: Array, labels: Array, name: str) -> Array:
        """Normalize x where only NCSN does; NCSNv2 has no normalization in its decoder."""
        return self.normalize(x, labels, name) if self.is_conditional else x


class ConvMeanPool(nn.Module):
    """Convolution with size x size taps, then the mean of each 2x2 pixels."""

    features: int
    size: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 O"]:
        conv = Conv(self.features, self.size, kernel_init=initializers.lecun_normal, name="conv")
        return resample.downsample_mean(conv(x))


class ResidualBlock(nn.Module):
    """Two normalized convolutions and a shortcut; halves the image, or dilates the convolutions instead."""

    features: int
    options: RefineOptions
    is_down: bool = False  # first block of a stage, which halves the image if its convolutions are not dilated
    dilation: int = 1  # of the convolutions

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], labels: Array) -> Float[Array, "B P Q O"]:
        pools = self.is_down and self.dilation == 1
        conv = functools.partial(RefineConv, dilation=self.dilation)
        # The original computes the shortcut of a block that is no "down" block first: its layers count in this order.
        shortcut = None if self.is_down else self._shortcut(x)
        h = self.options.act(self.options.normalize(x, labels, "norm1"))
        h = conv(x.shape[-1] if self.is_down else self.features, name="conv1")(h)
        h = self.options.act(self.options.normalize(h, labels, "norm2"))
        h = ConvMeanPool(self.features, name="conv2")(h) if pools else conv(self.features, name="conv2")(h)
        return h + (self._shortcut(x) if shortcut is None else shortcut)

    def _shortcut(self, x: Array) -> Array:
        if self.is_down and self.dilation == 1:
            return ConvMeanPool(self.features, 1, name="shortcut")(x)
        if not self.is_down and x.shape[-1] == self.features:
            return x
        return RefineConv(self.features, 3 if self.dilation > 1 else 1, dilation=self.dilation, name="shortcut")(x)


class ResidualUnits(nn.Module):
    """Residual convolution units (RCU), of two convolutions each, one after the other."""

    num_units: int
    options: RefineOptions

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], labels: Array) -> Float[Array, "B H W C"]:
        for unit in range(self.num_units):
            h = x
            for stage in range(NUM_STAGES):
                h = self.options.normalize_if_conditional(h, labels, f"unit{unit}_norm{stage}")
                h = BiaslessConv(x.shape[-1], name=f"unit{unit}_conv{stage}")(self.options.act(h))
            x = x + h
        return x


class MultiResolutionFusion(nn.Module):
    """Sum of feature maps (MSF), each convolved and brought to one size."""

    features: int
    options: RefineOptions

    @nn.compact
    def __call__(self, maps: list[Array], labels: Array) -> Float[Array, "B H W O"]:
        """Merge `maps`, float[B, H_i, W_i, C_i], at the size of the first."""
        B, H, W, _ = maps[0].shape
        resized = []
        for i, x in enumerate(maps):
            h = self.options.normalize_if_conditional(x, labels, f"norm{i}")
            h = RefineConv(self.features, name=f"conv{i}")(h)
            resized.append(jax.image.resize(h, (B, H, W, self.features), self.options.interpolation))
        return functools.reduce(jnp.add, resized)


class ChainedPooling(nn.Module):
    """Chained residual pooling (CRP): each pooled and convolved map is added to the sum, and pooled again."""

    options: RefineOptions

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], labels: Array) -> Float[Array, "B H W C"]:
        x = self.options.act(x)
        path = x
        for stage in range(NUM_STAGES):
            if self.options.is_conditional:
                path = self.options.normalize(path, labels, f"norm{stage}")
                path = resample.pool_mean(path, POOL_SIZE)
            else:
                path = nn.max_pool(path, (POOL_SIZE, POOL_SIZE), padding="SAME")
            path = BiaslessConv(x.shape[-1], name=f"conv{stage}")(path)
            x = x + path
        return x


class RefineBlock(nn.Module):
    """Refinement of a feature map with a coarser one; the last block ends with three residual units instead of one."""

    features: int
    options: RefineOptions
    is_last: bool = False

    @nn.compact
    def __call__(self, maps: list[Array], labels: Array) -> Float[Array, "B H W O"]:
        """Join `maps`, the first of which gives the size; the first block of a network has one, which it keeps."""
        call = functools.partial(call_block, remat=self.options.remat)
        maps = [call(ResidualUnits(2, self.options, name=f"input{i}"), x, labels) for i, x in enumerate(maps)]
        fuse = MultiResolutionFusion(self.features, self.options, name="fusion")
        h = call(fuse, maps, labels) if len(maps) > 1 else maps[0]
        h = call(ChainedPooling(self.options, name="pooling"), h, labels)
        return call(ResidualUnits(3 if self.is_last else 1, self.options, name="output"), h, labels)
