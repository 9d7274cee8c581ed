"""What the benchmarks share: flags, times of calls, memory of the process, the rate of a matrix product, the report."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GEMM_SIZE = 2048  # of the square matrices whose product is the rate that others are compared with
GEMM_REPETITIONS = 8
CPU_INFO = Path("/proc/cpuinfo")  # of Linux
STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux
MATRIX_EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # that decide how fast a CPU multiplies matrices


# --- the command -----------------------------------------------------------------------------------------------------


def define_flags(data: str = "are not read", **integers: tuple[int, str]) -> None:
    """Define --config, whose data are used as `data` says, and flags of whole numbers: name=(default, meaning)."""
    config_flags.DEFINE_config_file("config", None, f"Experiment; its data {data}.")
    for name, (default, meaning) in integers.items():
        flags.DEFINE_integer(name, default, meaning)
    flags.mark_flag_as_required("config")


def flag_values(*names: str) -> dict[str, Any]:
    """Return the values of flags by name."""
    return {name: flags.FLAGS[name].value for name in names}


def main(run: Callable[[], dict[str, Any] | None]) -> None:
    """Parse the flags and report what `run` returns, if anything; a UserError ends in one sentence."""

    def call(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            result = run()
        except UserError as error:
            sys.exit(f"benchmarks.{Path(sys.argv[0]).stem}: {error}")
        if result is not None:
            report(result)

    for flag in flags.FLAGS.flags_by_module_dict().get(__name__, ()):  # so that --help lists them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(call)


def progress(message: str) -> None:
    """Print what is running on stderr."""
    print(message, file=sys.stderr, flush=True)


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        return None


def describe(config: ConfigDict) -> dict[str, Any]:
    """Return what every report says of the experiment."""
    return {"network": config.model.name, "dtype": config.model.dtype, "batch_size": config.training.batch_size}


def machine() -> dict[str, Any]:
    """Return what a time depends on besides the program: processor, cores, devices, versions."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    known = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    extensions = known[1].split() if known else []
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "extensions": [name for name in MATRIX_EXTENSIONS if name in extensions],
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def report(result: dict[str, Any]) -> None:
    """Print the result with its command, commit and machine as one JSON line on stdout."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    facts = {"command": " ".join(sys.orig_argv[1:]), "commit": commit, "modified": bool(changes), "machine": machine()}
    print(json.dumps(result | facts), flush=True)


# --- time ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Times of one call, repeated, in order."""

    all: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    @property
    def min(self) -> float:
        return min(self.all)

    def summary(self, parts: int = 1) -> dict[str, float]:
        """Return "median" and "min" of one of the `parts` of a call."""
        return {"median": self.median / parts, "min": self.min / parts}


def time_calls(call: Callable[[], Any], repetitions: int, *, warm_up: int = 1) -> Seconds:
    """Time calls, each until its result is ready."""
    times = []
    for _ in range(warm_up + repetitions):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return Seconds(tuple(times[warm_up:]))


def alternate(
    call: Callable[[], Any],
    between: Callable[[], Sequence[float]],
    repetitions: int,
    *,
    warm_up: int = 0,
    enough: float = math.inf,
) -> tuple[Seconds, list[float]]:
    """Time calls, with what `between` measures before each of them and after the last.

    Calls to warm up do not count, unless the first takes longer than `enough` seconds: then it is the only one.
    """
    times: list[float] = []
    measured = [*between()]
    for _ in range(warm_up + repetitions):
        times += time_calls(call, 1, warm_up=0).all
        measured += between()
        if times[0] > enough:
            return Seconds(tuple(times)), measured
    return Seconds(tuple(times[warm_up:])), measured


def gemm_flops_per_s(dtype: Any = jnp.float32, repetitions: int = GEMM_REPETITIONS) -> float:
    """Return the rate of a product of two square matrices: 2 GEMM_SIZE³ / the median of its times."""
    square = jnp.ones((GEMM_SIZE, GEMM_SIZE), dtype)
    multiply = jax.jit(jnp.matmul)
    return 2 * GEMM_SIZE**3 / time_calls(lambda: multiply(square, square), repetitions).median


def flops(compiled: jax.stages.Compiled) -> float:
    """Return the floating-point operations of one call, as XLA counts them; a loop's body counts once."""
    analysis: Any = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, Sequence) else analysis
    return float(analysis["flops"])


# --- memory ----------------------------------------------------------------------------------------------------------


def status(*names: str) -> list[int]:
    """Return numbers of /proc/self/status of Linux, memory in KiB: "VmRSS", "Threads"."""
    known = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return [int(known[name].split()[0]) for name in names]


def free_memory() -> None:
    """Collect garbage and return free memory to the system, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Growth:
    """Growth of this process since this was made: what its arrays take on a CPU. Known on Linux only."""

    def __init__(self) -> None:
        self._is_known = CLEAR_PEAK.exists()
        self.forget_peak()
        self._before = status("VmRSS")[0] if self._is_known else 0

    def forget_peak(self) -> None:
        """Free memory and restart the peak from what is in use then."""
        if self._is_known:
            free_memory()
            CLEAR_PEAK.write_text("5")

    def peak_bytes(self) -> int | None:
        """Return the peak since then, less what was in use when this was made."""
        return (status("VmHWM")[0] - self._before) * 1024 if self._is_known else None
