"""Pictures of a user's own: how one is decoded and brought to what a network expects; those that `restore` is given.

What is done to a picture is written down in docs/data.md. Of a few pictures, what cannot be read or does not fit is
named and left out, so that one bad file does not stop the others; a whole data set of them is in `folder.py`.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from errors import UserError
from sources.npz import load_npz
from sources.resize import resize
from storage import guards

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".npy")
RESIZE = ("none", "crop", "stretch")  # values of `data.resize` and `restore.resize`
MAX_VALUES = 4 * guards.MAX_PIXELS  # of an array: a GiB as float32
NUM_NAMED = 5  # files that an error lists
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # luma of R, G and B by ITU-R BT.601, as Pillow's


@dataclass(frozen=True)
class Fit:
    """What pictures must be, and what may be done to make them so.

    Attributes:
      shape: height, width and channels.
      resize: "none"; "crop": the largest part in the middle that has the proportions, then resized; "stretch": resized
        as a whole, whatever its proportions.
      convert_channels: colour may become grey (luma) and grey colour (repeated).
      group: of the settings that say so, for messages: "restore" or "data".
    """

    shape: tuple[int, int, int]
    resize: str = "none"
    convert_channels: bool = False
    group: str = "restore"

    @property
    def keeps_alpha(self) -> bool:
        """Whether the last of the channels is the transparency: of 2 (grey) or 4 (RGB) channels."""
        return self.shape[-1] in (2, 4)

    @property
    def rule(self) -> str:
        """Says in a report what is done to pictures."""
        ways = {
            "none": "no resizing",
            "crop": "largest central part of the right proportions, antialiased bicubic resizing",
            "stretch": "antialiased bicubic resizing of the whole",
        }
        return f"{ways[self.resize]} to {self.shape[0]}x{self.shape[1]}, {self.shape[2]} channel(s)"


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
        """Returns the nearest levels, 0 .. num_levels - 1."""
        return to_levels(self.values, num_levels)


# --- one picture -----------------------------------------------------------------------------------------------------


def _is_gray(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La")


def _values(image: Image.Image, mode: str) -> Float[np.ndarray, "H W C"]:
    """Converts to a mode of 8 bits and divides by 255, in place: a large picture is a GiB."""
    values = np.array(image if image.mode == mode else image.convert(mode), np.float32)
    values /= 255
    return values.reshape(*image.size[::-1], -1)


def _with_alpha(image: Image.Image) -> Float[np.ndarray, "H W C"]:
    return _values(image, "LA" if _is_gray(image) else "RGBA")


def _on_white(values: Float[np.ndarray, "H W C"]) -> Float[np.ndarray, "..."]:
    """Lays a picture with transparency, its last channel, on white; in place."""
    color, alpha = values[..., :-1], values[..., -1:]
    color *= alpha
    color += 1 - alpha
    return color


def to_array(image: Image.Image, *, keep_alpha: bool = False) -> Float[np.ndarray, "H W C"]:
    """Returns a picture as values in [0, 1], of 1 channel if it is grey and of 3 if it is not.

    Turned as its EXIF orientation says, transparency laid on white, palettes and other colour spaces turned into RGB,
    16 bits kept. Of several frames the first counts.

    Args:
      image: that Pillow has opened.
      keep_alpha: add the opacity as a last channel, 1 where there is no transparency, and lay nothing on white.

    Raises:
      UserError: if its values have no known black and white (32 bits).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise UserError("its values have 32 bits, of which black and white are not known; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32)[..., None] / 65535
        return np.concatenate([values, np.ones_like(values)], axis=-1) if keep_alpha else values
    if keep_alpha:
        return _with_alpha(image)
    if image.has_transparency_data:
        return _on_white(_with_alpha(image))
    return _values(image, "L" if _is_gray(image) else "RGB")


def _decode_array(data: bytes) -> Float[np.ndarray, "H W C"]:
    """Decodes a .npy file: uint8 or uint16 of shape [H, W] or [H, W, C], with any number of channels."""
    array = guards.read_array(io.BytesIO(data), len(data))
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or not array.size:
        raise UserError(f"it is {array.dtype}{list(array.shape)}; expected uint8 or uint16 of [H, W] or [H, W, C]")
    if array.size > MAX_VALUES:
        raise UserError(f"it has {array.size:,} values, more than {MAX_VALUES:,}; make it smaller")
    return array.reshape(*array.shape[:2], -1).astype(np.float32) / np.iinfo(array.dtype).max


def decode_picture(data: bytes, name: str, *, keep_alpha: bool = False) -> Float[np.ndarray, "H W C"]:
    """Decodes the content of a file: a .npy array by its name, anything else with Pillow (see `to_array`).

    Raises:
      UserError: saying why it cannot be read.
    """
    try:
        if name.lower().endswith(".npy"):
            return _decode_array(data)
        return guards.read_picture(data, lambda image: to_array(image, keep_alpha=keep_alpha))
    except UserError as error:
        raise UserError(f"it cannot be read: {error}") from error


def read_picture(path: str | Path, *, keep_alpha: bool = False) -> Float[np.ndarray, "H W C"]:
    """Reads a picture from a file (see `decode_picture`).

    Raises:
      UserError: saying why it cannot be read.
    """
    try:
        data = guards.read_content(path)
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}") from error
    return decode_picture(data, str(path), keep_alpha=keep_alpha)


