"""Images in .npz files: a data set of one's own, or samples that a network has drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from files import read_npz
from sources.base import ArraySource

ARRAYS = ("samples", "images")  # names that the array of images may have
LABELS, NUM_CLASSES = "labels", "num_classes"


def _classes(arrays: dict[str, np.ndarray], path: str | Path, num_images: int) -> tuple[np.ndarray, int]:
    """Returns the labels, zeros if the file has none, and the number of classes, 0 then."""
    if LABELS not in arrays:
        return np.zeros(num_images, np.int64), 0
    labels = arrays[LABELS]
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu" or (num_images and labels.min() < 0):
        raise ValueError(
            f"{LABELS} of {path} are {labels.dtype} of shape {labels.shape}; expected whole numbers from 0, of shape "
            f"({num_images},), one for each image"
        )
    num_classes = int(arrays[NUM_CLASSES]) if NUM_CLASSES in arrays else int(labels.max(initial=0)) + 1
    if num_images and labels.max() >= num_classes:
        raise ValueError(f"{LABELS} of {path} go up to {labels.max()}, but its {NUM_CLASSES} is {num_classes}")
    return labels.astype(np.int64), num_classes


def load_npz(path: str | Path, image_shape: tuple[int, int, int], num_levels: int) -> ArraySource:
    """Loads the images of an .npz file.

    Its arrays are "images" or "samples": levels, uint8[N, H, W, C]; if there are labels, "labels": whole numbers from
    0, [N]; and, if the largest label of all is not among them, "num_classes".

    Args:
      path: of the file.
      image_shape: height, width and channels that the images must have.
      num_levels: above all their levels.

    Raises:
      ValueError: if the file is damaged, or its arrays are missing, of another shape or type, or out of range.
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
    classes, num_classes = _classes(arrays, path, len(levels))
    return ArraySource(levels, classes, num_levels, num_classes)


def load_npz_split(folder: str, split: str, image_shape: tuple[int, int, int], num_levels: int) -> ArraySource:
    """Loads train.npz or test.npz of a folder (see `load_npz`).

    Args:
      folder: of both files, `data.path`.
      split: "train" or "test".
      image_shape: height, width and channels that the images must have.
      num_levels: above all their levels.

    Raises:
      ValueError: if no folder is named, the file has no images, or as `load_npz`.
      FileNotFoundError: if there is no such file.
    """
    if not folder:
        raise ValueError("data.path is empty; set --config.data.path to the folder of train.npz and test.npz")
    path = Path(folder) / f"{split}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; data.dataset='npz' reads train.npz and test.npz of data.path")
    source = load_npz(path, image_shape, num_levels)
    if not len(source):
        raise ValueError(f"{path} has no images")
    return source
