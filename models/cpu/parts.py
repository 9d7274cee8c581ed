"""Batches taken in parts, one after the other, so that what is computed of one part stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def num_parts(num_examples: int, values_per_example: int, limit: int) -> int:
    """Return the least number of equal parts of a batch, each with `limit` values at the most if it can."""
    fitting = (n for n in range(1, num_examples + 1) if num_examples % n == 0)
    return next((n for n in fitting if num_examples // n * values_per_example <= limit), num_examples)


def _split(num_parts: int, array: Array) -> Array:
    return array.reshape(num_parts, -1, *array.shape[1:])


def _zeros(like: jax.ShapeDtypeStruct, after: Array) -> Array:
    """Return zeros that come into being with `after`: made of a constant, they would be there from the beginning."""
    zero, _ = lax.optimization_barrier((jnp.zeros((), like.dtype), after))
    return jnp.broadcast_to(zero, like.shape)


def map_parts(of_part: Callable[[Array], Array], num_parts: int, x: Array) -> Array:
    """Return of_part(x) of a function that maps each example by itself."""
    if num_parts == 1:
        return of_part(x)
    y = _zeros(jax.eval_shape(of_part, x), x)

    def put(y: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        index, x = part
        return lax.dynamic_update_slice_in_dim(y, of_part(x), index * len(x), 0), None

    return lax.scan(put, y, (jnp.arange(num_parts), _split(num_parts, x)))[0]


def sum_over_parts(of_part: Callable[[Array, Array], Array], num_parts: int, x: Array, cotangent: Array) -> Array:
    """Return of_part(x, cotangent) of a function that is a sum over examples."""
    if num_parts == 1:
        return of_part(x, cotangent)
    total = _zeros(jax.eval_shape(of_part, x, cotangent), cotangent)
    parts = _split(num_parts, x), _split(num_parts, cotangent)
    return lax.scan(lambda total, part: (total + of_part(*part), None), total, parts)[0]
