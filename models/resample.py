"""Resampling of images by 2: nearest, mean, and separable FIR filters made of slices and adds.

A FIR filter along one axis is a weighted sum of shifted copies. Upsampling never touches the zeros that the textbook
inserts between pixels: each of the two phases of the output is a sum over its own half of the taps. The conventions
(padding, flipped kernel, gain) are StyleGAN2's (Karras et al. 2020), which Song et al. 2021 use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from errors import UserError
from models.convolution import convolve
from models.precision import at_least_float32
from models.window import Pair, Window

FACTOR = 2
_SPATIAL = (1, 2)


def require_halvings(image_size: Pair, num_halvings: int) -> None:
    """Check that images can be halved as often as a network does.

    Raises:
      UserError: if they cannot.
    """
    factor = FACTOR**num_halvings
    if any(size % factor for size in image_size):
        times = "twice" if num_halvings == 2 else f"{num_halvings} times"
        raise UserError(
            f"images of {image_size[0]}x{image_size[1]} pixels (data.image_size, data.image_width) cannot be halved "
            f"{times}, as this network does; choose multiples of {factor}"
        )


def _taps(kernel: Sequence[float], gain: float) -> np.ndarray:
    """Return the flipped taps of one axis, whose sum is `gain`."""
    taps = np.asarray(kernel, np.float64)[::-1]
    return taps / taps.sum() * gain


def _pad(x: Array, axis: int, padding: Pair) -> Array:
    """Pad one axis with zeros; negative values crop."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(*padding, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])


def _filter(x: Array, axis: int, taps: np.ndarray, padding: Pair, stride: int = 1) -> Array:
    """Correlate one axis with `taps` and keep every `stride`-th result; sums in float32 or better."""
    dtype, x = x.dtype, at_least_float32(_pad(x, axis, padding))
    num_outputs = (x.shape[axis] - len(taps)) // stride + 1
    y = jnp.zeros((*x.shape[:axis], num_outputs, *x.shape[axis + 1 :]), x.dtype)
    for i, tap in enumerate(taps):
        last = i + (num_outputs - 1) * stride
        y = y + float(tap) * lax.slice_in_dim(x, i, last + 1, stride, axis)
    return y.astype(dtype)


def _interleave(phases: list[Array], axis: int) -> Array:
    """Take from the phases in turn: twice the pixels along one axis."""
    shape = phases[0].shape
    return jnp.stack(phases, axis + 1).reshape(*shape[:axis], FACTOR * shape[axis], *shape[axis + 1 :])


def _interpolate(x: Array, axis: int, taps: np.ndarray, before: int) -> Array:
    """Insert a zero after each pixel of one axis, pad and correlate: an axis of twice the length.

    Output 2q + r sees the pixels at q + (r + j - before) / 2 through the taps j for which that is whole.
    """
    phases = []
    for r in range(FACTOR):
        first = (before - r) % FACTOR
        own_taps = taps[first::FACTOR]
        start = (before - r - first) // FACTOR
        phases.append(_filter(x, axis, own_taps, (start, len(own_taps) - 1 - start)))
    return _interleave(phases, axis)


def upsample_fir(x: Float[Array, "B H W C"], kernel: Sequence[float], gain: float = 1.0) -> Float[Array, "B 2*H 2*W C"]:
    """Upsample by 2 with a separable FIR filter.

    Args:
      x: images.
      kernel: taps of one axis, of any length; normalized here.
      gain: factor on the result.
    """
    taps = _taps(kernel, FACTOR * math.sqrt(gain))
    before = (len(taps) - 1) // 2 + 1
    for axis in _SPATIAL:
        x = _interpolate(x, axis, taps, before)
    return x


def downsample_fir(
    x: Float[Array, "B H W C"], kernel: Sequence[float], gain: float = 1.0
) -> Float[Array, "B H//2 W//2 C"]:
    """Filter with a separable FIR filter and keep every second pixel; arguments as `upsample_fir`."""
    taps = _taps(kernel, math.sqrt(gain))
    excess = len(taps) - FACTOR
    for axis in _SPATIAL:
        x = _filter(x, axis, taps, ((excess + 1) // 2, excess // 2), FACTOR)
    return x


def upsample_convolve(
    x: Float[Array, "B H W C"], weight: Float[Array, "h w C O"], kernel: Sequence[float]
) -> Float[Array, "B 2*H 2*W O"]:
    """Upsample by 2 with a transposed convolution, and filter the result.

    Args:
      x: images.
      weight: kernel of the convolution; square.
      kernel: taps of one axis of the filter; normalized here.
    """
    size = weight.shape[0]
    full = (size - 1, size - 1)
    x = convolve(x, weight, Window(padding=(full, full), base_dilation=(FACTOR, FACTOR)))
    taps = _taps(kernel, FACTOR)
    excess = len(taps) - FACTOR - (size - 1)
    for axis in _SPATIAL:
        x = _filter(x, axis, taps, ((excess + 1) // 2 + FACTOR - 1, excess // 2 + 1))
    return x


def convolve_downsample(
    x: Float[Array, "B H W C"], weight: Float[Array, "h w C O"], kernel: Sequence[float]
) -> Float[Array, "B H//2 W//2 O"]:
    """Filter, then downsample by 2 with a strided convolution; arguments as `upsample_convolve`."""
    taps = _taps(kernel, 1.0)
    excess = len(taps) - FACTOR + weight.shape[0] - 1
    for axis in _SPATIAL:
        x = _filter(x, axis, taps, ((excess + 1) // 2, excess // 2))
    return convolve(x, weight, Window(strides=(FACTOR, FACTOR)))


def upsample_nearest(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Repeat each pixel in both directions."""
    for axis in _SPATIAL:
        x = _interleave([x] * FACTOR, axis)
    return x


def downsample_mean(x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 C"]:
    """Average each 2x2 pixels."""
    B, H, W, C = x.shape
    squares = x.reshape(B, H // FACTOR, FACTOR, W // FACTOR, FACTOR, C)
    # Slices and adds again: XLA's reduction over such short axes is slower.
    top, bottom = (squares[:, :, i, :, 0] + squares[:, :, i, :, 1] for i in range(FACTOR))
    return (top + bottom) / FACTOR**2


def pool_mean(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B H W C"]:
    """Average over a window of size x size pixels around each pixel, an odd number; pixels outside count as 0."""
    taps, half = np.full(size, 1 / size), size // 2
    for axis in _SPATIAL:
        x = _filter(x, axis, taps, (half, half))
    return x
