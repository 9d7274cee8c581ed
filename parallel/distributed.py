"""Devices and hosts: the one place that knows how work is spread over them.

One program runs on every device (`pmap`), the training state is replicated, and the batch is split along its first
axis. Inside a mapped function `example_index` and `mean` see the whole global batch; outside one they are what they
would be on a single device, so that the same functions run in tests and on a pod.

With several processes each has devices of its own. Process 0 alone reads and writes the files of a run, and decides
what depends on them: `once` runs a function there and returns its result or error on all processes.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from errors import UserError
from parallel.cluster import find_place, is_tpu_worker
from parallel.membership import START_SECONDS, Membership
from parallel.preemption import preemption as preemption

AXIS = "batch"  # name of the mapped axis
CHUNK_BYTES = 2**26  # sent to all processes at a time
PyTree = Any
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Tree = TypeVar("Tree")


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
    """Trace the body for part `index` of `num_parts` equal parts of a device's batch."""
    token = _part.set((index, num_parts))
    try:
        yield
    finally:
        _part.reset(token)


def example_index(num_examples: int) -> Int[Array, "B"]:
    """Return the indices in the global batch of the `num_examples` examples on this device, or in this part of it."""
    part, num_parts = _part.get()
    index = jnp.arange(num_examples) + part * num_examples
    return index + jax.lax.axis_index(AXIS) * (num_examples * num_parts) if _in_mapped_function() else index


def mean(tree: PyTree) -> PyTree:
    """Average arrays over the devices of a mapped function; the identity outside one, and on one device.

    On one device XLA would copy all arrays.
    """
    return jax.lax.pmean(tree, AXIS) if _in_mapped_function() and jax.lax.axis_size(AXIS) > 1 else tree


def pmap(
    fn: Callable[..., Any], *, donate_argnums: tuple[int, ...] = (), in_axes: int | tuple[int | None, ...] = 0
) -> jax.stages.Wrapped:
    """Map `fn` over the leading device axis of its arguments, with collectives along `AXIS`."""
    return jax.pmap(fn, axis_name=AXIS, donate_argnums=donate_argnums, in_axes=in_axes)


def compile_ahead(mapped: jax.stages.Wrapped, *args: Any) -> Callable[..., Any]:
    """Compile a mapped function for arguments like these without running it; return the function to call."""
    compiled = mapped.lower(*args).compile()
    # With several processes the compiled program needs arrays of all of them; the mapped function makes these, and
    # finds its program in JAX's memory.
    return compiled if jax.process_count() == 1 else mapped


# --- between host and devices ----------------------------------------------------------------------------------------


def check_platform() -> None:
    """Check that JAX has devices of the platform it is asked for; call it once the processes have met.

    Raises:
      UserError: naming the platform and why JAX cannot have it.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion if the platform's plugin is not installed
        reason = str(error).partition("\n")[0] or "its plugin is not installed"
        reason = reason.removesuffix("(set JAX_PLATFORMS='' to automatically choose an available backend)").rstrip(" .")
        platforms = getattr(jax.config, "jax_platforms", None) or ""
        raise UserError(
            f"JAX_PLATFORMS={platforms!r} is not available: {reason}; install that platform, or unset JAX_PLATFORMS to "
            "use what this machine has"
        ) from error


def check_batch_size(name: str, batch_size: int) -> None:
    """Check that the devices of all hosts divide a global batch, the value of the setting `name`.

    Raises:
      UserError: naming the nearest sizes that work.
    """
    devices = device_count()
    if batch_size > 0 and batch_size % devices == 0:
        return
    below = batch_size // devices * devices
    nearest = f"{below} or {below + devices}" if below > 0 else f"{devices}"
    raise UserError(f"{name}={batch_size} is not divided by the {devices} devices; the nearest that is: {nearest}")


def device_count() -> int:
    """Return the number of devices of all hosts."""
    return jax.device_count()


def local_device_count() -> int:
    """Return the number of devices of this host."""
    return jax.local_device_count()


def round_up(batch_size: int) -> int:
    """Return the least batch size, of at least the given one, that the devices of all hosts divide."""
    devices = device_count()
    return -(-batch_size // devices) * devices


def host_share(array: np.ndarray) -> np.ndarray:
    """Return this host's part of a global batch, split along its first axis."""
    share = len(array) // jax.process_count()
    return array[jax.process_index() * share : (jax.process_index() + 1) * share]


def _local_sharding() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))


