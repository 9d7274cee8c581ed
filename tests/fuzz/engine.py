"""Runs a reader on many changed inputs in a process of its own, within bounds of time and memory.

  PYTHONPATH=.:tests python -m fuzz --reader picture --count 10000 --seed 1 --keep /tmp/found

An input is a failure if the reader raises what it must not, an error that does not name the file, takes longer or more
memory than is allowed, or ends the process. It is kept, and so can be tried again: --input FILE.
"""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from errors import UserError

SECONDS = 5.0  # of the processor's time for an input
WAITING = 60.0  # seconds in all, on a machine that does other things beside it
MEMORY = 2**30  # bytes that a reader may take on top of what the process has when it starts
MAX_FAILURES = 20  # after which a run stops
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
      name: of the reader.
      file: name of the file.
      inputs: good ones, bytes; or a function that returns them, called in the process that reads.
      change: (random, inputs) -> bytes.
      read: called with the path.
      errors: that it may raise; their message must name the file.
      memory: bytes that it may take.
      clean: called after each input.
      prepare: called once in the process that reads: what the first input would otherwise wait for.
      name_in_message: what must be in the message; empty: the file's name.
      address_space: bytes that it may reserve; 0: little more than `memory`.
      share: of the inputs that are asked for, if it is slow.
      seconds: of the processor's time that an input may take; 0: `SECONDS`.
    """

    name: str
    file: str
    inputs: tuple[bytes, ...] | Callable
    change: Callable
    read: Callable
    errors: tuple[type[BaseException], ...] = (UserError,)
    memory: int = MEMORY
    clean: Callable = lambda: None
    prepare: Callable = lambda: None
    name_in_message: str = ""
    address_space: int = 0
    share: float = 1.0
    seconds: float = 0.0


class TooLongError(BaseException):
    """An input took too long. No Exception: no reader may catch it."""


def _stop(number, frame):
    raise TooLongError


def _status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _set_timers(seconds, waiting):
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, waiting)


def _forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def attempt(reader, path):
    """Reads one input; returns (outcome, what was wrong, if anything)."""
    seconds = reader.seconds or SECONDS
    _set_timers(seconds, WAITING)
    try:
        reader.read(path)
    except reader.errors as error:
        _set_timers(0, 0)
        expected = reader.name_in_message or path.name
        named = expected in str(error)
        return "refused", "" if named else f"does not name {expected}: {error!r}\n{traceback.format_exc()}"
    except TooLongError:
        return "too long", f"took more than {seconds} s, or {WAITING} s in all\n{traceback.format_exc()}"
    except BaseException:
        _set_timers(0, 0)
        return "failed", traceback.format_exc()
    finally:
        _set_timers(0, 0)
        reader.clean()
    return "read", ""


def _child(reader, count, seed, path, keep, results):
    """Tries the inputs; appends a line of JSON for each failure, and one at the end."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _stop)
    reader.prepare()
    inputs = list(reader.inputs() if callable(reader.inputs) else reader.inputs)
    limit = _status("VmSize") + (reader.address_space or reader.memory + 2**28)  # stacks of threads, arenas
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes, slowest, largest, failures = {}, 0.0, 0, 0
    with open(results, "a") as log:
        for number in range(count):
            data = reader.change(random.Random(f"{seed} {number}"), inputs)
            path.write_bytes(data)
            _forget_peak()
            before, start = _status("VmRSS"), time.process_time()
            outcome, wrong = attempt(reader, path)
            slowest = max(slowest, time.process_time() - start)
            taken = _status("VmHWM") - before
            largest = max(largest, taken)
            if not wrong and taken > reader.memory:
                wrong = f"took {taken / MIB:.0f} MiB"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if wrong:
                failures += 1
                kept = Path(keep) / f"{reader.name}-{seed}-{number}"
                kept.write_bytes(data)
                print(json.dumps({"input": str(kept), "wrong": wrong}), file=log, flush=True)
                if failures == MAX_FAILURES:
                    break
        summary = {"outcomes": outcomes, "slowest": slowest, "memory_mib": largest / MIB}
        print(json.dumps(summary), file=log, flush=True)


def run(reader, count, seed, keep):
    """Tries `count` inputs in a forked process.

    Returns:
      (summary, failures): how many were read and refused, the time of all and of the longest, the most memory; each
      failure with the file in which its input was kept.
    """
    Path(keep).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path, results = Path(folder) / reader.file, Path(folder) / "results"
        pid = os.fork()
        if pid == 0:
            try:
                _child(reader, count, seed, path, keep, results)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status, seconds = _wait(pid, path)
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        failures = [line for line in lines if "wrong" in line]
        summary = {"cpu_seconds": round(seconds, 1)} | next((line for line in lines if "outcomes" in line), {})
        if status:
            kept = Path(keep) / f"{reader.name}-{seed}-last"
            if path.is_file():
                shutil.copy(path, kept)
            failures.append({"input": str(kept), "wrong": f"the process ended with status {status}"})
        return summary, failures


def _wait(pid, path):
    """Waits for the child, and ends it if an input, which it writes to `path`, takes far too long.

    Returns:
      (status, seconds of the processor's time)
    """
    while True:
        done, status, taken = os.wait4(pid, os.WNOHANG)
        if done:
            return status, taken.ru_utime + taken.ru_stime
        if path.exists() and time.time() - path.stat().st_mtime > 2 * WAITING:
            os.kill(pid, signal.SIGKILL)  # code that no signal reaches
        time.sleep(0.05)
