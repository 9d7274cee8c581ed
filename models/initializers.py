"""Initial values of parameters.

The kernels of a network are drawn with an integer hash instead of `jax.random.uniform`: XLA needs half a second to
compile threefry for each array on a CPU, 40 s for the 200 kernels of a CIFAR-10 network, and 0.05 s for the hash. Keys
are split by threefry as everywhere, each array has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

Initializer = Callable[[PRNGKeyArray, tuple[int, ...]], Array]  # (key, shape) -> parameter

SMALLEST_SCALE = 1e-10  # stands for 0: layers that start "at zero" start at about 1e-5 of the usual size


def _hash(bits: UInt32[Array, "N"]) -> UInt32[Array, "N"]:
    """Scrambles 32-bit integers one to one: a step and the output permutation of PCG (O'Neill 2014).

    Jarzynski & Olano 2020 ("Hash functions for GPU rendering") recommend it among many for its statistical quality.
    """
    state = bits * jnp.uint32(747796405) + jnp.uint32(2891336453)
    word = ((state >> ((state >> 28) + 4)) ^ state) * jnp.uint32(277803737)
    return (word >> 22) ^ word


def hashed_uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws uniform numbers on (-1, 1), for initial parameters only; see the head of this module."""
    low, high = jax.random.key_data(key).reshape(-1)[-2:]
    bits = _hash(_hash(jnp.arange(math.prod(shape), dtype=jnp.uint32) + low) ^ high)
    # The upper 24 bits as the middle of one of 2^24 equal intervals, all exact in float32.
    return ((bits >> 8).astype(jnp.float32) * 2.0**-23 + (2.0**-24 - 1)).reshape(shape)


def default_init(scale: float = 1.0) -> Initializer:
    """Returns DDPM's initializer of kernels [..., in, out]: uniform with variance scale / mean(fan in, fan out).

    A scale of 0 stands for 1e-10.
    """

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        mean_fan = math.prod(shape[:-2]) * (shape[-2] + shape[-1]) / 2
        bound = math.sqrt(3 * (scale or SMALLEST_SCALE) / mean_fan)  # the variance of U(-b, b) is b² / 3
        return bound * hashed_uniform(key, shape)

    return init
