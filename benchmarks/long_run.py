"""Whether a long training run grows, and what telling of its progress costs: one JSON line on stdout.

  python -m benchmarks.long_run --steps 20000

Trains a network of a few thousand parameters on the embedded digits with all that a run has besides: the log, the loss
of test images, TensorBoard, checkpoints to resume from, snapshots and grids of samples; in one process. Memory, open
files and threads are looked at every `--sample_every` steps; a line is fitted to what comes after the warm-up, the
first half. (Memory: of the process's own pages, once Python's garbage is collected and free heap given back.)

`progress_share` is the time of the calls that show and record, TensorBoard's among them, as a part of the run without
evaluating and drawing. `progress_share_digits` sets the same against the time of a step that
configs/vp/digits_ddpmpp_continuous.py has, which is measured afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

import checks
import datasets
import run_lib
from configs.vp import digits_ddpmpp_continuous
from experiment.build import build_experiment, build_train_program
from parallel import distributed
from training import loop as train_loop
from workdir import logs
from workdir.progress import TrainingProgress

SETTINGS = {
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.attn_resolutions": (),
    "training.batch_size": 16,
    "training.snapshot_num_samples": 16,
    "sampling.num_steps": 25,
}
WARM_UP = 1 / 2  # of the steps: Orbax takes some 80 checkpoints until all its threads have their heaps
STEPS_OF_DIGITS = 300
KIB = 1024
PROCESS = Path("/proc/self")  # of Linux

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_integer("steps", 20_000, "Training steps.")
    flags.DEFINE_integer("sample_every", 200, "Steps between two looks at memory, files and threads.")
    flags.DEFINE_integer(
        "save_every", 100, "Steps between two checkpoints, of which every second is kept and draws a grid."
    )


def _give_back_what_is_free() -> None:
    """Gives free memory back to the system, where the C library can (glibc): its heaps grow in leaps of 2 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def usage() -> dict[str, int]:
    """Returns the bytes of this process's own memory, its open files and its threads."""
    gc.collect()
    _give_back_what_is_free()
    status = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
    return {
        "bytes": int(status["RssAnon"].split()[0]) * KIB,
        "files": len(os.listdir(PROCESS / "fd")),
        "threads": int(status["Threads"]),
    }


class MeasuredProgress(TrainingProgress):
    """The progress of a run that is timed, and with it what the process takes.

    Attributes:
      sample_every: steps between two looks.
    """

    sample_every = 200

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.samples: dict[int, dict[str, int]] = {}
        self.seconds = self.paused = 0.0
        self.first = self.last = (0, 0.0, 0.0, 0.0)  # of the time that is measured: step, clock, `seconds`, `paused`

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def show(self, step: int, loss: float) -> None:
        """Shows the loss; looks at the process if it is time to."""
        with self._timed():
            super().show(step, loss)
        if step % self.sample_every == 0:
            start = time.perf_counter()
            self.samples[step] = usage()
            self.paused += time.perf_counter() - start
        self.last = (step, time.perf_counter(), self.seconds, self.paused)
        if not self.first[0]:  # all is compiled but for what evaluates and draws
            self.first = self.last

    def record(self, step: int, **values: float) -> None:
        """Records values."""
        with self._timed():
            super().record(step, **values)

    def record_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Records an image; this comes while the run pauses to draw it."""
        with self._timed():
            super().record_image(step, name, image)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Counts the time of what is not training."""
        start = time.perf_counter()
        with super().pause():
            yield
        self.paused += time.perf_counter() - start

    @property
    def step_seconds(self) -> float:
        """Mean time of a training step with its share of showing and recording."""
        steps, clock, _, paused = np.subtract(self.last, self.first)
        return (clock - paused) / steps

    @property
    def progress_seconds(self) -> float:
        """Mean time of showing and recording, for each step."""
        steps, _, seconds, _ = np.subtract(self.last, self.first)
        return seconds / steps


