"""Convolution whose gradients run at the speed of matrix products: the one that every network here uses.

On a CPU, XLA's own gradients of a convolution are slow: that of the kernel everywhere, and both of them 10 to 80 times
more inside `lax.scan`, `fori_loop` and `while_loop`, as in several training steps of one compiled call, likelihoods and
guidance. Only a forward convolution in the layout NHWC, HWIO -> NHWC reaches the fast kernels there. A convolution is
bilinear and both of its gradients are convolutions again:

* of the input: the cotangent, dilated by the stride, with the kernel flipped in space and transposed in channels;
* of the kernel: a sum over all pixels of the batch of input times cotangent, for each tap of the kernel; see
  `_kernel_gradient_by_columns`, and `_kernel_gradient` for windows that it does not fit.

Where it pays, a CPU convolves with 3x3 taps by fewer multiplications: see `models.winograd`.

`_own_gradients` says so explicitly, with the transpositions done on the arrays. It calls `_convolve` itself, so
derivatives of every order are as fast. Other platforms have good native rules and keep them: `_backward` chooses when a
program is lowered for a platform. The price is forward-mode differentiation (`jax.jvp`, `jax.jacfwd`), which a
`custom_vjp` does not have; reverse mode, `vmap` and `jit` work everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from models import initializers, parts, winograd
from models.initializers import BiasInitializer, Initializer
from models.precision import add_to_channels
from models.rematerialization import keep

Pair = tuple[int, int]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
PART_VALUES = 2**18  # of a cotangent that the second-level cache of a CPU holds
NARROW_PART_VALUES = 2**20  # of columns, see `_columns`, in bfloat16


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

    def output_sizes(self, x: Array, taps: tuple[int, ...]) -> Pair:
        """Returns the numbers of outputs along rows and columns of images x, for a kernel of this shape."""
        return self.output_size(0, x.shape[1], taps[0]), self.output_size(1, x.shape[2], taps[1])


def same_padding(size: int, num_taps: int, stride: int, dilation: int) -> Pair:
    """Returns the (before, after) zeros of "SAME": ceil(size / stride) outputs, the odd zero after."""
    total = max((math.ceil(size / stride) - 1) * stride + (num_taps - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _is_pointwise(kernel: Array, window: Window) -> bool:
    """Says whether each pixel is mapped by itself: a product with a matrix."""
    return kernel.shape[:2] == (1, 1) and window == Window()


def _native(x: Array, kernel: Array, window: Window) -> Array:
    if _is_pointwise(kernel, window):
        return jnp.tensordot(x, kernel[0, 0], 1)
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        lhs_dilation=window.base_dilation,
        rhs_dilation=window.window_dilation,
        dimension_numbers=_LAYOUT,
    )


def _moves_by_pixels(window: Window) -> bool:
    return window == Window(padding=window.padding)


# --- bfloat16 on a CPU -----------------------------------------------------------------------------------------------


def _columns(x: Array, window: Window, num_taps: int, order: tuple[int, int, int, int]) -> Array:
    """Returns padded images shifted by each tap of a row of the kernel, the channels of all shifts together.

    Args:
      x: images [B, H, W, C].
      window: of the convolution.
      num_taps: of a row of the kernel.
      order: of the axes of the result.
    """
    width = window.output_size(1, x.shape[2], num_taps)
    edges = [(0, 0, 0), *((*each, 0) for each in window.padding), (0, 0, 0)]
    padded = lax.pad(x.transpose(order), jnp.zeros((), x.dtype), [edges[axis] for axis in order])
    shifts = [lax.slice_in_dim(padded, j, j + width, axis=order.index(2)) for j in range(num_taps)]
    return lax.optimization_barrier(jnp.concatenate(shifts, order.index(3)))


def _narrow(x: Array, kernel: Array, window: Window) -> Array:
    """Convolves as matrix products, summed in float32.

    A CPU multiplies matrices of bfloat16 several times faster than those of float32, but XLA widens the operands of a
    convolution to float32.
    """
    h, w, C, features = kernel.shape
    rows = kernel.reshape(h, w * C, features)
    num_rows = window.output_size(0, x.shape[1], h)

    def of_part(x: Array) -> Array:
        columns = _columns(x, window, w, (0, 1, 2, 3))
        products = [
            jnp.tensordot(columns[:, i : i + num_rows], rows[i], 1, preferred_element_type=jnp.float32)
            for i in range(h)
        ]
        return functools.reduce(jnp.add, products).astype(x.dtype)

    return parts.map_parts(of_part, parts.num_parts(len(x), x[0].size * w, NARROW_PART_VALUES), x)


def _narrow_kernel_gradient(x: Array, cotangent: Array, window: Window, taps: Pair) -> Array:
    """Returns the kernel's gradient as matrix products, summed in float32; see `_narrow`."""
    (h, w), (num_rows, _, features), C = taps, cotangent.shape[1:], x.shape[3]

    def of_part(x: Array, cotangent: Array) -> Array:
        moved = _columns(x, window, w, (3, 1, 0, 2))
        pixels = lax.optimization_barrier(cotangent.swapaxes(0, 1).reshape(-1, features))
        products = [
            jnp.matmul(moved[:, i : i + num_rows].reshape(w * C, -1), pixels, preferred_element_type=jnp.float32)
            for i in range(h)
        ]
        return jnp.stack(products)

    num_parts = parts.num_parts(len(x), x[0].size * w, NARROW_PART_VALUES)
    total = parts.sum_over_parts(of_part, num_parts, x, cotangent)
    return total.reshape(h, w, C, features).astype(x.dtype)


