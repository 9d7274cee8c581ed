"""NCSN (Song & Ermon 2019) and NCSNv2 (Song & Ermon 2020): RefineNets of three depths, given as data."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers import call_block, divide_by_sigma
from models.precision import at_least_float32
from models.refinenet import RefineBlock, RefineConv, RefineOptions, ResidualBlock
from sde_lib import VESDE


@dataclasses.dataclass(frozen=True)
class Layout:
    """Widths are in multiples of the channels of the first layer."""

    # (width, dilation) of each stage of two residual blocks; every stage but the first halves the image, or dilates
    # its convolutions if the dilation is more than 1.
    stages: tuple[tuple[int, int], ...]
    decoder: tuple[int, ...]  # width of each refine block, from the last stage back to the first

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
    """RefineNet that returns the score; NCSN if its normalization is conditioned on the label."""

    nf: int  # channels of the first layer
    layout: Layout  # widths and dilations
    options: RefineOptions  # what the blocks have in common
    centered: bool = False  # images come in [-1, 1]; otherwise in [0, 1]
    noise_levels: VESDE | None = None  # divide the output by the sigma that the label counts; None: do not
    dtype: jnp.dtype | None = None  # of the features; None: that of the images

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
          x: noisy images, in the range of `centered`.
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
