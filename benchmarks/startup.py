"""Time from the start of main.py to the end of its first training step: one JSON line on stdout.

  python -m benchmarks.startup --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8

Runs main.py as a user does, on random images in a temporary folder: cold, with an empty compilation cache, then warm,
with the cache of the first run. The seconds are measured from outside, from launching the process to the line of its
log that reports the first step; the phases are those of that line. They follow each other in the main thread:
"compile" is the wait that remains after "trace", in which compiling began.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

import checks
from benchmarks import measure
from configs.settings import image_shape
from experiment import startup

NUM_IMAGES = {"train": 512, "test": 64}
STARTS = ("cold", "warm")


def write_images(folder: Path, config: ConfigDict) -> None:
    """Write random images of the configured shape, and labels of every configured class, for data.dataset=npz."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for split, count in NUM_IMAGES.items():
        levels = random.integers(0, config.data.num_levels, (count, *image_shape(config)), np.uint8)
        labels = {"labels": np.arange(count) % config.model.num_classes} if config.model.num_classes else {}
        np.savez(folder / f"{split}.npz", images=levels, **labels)


def time_start(arguments: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command to its end and time it up to the line that reports the first step."""
    lines: list[str] = []
    found: dict[str, float] = {}
    start = time.perf_counter()
    with subprocess.Popen(
        arguments, cwd=measure.ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr or ():
            lines.append(line)
            if not found and (phases := startup.parse(line)):
                found = {"seconds": time.perf_counter() - start, **phases}
                measure.progress(line.rstrip())
    if process.returncode or not found:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}: {''.join(lines[-5:])}")
    return found


def run(config: ConfigDict, overrides: Sequence[str], *, batch_size: int, steps_per_call: int) -> dict[str, Any]:
    """Start the run cold, then warm."""
    checks.positive("--batch_size", batch_size)
    checks.positive("--steps_per_call", steps_per_call)
    result: dict[str, Any] = {"batch_size": batch_size, "steps_per_call": steps_per_call}
    settings: dict[str, Any] = {"data.dataset": "npz", "training.snapshot_sampling": False}
    steps = {"training.n_jitted_steps": steps_per_call, "training.n_iters": steps_per_call}
    settings |= {"training.batch_size": batch_size, **steps}
    # Nothing periodic is due in a run this short; its last step is a snapshot, which would draw samples.
    for frequency in ("log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption"):
        settings[f"training.{frequency}"] = 1000 * steps_per_call
    command = [sys.executable, "main.py", *overrides, "--mode=train"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        write_images(folder / "images", config)
        caches = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "SCORE_SDE_CACHE": str(folder / "cache")}
        for kind in STARTS:
            measure.progress(f"{kind} start")
            folders = [f"--config.data.path={folder / 'images'}", f"--workdir={folder / kind}"]
            phases = time_start([*command, *folders], os.environ | caches)
            result[f"{kind}_seconds"] = phases.pop("seconds")
            result[f"{kind}_phases"] = phases
    return result


def main() -> dict[str, Any]:
    overrides = ["--config", config_flags.get_config_filename(flags.FLAGS["config"])]
    overrides += [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    numbers = measure.flag_values("batch_size", "steps_per_call")
    return {"config": overrides[1], **run(flags.FLAGS.config.lock(), overrides, **numbers)}


if __name__ == "__main__":
    measure.define_flags(
        "are replaced by random images of their shape",
        batch_size=(8, "Images of a step."),
        steps_per_call=(1, "Steps of a compiled call, which all count: training.n_jitted_steps."),
    )
    measure.main(main)
