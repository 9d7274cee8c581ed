"""How a kernel moves over images, and the convolution that XLA makes of it."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Window:
    """How a kernel moves over an image, per spatial axis (rows, columns)."""

    strides: Pair = (1, 1)  # pixels between neighbouring outputs
    # (before, after) zeros around the image, after `base_dilation`; negative values crop.
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    # Pixels between neighbouring inputs; more than 1 inserts zeros, a transposed convolution.
    base_dilation: Pair = (1, 1)
    window_dilation: Pair = (1, 1)  # pixels between neighbouring taps of the kernel

    def output_size(self, axis: int, num_inputs: int, num_taps: int) -> int:
        """Return the number of outputs along spatial `axis`."""
        span = (num_inputs - 1) * self.base_dilation[axis] + 1 + sum(self.padding[axis])
        return (span - (num_taps - 1) * self.window_dilation[axis] - 1) // self.strides[axis] + 1


def same_padding(size: int, num_taps: int, stride: int, dilation: int) -> Pair:
    """Return the (before, after) zeros of "SAME": ceil(size / stride) outputs, the odd zero after."""
    total = max((math.ceil(size / stride) - 1) * stride + (num_taps - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def is_pointwise(kernel: Array, window: Window) -> bool:
    """Return whether each pixel is mapped by itself: a product with a matrix."""
    return kernel.shape[:2] == (1, 1) and window == Window()


def correlate(x: Array, kernel: Array, window: Window) -> Array:
    """Convolve images [B, H, W, C] with a kernel [h, w, C, O] by XLA's own convolution, or as one matrix product."""
    if is_pointwise(kernel, window):
        return jnp.tensordot(x, kernel[0, 0], 1)
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        lhs_dilation=window.base_dilation,
        rhs_dilation=window.window_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
