"""Initial values of parameters.

Kernels are drawn by XLA's own random bit generator ("rbg"), each from a key of its own that threefry derived as
everywhere: for threefry's bits themselves XLA needs half a second of compilation for each array on a CPU, 40 s for the
200 kernels of a CIFAR-10 network. The same seed gives the same parameters on the same kind of device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Initializer = Callable[[PRNGKeyArray, tuple[int, ...]], Array]  # (key, shape) -> parameter
BiasInitializer = Callable[[PRNGKeyArray, tuple[int, ...]], Array]  # (key, shape of the kernel) -> bias

SMALLEST_SCALE = 1e-10  # stands for 0: layers that start "at zero" start at about 1e-5 of the usual size


def _rbg(key: PRNGKeyArray) -> PRNGKeyArray:
    """Return the key of XLA's generator that a threefry key stands for: four words, where threefry has two."""
    words = jnp.tile(jax.random.key_data(key).reshape(-1), 4)[:4]
    return jax.random.wrap_key_data(words, impl="rbg")


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draw uniform numbers on [-1, 1)."""
    return jax.random.uniform(_rbg(key), shape, minval=-1.0, maxval=1.0)


def default_init(scale: float = 1.0) -> Initializer:
    """Return DDPM's initializer of kernels [..., in, out]: uniform with variance scale / mean(fan in, fan out).

    A scale of 0 stands for 1e-10.
    """

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        mean_fan = math.prod(shape[:-2]) * (shape[-2] + shape[-1]) / 2
        bound = math.sqrt(3 * (scale or SMALLEST_SCALE) / mean_fan)  # the variance of U(-b, b) is b² / 3
        return bound * _uniform(key, shape)

    return init


def ncsn_init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Draw NCSN's kernels [..., in, out]: uniform with variance 1 / (3 fan in), PyTorch's default."""
    return _uniform(key, shape) / math.sqrt(math.prod(shape[:-1]))


def ncsn_bias(key: PRNGKeyArray, kernel_shape: tuple[int, ...]) -> Array:
    """Draw NCSN's biases, by the law of their kernel."""
    return _uniform(key, kernel_shape[-1:]) / math.sqrt(math.prod(kernel_shape[:-1]))


def zero_bias(key: PRNGKeyArray, kernel_shape: tuple[int, ...]) -> Array:
    """Return a bias of zeros for a kernel of this shape."""
    return jnp.zeros(kernel_shape[-1:])


def lecun_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Draw Flax's default kernel: a normal of variance 1 / fan in, cut off at two standard deviations."""
    return jax.nn.initializers.lecun_normal()(_rbg(key), shape)


def kaiming_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Draw the kernels of the Wide ResNet: normal of variance 2 / fan out (He et al. 2015)."""
    return jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")(_rbg(key), shape)


def uniform_by_outputs(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Draw the Wide ResNet's last kernel [in, out]: uniform within 1 / sqrt(out)."""
    return _uniform(key, shape) / math.sqrt(shape[-1])


def normal_init(mean: float, std: float) -> Initializer:
    """Return an initializer of normal numbers."""

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        return mean + std * jax.random.normal(_rbg(key), shape)

    return init
