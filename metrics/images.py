"""How images reach the networks that compute features: levels checked, grey made RGB, in batches of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from errors import UserError
from storage.files import content_hash

RGB = 3  # channels that networks trained on photographs take


def check_levels(name: str, levels: UInt8[np.ndarray, "N H W C"], num_levels: int) -> None:
    """Raise a UserError unless an array is uint8[N, H, W, C] with N >= 1 and values below `num_levels`."""
    if levels.ndim != 4 or levels.dtype != np.uint8 or not len(levels):
        raise UserError(f"{name} is {levels.dtype}{list(levels.shape)}; expected uint8[N, H, W, C] with N >= 1")
    if levels.max() >= num_levels:
        raise UserError(f"{name} has level {levels.max()}, not below num_levels={num_levels}; give the data's levels")


def check_channels(extractor: str, channels: int) -> None:
    """Raise a UserError unless a network trained on photographs takes this number of channels."""
    if channels not in (1, RGB):
        raise UserError(
            f"the extractor {extractor!r} takes grey and RGB images, not {channels} channels; choose 'classifier', "
            "which is trained on the data themselves"
        )


def check_photographs(extractor: str, levels: UInt8[np.ndarray, "N H W C"], num_levels: int) -> None:
    """Check images for a network trained on photographs: levels as `check_levels`, grey or RGB."""
    check_levels("levels", levels, num_levels)
    check_channels(extractor, levels.shape[-1])


def as_rgb(levels: UInt8[np.ndarray, "N H W c"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Repeat the channel of grey images; leave RGB images as they are."""
    return np.broadcast_to(levels, (*levels.shape[:3], RGB))


def apply_in_batches(
    apply: Callable[[np.ndarray], tuple[Array, Array]], images: np.ndarray, batch_size: int
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]:
    """Apply a network to images in batches of one size, for which it is compiled once; pad the last one.

    `apply` maps `batch_size` images to (features, logits). Returns (features, logits) of every image, float64.
    """
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)
        outputs = apply(np.concatenate([batch, padding]))
        parts.append([np.asarray(output, np.float64)[: len(batch)] for output in outputs])
    features, logits = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
    return features, logits


def flatten_params(params: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a tree of parameters by their slash-joined paths, in alphabetical order."""
    return dict(sorted(traverse_util.flatten_dict(params, sep="/").items()))


def params_hash(params: Any) -> str:
    """Return the SHA-256 of a tree of parameters, in hex: of their paths, shapes and values."""
    return content_hash(*(part for item in flatten_params(params).items() for part in item))
