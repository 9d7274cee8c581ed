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

SMALLEST_SCALE = 1e-10  # stands for 0: layers that start "at zero" start at about 1e-5 of the usual size


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws uniform numbers on [-1, 1)."""
    # An rbg key is four words, a threefry key two.
    words = jnp.tile(jax.random.key_data(key).reshape(-1), 4)[:4]
    return jax.random.uniform(jax.random.wrap_key_data(words, impl="rbg"), shape, minval=-1.0, maxval=1.0)


def default_init(scale: float = 1.0) -> Initializer:
    """Returns DDPM's initializer of kernels [..., in, out]: uniform with variance scale / mean(fan in, fan out).

    A scale of 0 stands for 1e-10.
    """

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        mean_fan = math.prod(shape[:-2]) * (shape[-2] + shape[-1]) / 2
        bound = math.sqrt(3 * (scale or SMALLEST_SCALE) / mean_fan)  # the variance of U(-b, b) is b² / 3
        return bound * _uniform(key, shape)

    return init
