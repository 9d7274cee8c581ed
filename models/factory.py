"""Builds networks from a configuration: the only place that reads `config.model`.

Every setting is checked here, before anything is traced or compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import flax.linen as nn
from ml_collections import ConfigDict

from models.blocks import BlockOptions
from models.layers import ACTIVATIONS, num_groups
from models.ncsnpp import BLOCKS, NCSNpp, normalized_widths
from sde_lib import VESDE


def _one_of(config: ConfigDict, key: str, known: Iterable[str]) -> str:
    """Returns the setting model.`key` after checking that it is known."""
    value = config.model[key]
    if value not in known:
        raise ValueError(f"model.{key}={value!r} is unknown; known: {', '.join(sorted(known))}")
    return value


def _at_least(config: ConfigDict, key: str, smallest: int) -> int:
    value = config.model[key]
    if not isinstance(value, int) or value < smallest:
        raise ValueError(f"model.{key}={value!r}: expected a whole number of at least {smallest}")
    return value


def _channel_multiples(config: ConfigDict) -> tuple[int, ...]:
    """Returns model.ch_mult after checking that the image can be halved between its levels."""
    multiples = tuple(config.model.ch_mult)
    if not multiples or min(multiples) < 1:
        raise ValueError(f"model.ch_mult={multiples}: expected a positive multiple of model.nf for each level")
    shrinkage = 2 ** (len(multiples) - 1)
    for key in ("image_size", "image_width"):
        size = config.data[key]
        if size % shrinkage:
            raise ValueError(
                f"data.{key}={size} cannot be halved {len(multiples) - 1} times for the {len(multiples)} levels of "
                f"model.ch_mult={multiples}; choose a multiple of {shrinkage}, or fewer levels"
            )
    return multiples


def _fir_kernel(config: ConfigDict) -> tuple[float, ...] | None:
    if not config.model.fir:
        return None
    kernel = tuple(float(tap) for tap in config.model.fir_kernel)
    if len(kernel) < 2 or sum(kernel) <= 0:
        raise ValueError(
            f"model.fir_kernel={kernel}: expected at least 2 taps with a positive sum, such as [1, 3, 3, 1]"
        )
    return kernel


def _dropout(config: ConfigDict) -> float:
    if not 0 <= config.model.dropout < 1:
        raise ValueError(f"model.dropout={config.model.dropout}: expected a probability in [0, 1)")
    return float(config.model.dropout)


def _embedding_type(config: ConfigDict) -> str:
    embedding_type = _one_of(config, "embedding_type", ("fourier", "positional"))
    if embedding_type == "fourier" and not config.training.continuous:
        raise ValueError(
            "model.embedding_type='fourier' embeds log(sigma), but training.continuous=False labels noise levels by "
            "index; set model.embedding_type='positional' or training.continuous=True"
        )
    return embedding_type


def _block_options(config: ConfigDict) -> BlockOptions:
    _one_of(config, "normalization", ("GroupNorm",))
    if config.model.init_scale < 0:
        raise ValueError(f"model.init_scale={config.model.init_scale}: expected 0 (which stands for 1e-10) or more")
    return BlockOptions(
        kind=_one_of(config, "resblock_type", BLOCKS),
        nonlinearity=_one_of(config, "nonlinearity", ACTIVATIONS),
        dropout=_dropout(config),
        skip_rescale=config.model.skip_rescale,
        init_scale=config.model.init_scale,
        fir_kernel=_fir_kernel(config),
        resample_with_conv=config.model.resamp_with_conv,
    )


def _noise_levels(config: ConfigDict) -> VESDE | None:
    """Returns the levels whose index is the network's label; None if it is told sigma, or need not know it."""
    if not config.model.scale_by_sigma or config.model.embedding_type == "fourier":
        return None
    return VESDE(config.model.sigma_min, config.model.sigma_max, config.model.num_scales)


def _ncsnpp(config: ConfigDict) -> nn.Module:
    multiples = _channel_multiples(config)
    nf, num_res_blocks = _at_least(config, "nf", 4), _at_least(config, "num_res_blocks", 1)
    progressive_input = _one_of(config, "progressive_input", ("none", "input_skip", "residual"))
    progressive_combine = _one_of(config, "progressive_combine", ("sum", "cat"))
    doubled = progressive_input == "input_skip" and progressive_combine == "cat"
    for width in normalized_widths(nf, multiples, num_res_blocks, doubled):
        num_groups(width)
    return NCSNpp(
        nf=nf,
        ch_mult=multiples,
        num_res_blocks=num_res_blocks,
        attn_resolutions=tuple(config.model.attn_resolutions),
        block=_block_options(config),
        progressive=_one_of(config, "progressive", ("none", "output_skip", "residual")),
        progressive_input=progressive_input,
        progressive_combine=progressive_combine,
        embedding_type=_embedding_type(config),
        fourier_scale=config.model.fourier_scale,
        conditional=config.model.conditional,
        centered=config.data.centered,
        scale_by_sigma=config.model.scale_by_sigma,
        noise_levels=_noise_levels(config),
    )


NETWORKS: dict[str, Callable[[ConfigDict], nn.Module]] = {"ncsnpp": _ncsnpp}


def create_model(config: ConfigDict) -> nn.Module:
    """Builds the network that a configuration describes; the only reader of `config.model`.

    The network has the signature network(x, time_cond, train=False): x float[B, H, W, C] in the data range of the
    configuration, time_cond float[B] the label of the noise level.

    Raises:
      ValueError: if a setting is unknown or out of range, or settings contradict each other.
    """
    return NETWORKS[_one_of(config, "name", NETWORKS)](config)
