"""Pictures of a user's own: a file, a folder of them or an .npz file, brought to what a network expects.

What is done to a picture is written down in docs/controllable.md. Size and channels change only by a setting; what
cannot be read or does not fit is named and left out, so that one bad file does not stop the others.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from sources.npz import load_npz
from sources.resize import resize

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
RESIZE = ("none", "crop", "stretch")  # values of `restore.resize`
NUM_NAMED = 5  # files that an error lists
# What Pillow raises for damaged files: the first four came up when 16,500 files were cut off or had bytes changed.
DAMAGED = (OSError, ValueError, SyntaxError, TypeError, EOFError, struct.error, zlib.error)
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # luma of R, G and B by ITU-R BT.601, as Pillow's


@dataclass(frozen=True)
class Fit:
    """What pictures must be, and what may be done to make them so.

    Attributes:
      shape: height, width and channels.
      resize: "none"; "crop": the largest part in the middle that has the proportions, then resized; "stretch": resized
        as a whole, whatever its proportions.
      convert_channels: colour may become grey (luma) and grey colour (repeated).
    """

    shape: tuple[int, int, int]
    resize: str = "none"
    convert_channels: bool = False


@dataclass(frozen=True)
class Pictures:
    """Pictures that were read.

    Attributes:
      names: of the pictures, without their folder; a place in an .npz file as "file_3".
      values: float32[N, H, W, C] in [0, 1], black to white.
      source: where they are from, in words.
      skipped: {file: why it was left out}.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "N H W C"]
    source: str
    skipped: dict[str, str]

    def to_levels(self, num_levels: int) -> UInt8[np.ndarray, "N H W C"]:
        """Returns the nearest of the levels 0 .. num_levels - 1, spread evenly from black to white."""
        return np.rint(self.values * (num_levels - 1)).astype(np.uint8)


# --- one picture -----------------------------------------------------------------------------------------------------


def _on_white(image: Image.Image) -> Float[np.ndarray, "H W C"]:
    """Lays a picture with transparency on white."""
    values = np.asarray(image.convert("LA" if image.mode in ("L", "LA", "La", "1") else "RGBA"), np.float32) / 255
    color, alpha = values[..., :-1], values[..., -1:]
    return alpha * color + (1 - alpha)


def to_array(image: Image.Image) -> Float[np.ndarray, "H W C"]:
    """Returns a picture as values in [0, 1], of 1 channel if it is grey and of 3 if it is not.

    Turned as its EXIF orientation says, transparency laid on white, palettes and other colour spaces turned into RGB,
    16 bits kept. Of several frames the first counts.

    Raises:
      ValueError: if its values have no known black and white (32 bits).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("its values have 32 bits, of which black and white are not known; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.float32)[..., None] / 65535
    if image.has_transparency_data:
        return _on_white(image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"), np.float32)[..., None] / 255
    return np.asarray(image.convert("RGB"), np.float32) / 255


def read_picture(path: str | Path) -> Float[np.ndarray, "H W C"]:
    """Reads a picture with Pillow (see `to_array`).

    Raises:
      ValueError: saying why it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return to_array(image)
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read: {error or type(error).__name__}") from error


def central_part(image: Float[np.ndarray, "h w C"], height: int, width: int) -> Float[np.ndarray, "..."]:
    """Cuts out the largest part in the middle with the proportions of height x width, to the nearest pixel."""
    h, w = image.shape[:2]
    scale = min(h / height, w / width)
    part_h, part_w = max(round(scale * height), 1), max(round(scale * width), 1)
    top, left = (h - part_h) // 2, (w - part_w) // 2
    return image[top : top + part_h, left : left + part_w]


def _fit_channels(image: Float[np.ndarray, "H W c"], channels: int, convert: bool) -> Float[np.ndarray, "..."]:
    found = image.shape[-1]
    if found == channels:
        return image
    if not convert:
        raise ValueError(
            f"it has {found} channel(s), expected {channels}; convert it, or set restore.convert_channels=True"
        )
    if (found, channels) == (3, 1):
        return (image @ GRAY_WEIGHTS)[..., None]
    if found == 1:
        return np.repeat(image, channels, axis=-1)
    raise ValueError(f"it has {found} channels, which cannot be converted to {channels}")


