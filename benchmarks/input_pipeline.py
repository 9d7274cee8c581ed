"""Images/s of the input pipeline alone, and what memory it takes: one JSON line on stdout.

  python -m benchmarks.input_pipeline --config configs/vp/cifar10_ddpmpp_continuous.py --batch_size 128 --seconds 10

Measures `datasets.training_batches` from end to end: the order of the images, reading them, and placing them on the
devices; no network runs. What `--mode prepare` does beforehand is not counted: the data set is opened first.

Memory is that of this process, at its peaks (Linux): `anonymous_mib` is its own; `file_mapped_mib` are pages of files,
shared by all processes that read them, which the system drops when it needs room. Data that are mapped and not held
add nothing to the first: `anonymous_mib_before` is its value before the data set was opened.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import checks
import datasets
from benchmarks import measure as measuring
from parallel import distributed

MIB = 2**20
WARM_UP = 3  # calls that are not timed: two are read ahead
STATUS = Path("/proc/self/status")  # of Linux

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags."""
    config_flags.DEFINE_config_file("config", None, "Experiment; its data set is read.")
    flags.DEFINE_integer("batch_size", 0, "Images of a step; 0: training.batch_size.")
    flags.DEFINE_float("seconds", 10.0, "Least time to measure.")
    flags.mark_flag_as_required("config")


def memory() -> dict[str, float]:
    """Returns the memory of this process in MiB, its own and that mapped from files; nothing where it is not known."""
    if not STATUS.exists():
        return {}
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE))
    return {"anonymous_mib": int(kib["RssAnon"]) / 1024, "file_mapped_mib": int(kib["RssFile"]) / 1024}


def measure(
    config: ConfigDict, *, batch_size: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Reads batches of the training split for some seconds."""
    checks.positive("--batch_size", batch_size)
    checks.positive("--seconds", seconds)
    if batch_size % jax.device_count():
        raise ValueError(f"--batch_size={batch_size} is not divided by the {jax.device_count()} devices")
    before = memory()
    source = datasets.build_source(config, "train")
    batches = datasets.training_batches(
        source,
        seed=config.seed,
        first_step=0,
        batch_size=batch_size,
        steps_per_call=config.training.n_jitted_steps,
        with_labels=config.model.num_classes > 0,
    )
    for _ in range(WARM_UP):
        jax.block_until_ready(next(batches))
    peaks, calls, start = memory(), 0, clock()
    while (elapsed := clock() - start) < seconds:
        jax.block_until_ready(next(batches))
        calls += 1
        peaks = {name: max(value, peaks[name]) for name, value in memory().items()}
    num_images = calls * config.training.n_jitted_steps * batch_size
    shape = datasets.image_shape(config)
    return {
        "dataset": config.data.dataset,
        "num_images": len(source),
        "image_shape": shape,
        "data_mib": len(source) * math.prod(shape) / MIB,
        "batch_size": batch_size,
        "steps_per_call": config.training.n_jitted_steps,
        "calls": calls,
        "images": num_images,
        "seconds": elapsed,
        "images_per_second": num_images / elapsed,
        **peaks,
        **{f"{name}_before": value for name, value in before.items()},
        **distributed.describe_devices(),
    }


def main(argv: Sequence[str]) -> None:
    """Prints the JSON line."""
    logging.set_verbosity(logging.WARNING)
    jax.devices()  # what JAX itself takes is there before the data
    config = FLAGS.config.lock()
    result = measure(config, batch_size=FLAGS.batch_size or config.training.batch_size, seconds=FLAGS.seconds)
    measuring.report(result)


if __name__ == "__main__":
    define_flags()
    app.run(main)
