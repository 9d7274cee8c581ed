"""Builds networks from a configuration: the only place that reads `config.model`.

A network's module has a function `build` with plain keyword arguments. Each is named after a setting, and `READERS`
says how a setting is read and checked, before anything is traced or compiled. A new network is a file with such a
function and a line in `SCORE_NETWORKS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

import checks
from errors import UserError
from models import ddpm, ncsnpp, ncsnv2, wideresnet
from models.layers import ACTIVATIONS
from models.normalization import NORMS
from models.precision import DTYPES
from sde_lib import VESDE


def _one_of(config: ConfigDict, key: str, known: Collection[str]) -> str:
    """Returns the setting model.`key` after checking that it is known."""
    checks.one_of(f"model.{key}", config.model[key], known)
    return config.model[key]


def _at_least(config: ConfigDict, key: str, smallest: int) -> int:
    value = config.model[key]
    if not isinstance(value, int) or value < smallest:
        raise UserError(f"model.{key}={value!r}: expected a whole number of at least {smallest}")
    return value


def _channel_multiples(config: ConfigDict) -> tuple[int, ...]:
    """Returns model.ch_mult after checking that the image can be halved between its levels."""
    multiples = tuple(config.model.ch_mult)
    if not multiples or min(multiples) < 1:
        raise UserError(f"model.ch_mult={multiples}: expected a positive multiple of model.nf for each level")
    shrinkage = 2 ** (len(multiples) - 1)
    for key in ("image_size", "image_width"):
        size = config.data[key]
        if size % shrinkage:
            raise UserError(
                f"data.{key}={size} cannot be halved {len(multiples) - 1} times for the {len(multiples)} levels of "
                f"model.ch_mult={multiples}; choose a multiple of {shrinkage}, or fewer levels"
            )
    return multiples


def _fir_kernel(config: ConfigDict) -> tuple[float, ...] | None:
    if not config.model.fir:
        return None
    kernel = tuple(config.model.fir_kernel)
    if not all(isinstance(tap, int | float) for tap in kernel):
        raise UserError(f"model.fir_kernel={kernel}: expected a list of numbers, the taps of a separable filter")
    if len(kernel) < 2 or sum(kernel) <= 0:
        raise UserError(
            f"model.fir_kernel={kernel}: expected at least 2 taps with a positive sum, such as [1, 3, 3, 1]"
        )
    return tuple(float(tap) for tap in kernel)


def _init_scale(config: ConfigDict) -> float:
    if config.model.init_scale < 0:
        raise UserError(f"model.init_scale={config.model.init_scale}: expected 0 (which stands for 1e-10) or more")
    return config.model.init_scale


def _dropout(config: ConfigDict) -> float:
    if not 0 <= config.model.dropout < 1:
        raise UserError(f"model.dropout={config.model.dropout}: expected a probability in [0, 1)")
    return float(config.model.dropout)


def _embedding_type(config: ConfigDict) -> str:
    embedding_type = _one_of(config, "embedding_type", ("fourier", "positional"))
    if embedding_type == "fourier" and not config.training.continuous:
        raise UserError(
            "model.embedding_type='fourier' embeds log(sigma), but training.continuous=False labels noise levels by "
            "index; set model.embedding_type='positional' or training.continuous=True"
        )
    return embedding_type


def _dtype(config: ConfigDict) -> jnp.dtype | None:
    """Returns the dtype of the features, None for that of the images."""
    return DTYPES[_one_of(config, "dtype", DTYPES)]


def _noise_levels(config: ConfigDict) -> VESDE | None:
    """Returns the levels by whose sigma the output is divided; None if it is not."""
    model = config.model
    return VESDE(model.sigma_min, model.sigma_max, model.num_scales) if model.scale_by_sigma else None


def image_size(config: ConfigDict) -> tuple[int, int]:
    """Returns height and width of the configured images, in pixels."""
    return config.data.image_size, config.data.image_width or config.data.image_size


# How an argument of a network's `build` is read from the configuration, by its name.
READERS: dict[str, Callable[[ConfigDict], Any]] = {
    "attn_resolutions": lambda config: tuple(config.model.attn_resolutions),
    "blocks_per_group": lambda config: _at_least(config, "blocks_per_group", 1),
    "centered": lambda config: config.data.centered,
    "ch_mult": _channel_multiples,
    "channel_multiplier": lambda config: _at_least(config, "channel_multiplier", 1),
    "conditional": lambda config: config.model.conditional,
    "dropout": _dropout,
    "dtype": _dtype,
    "embedding_type": _embedding_type,
    "fir_kernel": _fir_kernel,
    "fourier_scale": lambda config: config.model.fourier_scale,
    "image_size": image_size,
    "init_scale": _init_scale,
    "interpolation": lambda config: _one_of(config, "interpolation", ("bilinear", "nearest")),
    "nf": lambda config: _at_least(config, "nf", 4),
    "noise_levels": _noise_levels,
    "nonlinearity": lambda config: _one_of(config, "nonlinearity", ACTIVATIONS),
    "normalization": lambda config: _one_of(config, "normalization", NORMS),
    "num_classes": lambda config: _at_least(config, "num_classes", 0),
    "num_res_blocks": lambda config: _at_least(config, "num_res_blocks", 0),
    "num_scales": lambda config: _at_least(config, "num_scales", 1),
    "progressive": lambda config: _one_of(config, "progressive", ("none", "output_skip", "residual")),
    "progressive_combine": lambda config: _one_of(config, "progressive_combine", ("sum", "cat")),
    "progressive_input": lambda config: _one_of(config, "progressive_input", ("none", "input_skip", "residual")),
    "remat": lambda config: config.model.remat,
    "resamp_with_conv": lambda config: config.model.resamp_with_conv,
    "resblock_type": lambda config: _one_of(config, "resblock_type", ncsnpp.BLOCKS),
    "skip_rescale": lambda config: config.model.skip_rescale,
}

# Score networks by the name that `model.name` gives them.
SCORE_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ddpm": ddpm.build,
    "ncsn": ncsnv2.build_ncsn,
    "ncsnpp": ncsnpp.build,
    "ncsnv2_64": ncsnv2.build_v2(64),
    "ncsnv2_128": ncsnv2.build_v2(128),
    "ncsnv2_256": ncsnv2.build_v2(256),
}

# All networks; a classifier returns logits instead of a score.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **SCORE_NETWORKS,
    "wideresnet_noise_conditional": wideresnet.build,
}


def create_model(config: ConfigDict) -> nn.Module:
    """Builds the network that a configuration describes; the only reader of `config.model`.

    The network has the signature network(x, time_cond, train=False): x float[B, H, W, C] in the data range of the
    configuration, time_cond float[B] the label of the noise level; one that is told classes takes class_labels int[B],
    too.

    Raises:
      UserError: if a setting is unknown or out of range, or settings contradict each other.
    """
    build = NETWORKS[_one_of(config, "name", NETWORKS)]
    if config.model.num_classes and "num_classes" not in _arguments(build):
        raise UserError(
            f"model.num_classes={config.model.num_classes}: model.name={config.model.name!r} cannot be told classes; "
            f"networks that can: {', '.join(name for name in SCORE_NETWORKS if _takes_classes(name))}"
        )
    return build(**{name: READERS[name](config) for name in _arguments(build)})


def _takes_classes(name: str) -> bool:
    return "num_classes" in _arguments(SCORE_NETWORKS[name])


def told_classes(config: ConfigDict) -> int:
    """Returns how many classes of images the configured score network is told, 0 if none or if it is a classifier."""
    return config.model.num_classes if config.model.name in SCORE_NETWORKS else 0


def _arguments(build: Callable[..., nn.Module]) -> list[str]:
    """Returns the names of the arguments that a builder still needs."""
    parameters = inspect.signature(build).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]


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
