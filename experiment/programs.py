"""Training programs, compiled while parameters are drawn, and kept on disk for the next run.

JAX's own cache finds a compiled program by the traced one, and tracing a network takes as long as loading its program.
Here a program is found by all that it follows from: the sources of this project, the configuration, the batch, the
versions of packages, the settings of JAX and XLA, the processor. The files are pickles: whoever can write to the folder
can run code as whoever reads it, as with JAX's own cache.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import serialize_executable

from experiment import startup
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


def file_of(made_of: str | None) -> Path | None:
    """Return where a program is kept, beside JAX's cache; None if it is not, as on anything but a CPU."""
    folder = jax.config.values["jax_compilation_cache_dir"]
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
    """Compile a program; return whether to save it, which works for none from JAX's cache: its machine code is lost."""
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
    lowered: jax.stages.Lowered | None,
    path: Path | None = None,
    *,
    lower: Callable[[], jax.stages.Lowered] | None = None,
) -> Callable[..., Any]:
    """Compile a traced program in a thread; its first call waits for it, and raises what compiling raised.

    Args:
      lowered: the traced program; None: it is loaded from `path`.
      path: where it is kept for the next run, see `file_of`; None: nowhere.
      lower: trace it, if the file is damaged.
    """

    def build() -> tuple[jax.stages.Compiled, bool]:
        if lowered is not None:
            return _compile(lowered)
        assert path is not None
        assert lower is not None
        return (loaded, False) if (loaded := _load(path)) else _compile(lower())

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
