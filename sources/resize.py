"""Cropping and resizing photographs to square images, as the 2021 code did it.

Each recipe maps one image of levels to real values in units of levels; `nearest_level` rounds them to levels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image

from errors import UserError

CELEBA_CROP = 140  # pixels: the face in the 218x178 photographs of CelebA


def resize(
    image: Num[np.ndarray, "H W C"], height: int, width: int, method: Image.Resampling
) -> Float[np.ndarray, "..."]:
    """Resize with a kernel that widens as the image shrinks (antialiasing); float32, in units of levels.

    Equal to TensorFlow's `tf.image.resize(antialias=True)` to float32 rounding: Pillow computes the same for images of
    one float channel. (For 8-bit images it rounds between the two passes, and differs by a level.) `method` is
    BILINEAR (triangle) or BICUBIC (Keys' cubic with a = -1/2), whose values may overshoot the range of the levels.
    """
    channels = np.moveaxis(image.astype(np.float32, copy=False), -1, 0)
    resized = [np.asarray(Image.fromarray(channel).resize((width, height), method)) for channel in channels]
    return np.stack(resized, axis=-1)


def central_crop(image: Num[np.ndarray, "H W C"], size: int) -> Num[np.ndarray, "S S C"]:
    """Cut out the central square of `size` pixels; an odd pixel is left over at the bottom or the right."""
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise UserError(f"an image of {height}x{width} pixels is too small for a central crop of {size}x{size}")
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def resize_small_side(image: Num[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "h w C"]:
    """Resize bilinearly so that the smaller side has `size` pixels; keep the proportions.

    The other side is rounded in float32, half to even, as TensorFlow rounds it.
    """
    ratio = size / min(image.shape[:2])
    height, width = (int(np.rint(np.float32(side * ratio))) for side in image.shape[:2])
    return resize(image, height, width, Image.Resampling.BILINEAR)


def celeba(image: UInt8[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "S S C"]:
    """Cut out the face of an aligned 218x178 photograph and resize it bilinearly: CelebA of the 2021 code."""
    return resize_small_side(central_crop(image, CELEBA_CROP), size)


def lsun(image: UInt8[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "S S C"]:
    """Resize the largest central square bicubically: LSUN of the 2021 code, at all sizes but 128.

    Sharp edges overshoot 0 .. 255.
    """
    square = central_crop(image, min(image.shape[:2]))
    return resize(square, size, size, Image.Resampling.BICUBIC)


def lsun_128(image: UInt8[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "S S C"]:
    """Resize the smaller side bilinearly, then cut out the middle: LSUN of the 2021 code, at size 128."""
    return central_crop(resize_small_side(image, size), size)


def nearest_level(image: Float[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W C"]:
    """Clip to 0 .. 255 and round to the nearest level, half to even.

    The 2021 code kept the real values of CelebA and of 128-pixel LSUN, and cast those of other LSUN to uint8, which
    darkens by half a level and wraps overshoot around: -3 becomes 253, 258 becomes 2.
    """
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)
