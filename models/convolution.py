"""The convolution that every network uses: XLA's own, or on a CPU the one of `models.cpu.convolution`."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from models import cpu, initializers
from models.cpu import convolution as on_cpu
from models.initializers import BiasInitializer, Initializer
from models.precision import add_to_channels
from models.window import Window, correlate, same_padding


def convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C O"],
    window: Window = Window(),  # noqa: B008
) -> Float[Array, "B P Q O"]:
    """Correlate images with a kernel, as deep learning's "convolution" does.

    y[b, p, q, o] = Σ_{i, j, c} x_padded[b, p s + i d, q s + j d, c] kernel[i, j, c, o], stride s, window dilation d.

    Forward-mode differentiation (`jax.jvp`) works on GPUs and TPUs; the CPU's has reverse mode only.

    Args:
      x: images.
      kernel: taps, rows first.
      window: how the kernel moves; by default one pixel at a time, without padding.
    """
    return on_cpu.correlate(x, kernel, window) if cpu.is_target() else correlate(x, kernel, window)


class Conv(nn.Module):
    """Convolution with "SAME" padding, in the dtype of its input."""

    features: int  # output channels
    size: int = 3  # taps of the square kernel along each axis
    stride: int = 1  # pixels between neighbouring outputs
    dilation: int = 1  # pixels between neighbouring taps
    kernel_init: Initializer = initializers.default_init()  # law of the initial kernel [h, w, in, out]
    # Law of the initial bias, given the kernel's shape; None for no bias.
    bias_init: BiasInitializer | None = initializers.zero_bias

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B P Q O"]:
        H, W, C = x.shape[1:]
        shape = (self.size, self.size, C, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        rows, columns = (same_padding(size, self.size, self.stride, self.dilation) for size in (H, W))
        window = Window((self.stride,) * 2, (rows, columns), window_dilation=(self.dilation,) * 2)
        y = convolve(x, kernel.astype(x.dtype), window)
        if self.bias_init is not None:
            y = add_to_channels(y, self.param("bias", self.bias_init, shape))
        return cpu.keep(y)