def shard(array: np.ndarray, axis: int = 0) -> Array:
    """Place a host's batch on its devices, split along `axis`; the device axis comes first in the result."""
    parts = np.stack(np.split(array, jax.local_device_count(), axis=axis))
    return jax.device_put(parts, _local_sharding())


def place_batch(array: np.ndarray) -> Array:
    """Place a batch on this host's devices, which divide it, split along its first axis, for a jitted function."""
    return jax.device_put(array, _local_sharding())


def place_copies(tree: PyTree) -> PyTree:
    """Copy a tree of arrays to every device of this host, for a jitted function."""
    return jax.device_put(tree, NamedSharding(_local_sharding().mesh, PartitionSpec()))


def replicate(tree: PyTree) -> PyTree:
    """Copy a tree of arrays to every device of this host, on a new leading axis."""
    devices = jax.local_device_count()
    copy = lambda leaf: np.broadcast_to(np.asarray(leaf), (devices, *np.shape(leaf)))  # noqa: E731
    return jax.device_put(jax.tree.map(copy, tree), _local_sharding())


def unreplicate(tree: PyTree) -> PyTree:
    """Copy the first device's values of a replicated tree to numpy arrays on the host."""
    # A true copy: on a CPU the host may otherwise see the very buffer that the next, donated step overwrites.
    return jax.tree.map(lambda leaf: np.array(leaf.addressable_data(0)[0], copy=True), tree)


def gather(array: Array) -> np.ndarray:
    """Join the results [devices, B, ...] of a mapped function over all devices and hosts to numpy [global B, ...]."""
    local = np.asarray(jax.device_get(array))
    local = local.reshape(-1, *local.shape[2:])
    if jax.process_count() == 1:
        return local
    return np.asarray(multihost_utils.process_allgather(local, tiled=True))


def describe_devices() -> dict[str, Any]:
    """Return platform, kind and number of the devices, and the CPUs of a host, for reports."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
    }


# --- processes -------------------------------------------------------------------------------------------------------


class ProcessError(UserError):
    """Another process stopped, or is gone."""


_membership: Membership | None = None  # None: this process is the only one


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_seconds: float = START_SECONDS,
    preemptible: bool = False,
) -> None:
    """Join the processes of a run, if there are several; call it before JAX looks for devices.

    Without arguments tasks of SLURM, processes of Open MPI and workers of a pod of TPUs find each other.

    Args:
      coordinator_address: HOST:PORT of process 0, a free port there.
      num_processes: of the run.
      process_id: of this process, counted from 0.
      start_seconds: time limit to wait for the others.
      preemptible: SIGTERM is left to `preemption`.

    Raises:
      UserError: if an argument is wrong or missing, or process 0 cannot be reached in time.
    """
    global _membership
    place = find_place(os.environ, coordinator_address, num_processes, process_id)
    if place is None and not is_tpu_worker(os.environ):
        return
    _membership = Membership(place, start_seconds=start_seconds, preemptible=preemptible)
    require_same({"number of devices of this process": jax.local_device_count()})


def is_alone() -> bool:
    """Return whether this process is the only one."""
    return _membership is None


def is_main_process() -> bool:
    """Return whether this process reads and writes the files that all processes share."""
    return _membership is None or _membership.index == 0


_onces = itertools.count()  # every process calls the same ones in the same order
_deciding = False  # process 0 is inside one, alone


def once(fn: Callable[[], Result]) -> Result:
    """Run `fn` on process 0 and return its result on all processes, after a round trip through JSON.

    The others wait without blocking a device. Nested, it is a plain call.

    Raises:
      ProcessError: on the other processes, if `fn` raised an error on process 0.
    """
    global _deciding
    if _membership is None or _deciding:
        return fn()
    key = f"once/{next(_onces)}"
    if is_main_process():
        _deciding = True
        try:
            answer = json.dumps({"result": fn()})
        except Exception as error:
            _membership.publish(key, json.dumps({"error": str(error)}))
            raise
        finally:
            _deciding = False
        _membership.publish(key, answer)
    else:
        answer = _membership.wait_for(key)
    content = json.loads(answer)
    if "error" in content:
        raise ProcessError(f"process 0 stopped: {content['error']}")
    result: Result = content["result"]
    return result


def on_main(fn: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function run `once`: on process 0, with its result or error on all."""

    @functools.wraps(fn)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return once(lambda: fn(*args, **kwargs))

    return run


