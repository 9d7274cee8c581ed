"""Builds networks from a configuration: the only place that reads `config.model`.

A new network is a file with a function `build` of plain keyword arguments, and here a function that passes them and a
line in `SCORE_NETWORKS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
from ml_collections import ConfigDict

from configs.settings import check
from errors import UserError
from models import ddpm, ncsnpp, ncsnv2, wideresnet
from models.precision import DTYPES
from sde_lib import VESDE


def image_size(config: ConfigDict) -> tuple[int, int]:
    """Return height and width of the configured images, in pixels."""
    return config.data.image_size, config.data.image_width or config.data.image_size


def _channel_multiples(config: ConfigDict) -> tuple[int, ...]:
    """Return model.ch_mult after checking that the image can be halved between its levels."""
    multiples = tuple(config.model.ch_mult)
    shrinkage = 2 ** (len(multiples) - 1)
    for key in ("image_size", "image_width"):
        size = config.data[key]
        if size % shrinkage:
            raise UserError(
                f"data.{key}={size} cannot be halved {len(multiples) - 1} times for the {len(multiples)} levels of "
                f"model.ch_mult={multiples}; choose a multiple of {shrinkage}, or fewer levels"
            )
    return multiples


def _check_embedding(config: ConfigDict) -> None:
    if config.model.embedding_type == "fourier" and not config.training.continuous:
        raise UserError(
            "model.embedding_type='fourier' embeds log(sigma), but training.continuous=False labels noise levels by "
            "index; set model.embedding_type='positional' or training.continuous=True"
        )


def _noise_levels(config: ConfigDict) -> VESDE | None:
    """Return the levels by whose sigma the output is divided; None if it is not."""
    model = config.model
    return VESDE(model.sigma_min, model.sigma_max, model.num_scales) if model.scale_by_sigma else None


def _refuse_classes(config: ConfigDict) -> None:
    if config.model.num_classes:
        raise UserError(
            f"model.num_classes={config.model.num_classes}: model.name={config.model.name!r} cannot be conditioned on "
            "classes; networks that can: ddpm, ncsnpp; or set model.num_classes=0"
        )


def _ddpm(config: ConfigDict) -> nn.Module:
    model = config.model
    return ddpm.build(
        nf=model.nf,
        ch_mult=_channel_multiples(config),
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=tuple(model.attn_resolutions),
        normalization=model.normalization,
        nonlinearity=model.nonlinearity,
        dropout=float(model.dropout),
        resamp_with_conv=model.resamp_with_conv,
        conditional=model.conditional,
        centered=config.data.centered,
        noise_levels=_noise_levels(config),
        num_classes=model.num_classes,
        remat=model.remat,
        dtype=DTYPES[model.dtype],
    )


def _ncsnpp(config: ConfigDict) -> nn.Module:
    model = config.model
    _check_embedding(config)
    return ncsnpp.build(
        nf=model.nf,
        ch_mult=_channel_multiples(config),
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=tuple(model.attn_resolutions),
        normalization=model.normalization,
        resblock_type=model.resblock_type,
        nonlinearity=model.nonlinearity,
        dropout=float(model.dropout),
        skip_rescale=model.skip_rescale,
        init_scale=model.init_scale,
        fir_kernel=tuple(float(tap) for tap in model.fir_kernel) if model.fir else None,
        resamp_with_conv=model.resamp_with_conv,
        progressive=model.progressive,
        progressive_input=model.progressive_input,
        progressive_combine=model.progressive_combine,
        embedding_type=model.embedding_type,
        fourier_scale=model.fourier_scale,
        conditional=model.conditional,
        centered=config.data.centered,
        noise_levels=_noise_levels(config),
        num_classes=model.num_classes,
        remat=model.remat,
        dtype=DTYPES[model.dtype],
    )


def _ncsn(config: ConfigDict) -> nn.Module:
    model = config.model
    _refuse_classes(config)
    return ncsnv2.build_ncsn(
        nf=model.nf,
        image_size=image_size(config),
        normalization=model.normalization,
        nonlinearity=model.nonlinearity,
        interpolation=model.interpolation,
        num_scales=model.num_scales,
        centered=config.data.centered,
        noise_levels=_noise_levels(config),
        remat=model.remat,
        dtype=DTYPES[model.dtype],
    )


def _ncsnv2(config: ConfigDict, resolution: int) -> nn.Module:
    model = config.model
    _refuse_classes(config)
    return ncsnv2.build_ncsnv2(
        resolution=resolution,
        nf=model.nf,
        image_size=image_size(config),
        normalization=model.normalization,
        nonlinearity=model.nonlinearity,
        interpolation=model.interpolation,
        centered=config.data.centered,
        noise_levels=_noise_levels(config),
        remat=model.remat,
        dtype=DTYPES[model.dtype],
    )


def _wideresnet(config: ConfigDict) -> nn.Module:
    model = config.model
    return wideresnet.build(
        image_size=image_size(config),
        blocks_per_group=model.blocks_per_group,
        channel_multiplier=model.channel_multiplier,
        num_classes=model.num_classes,
        remat=model.remat,
        dtype=DTYPES[model.dtype],
    )


Build = Callable[[ConfigDict], nn.Module]
# Score networks by the name that `model.name` gives them.
SCORE_NETWORKS: dict[str, Build] = {
    "ddpm": _ddpm,
    "ncsn": _ncsn,
    "ncsnpp": _ncsnpp,
    "ncsnv2_64": functools.partial(_ncsnv2, resolution=64),
    "ncsnv2_128": functools.partial(_ncsnv2, resolution=128),
    "ncsnv2_256": functools.partial(_ncsnv2, resolution=256),
}
# All networks; a classifier returns logits instead of a score.
NETWORKS: dict[str, Build] = {**SCORE_NETWORKS, "wideresnet_noise_conditional": _wideresnet}


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


def num_classes_of(config: ConfigDict) -> int:
    """Return the number of classes that condition the score network; 0 if none do, or if it is a classifier."""
    return config.model.num_classes if config.model.name in SCORE_NETWORKS else 0


def require_score_network(config: ConfigDict) -> None:
    """Checks that the network is one of a score.

    Raises:
      UserError: if it is a classifier.
    """
    if config.model.name not in SCORE_NETWORKS:
        raise UserError(
            f"model.name={config.model.name!r} is a classifier, which this mode cannot use; score networks: "
            f"{', '.join(sorted(SCORE_NETWORKS))}"
        )


def check_labels(config: ConfigDict, model: nn.Module) -> None:
    """Checks that training labels noise levels as the network expects.

    Args:
      config: reads `training.continuous`.
      model: network; its `counts_levels`, if it has that, says that it takes its label for the index of a level.

    Raises:
      UserError: if there are no levels to count in continuous time.
    """
    if config.training.continuous and getattr(model, "counts_levels", False):
        raise UserError(
            "this network takes the label for the index of a level (model.scale_by_sigma=True, or "
            "model.name='ncsn'), which it is not with training.continuous=True; set training.continuous=False, or "
            "for model.name='ncsnpp' model.embedding_type='fourier'"
        )
