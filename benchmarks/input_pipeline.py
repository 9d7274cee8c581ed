"""Images/s of the input pipeline alone, and its memory: one JSON line on stdout.

  python -m benchmarks.input_pipeline --config configs/vp/cifar10_ddpmpp_continuous.py --batch_size 128 --seconds 10

Measures `datasets.training_batches` from end to end: the order of the images, reading them, and placing them on the
devices; no network runs. What `--mode prepare` does is not counted: the data set is opened first.

Memory is that of this process at its peak (Linux): `anonymous_mib` is its own; `file_mapped_mib` are pages of files,
shared by all processes that read them, which the system drops when it needs room. `anonymous_mib_before` is the first
before the data set was opened: data that are mapped add nothing to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

import checks
import datasets
from benchmarks import measure as measuring
from configs.settings import image_shape
from parallel import distributed

MIB = 2**20
WARM_UP = 3  # calls that are not timed: two are read ahead


def memory() -> dict[str, float]:
    """Return the memory of this process in MiB, its own and that mapped from files; nothing where it is not known."""
    if not measuring.STATUS.exists():
        return {}
    anonymous, mapped = measuring.status("RssAnon", "RssFile")
    return {"anonymous_mib": anonymous / 1024, "file_mapped_mib": mapped / 1024}


def measure(
    config: ConfigDict, *, batch_size: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Read batches of the training split for some seconds."""
    checks.positive("--batch_size", batch_size)
    checks.positive("--seconds", seconds)
    distributed.check_batch_size("--batch_size", batch_size)
    before, source = memory(), datasets.build_source(config, "train")
    steps_per_call = config.training.n_jitted_steps
    batches = datasets.training_batches(
        source,
        seed=config.seed,
        first_step=0,
        batch_size=batch_size,
        steps_per_call=steps_per_call,
        with_labels=config.model.num_classes > 0,
    )
    for _ in range(WARM_UP):
        jax.block_until_ready(next(batches))
    peaks, calls, start = memory(), 0, clock()
    while (elapsed := clock() - start) < seconds:
        jax.block_until_ready(next(batches))
        calls += 1
        peaks = {name: max(value, peaks[name]) for name, value in memory().items()}
    num_images, shape = calls * steps_per_call * batch_size, image_shape(config)
    return {
        "dataset": config.data.dataset,
        "num_images": len(source),
        "image_shape": shape,
        "data_mib": len(source) * math.prod(shape) / MIB,
        "batch_size": batch_size,
        "steps_per_call": steps_per_call,
        "calls": calls,
        "images": num_images,
        "seconds": elapsed,
        "images_per_second": num_images / elapsed,
        **peaks,
        **{f"{name}_before": value for name, value in before.items()},
        **distributed.describe_devices(),
    }


def main() -> dict[str, Any]:
    jax.devices()  # so that JAX's own memory is there before the data
    config = flags.FLAGS.config.lock()
    batch_size = flags.FLAGS.batch_size or config.training.batch_size
    return measure(config, batch_size=batch_size, seconds=flags.FLAGS.seconds)


if __name__ == "__main__":
    measuring.define_flags("are read", batch_size=(0, "Images of a step; 0: training.batch_size."))
    flags.DEFINE_float("seconds", 10.0, "Least time to measure.")
    measuring.main(main)
