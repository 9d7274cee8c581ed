"""Cropping and resizing of photographs to the square images that the networks see, as the 2021 code did it.

Each recipe maps one image of levels to real values in units of levels; `nearest_level` makes levels of them again.
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
    """Resizes with a kernel that widens as the image shrinks, so that nothing is aliased.

    TensorFlow calls this `tf.image.resize(antialias=True)`; Pillow computes the same numbers, to float32 rounding, for
    images of one float channel. (For 8-bit images it rounds between the two passes, and differs by a level.)

    Args:
      image: in units of levels.
      height: of the result, in pixels.
      width: of the result, in pixels.
      method: BILINEAR (the triangle) or BICUBIC (Keys' cubic with a = -1/2).

    Returns:
      float32[height, width, C], in units of levels. Bicubic values may overshoot the range of the levels.
    """
    channels = np.moveaxis(image.astype(np.float32, copy=False), -1, 0)
    resized = [np.asarray(Image.fromarray(channel).resize((width, height), method)) for channel in channels]
    return np.stack(resized, axis=-1)


def central_crop(image: Num[np.ndarray, "H W C"], size: int) -> Num[np.ndarray, "S S C"]:
    """Cuts out the square of `size` pixels in the middle; an odd pixel is left over at the bottom or the right.

    Raises:
      UserError: if the image is smaller.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise UserError(f"an image of {height}x{width} pixels is too small for a central crop of {size}x{size}")
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def resize_small_side(image: Num[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "h w C"]:
    """Resizes bilinearly so that the smaller side has `size` pixels; the other keeps the proportions.

    The other side is rounded to the nearest pixel in float32, half to even, as TensorFlow rounds it.
    """
    ratio = size / min(image.shape[:2])
    height, width = (int(np.rint(np.float32(side * ratio))) for side in image.shape[:2])
    return resize(image, height, width, Image.Resampling.BILINEAR)


def celeba(image: UInt8[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "S S C"]:
    """Cuts out the face and resizes it bilinearly: CelebA of the 2021 code.

    Args:
      image: aligned photograph, 218x178 pixels in CelebA.
      size: height and width of the result, in pixels.

    Returns:
      float32 in units of levels, within 0 .. 255 to float32 rounding.
    """
    return resize_small_side(central_crop(image, CELEBA_CROP), size)


def lsun(image: UInt8[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "S S C"]:
    """Makes a photograph of any size square: LSUN of the 2021 code, at all sizes but 128.

    The largest central square is resized bicubically.

    Returns:
      float32 in units of levels; sharp edges overshoot 0 .. 255.
    """
    square = central_crop(image, min(image.shape[:2]))
    return resize(square, size, size, Image.Resampling.BICUBIC)


def lsun_128(image: UInt8[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "S S C"]:
    """Makes a photograph of any size square: LSUN of the 2021 code, at size 128.

    The smaller side is resized bilinearly, then the middle is cut out.

    Returns:
      float32 in units of levels, within 0 .. 255 to float32 rounding.
    """
    return central_crop(resize_small_side(image, size), size)


def nearest_level(image: Float[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W C"]:
    """Clips to 0 .. 255 and rounds to the nearest level, half to even.

    The 2021 code kept the real values of CelebA and of 128-pixel LSUN, and cast those of other LSUN to uint8, which
    darkens by half a level and turns overshoot into its opposite: -3 into 253, 258 into 2.
    """
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)
