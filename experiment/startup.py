"""How long a run takes from its start to its first training step, and what takes how long.

A process starts once, so that this is kept for the process: `begin` when it starts, `mark` at the end of each phase,
`finish` after the first call of the compiled step, which is told in one line of the log. Without `begin` nothing is
kept or told.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging

PHASES = ("imports", "build", "data", "trace", "init", "compile", "step")  # in their order
STATUS = Path("/proc/self/stat")  # of Linux
_START_TIME = 19  # its place among the fields that follow the name of the program
_LINE = re.compile(r"first \d+ step\(s\) done ([\d.]+) s after the start: (.+)$", re.MULTILINE)
_PHASE = re.compile(r"(\w+) ([\d.]+) s")

_now = time.monotonic
_marks: list[tuple[str, float]] = []


def process_start() -> float:
    """Returns when this process was started, on the clock of `time.monotonic`; now where the system does not tell."""
    if not STATUS.exists():
        return time.monotonic()
    fields = STATUS.read_text().rpartition(")")[2].split()
    since_boot = int(fields[_START_TIME]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def begin(start: float) -> None:
    """Starts the clock at `start`, seconds of `time.monotonic`."""
    _marks[:] = [("start", start)]


def mark(phase: str) -> None:
    """Says that a phase, one of `PHASES`, ends now."""
    if _marks:
        _marks.append((phase, _now()))


def durations() -> dict[str, float]:
    """Returns the seconds of each phase so far, from the end of the one before."""
    return {phase: end - start for (_, start), (phase, end) in itertools.pairwise(_marks)}


def finish(result: Any, num_steps: int) -> None:
    """Ends the last phase when the result of the first call is there, tells all in the log, and stops the clock.

    Args:
      result: arrays that the call returned.
      num_steps: training steps of the call.
    """
    if not _marks:
        return
    jax.block_until_ready(result)
    mark(PHASES[-1])
    logging.info("%s", describe(durations(), num_steps))
    _marks.clear()


def describe(seconds: dict[str, float], num_steps: int) -> str:
    """Returns the line of the log for the seconds of the phases up to the end of the first call."""
    phases = ", ".join(f"{phase} {duration:.2f} s" for phase, duration in seconds.items())
    return f"first {num_steps} step(s) done {sum(seconds.values()):.2f} s after the start: {phases}"


def parse(log: str) -> dict[str, float] | None:
    """Finds that line in a log: the seconds of each phase and, as "total", all of them; None if it is not there."""
    found = _LINE.search(log)
    if found is None:
        return None
    return {"total": float(found[1])} | {phase: float(duration) for phase, duration in _PHASE.findall(found[2])}
