"""What the benchmarks share: times of calls, the rate of a matrix product, the machine, and how a result is printed."""

from __future__ import annotations

import dataclasses
import json
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

GEMM_SIZE = 2048  # of the square matrices whose product is the rate that others are compared with
GEMM_REPETITIONS = 8
CPU_INFO = Path("/proc/cpuinfo")  # of Linux
MATRIX_EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # that decide how fast a CPU multiplies matrices


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Times of one call, repeated.

    Attributes:
      all: every one of them, in order.
    """

    all: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls took longer."""
        return statistics.median(self.all)

    @property
    def min(self) -> float:
        """Time of the fastest call."""
        return min(self.all)

    def summary(self, parts: int = 1) -> dict[str, float]:
        """Returns what reports say of the times: "median" and "min", of one of the `parts` of a call."""
        return {"median": self.median / parts, "min": self.min / parts}


def time_calls(call: Callable[[], Any], repetitions: int, *, warm_up: int = 1) -> Seconds:
    """Times calls, each until its result is there."""
    times = []
    for _ in range(warm_up + repetitions):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return Seconds(tuple(times[warm_up:]))


def gemm_flops_per_s(dtype: Any = jnp.float32, repetitions: int = GEMM_REPETITIONS) -> float:
    """Returns the rate of a product of two square matrices: 2 GEMM_SIZE³ / the median of its times."""
    square = jnp.ones((GEMM_SIZE, GEMM_SIZE), dtype)
    multiply = jax.jit(jnp.matmul)
    return 2 * GEMM_SIZE**3 / time_calls(lambda: multiply(square, square), repetitions).median


def flops(compiled: jax.stages.Compiled) -> float:
    """Returns the floating-point operations of one call, as XLA counts them; a loop's body counts once."""
    analysis: Any = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, Sequence) else analysis
    return float(analysis["flops"])


def machine() -> dict[str, Any]:
    """Returns what a time depends on besides the program: processor, cores, devices, versions."""
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


def progress(message: str) -> None:
    """Tells the one who waits what is going on, on stderr."""
    print(message, file=sys.stderr, flush=True)


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        return None


def report(result: dict[str, Any]) -> None:
    """Print the result with its command, commit and machine as one JSON line on stdout."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    facts = {"command": " ".join(sys.orig_argv[1:]), "commit": commit, "modified": bool(changes), "machine": machine()}
    print(json.dumps(result | facts), flush=True)
