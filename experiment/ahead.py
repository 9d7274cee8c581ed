"""Training programs that are compiled before their arguments are there, from the shapes of these alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import datasets
from experiment import startup, stored_programs
from experiment.background import Background
from models.factory import num_classes_of
from parallel import distributed


def on_devices(tree: Any) -> Any:
    """Returns the shapes of a tree with the leading device axis of a mapped function."""
    devices = distributed.local_device_count()
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((devices, *leaf.shape), leaf.dtype), tree)


def training_batch(config: ConfigDict, group: str = "training") -> Any:
    """Returns the shapes of the batches that a device gets for one compiled call.

    Args:
      config: experiment configuration.
      group: of its settings that has the batch size: "training" for the score's, or "classifier", which has labels.
    """
    sizes = config[group].n_jitted_steps, config[group].batch_size // distributed.device_count()
    levels = jax.ShapeDtypeStruct((*sizes, *datasets.image_shape(config)), jnp.uint8)
    labels = jax.ShapeDtypeStruct(sizes, jnp.int32)
    return (levels, labels) if group == "classifier" or num_classes_of(config) else levels


def compile_in_background(
    mapped: jax.stages.Wrapped, shapes: Callable[[], Sequence[Any]], *, made_of: str | None = None
) -> Callable[..., Any]:
    """Traces a mapped function for arguments of these shapes, and compiles it while the program goes on.

    With several processes both are left to the first call, to which they all come.

    Args:
      mapped: the function.
      shapes: returns those of its arguments; only called if they are needed.
      made_of: all that the function and the shapes follow from, besides the sources, see `stored_programs`: where an
        earlier process has left its program, that is loaded, and nothing traced. None: do not look for it.

    Returns:
      The function: its first call waits until it is compiled, and raises the error if it cannot be.
    """
    if not distributed.is_alone():
        return mapped
    place = stored_programs.find_place(made_of) if made_of is not None else None
    to_keep: list[jax.stages.Compiled] = []

    def make(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        if place is None:
            return lowered.compile()
        compiled, can_be_kept = stored_programs.compile_to_keep(lowered)
        if can_be_kept:
            to_keep.append(compiled)
        return compiled

    if place is not None and place.path.exists():
        making = Background(lambda: place.load() or make(mapped.lower(*shapes())), "load the training steps")
    else:
        # Traced here, since two threads of Python take turns: beside it nothing else would get on.
        making = Background(functools.partial(make, mapped.lower(*shapes())), "compile the training steps")
    startup.mark("trace")

    def call(*args: Any) -> Any:
        compiled = making.result()
        startup.mark("compile")
        results = compiled(*args)
        if place is not None and to_keep:  # beside the steps that follow
            Background(functools.partial(place.save, to_keep.pop()), "keep the training steps")
        return results

    return call