def fit_picture(image: Float[np.ndarray, "h w c"], fit: Fit) -> Float[np.ndarray, "H W C"]:
    """Brings a picture to the shape that is expected, as far as the settings allow.

    Resizing is bicubic with a kernel that widens as the picture shrinks, so that nothing is aliased; what it overshoots
    is clipped.

    Args:
      image: in [0, 1].
      fit: the shape and what is allowed.

    Raises:
      ValueError: naming what was found, what is expected, and the setting that would change it.
    """
    height, width, channels = fit.shape
    image = _fit_channels(image, channels, fit.convert_channels)
    if image.shape == fit.shape:
        return image
    if fit.resize == "none":
        raise ValueError(
            f"it has {image.shape[0]}x{image.shape[1]} pixels (height x width), expected {height}x{width}; resize it, "
            "or set restore.resize to 'crop' or 'stretch'"
        )
    part = central_part(image, height, width) if fit.resize == "crop" else image
    return np.clip(resize(part, height, width, Image.Resampling.BICUBIC), 0, 1)


# --- many ------------------------------------------------------------------------------------------------------------


def _list_files(folder: Path) -> list[Path]:
    """Returns the files of a folder in the order of their names, without those whose name starts with a dot."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _read_file(path: Path, fit: Fit) -> Float[np.ndarray, "H W C"]:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"it is no picture by its name; expected {', '.join(SUFFIXES)}")
    return fit_picture(read_picture(path), fit)


def _read_files(paths: list[Path], fit: Fit, limit: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns {name: picture} of the first `limit` files that can be read and fit, and {name: why not} of others."""
    pictures: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for path in paths:
        if limit and len(pictures) == limit:
            break
        try:
            pictures[path.name] = _read_file(path, fit)
        except ValueError as error:
            skipped[path.name] = str(error)
            logging.warning("%s is left out: %s", path, error)
    return pictures, skipped


def _load_arrays(path: Path, fit: Fit, num_levels: int, limit: int) -> Pictures:
    levels = load_npz(path, fit.shape, num_levels).levels
    levels = levels[:limit] if limit else levels
    if not len(levels):
        raise ValueError(f"{path} has no images")
    names = tuple(f"{path.stem}_{index}" for index in range(len(levels)))
    return Pictures(names, levels.astype(np.float32) / (num_levels - 1), str(path), {})


def load_pictures(path: str | Path, fit: Fit, *, num_levels: int, limit: int = 0) -> Pictures:
    """Loads pictures: a file, the files of a folder (not of folders in it), or an .npz file (see `sources.npz`).

    Files are taken in the order of their names. One that cannot be read or does not fit is named in the log and in
    `skipped`; hidden files do not count.

    Args:
      path: of the file or folder; "~" is the home folder.
      fit: what they must be; an .npz file is not resized.
      num_levels: of the levels in an .npz file.
      limit: pictures to load, at the most; 0: all.

    Raises:
      ValueError: if there is no file, or none that can be read and fits; the message names the first ones and why.
      FileNotFoundError: if there is no such path.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix.lower() == ".npz" and path.is_file():
        return _load_arrays(path, fit, num_levels, limit)
    if not path.exists():
        raise FileNotFoundError(
            f"restore.images={str(path)!r} does not exist; give a picture, a folder or an .npz file"
        )
    files = _list_files(path) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"restore.images={str(path)!r} is a folder without files; put pictures in it")
    pictures, skipped = _read_files(files, fit, limit)
    if not pictures:
        reasons = [f"{name}: {why}" for name, why in list(skipped.items())[:NUM_NAMED]]
        more = f"; and {len(skipped) - NUM_NAMED} more" if len(skipped) > NUM_NAMED else ""
        raise ValueError(f"restore.images={str(path)!r} has no picture that can be used: {'; '.join(reasons)}{more}")
    return Pictures(tuple(pictures), np.stack(list(pictures.values())).astype(np.float32), str(path), skipped)
