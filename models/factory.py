"""Builds networks from a configuration: the only place that reads `config.model`.

A new network is a module in a file of its own, and here a function that makes it and a line in `SCORE_NETWORKS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from absl import logging
from ml_collections import ConfigDict

from configs.settings import check, image_shape
from errors import UserError
from models.blocks import BlockOptions
from models.ddpm import DDPM
from models.ncsnpp import NCSNpp, normalized_widths
from models.ncsnv2 import LAYOUTS, NCSNv2
from models.normalization import DDPM_GROUPS, NORMS, num_groups
from models.precision import DTYPES
from models.refinenet import RefineOptions
from models.resample import require_halvings
from models.wideresnet import BASE_WIDTHS, WideResNet
from sde_lib import VESDE


def _build_noise_levels(config: ConfigDict) -> VESDE | None:
    """Return the levels by whose sigma the output is divided; None if it is not."""
    model = config.model
    return VESDE(model.sigma_min, model.sigma_max, model.num_scales) if model.scale_by_sigma else None


def _require_normalization(given: str, only: str) -> None:
    if given != only:
        raise UserError(f"model.normalization={given!r}: this network has {only!r} only; set that")


def _build_unet_fields(config: ConfigDict) -> dict[str, Any]:
    """Return what DDPM and NCSN++ take from the same settings, after checking it."""
    model, multiples = config.model, tuple(config.model.ch_mult)
    shrinkage = 2 ** (len(multiples) - 1)
    for key in ("image_size", "image_width"):
        if config.data[key] % shrinkage:
            raise UserError(
                f"data.{key}={config.data[key]} cannot be halved {len(multiples) - 1} times for the {len(multiples)} "
                f"levels of model.ch_mult={multiples}; choose a multiple of {shrinkage}, or fewer levels"
            )
    heights = [config.data.image_size // 2**level for level in range(len(multiples))]
    if missed := sorted(set(model.attn_resolutions) - set(heights)):
        logging.warning("model.attn_resolutions: no level has the height(s) %s; the levels have %s", missed, heights)
    if model.num_classes and not model.conditional:
        raise UserError(
            f"model.num_classes={model.num_classes} adds the label to the embedding of the noise level, which "
            "model.conditional=False leaves out; set model.conditional=True"
        )
    return {
        "nf": model.nf,
        "ch_mult": multiples,
        "num_res_blocks": model.num_res_blocks,
        "attn_resolutions": tuple(model.attn_resolutions),
        "conditional": model.conditional,
        "centered": config.data.centered,
        "scale_by_sigma": model.scale_by_sigma,
        "num_classes": model.num_classes,
        "dtype": DTYPES[model.dtype],
    }


def _build_ddpm(config: ConfigDict) -> nn.Module:
    model, unet = config.model, _build_unet_fields(config)
    if model.normalization == "GroupNorm":
        for width in normalized_widths(model.nf, unet["ch_mult"], model.num_res_blocks, doubled_input=False):
            num_groups(width, DDPM_GROUPS)
    block = BlockOptions(
        kind="ddpm",
        nonlinearity=model.nonlinearity,
        dropout=float(model.dropout),
        skip_rescale=False,
        init_scale=0.0,
        resample_with_conv=model.resamp_with_conv,
        norm=NORMS[model.normalization],
        remat=model.remat,
    )
    return DDPM(**unet, block=block, noise_levels=_build_noise_levels(config))


def _build_ncsnpp(config: ConfigDict) -> nn.Module:
    model, is_fourier = config.model, config.model.embedding_type == "fourier"
    if is_fourier and not config.training.continuous:
        raise UserError(
            "model.embedding_type='fourier' embeds log(sigma), but training.continuous=False labels noise levels by "
            "index; set model.embedding_type='positional' or training.continuous=True"
        )
    unet = _build_unet_fields(config)
    _require_normalization(model.normalization, "GroupNorm")
    doubled = model.progressive_input == "input_skip" and model.progressive_combine == "cat"
    for width in normalized_widths(model.nf, unet["ch_mult"], model.num_res_blocks, doubled):
        num_groups(width)
    block = BlockOptions(
        kind=model.resblock_type,
        nonlinearity=model.nonlinearity,
        dropout=float(model.dropout),
        skip_rescale=model.skip_rescale,
        init_scale=model.init_scale,
        fir_kernel=tuple(float(tap) for tap in model.fir_kernel) if model.fir else None,
        resample_with_conv=model.resamp_with_conv,
        remat=model.remat,
    )
    return NCSNpp(
        **unet,
        block=block,
        progressive=model.progressive,
        progressive_input=model.progressive_input,
        progressive_combine=model.progressive_combine,
        embedding_type=model.embedding_type,
        fourier_scale=model.fourier_scale,
        noise_levels=None if is_fourier else _build_noise_levels(config),
    )


def _build_ncsnv2(config: ConfigDict, resolution: int, is_ncsn: bool = False) -> nn.Module:
    """Build the network made for a resolution; NCSN conditions every normalization on one of `num_scales` labels."""
    model, layout = config.model, LAYOUTS[resolution]
    if model.num_classes:
        raise UserError(
            f"model.num_classes={model.num_classes}: model.name={model.name!r} cannot be conditioned on classes; "
            "networks that can: ddpm, ncsnpp; or set model.num_classes=0"
        )
    if is_ncsn:
        _require_normalization(model.normalization, "InstanceNorm++")
    require_halvings(image_shape(config)[:2], layout.num_halvings)
    if model.normalization == "GroupNorm":
        for width, _ in layout.stages:
            num_groups(width * model.nf, DDPM_GROUPS)
    labels = model.num_scales if is_ncsn else 0
    options = RefineOptions(
        model.nonlinearity, model.interpolation, NORMS[model.normalization], num_classes=labels, remat=model.remat
    )
    return NCSNv2(model.nf, layout, options, config.data.centered, _build_noise_levels(config), DTYPES[model.dtype])


def _build_wideresnet(config: ConfigDict) -> nn.Module:
    model = config.model
    if model.num_classes < 2:
        raise UserError(
            f"model.num_classes={model.num_classes}: a classifier needs 2 or more; set the data set's number"
        )
    require_halvings(image_shape(config)[:2], len(BASE_WIDTHS) - 1)
    return WideResNet(
        model.blocks_per_group, model.channel_multiplier, model.num_classes, model.remat, DTYPES[model.dtype]
    )


Build = Callable[[ConfigDict], nn.Module]
# Score networks by the name that `model.name` gives them.
SCORE_NETWORKS: dict[str, Build] = {
    "ddpm": _build_ddpm,
    "ncsn": functools.partial(_build_ncsnv2, resolution=64, is_ncsn=True),
    "ncsnpp": _build_ncsnpp,
    "ncsnv2_64": functools.partial(_build_ncsnv2, resolution=64),
    "ncsnv2_128": functools.partial(_build_ncsnv2, resolution=128),
    "ncsnv2_256": functools.partial(_build_ncsnv2, resolution=256),
}
# All networks; a classifier returns logits instead of a score.
NETWORKS: dict[str, Build] = {**SCORE_NETWORKS, "wideresnet_noise_conditional": _build_wideresnet}


def create_model(config: ConfigDict) -> nn.Module:
    """Build the network that a configuration describes; the only reader of `config.model`.

    The network has the signature network(x, time_cond, train=False): x float[B, H, W, C] in the data range of the
    configuration, time_cond float[B] the label of the noise level; a class-conditional one takes class_labels int[B],
    too.

    Raises:
      UserError: if a setting is unknown or out of range, or settings contradict each other.
    """
    check(config, "model")
    return NETWORKS[config.model.name](config)


def num_classes_of(name: str, num_classes: int) -> int:
    """Return the number of classes that condition the network of this name; 0 if it is a classifier."""
    return num_classes if name in SCORE_NETWORKS else 0


def require_score_network(name: str) -> None:
    """Raise a UserError if the network of this name is a classifier."""
    if name not in SCORE_NETWORKS:
        raise UserError(
            f"model.name={name!r} is a classifier, which this mode cannot use; score networks: "
            f"{', '.join(sorted(SCORE_NETWORKS))}"
        )


def check_labels(model: nn.Module, *, continuous: bool) -> None:
    """Raise a UserError if the network takes its label for the index of a level, but training is in continuous time."""
    if continuous and getattr(model, "counts_levels", False):
        raise UserError(
            "this network takes the label for the index of a level (model.scale_by_sigma=True, or "
            "model.name='ncsn'), which it is not with training.continuous=True; set training.continuous=False, or "
            "for model.name='ncsnpp' model.embedding_type='fourier'"
        )
