"""What a training step is said to hold in memory and what the process then takes: one JSON line on stdout.

  python -m benchmarks.training_memory --config configs/vp/digits_ddpmpp_continuous.py --config.model.remat=True

Says what `--mode memory` says, then trains a few calls on random images and reads by how much this process has grown at
its peak (Linux, a CPU): from before the state is there, with all compiled and free pages given back, to the highest
since. The state is made on the host first, which counts, and is let go once it is on the devices.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from benchmarks.process_memory import Growth
from experiment.build import build_experiment
from modes import memory
from parallel import distributed
from training import loop as train_loop

CALLS = 3

FLAGS = flags.FLAGS


def measure(config: ConfigDict) -> dict[str, Any]:
    """Trains a few calls on random images."""
    train_loop.check_schedule(config)
    experiment, devices, settings = build_experiment(config), distributed.device_count(), config.training
    steps = memory.compile_training(experiment)
    foreseen = memory.of_training(experiment, steps)
    shape = (settings.n_jitted_steps, settings.batch_size, *experiment.image_shape)
    levels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    growth = Growth()
    state, batch = distributed.replicate(experiment.state_template()), distributed.shard(levels, axis=1)
    seconds = math.inf
    for _ in range(CALLS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(steps(experiment.keys["train"], state, batch))
        seconds = min(seconds, (time.perf_counter() - start) / settings.n_jitted_steps)
    measured = growth.peak_bytes()
    return {
        "batch_size": settings.batch_size,
        "microbatches": settings.microbatches,
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "foreseen_mib": foreseen.total * devices / memory.MIB,
        "foreseen_temporaries_mib": foreseen.temporaries * devices / memory.MIB,
        "measured_mib": measured and measured / memory.MIB,
        "seconds_per_step": seconds,
        **distributed.describe_devices(),
    }


def main(argv: Sequence[str]) -> None:
    """Prints the JSON line."""
    logging.set_verbosity(logging.WARNING)
    print(json.dumps(measure(FLAGS.config.lock())))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Experiment; its data are not read.")
    flags.mark_flag_as_required("config")
    app.run(main)
