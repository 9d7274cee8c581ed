"""Convolution whose gradients run at the speed of matrix products.

On a CPU, XLA's own gradients of a convolution are slow: that of the kernel everywhere, and both of them 10 to 80 times
more inside `lax.scan`, `fori_loop` and `while_loop`, as in several training steps of one compiled call, likelihoods and
guidance. Only a forward convolution in the layout NHWC, HWIO -> NHWC reaches the fast kernels there. A convolution is
bilinear and both of its gradients are convolutions again:

* of the input: the cotangent, dilated by the stride, with the kernel flipped in space and transposed in channels;
* of the kernel: a sum over all pixels of the batch of input times cotangent, for each tap of the kernel; see
  `_kernel_gradient_by_columns`, which fits kernels that move by single pixels: 320 to 350 GFLOP/s where one convolution
  has 78 to 230.

3x3 taps are convolved with fewer multiplications where this is faster: see `models.cpu.winograd`.

The gradients call `correlate` itself, so derivatives of every order are as fast. The price is forward-mode
differentiation (`jax.jvp`, `jax.jacfwd`), which a `custom_vjp` does not have; reverse mode, `vmap` and `jit` work.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from models import window as native
from models.cpu import parts, winograd
from models.window import Pair, Window, is_pointwise

PART_VALUES = 2**18  # of a cotangent that the second-level cache of a CPU holds
NARROW_PART_VALUES = 2**20  # of columns, see `_columns`, in bfloat16


def _moves_by_pixels(window: Window) -> bool:
    return window == Window(padding=window.padding)


# --- bfloat16 on a CPU -----------------------------------------------------------------------------------------------


def _columns(x: Array, window: Window, num_taps: int, order: tuple[int, int, int, int]) -> Array:
    """Return padded images shifted by each tap of a row of the kernel, the channels of all shifts together.

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
    """Convolve as matrix products, summed in float32.

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
    """Return the kernel's gradient as matrix products, summed in float32; see `_narrow`."""
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
    if not is_pointwise(kernel, window) and _moves_by_pixels(window):
        if x.dtype == jnp.bfloat16:
            return _narrow(x, kernel, window)
        if winograd.is_faster(x, kernel.shape, window.padding):
            return winograd.convolve(x, kernel, window.padding)
    return native.correlate(x, kernel, window)


correlate = jax.custom_vjp(lambda x, kernel, window: _value(x, kernel, window=window), nondiff_argnums=(2,))


def _forward(x: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    return correlate(x, kernel, window), (x, kernel)


def _gradient_windows(window: Window, inputs: Pair, taps: Pair) -> tuple[Window, Window]:
    """Return how the flipped kernel moves over the cotangent, and how the cotangent moves over the input.

    What comes out has the size of the inputs, and of the kernel.
    """
    of_input, of_kernel = [], []
    for axis in range(2):
        before = window.padding[axis][0]
        last_input = (inputs[axis] - 1) * window.base_dilation[axis] + before
        last_output = (window.output_size(axis, inputs[axis], taps[axis]) - 1) * window.strides[axis]
        last_tap = (taps[axis] - 1) * window.window_dilation[axis]
        of_input.append((last_tap - before, last_input - last_output))
        of_kernel.append((before, last_tap + last_output - last_input))
    return (
        Window(window.base_dilation, (of_input[0], of_input[1]), window.strides, window.window_dilation),
        Window(window.window_dilation, (of_kernel[0], of_kernel[1]), window.base_dilation, window.strides),
    )


def _kernel_gradient_by_columns(x: Array, cotangent: Array, window: Window, taps: Pair) -> Array:
    """Return the kernel's gradient for a window that moves by single pixels, as matrix products with many rows.

    As one convolution, a product has as many rows as the kernel is wide, so few that the cotangent comes from memory
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
            columns.append(correlate(along_rows, kernel, Window(padding=(rows, (0, 0))))[0])
        return jnp.stack(columns, 1)

    return parts.sum_over_parts(of_part, num_parts, x, cotangent)


def _pull_back(x: Array, kernel: Array, cotangent: Array, window: Window) -> tuple[Array, Array]:
    """Return the gradients in x and in the kernel."""
    h, w, C, features = kernel.shape
    if is_pointwise(kernel, window):
        x_gradient = correlate(cotangent, kernel.swapaxes(2, 3), window)
        return x_gradient, (x.reshape(-1, C).swapaxes(0, 1) @ cotangent.reshape(-1, features)).reshape(kernel.shape)
    input_window, kernel_window = _gradient_windows(window, (x.shape[1], x.shape[2]), (h, w))
    # Flipped in space, then transposed in channels.
    flipped = jnp.flip(kernel.reshape(h * w, C, features), 0)
    x_gradient = correlate(cotangent, flipped.swapaxes(1, 2).reshape(h, w, features, C), input_window)
    if not _moves_by_pixels(window):
        images, taps = x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)
        return x_gradient, correlate(images, taps, kernel_window).transpose(1, 2, 0, 3)
    if x.dtype == jnp.bfloat16:
        return x_gradient, _narrow_kernel_gradient(x, cotangent, window, (h, w))
    if winograd.is_faster(x, kernel.shape, window.padding):
        return x_gradient, winograd.kernel_gradient(x, cotangent, window.padding)
    return x_gradient, _kernel_gradient_by_columns(x, cotangent, window, (h, w))


@functools.partial(jax.jit, static_argnames="window")
def _gradients(x: Array, kernel: Array, cotangent: Array, window: Window) -> tuple[Array, Array]:
    # The cotangent and x are used twice: stored, so that XLA does not compute what produced them twice, once in a
    # transposed order. The kernel: so that it is not flipped long before, and its copy kept through the forward pass.
    x, kernel, cotangent = lax.optimization_barrier((x, kernel, cotangent))
    # Both before what follows from the first, so that x and the cotangent are not kept for the second any longer.
    return lax.optimization_barrier(_pull_back(x, kernel, cotangent, window))


correlate.defvjp(_forward, lambda window, residuals, cotangent: _gradients(*residuals, cotangent, window=window))
