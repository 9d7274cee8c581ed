"""Masks for in-painting: half of the image, a box, random pixels, or a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from errors import UserError
from storage import untrusted

_THRESHOLD = 128  # of 8 bits: pixels of a picture from this value on count as white

# The half to be drawn: (rows, columns) of an image of H x W pixels.
HALVES: dict[str, Callable[[int, int], tuple[slice, slice]]] = {
    "top": lambda H, W: (slice(H // 2), slice(W)),
    "bottom": lambda H, W: (slice(H - H // 2, H), slice(W)),
    "left": lambda H, W: (slice(H), slice(W // 2)),
    "right": lambda H, W: (slice(H), slice(W - W // 2, W)),
}
_FORMS = (
    f"a half ({', '.join(HALVES)}), box:TOP,LEFT,HEIGHT,WIDTH in pixels, random:FRACTION, or the path of a picture, "
    "white where pixels are to be drawn"
)


def _box(numbers: str, H: int, W: int) -> tuple[slice, slice]:
    parts = numbers.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"restore.mask='box:{numbers}': expected box:TOP,LEFT,HEIGHT,WIDTH, four whole numbers")
    top, left, height, width = map(int, parts)
    if not (height > 0 and width > 0 and top + height <= H and left + width <= W):
        raise UserError(f"restore.mask='box:{numbers}' is empty or not inside the image of {H}x{W} pixels")
    return slice(top, top + height), slice(left, left + width)


def _random(fraction: str, H: int, W: int, seed: int) -> Float[np.ndarray, "H W"]:
    try:
        hidden = float(fraction)
    except ValueError:
        hidden = -1.0
    if not 0 < hidden < 1:
        raise UserError(f"restore.mask='random:{fraction}': expected the fraction of pixels to be drawn, in (0, 1)")
    num_hidden = min(max(round(hidden * H * W), 1), H * W - 1)
    order = np.random.Generator(np.random.Philox(seed)).permutation(H * W)
    return (order >= num_hidden).astype(np.float64).reshape(H, W)


def _picture(path: str, H: int, W: int) -> Float[np.ndarray, "H W"]:
    if not Path(path).is_file():
        raise UserError(f"restore.mask={path!r}: no such file; expected {_FORMS}")
    try:
        levels = untrusted.read_picture(untrusted.read_content(path), lambda picture: np.asarray(picture.convert("L")))
    except (UserError, OSError) as error:
        raise UserError(f"restore.mask={path!r} is not a picture that can be read ({error})") from error
    if levels.shape != (H, W):
        raise UserError(
            f"restore.mask={path!r} has {levels.shape[0]}x{levels.shape[1]} pixels; expected {H}x{W}, as the images"
        )
    return (levels < _THRESHOLD).astype(np.float64)


def read_mask(setting: str, image_shape: tuple[int, int, int], seed: int) -> Float[np.ndarray, "H W C"]:
    """Return the mask that `restore.mask` describes: 1 where pixels are known, 0 where they are to be drawn.

    The setting names the pixels to be drawn: a half ("top", "bottom", "left", "right"), "box:TOP,LEFT,HEIGHT,WIDTH",
    "random:FRACTION" (chosen by `seed`), or the path of a picture.
    """
    H, W, _ = image_shape
    kind, _, rest = setting.partition(":")
    if kind == "random":
        mask = _random(rest, H, W, seed)
    elif kind == "box" or setting in HALVES:
        mask = np.ones((H, W))
        mask[_box(rest, H, W) if kind == "box" else HALVES[setting](H, W)] = 0
    elif setting:
        mask = _picture(setting, H, W)
    else:
        raise UserError(f"restore.mask is empty; set it to {_FORMS}")
    if mask.min() == mask.max():
        raise UserError(f"restore.mask={setting!r} hides {'nothing' if mask.max() else 'everything'}; expected a part")
    return np.broadcast_to(mask[..., None], image_shape).copy()