def central_part(image: Float[np.ndarray, "h w C"], height: int, width: int) -> Float[np.ndarray, "..."]:
    """Cuts out the largest part in the middle with the proportions of height x width, to the nearest pixel."""
    h, w = image.shape[:2]
    scale = min(h / height, w / width)
    part_h, part_w = max(round(scale * height), 1), max(round(scale * width), 1)
    top, left = (h - part_h) // 2, (w - part_w) // 2
    return image[top : top + part_h, left : left + part_w]


def _fit_channels(image: Float[np.ndarray, "H W c"], fit: Fit) -> Float[np.ndarray, "..."]:
    """Makes grey of colour or colour of grey, as far as the settings allow; opacity stays the last channel."""
    found, expected = image.shape[-1], fit.shape[-1]
    if found == expected:
        return image
    if not fit.convert_channels:
        raise UserError(
            f"it has {found} channel(s), expected {expected}; convert it, or set {fit.group}.convert_channels=True"
        )
    colors = (found - fit.keeps_alpha, expected - fit.keeps_alpha)
    color, alpha = image[..., : colors[0]], image[..., colors[0] :]
    if colors == (3, 1):
        color = (color @ GRAY_WEIGHTS)[..., None]
    elif colors == (1, 3):
        color = np.repeat(color, 3, axis=-1)
    else:
        raise UserError(f"it has {found} channels, which cannot be converted to {expected}")
    return np.concatenate([color, alpha], axis=-1)


def _resize(image: Float[np.ndarray, "h w C"], height: int, width: int, keeps_alpha: bool) -> Float[np.ndarray, "..."]:
    """Resizes, weighting colours by their opacity: those of transparent pixels, which nobody sees, must not bleed."""
    if not keeps_alpha:
        return np.clip(resize(image, height, width, Image.Resampling.BICUBIC), 0, 1)
    color, alpha = image[..., :-1], image[..., -1:]
    both = resize(np.concatenate([color * alpha, alpha], axis=-1), height, width, Image.Resampling.BICUBIC)
    alpha = np.clip(both[..., -1:], 0, 1)
    color = np.divide(both[..., :-1], alpha, out=np.zeros_like(both[..., :-1]), where=alpha > 0)
    return np.concatenate([np.clip(color, 0, 1), alpha], axis=-1)


def fit_picture(image: Float[np.ndarray, "h w c"], fit: Fit) -> Float[np.ndarray, "H W C"]:
    """Brings a picture to the shape that is expected, as far as the settings allow.

    Resizing is bicubic with a kernel that widens as the picture shrinks, so that nothing is aliased; what it overshoots
    is clipped.

    Args:
      image: in [0, 1].
      fit: the shape and what is allowed.

    Raises:
      UserError: naming what was found, what is expected, and the setting that would change it.
    """
    height, width, _ = fit.shape
    image = _fit_channels(image, fit)
    if image.shape == fit.shape:
        return image
    if fit.resize == "none":
        raise UserError(
            f"it has {image.shape[0]}x{image.shape[1]} pixels (height x width), expected {height}x{width}; resize it, "
            f"or set {fit.group}.resize to 'crop' or 'stretch'"
        )
    part = central_part(image, height, width) if fit.resize == "crop" else image
    return _resize(part, height, width, fit.keeps_alpha)


def to_levels(values: Float[np.ndarray, "*shape"], num_levels: int) -> UInt8[np.ndarray, "*shape"]:
    """Returns the nearest of the levels 0 .. num_levels - 1, spread evenly from black, 0, to white, 1."""
    return np.rint(values * (num_levels - 1)).astype(np.uint8)


# --- many ------------------------------------------------------------------------------------------------------------


def _list_files(folder: Path) -> list[Path]:
    """Returns the files of a folder in the order of their names, without those whose name starts with a dot."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _read_file(path: Path, fit: Fit) -> Float[np.ndarray, "H W C"]:
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"it is no picture by its name; expected {', '.join(SUFFIXES)}")
    return fit_picture(read_picture(path, keep_alpha=fit.keeps_alpha), fit)


def _read_files(paths: list[Path], fit: Fit, limit: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns {name: picture} of the first `limit` files that can be read and fit, and {name: why not} of others."""
    pictures: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for path in paths:
        if limit and len(pictures) == limit:
            break
        try:
            pictures[path.name] = _read_file(path, fit)
        except UserError as error:
            skipped[path.name] = str(error)
            logging.warning("%s is left out: %s", path, error)
    return pictures, skipped


def _load_arrays(path: Path, fit: Fit, num_levels: int, limit: int) -> Pictures:
    levels = load_npz(path, fit.shape, num_levels).levels
    levels = levels[:limit] if limit else levels
    if not len(levels):
        raise UserError(f"{path} has no images")
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
      UserError: if there is no file, or none that can be read and fits; the message names the first ones and why.
      UserError: if there is no such path.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix.lower() == ".npz" and path.is_file():
        return _load_arrays(path, fit, num_levels, limit)
    if not path.exists():
        raise UserError(f"restore.images={str(path)!r} does not exist; give a picture, a folder or an .npz file")
    files = _list_files(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"restore.images={str(path)!r} is a folder without files; put pictures in it")
    pictures, skipped = _read_files(files, fit, limit)
    if not pictures:
        reasons = [f"{name}: {why}" for name, why in list(skipped.items())[:NUM_NAMED]]
        more = f"; and {len(skipped) - NUM_NAMED} more" if len(skipped) > NUM_NAMED else ""
        raise UserError(f"restore.images={str(path)!r} has no picture that can be used: {'; '.join(reasons)}{more}")
    return Pictures(tuple(pictures), np.stack(list(pictures.values())).astype(np.float32), str(path), skipped)