# --- the value and its derivatives -----------------------------------------------------------------------------------


# Compiled functions within the program: JAX traces each once for all layers of the same shapes.


@functools.partial(jax.jit, static_argnames="window")
def _value(x: Array, kernel: Array, window: Window) -> Array:
    native = functools.partial(_native, window=window)
    if _is_pointwise(kernel, window) or not _moves_by_pixels(window):
        return native(x, kernel)
    if x.dtype == jnp.bfloat16:
        return lax.platform_dependent(x, kernel, cpu=functools.partial(_narrow, window=window), default=native)
    if winograd.is_faster(x, kernel.shape, window.output_sizes(x, kernel.shape)):
        fast = functools.partial(winograd.convolve, padding=window.padding)
        return lax.platform_dependent(x, kernel, cpu=fast, default=native)
    return native(x, kernel)


_convolve = jax.custom_vjp(lambda x, kernel, window: _value(x, kernel, window=window), nondiff_argnums=(2,))


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


def _kernel_gradient(x: Array, cotangent: Array, window: Window, taps: Pair) -> Array:
    """Returns the kernel's gradient as one convolution that moves the cotangent over the input, for any window."""
    moved = _kernel_window(window, (x.shape[1], x.shape[2]), taps)
    examples_last, cotangent_kernel = x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)
    return _convolve(examples_last, cotangent_kernel, moved).transpose(1, 2, 0, 3)


