"""Randomness per example: what example i draws depends on its own key, not on the batch or device it is in.

Every function takes `key` either as one key, from which example i of the global batch derives its own, or as a vector
of keys, one for each example. The same seed then gives the same noise on one device, on eight, and in any batch size.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from errors import UserError
from parallel import distributed


def example_keys(key: PRNGKeyArray, num_examples: int) -> PRNGKeyArray:
    """Returns one key for each example, key[B]; a vector of keys is returned as it is."""
    if key.ndim == 1:
        if key.shape[0] != num_examples:
            raise UserError(f"got {key.shape[0]} keys for {num_examples} examples; pass one key, or one per example")
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, distributed.example_index(num_examples))


def fold_in(key: PRNGKeyArray, data: int | Array) -> PRNGKeyArray:
    """Folds an integer into one key, or into each key of a vector: the same one, or int[B] one for each."""
    if key.ndim == 0:
        return jax.random.fold_in(key, data)
    return jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(data) else None))(key, data)


def split(key: PRNGKeyArray, num: int = 2) -> tuple[PRNGKeyArray, ...]:
    """Splits one key, or each key of a vector, into `num` of the same kind."""
    return (
        tuple(jax.random.split(key, num))
        if key.ndim == 0
        else tuple(jax.vmap(jax.random.split, (0, None), 1)(key, num))
    )


def normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Draws standard normal noise of `shape`, whose first axis counts examples."""
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(example_keys(key, shape[0]))


def rademacher(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Draws -1 or +1 with equal probability, float32 of `shape`, whose first axis counts examples."""
    return jax.vmap(lambda k: jax.random.rademacher(k, shape[1:], jnp.float32))(example_keys(key, shape[0]))


def uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], minval: float = 0.0, maxval: float = 1.0
) -> Float[Array, "B ..."]:
    """Draws uniform numbers on [minval, maxval) of `shape`, whose first axis counts examples."""
    draw = lambda k: jax.random.uniform(k, shape[1:], minval=minval, maxval=maxval)  # noqa: E731
    return jax.vmap(draw)(example_keys(key, shape[0]))


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of Threefry-2x32 (Salmon et al. 2011, Table 2)
_PARITY = 0x1BD11BDA  # completes its key


def _threefry(key_words: UInt32[Array, "2"], counts: UInt32[Array, "N"]) -> UInt32[Array, "N"]:
    """Returns the 32 random bits that JAX draws for each count below 2³²: Threefry-2x32 with 20 rounds, folded."""
    words = (key_words[0], key_words[1], key_words[0] ^ key_words[1] ^ jnp.uint32(_PARITY))
    x, y = jnp.broadcast_to(words[0], counts.shape), counts + words[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << rotation) | (y >> (32 - rotation))) ^ x
        x = x + words[(group + 1) % 3]
        y = y + words[(group + 2) % 3] + jnp.uint32(group + 1)
    return x ^ y


def _bernoulli(key: PRNGKeyArray, probability: float, shape: tuple[int, ...]) -> Array:
    """Returns what `jax.random.bernoulli` does, three times as fast on a CPU.

    There JAX's Threefry is a loop over rounds, each of which goes through memory; written out it is one operation.
    """
    is_threefry = str(jax.random.key_impl(key)) == "threefry2x32" and jax.config.values["jax_threefry_partitionable"]
    if not is_threefry or math.prod(shape) >= 2**32:
        return jax.random.bernoulli(key, probability, shape)
    bits = _threefry(jax.random.key_data(key), jnp.arange(math.prod(shape), dtype=jnp.uint32))
    # JAX compares the first 23 bits, as a fraction in float32, with the probability.
    return ((bits >> 9).astype(jnp.float32) * 2.0**-23 < probability).reshape(shape)


def bernoulli(key: PRNGKeyArray, probability: float, shape: tuple[int, ...]) -> Array:
    """Draws bool[shape], true with `probability`; the first axis counts examples."""
    return jax.vmap(lambda k: _bernoulli(k, probability, shape[1:]))(example_keys(key, shape[0]))


def randint(key: PRNGKeyArray, num_examples: int, maxval: int) -> Array:
    """Draws int32[B] uniform on 0 .. maxval - 1."""
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, maxval))(example_keys(key, num_examples))
