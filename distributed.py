"""Devices and hosts: the one place that knows how work is spread over them.

One program runs on every device (`pmap`), the training state is replicated, and the batch is split along its first
axis. Inside a mapped function `example_index` and `mean` see the whole global batch; outside one they are what they
would be on a single device, so that the same functions run in tests and on a pod.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import platform
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

AXIS = "batch"  # name of the mapped axis
PyTree = Any


# --- inside a mapped function ----------------------------------------------------------------------------------------


def _in_mapped_function() -> bool:
    try:
        jax.lax.axis_index(AXIS)
    except NameError:  # what JAX raises for an axis that is not bound
        return False
    return True


# Which of how many equal parts of a device's batch is being traced.
_part: contextvars.ContextVar[tuple[int | Int[Array, ""], int]] = contextvars.ContextVar("part", default=(0, 1))


@contextlib.contextmanager
def part_of_batch(index: Int[Array, ""], num_parts: int) -> Iterator[None]:
    """Says that what is traced inside sees one of `num_parts` equal parts of the batch of a device, in their order."""
    token = _part.set((index, num_parts))
    try:
        yield
    finally:
        _part.reset(token)


def example_index(num_examples: int) -> Int[Array, "B"]:
    """Returns the indices in the global batch of the `num_examples` examples on this device, or in this part of it."""
    part, num_parts = _part.get()
    index = jnp.arange(num_examples) + part * num_examples
    return index + jax.lax.axis_index(AXIS) * (num_examples * num_parts) if _in_mapped_function() else index


def mean(tree: PyTree) -> PyTree:
    """Averages arrays over the devices of a mapped function; the identity outside one."""
    return jax.lax.pmean(tree, AXIS) if _in_mapped_function() else tree


def pmap(
    fn: Callable[..., Any], *, donate_argnums: tuple[int, ...] = (), in_axes: int | tuple[int | None, ...] = 0
) -> jax.stages.Wrapped:
    """Maps `fn` over the leading device axis of its arguments, with collectives along `AXIS`."""
    return jax.pmap(fn, axis_name=AXIS, donate_argnums=donate_argnums, in_axes=in_axes)


# --- between host and devices ----------------------------------------------------------------------------------------


def check_batch_size(name: str, batch_size: int) -> None:
    """Checks that the devices of all hosts divide a global batch.

    Raises:
      ValueError: naming the setting `name`, the number of devices and the nearest sizes that work.
    """
    devices = device_count()
    if batch_size > 0 and batch_size % devices == 0:
        return
    below = batch_size // devices * devices
    nearest = f"{below} or {below + devices}" if below > 0 else f"{devices}"
    raise ValueError(f"{name}={batch_size} is not divided by the {devices} devices; the nearest that is: {nearest}")


def device_count() -> int:
    """Returns the number of devices of all hosts."""
    return jax.device_count()


def local_device_count() -> int:
    """Returns the number of devices of this host."""
    return jax.local_device_count()


def round_up(batch_size: int) -> int:
    """Returns the least batch size, of at least the given one, that the devices of all hosts divide."""
    devices = device_count()
    return -(-batch_size // devices) * devices


def host_share(array: np.ndarray) -> np.ndarray:
    """Returns the part of a global batch, split along its first axis, that this host works on."""
    share = len(array) // jax.process_count()
    return array[jax.process_index() * share : (jax.process_index() + 1) * share]


def _local_sharding() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))


def shard(array: np.ndarray, axis: int = 0) -> Array:
    """Places a host's batch on its devices, split along `axis`; the device axis comes first in the result."""
    parts = np.stack(np.split(array, jax.local_device_count(), axis=axis))
    return jax.device_put(parts, _local_sharding())


def place_batch(array: np.ndarray) -> Array:
    """Places a batch on this host's devices, split along its first axis, for a function that is jitted, not mapped.

    The compiler spreads the work as the batch is spread. The devices of this host must divide the batch.
    """
    return jax.device_put(array, _local_sharding())


def place_copies(tree: PyTree) -> PyTree:
    """Copies a tree of arrays to every device of this host, for a function that is jitted, not mapped."""
    return jax.device_put(tree, NamedSharding(_local_sharding().mesh, PartitionSpec()))


def replicate(tree: PyTree) -> PyTree:
    """Copies a tree of arrays to every device of this host, on a new leading axis."""
    devices = jax.local_device_count()
    copy = lambda leaf: np.broadcast_to(np.asarray(leaf), (devices, *np.shape(leaf)))  # noqa: E731
    return jax.device_put(jax.tree.map(copy, tree), _local_sharding())


def unreplicate(tree: PyTree) -> PyTree:
    """Copies the first device's values of a replicated tree to numpy arrays on the host."""
    # A true copy: on a CPU the host may otherwise see the very buffer that the next, donated step overwrites.
    return jax.tree.map(lambda leaf: np.array(leaf.addressable_data(0)[0], copy=True), tree)


def gather(array: Array) -> np.ndarray:
    """Joins the results [devices, B, ...] of a mapped function over all devices and hosts to numpy [global B, ...]."""
    local = np.asarray(jax.device_get(array))
    local = local.reshape(-1, *local.shape[2:])
    if jax.process_count() == 1:
        return local
    return np.asarray(multihost_utils.process_allgather(local, tiled=True))


def describe_devices() -> dict[str, Any]:
    """Returns what computes, for reports: platform and kind of the devices, how many there are, and CPUs of a host."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
    }


def is_main_process() -> bool:
    """Says whether this process writes the files that all processes share."""
    return jax.process_index() == 0


class Preemption:
    """Notices SIGTERM, so that the state can be saved before the process ends.

    With several processes the scheduler may signal only some of them: then JAX's preemption service makes all of them
    stop after the same step.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        """Starts to listen."""
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restores the previous handler."""
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, signum: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self, step: int) -> bool:
        """Says whether the run should save and end after `step`; every process gets the same answer."""
        if jax.process_count() == 1:
            return self._signalled
        return bool(multihost_utils.reached_preemption_sync_point(step))
