"""Whether a long training run grows, and what reporting its progress costs: one JSON line on stdout.

  python -m benchmarks.long_run --steps 20000

Trains a network of a few thousand parameters on the embedded digits with everything that a run has: log, loss of test
images, TensorBoard, checkpoints, snapshots and grids of samples; in one process. Memory (the process's own pages, after
collecting garbage and returning free heap), open files and threads are sampled every `--sample_every` steps; a line is
fitted to the second half, after the warm-up.

`progress_share` is the time of the calls that show and record, TensorBoard's among them, as a fraction of the run
without evaluating and drawing; `progress_share_digits` as a fraction of a step of
configs/vp/digits_ddpmpp_continuous.py, which is measured afterwards.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags

import checks
import datasets
import run_lib
from benchmarks import measure as measuring
from configs.vp import digits_ddpmpp_continuous
from errors import UserError
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


def usage() -> dict[str, int]:
    """Return the bytes of this process's own memory, its open files and its threads."""
    measuring.free_memory()
    anonymous, threads = measuring.status("RssAnon", "Threads")
    return {"bytes": anonymous * 1024, "files": len(os.listdir("/proc/self/fd")), "threads": threads}


class MeasuredProgress(TrainingProgress):
    """The progress of a run, timed, with samples of the process every `sample_every` steps."""

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
        """Show the loss; sample the process if that is due."""
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
        with self._timed():
            super().record(step, **values)

    def record_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Record an image; this happens while the run pauses to draw it."""
        with self._timed():
            super().record_image(step, name, image)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time of what is not training."""
        start = time.perf_counter()
        with super().pause():
            yield
        self.paused += time.perf_counter() - start

    @property
    def step_seconds(self) -> float:
        """Mean time of a training step, showing and recording included."""
        steps, clock, _, paused = np.subtract(self.last, self.first)
        return (clock - paused) / steps

    @property
    def progress_seconds(self) -> float:
        """Mean time of showing and recording, for each step."""
        steps, _, seconds, _ = np.subtract(self.last, self.first)
        return seconds / steps


def run(steps: int, save_every: int, sample_every: int) -> MeasuredProgress:
    """Train in a temporary folder; return what was measured."""
    config = digits_ddpmpp_continuous.get_config()
    saving = {"training.snapshot_freq": 2 * save_every, "training.snapshot_freq_for_preemption": save_every}
    config.update_from_flattened_dict(SETTINGS | saving | {"training.n_iters": steps})
    if sample_every % config.training.log_freq or steps < 12 * sample_every:
        raise UserError(
            f"--steps={steps} --sample_every={sample_every}: expected a multiple of {config.training.log_freq} and "
            "twelve times as many steps or more"
        )
    made: list[MeasuredProgress] = []

    def make_progress(*arguments: Any, **options: Any) -> MeasuredProgress:
        made.append(MeasuredProgress(*arguments, **options))
        made[-1].sample_every = sample_every
        return made[-1]

    with tempfile.TemporaryDirectory() as workdir, mock.patch.object(train_loop, "TrainingProgress", make_progress):
        run_lib.train(config.lock(), workdir)
    return made[0]


def growth(samples: dict[int, dict[str, int]]) -> dict[str, float]:
    """Fit lines to the samples after the warm-up."""
    kept = [step for step in samples if step > WARM_UP * max(samples)]
    steps, third = np.array(kept) / 1000, max(len(kept) // 3, 1)
    values = {name: np.array([samples[step][name] for step in kept], np.float64) for name in samples[kept[0]]}
    lines = {name: np.polyfit(steps, each, 1, cov=True) for name, each in values.items()}  # coefficients, covariance
    result = {f"{name}_per_1000_steps": float(line[0][0]) for name, line in lines.items()}
    result["bytes_per_1000_steps_stderr"] = math.sqrt(lines["bytes"][1][0, 0])
    for name in ("bytes", "files", "threads"):
        result[f"{name}_early"] = float(np.max(values[name][:third]))
        result[f"{name}_late"] = float(np.max(values[name][-third:]))
    return result


def digits_step_seconds() -> float:
    """Return the time of a training step of the digits' configuration, once it is compiled."""
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
    state, _ = jax.block_until_ready(program(state, next(batches)))
    calls, start = STEPS_OF_DIGITS // settings.n_jitted_steps, time.perf_counter()
    for _ in range(calls):
        state, _ = program(state, next(batches))
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / (calls * settings.n_jitted_steps)


def measure(steps: int, sample_every: int, save_every: int) -> dict[str, Any]:
    """Train, and return what is printed."""
    checks.positive("--sample_every", sample_every)
    checks.positive("--save_every", save_every)
    progress = run(steps, save_every, sample_every)
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


def main() -> dict[str, Any]:
    logs.set_up_console()  # the log is part of what is measured
    return measure(**measuring.flag_values("steps", "sample_every", "save_every"))


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 20_000, "Training steps.")
    flags.DEFINE_integer("sample_every", 200, "Steps between two samples of memory, files and threads.")
    flags.DEFINE_integer("save_every", 100, "Steps between checkpoints; every second is kept and draws a grid.")
    measuring.main(main)
