"""Images in an .npz file, such as samples that a network has drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from files import read_npz
from sources.base import ArraySource

ARRAYS = ("samples", "images")  # names that the array of images may have


def load_npz(path: str | Path, image_shape: tuple[int, int, int], num_levels: int) -> ArraySource:
    """Loads the images of an .npz file: levels, uint8[N, H, W, C], by the name "samples" or "images", without labels.

    Args:
      path: of the file.
      image_shape: height, width and channels that the images must have.
      num_levels: above all their levels.

    Raises:
      ValueError: if the file is damaged, or its images are missing, of another shape or type, or out of range.
      FileNotFoundError: if there is no such file.
    """
    arrays = read_npz(path)
    name = next((name for name in ARRAYS if name in arrays), None)
    if name is None:
        raise ValueError(
            f"{path} has {', '.join(sorted(arrays)) or 'nothing'}; expected an array 'samples' or 'images'"
        )
    levels = arrays[name]
    if levels.dtype != np.uint8 or levels.shape[1:] != image_shape:
        raise ValueError(
            f"{name} of {path} are {levels.dtype} of shape {levels.shape}; expected levels, uint8, of shape "
            f"(N, {', '.join(map(str, image_shape))}), as the configuration's images"
        )
    if levels.size and levels.max() >= num_levels:
        raise ValueError(
            f"{name} of {path} have level {levels.max()}; expected levels below data.num_levels={num_levels}"
        )
    return ArraySource(levels, np.zeros(len(levels), np.int64), num_levels, num_classes=0)
