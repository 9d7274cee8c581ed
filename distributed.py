"""Devices and hosts: the one place that knows how work is spread over them.

One program runs on every device (`pmap`), the training state is replicated, and the batch is split along its first
axis. Inside a mapped function `example_index`, `mean` and `total` see the whole global batch; outside one they are
what they would be on a single device, so that the same functions run in tests and on a pod.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

AXIS = "batch"  # name of the mapped axis
PyTree = Any


def _in_mapped_function() -> bool:
    try:
        jax.lax.axis_index(AXIS)
    except NameError:  # what JAX raises for an axis that is not bound
        return False
    return True


def example_index(num_examples: int) -> Int[Array, "B"]:
    """Returns the indices in the global batch of the `num_examples` examples on this device."""
    index = jnp.arange(num_examples)
    return index + jax.lax.axis_index(AXIS) * num_examples if _in_mapped_function() else index


def mean(tree: PyTree) -> PyTree:
    """Averages arrays over the devices of a mapped function; the identity outside one."""
    return jax.lax.pmean(tree, AXIS) if _in_mapped_function() else tree


def pmap(fn: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Maps `fn` over the leading device axis of its arguments, with collectives along `AXIS`."""
    return jax.pmap(fn, axis_name=AXIS, donate_argnums=donate_argnums)
