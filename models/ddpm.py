"""DDPM (Ho et al. 2020): the U-Net of NCSN++ with plain residual blocks and a normalization of one's choice."""

from __future__ import annotations

import jax.numpy as jnp

from models.blocks import BlockOptions
from models.ncsnpp import NCSNpp, normalized_widths, require_conditional
from models.normalization import DDPM_GROUPS, NORMS, num_groups
from sde_lib import VESDE


class DDPM(NCSNpp):
    """DDPM: no filter, no rescaled sums, no growing input or output; the label is embedded by sines and cosines.

    As in the 2021 code, and unlike DDPM's first code, the way up attends once at each resolution, not after each block.
    """


def build(
    *,
    nf: int,
    ch_mult: tuple[int, ...],
    num_res_blocks: int,
    attn_resolutions: tuple[int, ...],
    normalization: str,
    nonlinearity: str,
    dropout: float,
    resamp_with_conv: bool,
    conditional: bool,
    centered: bool,
    noise_levels: VESDE | None,
    num_classes: int,
    remat: bool,
    dtype: jnp.dtype | None,
) -> DDPM:
    """Build DDPM; arguments are named after the settings of `config.model`.

    Raises:
      UserError: if group normalization cannot divide the channels, or classes have no residual block to condition.
    """
    require_conditional(conditional, num_classes)
    if normalization == "GroupNorm":
        for width in normalized_widths(nf, ch_mult, num_res_blocks, doubled_input=False):
            num_groups(width, DDPM_GROUPS)
    block = BlockOptions(
        kind="ddpm",
        nonlinearity=nonlinearity,
        dropout=dropout,
        skip_rescale=False,
        init_scale=0.0,
        resample_with_conv=resamp_with_conv,
        norm=NORMS[normalization],
        remat=remat,
    )
    return DDPM(
        nf=nf,
        ch_mult=ch_mult,
        num_res_blocks=num_res_blocks,
        attn_resolutions=attn_resolutions,
        block=block,
        conditional=conditional,
        centered=centered,
        scale_by_sigma=noise_levels is not None,
        noise_levels=noise_levels,
        num_classes=num_classes,
        dtype=dtype,
    )
