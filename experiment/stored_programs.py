"""Compiled training steps on disk, found by what they are made of: a run that goes on need not trace its network again.

JAX's own cache finds a compiled program by the traced one, and to trace a network takes Python as long as to load what
was compiled of it. Here a program is found by all that it follows from: the sources of this project, the configuration,
the batch, the versions of the packages it is traced with, JAX's settings, the processor and the devices. Whatever of it
changes makes another program. What was quick to make is not kept, nor anything but the newest programs.

Only for programs of a CPU in a single process, where this was tested; elsewhere nothing is kept. The files are pickles:
who can write to the folder can run code as whoever reads it, as with JAX's own cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
import platform
import threading
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import ml_collections
import numpy as np
import optax
from absl import logging
from jax.experimental import serialize_executable

from errors import UserError
from storage import files

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = ".program"
SWITCH = "SCORE_SDE_KEEP_PROGRAMS"  # in the environment; 0: none is kept or found, as for code changed at run time
LEAST_SECONDS = 5.0  # to compile a program that is worth a file
MOST_PROGRAMS = 4  # files of 50 MB for the largest networks
CACHE_WRITTEN = "/jax/compilation_cache/cache_misses"  # JAX's event when it has written what XLA compiled
VARIABLES = ("XLA_FLAGS", "NPROC", "PJRT_NPROC")  # of the environment, which change what XLA compiles
CPU_INFO = Path("/proc/cpuinfo")  # of Linux

_folder: Path | None = None


def keep_in(folder: Path | None) -> None:
    """Says where programs are kept from now on; None, as at first: nowhere."""
    global _folder
    _folder = folder


@functools.cache
def _sources() -> str:
    """Returns a hash of all sources of the project."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    paths = sorted([*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))])
    return files.content_hash(*(text for path in paths for text in (str(path.relative_to(ROOT)), path.read_text())))


def _processor() -> str:
    """Describes what a program is compiled for: the processor, its cores, and the devices that JAX makes of them."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    lines = {line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # on Linux alone
    return "\n".join([platform.platform(), platform.processor(), f"{cores} {jax.device_count()}", *sorted(lines)])


def _versions() -> str:
    packages = (jax, jaxlib, flax, optax, ml_collections, np)
    return " ".join([platform.python_version(), *(f"{package.__name__} {package.__version__}" for package in packages)])


def _settings() -> str:
    """Describes the settings of JAX and XLA, but for where and when JAX caches."""
    values = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    return repr(sorted(values.items())) + repr([os.environ.get(name) for name in VARIABLES])


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a program is kept.

    Attributes:
      path: of its file, which need not exist.
    """

    path: Path

    def load(self) -> jax.stages.Compiled | None:
        """Returns the program, or None, with a warning, if the file is no good; it is removed then."""
        try:
            digest, content = self.path.read_bytes().split(b"\n", 1)
            if hashlib.sha256(content).hexdigest().encode() != digest:
                raise UserError("its content is not what was written")
            compiled = serialize_executable.deserialize_and_load(*pickle.loads(content))
        except Exception as error:  # whatever it is, the program can be made again
            logging.warning("cannot use the program in %s, which is made again: %s", self.path, error)
            with contextlib.suppress(OSError):
                self.path.unlink()
            return None
        with contextlib.suppress(OSError):  # of another user, say
            os.utime(self.path)
        return compiled

    def save(self, compiled: jax.stages.Compiled) -> None:
        """Writes the program, and removes old ones and what killed processes left; a warning tells if it cannot."""
        try:
            files.remove_leftovers(self.path.parent)
            content = pickle.dumps(serialize_executable.serialize(compiled))
            files.write_bytes(self.path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            oldest_first = sorted(self.path.parent.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
            for path in oldest_first[:-MOST_PROGRAMS]:
                path.unlink(missing_ok=True)
        except Exception as error:  # the run goes on all the same
            logging.warning("cannot keep the compiled program in %s: %s", self.path, error)


def compile_to_keep(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
    """Compiles a program, and says whether it can be saved and is worth it.

    What JAX found in its own cache cannot be saved: XLA has loaded the machine code, and writes a program without it.
    """
    thread, events = threading.get_ident(), []

    def listen(event: str, **_: Any) -> None:
        if threading.get_ident() == thread:
            events.append(event)

    start = time.monotonic()
    jax.monitoring.register_event_listener(listen)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return compiled, CACHE_WRITTEN in events and time.monotonic() - start >= LEAST_SECONDS


def find_place(made_of: str) -> Place | None:
    """Returns where a program is kept, or None if programs are not kept.

    Args:
      made_of: all that the program follows from besides the sources: its name, its configuration, its shapes.
    """
    if _folder is None or jax.default_backend() != "cpu":
        return None
    name = files.content_hash(made_of, _sources(), _processor(), _versions(), _settings())
    return Place(_folder / f"{name[:32]}{SUFFIX}")
