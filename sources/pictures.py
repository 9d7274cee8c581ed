"""Decode pictures and bring them to the shape that a network expects; load the few that `--mode restore` is given.

docs/data.md states what is done to a picture. An unreadable or unfitting one is reported and left out, so that one bad
file does not stop the others; folder.py prepares a whole data set of them.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from errors import UserError
from sources.npz import load_npz
from sources.resize import resize
from storage import files as storage
from storage import untrusted

# Names of files that are taken for pictures; files of other names are recognized by their first bytes.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".jp2"),
    *(".j2k", ".tga", ".apng", ".jpe", ".jfif", ".npy"),
)
ARRAY = b"\x93NUMPY"
_STARTS = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", ARRAY),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),  # JPEG 2000
    *(b"8BPS", b"qoif", b"\x76\x2f\x31\x01", b"DDS "),  # pictures that are not decoded here: left out, with the reason
)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1")  # of files that begin as MP4 does
RESIZE = ("none", "crop", "stretch")  # values of `data.resize` and `restore.resize`
MAX_VALUES = 4 * untrusted.MAX_PIXELS  # of an array: 1 GiB as float32
NUM_NAMED = 5  # files that a message lists
GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # luma of R, G and B by ITU-R BT.601, as Pillow's


@dataclass(frozen=True)
class Fit:
    """The shape that pictures must have, and how they may be brought to it.

    `resize` is "none"; "crop": resize the largest central part of the right proportions; or "stretch": resize the
    whole, whatever its proportions.
    """

    shape: tuple[int, int, int]  # height, width and channels
    resize: str = "none"
    convert_channels: bool = False  # allow colour to become grey (luma) and grey colour (repeated)
    group: str = "restore"  # of the settings, for messages: "restore" or "data"

    @property
    def keeps_alpha(self) -> bool:
        """Whether the last channel is the opacity: with 2 (grey) or 4 (RGB) channels."""
        return self.shape[-1] in (2, 4)

    @property
    def rule(self) -> str:
        """The rule in words, for reports."""
        ways = {
            "none": "no resizing",
            "crop": "largest central part of the right proportions, antialiased bicubic resizing",
            "stretch": "antialiased bicubic resizing of the whole",
        }
        return f"{ways[self.resize]} to {self.shape[0]}x{self.shape[1]}, {self.shape[2]} channel(s)"


@dataclass(frozen=True)
class Pictures:
    """Pictures that were read."""

    names: tuple[str, ...]  # file names without folder; "file_3" for the fourth image of file.npz
    values: Float[np.ndarray, "N H W C"]  # float32[N, H, W, C] in [0, 1], black to white
    source: str  # where they come from, in words
    skipped: dict[str, str]  # {file: why it was left out}

    def to_levels(self, num_levels: int) -> UInt8[np.ndarray, "N H W C"]:
        """Return the nearest levels, 0 .. num_levels - 1."""
        return to_levels(self.values, num_levels)


# --- one picture -----------------------------------------------------------------------------------------------------


def is_picture(start: bytes) -> bool:
    """Return whether a file is a picture by its first bytes, `untrusted.START` of them. TGA has no mark."""
    return (
        start.startswith(_STARTS)
        or (start[:4], start[8:12]) == (b"RIFF", b"WEBP")
        or (start[:2], start[6:10]) == (b"BM", bytes(4))
        or (start[4:8] == b"ftyp" and start[8:12] in _BRANDS)
        or re.match(rb"P[1-6]\s", start) is not None
    )


def _values(image: Image.Image, mode: str) -> Float[np.ndarray, "H W C"]:
    """Convert to an 8-bit mode and divide by 255, in place: a large picture takes 1 GiB."""
    values = np.array(image if image.mode == mode else image.convert(mode), np.float32)
    values /= 255
    return values.reshape(*image.size[::-1], -1)


def to_array(image: Image.Image, *, keep_alpha: bool = False) -> Float[np.ndarray, "H W C"]:
    """Return a picture as values in [0, 1], with 1 channel if it is grey and 3 if not.

    The EXIF orientation is applied, transparency laid on white, palettes and other colour spaces converted to RGB, 16
    bits kept, and of several frames the first used. With `keep_alpha` the opacity is the last channel instead (1 where
    there is no transparency).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise UserError("its values have 32 bits, of which black and white are not known; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32)[..., None] / 65535
        return np.concatenate([values, np.ones_like(values)], axis=-1) if keep_alpha else values
    is_gray = image.mode in ("1", "L", "LA", "La")
    if not keep_alpha and not image.has_transparency_data:
        return _values(image, "L" if is_gray else "RGB")
    values = _values(image, "LA" if is_gray else "RGBA")
    if keep_alpha:
        return values
    color, alpha = values[..., :-1], values[..., -1:]
    color *= alpha  # in place
    color += 1 - alpha
    return color


def _decode_array(data: bytes) -> Float[np.ndarray, "H W C"]:
    """Decode a .npy file: uint8 or uint16 of shape [H, W] or [H, W, C], with any number of channels."""
    array = untrusted.read_array(io.BytesIO(data), len(data))
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or not array.size:
        raise UserError(f"it is {array.dtype}{list(array.shape)}; expected uint8 or uint16 of [H, W] or [H, W, C]")
    if array.size > MAX_VALUES:
        raise UserError(f"it has {array.size:,} values, more than {MAX_VALUES:,}; make it smaller")
    return array.reshape(*array.shape[:2], -1).astype(np.float32) / np.iinfo(array.dtype).max


def decode_picture(data: bytes, name: str, *, keep_alpha: bool = False) -> Float[np.ndarray, "H W C"]:
    """Decode the content of a file: a .npy array by its name, anything else with Pillow (see `to_array`)."""
    try:
        if name.lower().endswith(".npy") or data.startswith(ARRAY):
            return _decode_array(data)
        formats = untrusted.FORMATS + ("TGA",) * name.lower().endswith(".tga")
        return untrusted.read_picture(data, lambda image: to_array(image, keep_alpha=keep_alpha), formats)
    except UserError as error:
        raise UserError(f"it cannot be read: {error}") from error


def _read_content(path: str | Path) -> bytes:
    try:
        return untrusted.read_content(path)
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}") from error


