"""Convolution whose gradients are ordinary forward convolutions: the one that every network here uses.

On a CPU, XLA's own gradients of a convolution run 10 to 80 times slower inside `lax.scan`, `fori_loop` and
`while_loop` than outside, and so would training several steps in one compiled call, likelihoods and guidance. Only a
forward convolution in the layout NHWC, HWIO -> NHWC reaches the fast kernels there. A convolution is bilinear and both
of its gradients are convolutions again:

* of the input: the cotangent, dilated by the stride, with the kernel flipped in space and transposed in channels;
* of the kernel: the input with its channels as examples and its examples as channels, with the cotangent as kernel.

`_convolve` says so explicitly, with the transpositions done on the arrays. Its gradient rule calls `_convolve` itself,
so derivatives of every order are as fast. Other platforms have good native rules and keep them (`_has_own_gradient`,
the one place that decides). On a CPU this costs forward-mode differentiation (`jax.jvp`, `jax.jacfwd`), which a
`custom_vjp` does not have; reverse mode, `vmap` and `jit` work everywhere.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from models import initializers
from models.initializers import BiasInitializer, Initializer
from models.precision import add_to_channels

Pair = tuple[int, int]
_LAYOUT = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Window:
    """How a kernel moves over an image, per spatial axis (rows, columns).

    Attributes:
      strides: pixels between neighbouring outputs.
      padding: (before, after) zeros around the image, after `base_dilation`; negative values crop.
      base_dilation: pixels between neighbouring inputs; more than 1 inserts zeros, a transposed convolution.
      window_dilation: pixels between neighbouring taps of the kernel.
    """

    strides: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    base_dilation: Pair = (1, 1)
    window_dilation: Pair = (1, 1)

    def output_size(self, axis: int, num_inputs: int, num_taps: int) -> int:
        """Returns the number of outputs along spatial `axis`."""
        span = (num_inputs - 1) * self.base_dilation[axis] + 1 + sum(self.padding[axis])
        return (span - (num_taps - 1) * self.window_dilation[axis] - 1) // self.strides[axis] + 1


def same_padding(size: int, num_taps: int, stride: int, dilation: int) -> Pair:
    """Returns the (before, after) zeros of "SAME": ceil(size / stride) outputs, the odd zero after."""
    total = max((math.ceil(size / stride) - 1) * stride + (num_taps - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _native(x: Array, kernel: Array, window: Window) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        lhs_dilation=window.base_dilation,
        rhs_dilation=window.window_dilation,
        dimension_numbers=_LAYOUT,
    )


_convolve = jax.custom_vjp(_native, nondiff_argnums=(2,))


def _forward(x: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, window), (x, kernel)


def _input_window(window: Window, inputs: Pair, taps: Pair) -> Window:
    """Returns the window that moves the flipped kernel over the cotangent, so that the inputs' size comes out."""
    padding = []
    for axis in range(2):
        before, stride = window.padding[axis][0], window.strides[axis]
        last_input = (inputs[axis] - 1) * window.base_dilation[axis] + before
        last_output = (window.output_size(axis, inputs[axis], taps[axis]) - 1) * stride
        padding.append(((taps[axis] - 1) * window.window_dilation[axis] - before, last_input - last_output))
    return Window(window.base_dilation, (padding[0], padding[1]), window.strides, window.window_dilation)


def _kernel_window(window: Window, inputs: Pair, taps: Pair) -> Window:
    """Returns the window that moves the cotangent over the input, so that the kernel's size comes out."""
    padding = []
    for axis in range(2):
        before = window.padding[axis][0]
        last_input = (inputs[axis] - 1) * window.base_dilation[axis] + before
        last_output = (window.output_size(axis, inputs[axis], taps[axis]) - 1) * window.strides[axis]
        last_tap = (taps[axis] - 1) * window.window_dilation[axis]
        padding.append((before, last_tap + last_output - last_input))
    return Window(window.window_dilation, (padding[0], padding[1]), window.base_dilation, window.strides)


def _backward(window: Window, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    # Each is used twice: stored, so that XLA does not compute what produced it twice, once in a transposed order.
    x, cotangent = lax.optimization_barrier((residuals[0], cotangent))
    kernel = residuals[1]
    inputs, taps = (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1])
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    x_gradient = _convolve(cotangent, flipped, _input_window(window, inputs, taps))
    examples_last, cotangent_kernel = x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)
    kernel_gradient = _convolve(examples_last, cotangent_kernel, _kernel_window(window, inputs, taps))
    return x_gradient, kernel_gradient.transpose(1, 2, 0, 3)


_convolve.defvjp(_forward, _backward)


def _has_own_gradient() -> bool:
    """Says whether convolutions use the gradient rule of this module; decided when a function is traced."""
    return jax.default_backend() == "cpu"


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "h w C O"], window: Window | None = None
) -> Float[Array, "B P Q O"]:
    """Correlates images with a kernel, as deep learning's "convolution" does.

    y[b, p, q, o] = Σ_{i, j, c} x_padded[b, p s + i d, q s + j d, c] kernel[i, j, c, o], stride s, window dilation d.

    Args:
      x: images.
      kernel: taps, rows first.
      window: how the kernel moves; by default one pixel at a time, without padding.
    """
    window = Window() if window is None else window
    if kernel.shape[:2] == (1, 1) and window == Window():
        return jnp.tensordot(x, kernel[0, 0], 1)
    return _convolve(x, kernel, window) if _has_own_gradient() else _native(x, kernel, window)


class Conv(nn.Module):
    """Convolution with "SAME" padding, in the dtype of its input.

    Attributes:
      features: output channels.
      size: taps of the square kernel along each axis.
      stride: pixels between neighbouring outputs.
      dilation: pixels between neighbouring taps.
      kernel_init: law of the initial kernel [h, w, in, out].
      bias_init: law of the initial bias, given the kernel's shape; None for no bias.
    """

    features: int
    size: int = 3
    stride: int = 1
    dilation: int = 1
    kernel_init: Initializer = initializers.default_init()
    bias_init: BiasInitializer | None = initializers.zero_bias

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B P Q O"]:
        """Convolves x and adds the bias."""
        H, W, C = x.shape[1:]
        shape = (self.size, self.size, C, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        padding = (
            same_padding(H, self.size, self.stride, self.dilation),
            same_padding(W, self.size, self.stride, self.dilation),
        )
        window = Window((self.stride,) * 2, padding, window_dilation=(self.dilation,) * 2)
        y = convolve(x, kernel.astype(x.dtype), window)
        if self.bias_init is None:
            return y
        return add_to_channels(y, self.param("bias", self.bias_init, shape))