def _kernel_gradient_by_columns(x: Array, cotangent: Array, window: Window, taps: Pair) -> Array:
    """Returns the kernel's gradient for a window that moves by single pixels, as matrix products with many rows.

    In `_kernel_gradient` a product has as many rows as the kernel is wide, so few that the cotangent comes from memory
    for each again. Here, for each column of the kernel, a convolution moves the cotangent along the image's columns
    only: its width are the channels of x, and what it sums over are the pixels of a row of all examples. The batch is
    taken in parts whose cotangent stays in the cache.
    """
    B, H, W, C = x.shape
    P, Q, features = cotangent.shape[1:]
    rows, before = window.padding[0], window.padding[1][0]
    num_parts = parts.num_parts(B, P * W * features, PART_VALUES)

    def of_part(x: Array, cotangent: Array) -> Array:
        along_rows = x.transpose(1, 3, 0, 2).reshape(1, H, C, -1)
        columns = []
        for j in range(taps[1]):
            # Pixel w of x meets output w + before - j.
            shifts = [(0, 0, 0), (0, 0, 0), (j - before, W - Q - (j - before), 0), (0, 0, 0)]
            shifted = lax.pad(cotangent.swapaxes(0, 1), jnp.zeros((), cotangent.dtype), shifts)
            kernel = lax.optimization_barrier(shifted.reshape(P, 1, -1, features))
            columns.append(_convolve(along_rows, kernel, Window(padding=(rows, (0, 0))))[0])
        return jnp.stack(columns, 1)

    return parts.sum_over_parts(of_part, num_parts, x, cotangent)


def _flip(kernel: Array) -> Array:
    """Returns the kernel flipped in space and transposed in channels; in two steps, of which each is fast."""
    h, w, C, features = kernel.shape
    reversed_taps = lax.optimization_barrier(jnp.flip(kernel.reshape(h * w, C, features), 0))
    return reversed_taps.swapaxes(1, 2).reshape(h, w, features, C)


def _pointwise_kernel_gradient(x: Array, cotangent: Array) -> Array:
    """Returns the kernel's gradient of a linear map of the channels, from x stored the other way round."""
    channels_first = lax.optimization_barrier(x.reshape(-1, x.shape[3]).swapaxes(0, 1))
    product = channels_first @ cotangent.reshape(-1, cotangent.shape[3])
    return product.reshape(1, 1, *product.shape)


def _own_gradients(x: Array, kernel: Array, cotangent: Array, window: Window) -> tuple[Array, Array]:
    if _is_pointwise(kernel, window):
        x_gradient = _convolve(cotangent, kernel.swapaxes(2, 3), window)
        return x_gradient, _pointwise_kernel_gradient(x, cotangent)
    inputs, taps = (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1])
    x_gradient = _convolve(cotangent, _flip(kernel), _input_window(window, inputs, taps))
    if not _moves_by_pixels(window):
        return x_gradient, _kernel_gradient(x, cotangent, window, taps)
    if x.dtype == jnp.bfloat16:
        return x_gradient, _narrow_kernel_gradient(x, cotangent, window, taps)
    if winograd.is_faster(x, kernel.shape, window.output_sizes(x, kernel.shape)):
        return x_gradient, winograd.kernel_gradient(x, cotangent, window.padding)
    return x_gradient, _kernel_gradient_by_columns(x, cotangent, window, taps)


def _native_gradients(x: Array, kernel: Array, cotangent: Array, window: Window) -> tuple[Array, Array]:
    return jax.vjp(lambda x, kernel: _native(x, kernel, window), x, kernel)[1](cotangent)


@functools.partial(jax.jit, static_argnames="window")
def _gradients(x: Array, kernel: Array, cotangent: Array, window: Window) -> tuple[Array, Array]:
    # The cotangent and x are used twice: stored, so that XLA does not compute what produced them twice, once in a
    # transposed order. The kernel: so that it is not flipped long before, and its copy kept through the forward pass.
    arrays = lax.optimization_barrier((x, kernel, cotangent))
    gradients = lax.platform_dependent(
        *arrays,
        cpu=functools.partial(_own_gradients, window=window),
        default=functools.partial(_native_gradients, window=window),
    )
    # Both before what follows from the first, so that x and the cotangent are not kept for the second any longer.
    return lax.optimization_barrier(gradients)


def _backward(window: Window, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    return _gradients(*residuals, cotangent, window=window)


_convolve.defvjp(_forward, _backward)


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
    return _convolve(x, kernel, window)


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
            return keep(y)
        return keep(add_to_channels(y, self.param("bias", self.bias_init, shape)))
