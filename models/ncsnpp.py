"""NCSN++, DDPM++ and DDPM: one U-Net with every option of Song et al. 2021, Appendix H.

Parameters are named after what a layer is for: `down1_block0` is the first residual block of the second level on the
way down. legacy/parameters.py translates the names of the 2021 code.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.blocks import BigGANBlock, BlockOptions, Combine, DDPMBlock, Downsample, Features, Upsample
from models.convolution import Conv
from models.initializers import default_init
from models.layers import (
    Attention,
    Dense,
    FourierFeatures,
    LabelEmbedding,
    call_block,
    divide_by_sigma,
    residual_sum,
    timestep_embedding,
)
from models.precision import at_least_float32
from sde_lib import VESDE

BLOCKS = {"biggan": BigGANBlock, "ddpm": DDPMBlock}


def normalized_widths(nf: int, ch_mult: tuple[int, ...], num_res_blocks: int, doubled_input: bool) -> set[int]:
    """Return the numbers of channels at which a network normalizes, which groups have to divide.

    Arguments as `NCSNpp`'s attributes; `doubled_input`: an input skip is concatenated to the features.
    """
    outputs = [nf * mult for mult in ch_mult]
    h, skips, widths = nf, [nf], set(outputs)
    for level, output in enumerate(outputs):
        for _ in range(num_res_blocks):
            widths.add(h)
            h = output
            skips.append(h)
        if level < len(outputs) - 1:
            h = 2 * h if doubled_input else h
            skips.append(h)
    for output in reversed(outputs):
        for _ in range(num_res_blocks + 1):
            widths.add(h + skips.pop())
            h = output
    return widths


class NCSNpp(nn.Module):
    """NCSN++ (Song et al. 2021, Appendix H); DDPM++ without FIR filters and growing input and output."""

    nf: int  # channels of the first level
    ch_mult: tuple[int, ...]  # channels of each level, in multiples of nf
    num_res_blocks: int  # residual blocks of a level on the way down; one more on the way up
    attn_resolutions: tuple[int, ...]  # heights of images, in pixels, at which attention is applied
    block: BlockOptions  # options of the residual blocks
    progressive: str = "none"  # the output grows over the levels: "none", "output_skip" or "residual"
    progressive_input: str = "none"  # the input also enters at lower levels: "none", "input_skip" or "residual"
    progressive_combine: str = "sum"  # join of an input skip: "sum" or "cat"
    embedding_type: str = "positional"  # of the noise level: "positional" or "fourier"
    fourier_scale: float = 16.0  # standard deviation of the Fourier frequencies
    conditional: bool = True  # the residual blocks are conditioned on the noise level
    centered: bool = False  # images come in [-1, 1]; otherwise in [0, 1]
    scale_by_sigma: bool = False  # divide the output by sigma
    # Levels that the labels count, if the output is scaled; None if the labels are sigma.
    noise_levels: VESDE | None = None
    num_classes: int = 0  # classes of images that it is conditioned on; 0: none
    # Of the features; None: that of the images, which the embedding and the output have in any case.
    dtype: jnp.dtype | None = None

    @property
    def counts_levels(self) -> bool:
        """Return whether the label is taken for the index of a noise level."""
        return self.noise_levels is not None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        time_cond: Float[Array, "B"],
        train: bool = False,
        class_labels: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """Evaluate the network.

        Args:
          x: noisy images, in the range of `centered`.
          time_cond: label of the noise level: sigma if the embedding is fourier; otherwise 999 t, or the level's
            index, counted from the largest sigma.
          train: apply dropout.
          class_labels: class of each image, 0 .. num_classes - 1, or num_classes for "no label", which None stands for;
            ignored unless num_classes > 0.
        """
        embedding = self._embed(time_cond, class_labels)
        skips = self._encode(x if self.centered else 2 * x - 1, embedding, train)
        h = self._block(skips[-1], skips[-1].shape[-1], embedding, train, "middle_block0")
        h = self._attend(h, "middle_attention")
        h = self._block(h, h.shape[-1], embedding, train, "middle_block1")
        y = self._decode(h, skips, embedding, train, x.shape[-1])
        return divide_by_sigma(y, time_cond, self.noise_levels) if self.scale_by_sigma else y

    # The methods below are parts of __call__; they create layers, in the order of the original network.

    def _embed(self, time_cond: Array, class_labels: Array | None) -> Array | None:
        if self.embedding_type == "fourier":
            # These parameters exist, as in the original network, even if nothing depends on them.
            embedding = FourierFeatures(self.nf, self.fourier_scale, name="fourier")(jnp.log(time_cond))
        else:
            embedding = timestep_embedding(time_cond, self.nf)
        if not self.conditional:
            return None
        h = Dense(4 * self.nf, name="embedding1")(embedding)
        h = Dense(4 * self.nf, name="embedding2")(self.block.act(h))
        if self.num_classes:
            h += LabelEmbedding(self.num_classes, 4 * self.nf, name="label_embedding")(class_labels, len(time_cond))
        return h  # each residual block applies its nonlinearity first

    def _block(self, h: Features, features: int, embedding: Array | None, train: bool, name: str) -> Array:
        block = BLOCKS[self.block.kind](features, self.block, name=name)
        return call_block(block, h, embedding, train=train, remat=self.block.remat)

    def _attend(self, h: Array, name: str) -> Array:
        attention = Attention(self.block.init_scale, self.block.skip_rescale, self.block.norm, name=name)
        return call_block(attention, h, remat=self.block.remat)

    def _head(self, h: Array, features: int, init_scale: float, name: str) -> Array:
        """Normalize, activate and convolve: to an image, or to the first features of a growing output."""
        h = self.block.act(self.block.norm(name=f"{name}_norm")(h))
        return Conv(features, kernel_init=default_init(init_scale), name=f"{name}_conv")(h)

    def _encode(self, x: Array, embedding: Array | None, train: bool) -> list[Array]:
        h, pyramid = Conv(self.nf, name="input")(x.astype(self.dtype or x.dtype)), x
        skips = [h]
        for level, mult in enumerate(self.ch_mult):
            for i in range(self.num_res_blocks):
                h = self._block(h, self.nf * mult, embedding, train, f"down{level}_block{i}")
                if h.shape[1] in self.attn_resolutions:
                    h = self._attend(h, f"down{level}_attention{i}")
                skips.append(h)
            if level < len(self.ch_mult) - 1:
                h = self._resample(h, "down", embedding, train, f"down{level}_resample")
                h, pyramid = self._grow_input(h, pyramid, f"down{level}_pyramid")
                skips.append(h)
        return skips

    def _decode(self, h: Array, skips: list[Array], embedding: Array | None, train: bool, channels: int) -> Array:
        pyramid = None
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for i in range(self.num_res_blocks + 1):
                h = self._block([h, skips.pop()], self.nf * mult, embedding, train, f"up{level}_block{i}")
            if h.shape[1] in self.attn_resolutions:
                h = self._attend(h, f"up{level}_attention")
            h, pyramid = self._grow_output(h, pyramid, channels, f"up{level}_pyramid")
            if level > 0:
                h = self._resample(h, "up", embedding, train, f"up{level}_resample")
        if self.progressive == "output_skip":
            assert pyramid is not None  # there is at least one level
            return pyramid
        return at_least_float32(self._head(h, channels, self.block.init_scale, "output"))

    def _resample(self, h: Array, direction: str, embedding: Array | None, train: bool, name: str) -> Array:
        if self.block.kind == "biggan":
            block = BigGANBlock(h.shape[-1], self.block, direction, name=name)
            return call_block(block, h, embedding, train=train, remat=self.block.remat)
        features = h.shape[-1] if self.block.resample_with_conv else None
        layer = Downsample if direction == "down" else Upsample
        return layer(self.block.fir_kernel, features, name=name)(h)

    def _grow_input(self, h: Array, pyramid: Array, name: str) -> tuple[Array, Array]:
        """Let the image, or features of it, enter at a lower level; return the features and the pyramid."""
        if self.progressive_input == "none":
            return h, pyramid
        if self.progressive_input == "input_skip":
            pyramid = Downsample(self.block.fir_kernel, name=name)(pyramid)
            combine = Combine(self.progressive_combine, name=f"{name}_combine")
            return combine(pyramid.astype(h.dtype), h), pyramid
        pyramid = Downsample(self.block.fir_kernel, h.shape[-1], name=name)(pyramid.astype(h.dtype))
        h = residual_sum(pyramid, h, self.block.skip_rescale)
        return h, h

    def _grow_output(self, h: Array, pyramid: Array | None, channels: int, name: str) -> tuple[Array, Array | None]:
        """Grow the output by one level, None before the first; return the features and the pyramid."""
        if self.progressive == "none":
            return h, None
        if self.progressive == "output_skip":
            image = at_least_float32(self._head(h, channels, self.block.init_scale, name))
            if pyramid is None:
                return h, image
            return h, Upsample(self.block.fir_kernel, name=name)(pyramid) + image
        if pyramid is None:
            return h, self._head(h, h.shape[-1], 1.0, name)
        pyramid = Upsample(self.block.fir_kernel, h.shape[-1], name=name)(pyramid)
        h = residual_sum(pyramid, h, self.block.skip_rescale)
        return h, h
