"""Training programs that are compiled before their arguments are there, from the shapes of these alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import datasets
import distributed
from models.factory import told_classes
from runtime import startup
from runtime.background import Background


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
    return (levels, labels) if group == "classifier" or told_classes(config) else levels


def compile_in_background(mapped: jax.stages.Wrapped, *shapes: Any) -> Callable[..., Any]:
    """Traces a mapped function for arguments of these shapes, and compiles it while the program goes on.

    With several processes both are left to the first call, to which they all come.

    Returns:
      The function: its first call waits until it is compiled, and raises the error if it cannot be.
    """
    if not distributed.is_alone():
        return mapped
    # Traced here, since two threads of Python take turns: beside it nothing else would get on.
    compiling = Background(mapped.lower(*shapes).compile, "compile the training steps")
    startup.mark("trace")

    def call(*args: Any) -> Any:
        compiled = compiling.result()
        startup.mark("compile")
        return compiled(*args)

    return call