def read_picture(path: str | Path, *, keep_alpha: bool = False) -> Float[np.ndarray, "H W C"]:
    """Read a picture from a file (see `decode_picture`)."""
    return decode_picture(_read_content(path), str(path), keep_alpha=keep_alpha)


def central_part(image: Float[np.ndarray, "h w C"], height: int, width: int) -> Float[np.ndarray, "..."]:
    """Cut out the largest central part with the proportions of height x width, to the nearest pixel."""
    h, w = image.shape[:2]
    scale = min(h / height, w / width)
    part_h, part_w = max(round(scale * height), 1), max(round(scale * width), 1)
    top, left = (h - part_h) // 2, (w - part_w) // 2
    return image[top : top + part_h, left : left + part_w]


def _fit_channels(image: Float[np.ndarray, "H W c"], fit: Fit) -> Float[np.ndarray, "..."]:
    """Convert between grey and colour, as far as the settings allow; opacity stays the last channel."""
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
    """Resize, weighting colours by their opacity: those of transparent pixels must not bleed."""
    if not keeps_alpha:
        return np.clip(resize(image, height, width, Image.Resampling.BICUBIC), 0, 1)
    color, alpha = image[..., :-1], image[..., -1:]
    both = resize(np.concatenate([color * alpha, alpha], axis=-1), height, width, Image.Resampling.BICUBIC)
    alpha = np.clip(both[..., -1:], 0, 1)
    color = np.divide(both[..., :-1], alpha, out=np.zeros_like(both[..., :-1]), where=alpha > 0)
    return np.concatenate([np.clip(color, 0, 1), alpha], axis=-1)


def fit_picture(image: Float[np.ndarray, "h w c"], fit: Fit) -> Float[np.ndarray, "H W C"]:
    """Bring a picture, float in [0, 1], to the expected shape, as far as the settings allow.

    Resizing is antialiased bicubic; overshoot is clipped.
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
    """Return the nearest of the levels 0 .. num_levels - 1, spread evenly from black, 0, to white, 1."""
    return np.rint(values * (num_levels - 1)).astype(np.uint8)


# --- many ------------------------------------------------------------------------------------------------------------


def named(problems: dict[str, str]) -> str:
    """Name the first problems and count the others."""
    reasons = [f"{name}: {why}" for name, why in list(problems.items())[:NUM_NAMED]]
    more = f"; and {len(problems) - NUM_NAMED} more" if len(problems) > NUM_NAMED else ""
    return "; ".join(reasons) + more


def _read_file(path: Path, fit: Fit) -> Float[np.ndarray, "H W C"]:
    data = _read_content(path)
    if path.suffix.lower() not in SUFFIXES and not is_picture(data[: untrusted.START]):
        raise UserError(f"neither its name nor its content is that of a picture; expected {', '.join(SUFFIXES)}")
    return fit_picture(decode_picture(data, str(path), keep_alpha=fit.keeps_alpha), fit)


def _load_arrays(path: Path, fit: Fit, num_levels: int, limit: int) -> Pictures:
    levels = load_npz(path, fit.shape, num_levels).levels
    levels = levels[:limit] if limit else levels
    if not len(levels):
        raise UserError(f"{path} has no images")
    names = tuple(f"{path.stem}_{index}" for index in range(len(levels)))
    return Pictures(names, levels.astype(np.float32) / (num_levels - 1), str(path), {})


def load_pictures(path: str | Path, fit: Fit, *, num_levels: int, limit: int = 0) -> Pictures:
    """Load a picture, the files of a folder (without its subfolders), or an .npz file (see `sources.npz`).

    Files are read in alphabetical order, hidden ones left out. An unusable one is logged and listed in `skipped`.

    Args:
      path: of the file or folder; "~" is the home folder.
      fit: the shape they are brought to; an .npz file is not resized.
      num_levels: of the levels in an .npz file.
      limit: pictures to load, at most; 0: all.
    """
    path = storage.local_path(path, "restore.images")
    if path.suffix.lower() == ".npz" and path.is_file():
        return _load_arrays(path, fit, num_levels, limit)
    if not path.exists():
        raise UserError(f"restore.images={str(path)!r} does not exist; give a picture, a folder or an .npz file")
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
    if not files:
        raise UserError(f"restore.images={str(path)!r} is a folder without files; put pictures in it")
    pictures: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for file in files:
        if limit and len(pictures) == limit:
            break
        try:
            pictures[file.name] = _read_file(file, fit)
        except UserError as error:
            skipped[file.name] = str(error)
            logging.warning("%s is left out: %s", file, error)
    if not pictures:
        raise UserError(f"restore.images={str(path)!r} has no picture that can be used: {named(skipped)}")
    return Pictures(tuple(pictures), np.stack(list(pictures.values())).astype(np.float32), str(path), skipped)
