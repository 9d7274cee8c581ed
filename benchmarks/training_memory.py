"""The memory of a training step: predicted by `--mode memory`, and taken by the process; one JSON line on stdout.

  python -m benchmarks.training_memory --config configs/vp/digits_ddpmpp_continuous.py --config.model.remat=True

Trains a few calls on random images and measures the growth of the process at its peak (Linux, a CPU), from before the
state exists, with everything compiled and free pages returned. The state is made on the host first, which counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import measure as measuring
from experiment.build import build_experiment
from modes import memory
from parallel import distributed
from training import loop as train_loop

CALLS = 3


def measure(config: ConfigDict) -> dict[str, Any]:
    """Train a few calls on random images."""
    train_loop.check_schedule("training", config.training)
    experiment, devices, settings = build_experiment(config), distributed.device_count(), config.training
    steps = memory.compile_training(experiment)
    predicted = memory.of_training(experiment, steps)
    shape = (settings.n_jitted_steps, settings.batch_size, *experiment.image_shape)
    levels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    growth = measuring.Growth()
    state, batch = distributed.replicate(experiment.state_template()), distributed.shard(levels, axis=1)

    def call() -> Any:
        nonlocal state
        state, metrics = steps(experiment.keys["train"], state, batch)
        return state, metrics

    seconds = measuring.time_calls(call, CALLS, warm_up=0).min / settings.n_jitted_steps
    measured = growth.peak_bytes()
    return {
        "batch_size": settings.batch_size,
        "microbatches": settings.microbatches,
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "foreseen_mib": predicted.total * devices / memory.MIB,
        "foreseen_temporaries_mib": predicted.temporaries * devices / memory.MIB,
        "measured_mib": measured and measured / memory.MIB,
        "seconds_per_step": seconds,
        **distributed.describe_devices(),
    }


if __name__ == "__main__":
    measuring.define_flags()
    measuring.main(lambda: measure(flags.FLAGS.config.lock()))