def _to_all(content: bytes | None, size: int) -> bytes:
    """Send bytes of process 0, where alone `content` counts, to all through the devices."""
    parts = []
    for start in range(0, size, CHUNK_BYTES):
        length = min(CHUNK_BYTES, size - start)
        chunk = np.zeros(min(CHUNK_BYTES, 1 << (length - 1).bit_length()), np.uint8)  # few sizes: few compilations
        if content is not None:
            chunk[:length] = np.frombuffer(content, np.uint8, length, start)
        parts.append(np.asarray(multihost_utils.broadcast_one_to_all(chunk)).tobytes()[:length])
    return b"".join(parts)


def once_arrays(fn: Callable[[], dict[str, Any] | None]) -> dict[str, np.ndarray] | None:
    """Run `fn`, which returns arrays by name or None, on process 0; return its result on all; see `once`."""
    held: list[np.ndarray] = []

    def describe() -> list[tuple[str, str, tuple[int, ...]]] | None:
        arrays = fn()
        if arrays is None:
            return None
        held.extend(np.asarray(array) for array in arrays.values())
        # bfloat16 has no type code in numpy, only a name.
        types = [array.dtype.name if array.dtype.kind == "V" else array.dtype.str for array in held]
        return [(name, dtype, array.shape) for name, dtype, array in zip(arrays, types, held, strict=True)]

    described = once(describe)
    if described is None:
        return None
    if _membership is None or _deciding:
        return {name: array for (name, _, _), array in zip(described, held, strict=True)}
    sizes = [int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for _, dtype, shape in described]
    content = _to_all(b"".join(array.tobytes() for array in held) if is_main_process() else None, sum(sizes))
    arrays, start = {}, 0
    for (name, dtype, shape), size in zip(described, sizes, strict=True):
        arrays[name] = np.frombuffer(content[start : start + size], np.dtype(dtype)).reshape(shape).copy()
        start += size
    return arrays


def once_tree(fn: Callable[[], Tree | None], template: Tree) -> Tree | None:
    """Run `fn`, which returns a tree of arrays like the template or None, on process 0; see `once_arrays`."""
    leaves_of = lambda tree: {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}  # noqa: E731
    found = once_arrays(lambda: None if (tree := fn()) is None else leaves_of(tree))
    return None if found is None else jax.tree.unflatten(jax.tree.structure(template), list(found.values()))


def require_same(values: dict[str, Any]) -> None:
    """Check that values by name, which can be written as JSON, are the same on all processes."""
    expected, own = once(lambda: values), json.loads(json.dumps(values))
    for name in sorted(expected.keys() | own.keys()):
        if repr(expected.get(name)) != repr(own.get(name)):  # NaN equals itself here; settings.check refuses it
            raise UserError(
                f"{name}: {own.get(name)!r} on process {jax.process_index()}, but {expected.get(name)!r} on process 0; "
                "it must be the same on all"
            )


def divide(fn: Callable[[np.ndarray], tuple[np.ndarray, ...]], rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Apply a function of single rows to each process's part of the rows; return all results."""
    processes = jax.process_count()
    if processes == 1:
        return fn(rows)
    filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % processes, axis=0)])
    joined = []
    for part in fn(host_share(filled)):
        part = np.ascontiguousarray(part)
        # As bytes: JAX would make float64 float32.
        gathered = multihost_utils.process_allgather(part.view(np.uint8), tiled=True)
        joined.append(np.asarray(gathered).view(part.dtype)[: len(rows)])
    return tuple(joined)


# Words of JAX's errors if another process has gone: from the CPU's collectives, or the service.
_SIGNS_OF_LOSS = ("Gloo", "Connection closed", "Connection reset", "coordination", "UNAVAILABLE", "heartbeat", "NCCL")


def explain(error: BaseException) -> BaseException:
    """Return the error itself, or a `ProcessError` if it means that another process stopped or is gone."""
    if _membership is None or isinstance(error, ProcessError):
        return error
    if not isinstance(error, jax.errors.JaxRuntimeError | ValueError) or not any(
        sign in str(error) for sign in _SIGNS_OF_LOSS
    ):
        return error
    if stopped := _membership.first_error(seconds=2.0):
        return ProcessError(f"process {stopped[0]} stopped: {stopped[1]}")
    first = str(error).partition("\n")[0]
    return ProcessError(
        f"another process is gone ({first}): see the end of its log for why; completed work is kept: start all "
        "processes again with the same commands to resume from it"
    )


def stop(message: str, code: int) -> NoReturn:
    """End the program and, within seconds, all other processes of the run, which log the message."""
    if _membership is not None:
        _membership.stop(message, code)
    raise SystemExit(code)