def make_config(steps: int, save_every: int) -> ConfigDict:
    """Returns the configuration of the run."""
    config = digits_ddpmpp_continuous.get_config()
    saving = {"training.snapshot_freq": 2 * save_every, "training.snapshot_freq_for_preemption": save_every}
    config.update_from_flattened_dict(SETTINGS | saving | {"training.n_iters": steps})
    return config.lock()


def run(config: ConfigDict, workdir: str, sample_every: int) -> MeasuredProgress:
    """Trains in an empty folder; returns what was measured."""
    made: list[MeasuredProgress] = []

    class Progress(MeasuredProgress):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.sample_every = sample_every
            made.append(self)

    original = train_loop.TrainingProgress
    train_loop.TrainingProgress = Progress  # type: ignore[misc]
    try:
        run_lib.train(config, workdir)
    finally:
        train_loop.TrainingProgress = original  # type: ignore[misc]
    return made[0]


def growth(samples: dict[int, dict[str, int]]) -> dict[str, float]:
    """Fits lines to the samples after the warm-up."""
    kept = [step for step in samples if step > WARM_UP * max(samples)]
    steps, third = np.array(kept) / 1000, max(len(kept) // 3, 1)
    values = {name: np.array([samples[step][name] for step in kept], np.float64) for name in samples[kept[0]]}
    slopes = {name: np.polyfit(steps, each, 1) for name, each in values.items()}
    residuals = values["bytes"] - np.polyval(slopes["bytes"], steps)
    variance = (residuals**2).sum() / max(len(kept) - 2, 1)
    result = {f"{name}_per_1000_steps": float(line[0]) for name, line in slopes.items()}
    result["bytes_per_1000_steps_stderr"] = math.sqrt(variance / ((steps - steps.mean()) ** 2).sum())
    for name in ("bytes", "files", "threads"):
        result[f"{name}_early"] = float(np.max(values[name][:third]))
        result[f"{name}_late"] = float(np.max(values[name][-third:]))
    return result


def digits_step_seconds() -> float:
    """Measures the time of a training step of the digits' configuration, once it is compiled."""
    experiment = build_experiment(digits_ddpmpp_continuous.get_config().lock())
    settings = experiment.config.training
    batches = datasets.training_batches(
        datasets.build_source(experiment.config, "train"),
        seed=0,
        first_step=0,
        batch_size=settings.batch_size,
        steps_per_call=settings.n_jitted_steps,
    )
    program, state = build_train_program(experiment), distributed.replicate(experiment.init_state())
    calls = STEPS_OF_DIGITS // settings.n_jitted_steps
    for call in range(calls + 1):
        if call == 1:
            jax.block_until_ready(state)
            start = time.perf_counter()
        state, _ = program(state, next(batches))
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / (calls * settings.n_jitted_steps)


def measure(steps: int, sample_every: int, save_every: int, workdir: str) -> dict[str, Any]:
    """Trains, and returns all that is printed."""
    checks.positive("--sample_every", sample_every)
    checks.positive("--save_every", save_every)
    config = make_config(steps, save_every)
    if sample_every % config.training.log_freq or steps < 12 * sample_every:
        raise ValueError(
            f"--steps={steps} --sample_every={sample_every}: expected a multiple of {config.training.log_freq} and "
            "twelve times as many steps or more"
        )
    progress = run(config, workdir, sample_every)
    digits = digits_step_seconds()
    return {
        "steps": steps,
        "saves": steps // save_every,
        "samples": len(progress.samples),
        **growth(progress.samples),
        "step_ms": 1000 * progress.step_seconds,
        "progress_ms": 1000 * progress.progress_seconds,
        "progress_share": progress.progress_seconds / progress.step_seconds,
        "digits_step_ms": 1000 * digits,
        "progress_share_digits": progress.progress_seconds / digits,
        **distributed.describe_devices(),
    }


def main(argv: Sequence[str]) -> None:
    """Prints the JSON line."""
    logs.set_up_console()  # the log is part of what is measured
    with tempfile.TemporaryDirectory() as workdir:
        result = measure(FLAGS.steps, FLAGS.sample_every, FLAGS.save_every, workdir)
    print(json.dumps(result))


if __name__ == "__main__":
    define_flags()
    app.run(main)
