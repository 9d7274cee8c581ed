"""How images reach the networks that compute features: levels checked, grey made RGB, in batches of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from errors import UserError
from storage.files import content_hash

RGB = 3  # channels that networks trained on photographs take


class Rows(Protocol):
    """Anything that has a length and gives rows as an array."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        ...

    def __getitem__(self, chosen: slice) -> np.ndarray:
        """Returns the rows of a slice."""
        ...


def check_levels(name: str, levels: UInt8[np.ndarray, "N H W C"], num_levels: int) -> None:
    """Checks that an array holds images of levels.

    Raises:
      UserError: naming it, if it has another type or shape, no image, or a level that is not below `num_levels`.
    """
    if levels.ndim != 4 or levels.dtype != np.uint8 or not len(levels):
        raise UserError(f"{name} is {levels.dtype}{list(levels.shape)}; expected uint8[N, H, W, C] with N >= 1")
    if levels.max() >= num_levels:
        raise UserError(f"{name} has level {levels.max()}, not below num_levels={num_levels}; give the data's levels")


def check_channels(extractor: str, channels: int) -> None:
    """Checks that a network trained on photographs can take images of so many channels.

    Raises:
      UserError: if they are neither grey nor RGB.
    """
    if channels not in (1, RGB):
        raise UserError(
            f"the extractor {extractor!r} takes grey and RGB images, not {channels} channels; choose 'classifier', "
            "which is trained on the data themselves"
        )


def check_photographs(extractor: str, levels: UInt8[np.ndarray, "N H W C"], num_levels: int) -> None:
    """Checks that a network trained on photographs can take these images.

    Raises:
      UserError: if they have neither 1 nor 3 channels, or are no images of so many levels.
    """
    check_levels("levels", levels, num_levels)
    check_channels(extractor, levels.shape[-1])


def as_rgb(levels: UInt8[np.ndarray, "N H W c"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Repeats the channel of grey images; RGB images stay as they are."""
    return np.broadcast_to(levels, (*levels.shape[:3], RGB))


def apply_in_batches(
    apply: Callable[[np.ndarray], tuple[Array, Array]], images: Rows, batch_size: int
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]:
    """Applies a network to any number of images in batches of one size, for which it is compiled once.

    The last batch is filled up with zeros, whose outputs are dropped.

    Args:
      apply: maps `batch_size` images to (features, logits).
      images: at least one.
      batch_size: of the network.

    Returns:
      (features, logits) of every image, float64.
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
    """Returns the arrays of a tree of parameters by their slash-joined paths, in alphabetical order."""
    return dict(sorted(traverse_util.flatten_dict(params, sep="/").items()))


def params_hash(params: Any) -> str:
    """Returns the SHA-256 of a tree of parameters, in hex: of their paths, shapes and values."""
    return content_hash(*(part for item in flatten_params(params).items() for part in item))
