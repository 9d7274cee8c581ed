"""Training programs, compiled while parameters are drawn, and kept on disk for the next run.

JAX's own cache finds a compiled program by the traced one, and tracing a network takes as long as loading what was
compiled of it. Here a program is found by all that it follows from: the sources of this project, the configuration, the
batch, the versions of packages, the settings of JAX and XLA, the processor. Any change makes another program. The
files are pickles: whoever can write to the folder can run code as whoever reads it, as with JAX's own cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import serialize_executable
from ml_collections import ConfigDict

import datasets
from experiment import startup
from models.factory import num_classes_of
from parallel import distributed
from storage import files

ROOT = Path(__file__).resolve().parent.parent
SWITCH = "SCORE_SDE_KEEP_PROGRAMS"  # in the environment; 0: keep and find none, as for code that changes at run time
SUFFIX = ".program"
LEAST_SECONDS = 5.0  # to compile a program that is worth a file
MOST_PROGRAMS = 4  # files of 50 MB for the largest networks; only the newest stay
CACHE_WRITTEN = "/jax/compilation_cache/cache_misses"  # JAX's event when it has written what XLA compiled
VARIABLES = ("XLA_FLAGS", "NPROC", "PJRT_NPROC")  # of the environment, which change what XLA compiles
PACKAGES = ("jax", "jaxlib", "flax", "optax", "ml_collections", "numpy")
CPU_INFO = Path("/proc/cpuinfo")  # of Linux


def on_devices(tree: Any) -> Any:
    """Return the shapes of a tree with the leading device axis of a mapped function."""
    devices = distributed.local_device_count()
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((devices, *leaf.shape), leaf.dtype), tree)


def training_batch(config: ConfigDict, group: str = "training") -> Any:
    """Return the shapes of the batches that a device gets for one compiled call.

    Args:
      config: experiment configuration.
      group: its settings with the batch size: "training" for the score's, or "classifier", which has labels.
    """
    sizes = config[group].n_jitted_steps, config[group].batch_size // distributed.device_count()
    levels = jax.ShapeDtypeStruct((*sizes, *datasets.image_shape(config)), jnp.uint8)
    labels = jax.ShapeDtypeStruct(sizes, jnp.int32)
    return (levels, labels) if group == "classifier" or num_classes_of(config) else levels


@functools.cache
def _sources() -> str:
    """Return a hash of all sources of the project."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    paths = sorted([*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))])
    return files.content_hash(*(text for path in paths for text in (str(path.relative_to(ROOT)), path.read_text())))


def _environment() -> str:
    """Describe what a program is compiled with and for: versions, settings, processor, cores and devices."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    processor = sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # on Linux alone
    settings = sorted((name, value) for name, value in jax.config.values.items() if "cache" not in name)
    versions = [platform.python_version(), *map(metadata.version, PACKAGES)]
    variables = [os.environ.get(name) for name in VARIABLES]
    return repr((platform.platform(), processor, cores, jax.device_count(), versions, settings, variables))


def _file_of(made_of: str | None) -> Path | None:
    """Return where a program is kept, beside JAX's cache; None if it is not, as on anything but a CPU."""
    folder = jax.config.jax_compilation_cache_dir
    if made_of is None or folder is None or os.environ.get(SWITCH) == "0" or jax.default_backend() != "cpu":
        return None
    return Path(folder) / f"{files.content_hash(made_of, _sources(), _environment())[:32]}{SUFFIX}"


def _load(path: Path) -> jax.stages.Compiled | None:
    """Return the program, or None if the file is damaged or does not fit; it is removed then."""
    try:
        digest, content = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise ValueError("its content is not what was written")
        compiled = serialize_executable.deserialize_and_load(*pickle.loads(content))
    except Exception as error:  # whatever it is, the program can be compiled again
        logging.warning("cannot use the program in %s, so it is compiled again: %s", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):  # of another user, say
        os.utime(path)
    return compiled


def _save(path: Path, compiled: jax.stages.Compiled) -> None:
    try:
        files.remove_leftovers(path.parent)
        content = pickle.dumps(serialize_executable.serialize(compiled))
        files.write_bytes(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        oldest_first = sorted(path.parent.glob(f"*{SUFFIX}"), key=lambda each: each.stat().st_mtime)
        for each in oldest_first[:-MOST_PROGRAMS]:
            each.unlink(missing_ok=True)
    except Exception as error:  # the run does not need it
        logging.warning("cannot keep the compiled program in %s: %s", path, error)


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
    """Compile a program, and tell whether to save it.

    What JAX finds in its own cache cannot be saved: XLA serializes a loaded program without its machine code.
    """
    thread, events, start = threading.get_ident(), [], time.monotonic()

    def listen(event: str, **_: Any) -> None:
        if threading.get_ident() == thread:
            events.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return compiled, CACHE_WRITTEN in events and time.monotonic() - start >= LEAST_SECONDS


def compile_in_background(
    mapped: jax.stages.Wrapped, shapes: Callable[[], Sequence[Any]], *, made_of: str | None = None
) -> Callable[..., Any]:
    """Compile a mapped function for arguments of these shapes in a thread; with several processes, at its first call.

    Args:
      mapped: the function.
      shapes: returns those of its arguments; only called if the function is traced.
      made_of: all that function and shapes follow from, besides the sources: a program that an earlier process kept is
        loaded, and nothing traced. None: neither load nor keep it.

    Returns:
      The function. Its first call waits until it is compiled, and raises what compiling raised.
    """
    if not distributed.is_alone():
        return mapped
    path = _file_of(made_of)
    kept = path if path is not None and path.exists() else None
    # Traced here unless it is kept: Python runs one thread at a time, while XLA compiles without Python.
    lowered = None if kept else mapped.lower(*shapes())
    startup.mark("trace")

    def build() -> tuple[jax.stages.Compiled, bool]:
        if kept and (loaded := _load(kept)):
            return loaded, False
        return _compile(lowered or mapped.lower(*shapes()))

    def save() -> None:
        compiled, is_new = building.result()
        if path is not None and is_new:
            _save(path, compiled)

    worker = ThreadPoolExecutor(1, "compile")
    building = worker.submit(build)
    worker.submit(save)  # after that, while the first steps run
    worker.shutdown(wait=False)

    def call(*args: Any) -> Any:
        compiled, _ = building.result()
        startup.mark("compile")
        return compiled(*args)

    return call
