"""NCSN (Song & Ermon 2019) and NCSNv2 (Song & Ermon 2020): RefineNets of three depths, given as data."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers import call_block, divide_by_sigma
from models.normalization import DDPM_GROUPS, NORMS, num_groups, require
from models.precision import at_least_float32
from models.refinenet import RefineBlock, RefineConv, RefineOptions, ResidualBlock
from models.resample import require_halvings
from sde_lib import VESDE


@dataclasses.dataclass(frozen=True)
class Layout:
    """Widths are in multiples of the channels of the first layer.

    Attributes:
      stages: (width, dilation) of each stage of two residual blocks; every stage but the first halves the image, or
        dilates its convolutions if the dilation is more than 1.
      decoder: width of each refine block, from the last stage back to the first.
    """

    stages: tuple[tuple[int, int], ...]
    decoder: tuple[int, ...]

    @property
    def num_halvings(self) -> int:
        """Times that the image is halved."""
        return sum(dilation == 1 for _, dilation in self.stages[1:])


# By the resolution, in pixels, that each was made for; all run at any resolution that can be halved often enough.
LAYOUTS = {
    64: Layout(((1, 1), (2, 1), (2, 2), (2, 4)), (2, 2, 2, 1)),
    128: Layout(((1, 1), (2, 1), (2, 1), (4, 2), (4, 4)), (4, 2, 2, 1, 1)),
    256: Layout(((1, 1), (2, 1), (2, 1), (2, 1), (4, 2), (4, 4)), (4, 2, 2, 2, 1, 1)),
}


class NCSNv2(nn.Module):
    """RefineNet that returns the score; NCSN if its normalization is conditioned on the label.

    Attributes:
      nf: channels of the first layer.
      layout: widths and dilations.
      options: what the blocks have in common.
      centered: images come in [-1, 1]; otherwise in [0, 1].
      noise_levels: divide the output by the sigma that the label counts; None: do not.
      dtype: of the features; None: that of the images.
    """

    nf: int
    layout: Layout
    options: RefineOptions
    centered: bool = False
    noise_levels: VESDE | None = None
    dtype: jnp.dtype | None = None

    @property
    def counts_levels(self) -> bool:
        """Return whether the label is taken for the index of a noise level."""
        return self.noise_levels is not None or self.options.is_conditional

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], time_cond: Float[Array, "B"], train: bool = False
    ) -> Float[Array, "B H W C"]:
        """Evaluate the network.

        Args:
          x: noisy images, in the range that `centered` tells.
          time_cond: index of the noise level, counted from the largest sigma.
          train: makes no difference; these networks have no dropout.
        """
        images = x if self.centered else 2 * x - 1
        h = RefineConv(self.nf, name="input")(images.astype(self.dtype or x.dtype))
        maps = []
        for i, (width, dilation) in enumerate(self.layout.stages):
            first = ResidualBlock(width * self.nf, self.options, i > 0, dilation, name=f"stage{i}_block0")
            second = ResidualBlock(width * self.nf, self.options, dilation=dilation, name=f"stage{i}_block1")
            for block in (first, second):
                h = call_block(block, h, time_cond, remat=self.options.remat)
            maps.append(h)
        h = maps.pop()
        joined = [h]
        for i, width in enumerate(self.layout.decoder):
            is_last = i == len(self.layout.decoder) - 1
            h = RefineBlock(width * self.nf, self.options, is_last, name=f"refine{i}")(joined, time_cond)
            joined = [maps.pop(), h] if maps else []
        h = self.options.act(self.options.normalize(h, time_cond, "output_norm"))
        h = at_least_float32(RefineConv(x.shape[-1], name="output")(h))
        return h if self.noise_levels is None else divide_by_sigma(h, time_cond, self.noise_levels)


def build_ncsnv2(
    *,
    resolution: int,
    nf: int,
    image_size: tuple[int, int],
    normalization: str,
    nonlinearity: str,
    interpolation: str,
    centered: bool,
    noise_levels: VESDE | None,
    remat: bool,
    dtype: jnp.dtype | None,
) -> NCSNv2:
    """Build the NCSNv2 made for a resolution of 64, 128 or 256 pixels.

    Raises:
      UserError: if the images cannot be halved often enough, or group normalization cannot divide the channels.
    """
    layout = LAYOUTS[resolution]
    require_halvings(image_size, layout.num_halvings)
    if normalization == "GroupNorm":
        for width, _ in layout.stages:
            num_groups(width * nf, DDPM_GROUPS)
    options = RefineOptions(nonlinearity, interpolation, NORMS[normalization], remat=remat)
    return NCSNv2(nf, layout, options, centered, noise_levels, dtype)


def build_ncsn(
    *,
    nf: int,
    image_size: tuple[int, int],
    normalization: str,
    nonlinearity: str,
    interpolation: str,
    num_scales: int,
    centered: bool,
    noise_levels: VESDE | None,
    remat: bool,
    dtype: jnp.dtype | None,
) -> NCSNv2:
    """Build NCSN: the smallest layout, with every normalization conditioned on one of `num_scales` labels.

    Arguments are named after the settings of `config.model`.

    Raises:
      UserError: if the images cannot be halved, or the normalization has no form that depends on a label.
    """
    require(normalization, "InstanceNorm++")
    require_halvings(image_size, LAYOUTS[64].num_halvings)
    options = RefineOptions(nonlinearity, interpolation, num_classes=num_scales, remat=remat)
    return NCSNv2(nf, LAYOUTS[64], options, centered, noise_levels, dtype)
