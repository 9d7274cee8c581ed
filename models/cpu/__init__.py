"""What is tuned for CPUs. Every other platform gets plain XLA, optax and jax.random.

`is_target` is the only switch. It is read while a program is traced, so the jaxpr for a GPU or TPU contains none of
this. By default it follows the devices of the process; `for_platform` traces for hardware that is not here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

Tree = TypeVar("Tree")

_platform = jax.make_user_context(None)  # part of the key of jit's cache; None: that of the default backend


def for_platform(platform: str) -> AbstractContextManager[None]:
    """Trace inside for "cpu", "cuda" or "tpu", as `lower(lowering_platforms=(platform,))` then needs."""
    return _platform(platform)


def is_target() -> bool:
    """Return whether the program that is being traced is for a CPU."""
    return (_platform.value or jax.default_backend()) == "cpu"


def store(tree: Tree) -> Tree:
    """On a CPU, write arrays to memory instead of fusing what makes them into every use, in the gradient too."""
    return jax.lax.optimization_barrier(tree) if is_target() else tree


KEPT = "kept"


def keep(x: Array) -> Array:
    """Mark a result that is too expensive to compute twice, or small: see `recompute_cheap`."""
    return checkpoint_name(x, KEPT)


# On a CPU the gradient of a block finds its inputs, and what `keep` marks, in memory: convolutions, matrix products,
# moments, dropout masks. It computes the rest again (Chen et al. 2016, arXiv 1604.06174). docs/performance.md states
# the gain of each trick.
recompute_cheap = jax.checkpoint_policies.save_only_these_names(KEPT)
