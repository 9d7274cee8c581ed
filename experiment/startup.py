"""The start of a run: what JAX and Python are set to, and how long it takes until the first training step is done.

A process starts once, so the marks belong to the process: `begin` at its start, `mark` at the end of each phase,
`finish` after the first compiled call, which logs them in one line. Without `begin` nothing is kept or logged.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging

from storage.files import cache_folder

PHASES = ("imports", "build", "data", "trace", "init", "compile", "step")  # in their order
STATUS = Path("/proc/self/stat")  # of Linux
MIN_COMPILE_SECONDS = 0.5  # what compiles faster is not worth a file
GARBAGE_THRESHOLD = 100_000  # young objects at which Python looks for garbage; its default is 700
_START_TIME = 19  # its place among the fields that follow the name of the program
_LINE = re.compile(r"first \d+ step\(s\) done ([\d.]+) s after the start: (.+)$", re.MULTILINE)
_PHASE = re.compile(r"(\w+) ([\d.]+) s")

_now = time.monotonic
_marks: list[tuple[str, float]] = []


def set_up() -> None:
    """Turn on JAX's cache of compiled programs, and let Python look for garbage less often.

    Tracing a network makes millions of small objects, nearly none of them garbage.
    """
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder("xla"))
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    gc.freeze()  # what was imported
    gc.set_threshold(GARBAGE_THRESHOLD)


def process_start() -> float:
    """Return when this process started, on the clock of `time.monotonic`; now where the system does not tell."""
    if not STATUS.exists():
        return time.monotonic()
    fields = STATUS.read_text().rpartition(")")[2].split()
    since_boot = int(fields[_START_TIME]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def begin(start: float) -> None:
    """Start the clock at `start`, seconds of `time.monotonic`."""
    _marks[:] = [("start", start)]


def mark(phase: str) -> None:
    """End a phase, one of `PHASES`."""
    if _marks:
        _marks.append((phase, _now()))


def finish(result: Any, num_steps: int) -> None:
    """Wait for the result of the first call, of `num_steps` training steps, log all phases, and stop the clock."""
    if _marks:
        jax.block_until_ready(result)
        mark(PHASES[-1])
        seconds = {phase: end - start for (_, start), (phase, end) in itertools.pairwise(_marks)}
        logging.info("%s", describe(seconds, num_steps))
        _marks.clear()


def describe(seconds: dict[str, float], num_steps: int) -> str:
    """Return the line of the log for the seconds of the phases up to the end of the first call."""
    phases = ", ".join(f"{phase} {duration:.2f} s" for phase, duration in seconds.items())
    return f"first {num_steps} step(s) done {sum(seconds.values()):.2f} s after the start: {phases}"


def parse(log: str) -> dict[str, float] | None:
    """Find that line in a log: seconds by phase, and all of them as "total"; None if it is not there."""
    found = _LINE.search(log)
    if found is None:
        return None
    return {"total": float(found[1])} | {phase: float(duration) for phase, duration in _PHASE.findall(found[2])}
