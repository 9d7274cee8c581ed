"""Randomness per example: what example i draws depends on its own key, not on the batch or device it is in.

Every function takes `key` either as one key, from which example i of the global batch derives its own, or as a vector
of keys, one for each example. The same seed then gives the same noise on one device, on eight, and in any batch size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from errors import UserError
from parallel import distributed


def example_keys(key: PRNGKeyArray, num_examples: int) -> PRNGKeyArray:
    """Return one key for each example, key[B]; a vector of keys is returned as it is."""
    if key.ndim == 1:
        if key.shape[0] != num_examples:
            raise UserError(f"got {key.shape[0]} keys for {num_examples} examples; pass one key, or one per example")
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, distributed.example_index(num_examples))


def fold_in(key: PRNGKeyArray, data: int | Array) -> PRNGKeyArray:
    """Fold an integer into one key, or into each key of a vector: the same one, or int[B] one for each."""
    if key.ndim == 0:
        return jax.random.fold_in(key, data)
    return jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(data) else None))(key, data)


def split(key: PRNGKeyArray, num: int = 2) -> tuple[PRNGKeyArray, ...]:
    """Split one key, or each key of a vector, into `num` of the same kind."""
    return (
        tuple(jax.random.split(key, num))
        if key.ndim == 0
        else tuple(jax.vmap(jax.random.split, (0, None), 1)(key, num))
    )


def normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Draw standard normal noise of `shape`, whose first axis counts examples."""
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(example_keys(key, shape[0]))


def rademacher(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Draw -1 or +1 with equal probability, float32 of `shape`, whose first axis counts examples."""
    return jax.vmap(lambda k: jax.random.rademacher(k, shape[1:], jnp.float32))(example_keys(key, shape[0]))


def uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], minval: float = 0.0, maxval: float = 1.0
) -> Float[Array, "B ..."]:
    """Draw uniform numbers on [minval, maxval) of `shape`, whose first axis counts examples."""
    draw = lambda k: jax.random.uniform(k, shape[1:], minval=minval, maxval=maxval)  # noqa: E731
    return jax.vmap(draw)(example_keys(key, shape[0]))


def bernoulli(key: PRNGKeyArray, probability: float, shape: tuple[int, ...]) -> Array:
    """Draw bool[shape], true with `probability`; the first axis counts examples."""
    return jax.vmap(lambda k: jax.random.bernoulli(k, probability, shape[1:]))(example_keys(key, shape[0]))


def randint(key: PRNGKeyArray, num_examples: int, maxval: int) -> Array:
    """Draw int32[B] uniform on 0 .. maxval - 1."""
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, maxval))(example_keys(key, num_examples))
