"""How the cost of a training step grows: devices, image size, channels and batch, one axis at a time: one JSON line.

  python -m benchmarks.scaling --config configs/vp/digits_ddpmpp_continuous.py

Every point is a process of its own, which compiles the step of `--mode train`, one in a call, and times it on random
images and parameters. It differs from the configuration in its axis alone:

  devices     1, 2, 4, 8 CPU devices (--xla_force_host_platform_device_count) at the same global batch. They use the
              same cores, so that with fewer cores than devices this shows the cost of dividing the work, no speed-up
  image_size  --image_sizes
  nf          --channels: `model.nf`, the features of the first level
  batch_size  --batch_sizes

`exponent` is the slope of log seconds over log size from the first to the last point of an axis: 1 if the cost is
proportional; of `devices` 0 if dividing the work costs nothing.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

import checks
from benchmarks import measure as measuring
from benchmarks import train_step
from errors import UserError
from experiment.build import build_experiment
from modes import memory
from parallel import distributed

SETTING = {"image_size": "data.image_size", "nf": "model.nf", "batch_size": "training.batch_size"}
MAX_SECONDS = 300.0  # of one point


def measure_point(config: ConfigDict, steps: int) -> dict[str, Any]:
    """Compile a training step and time it on random images, on all devices of this process."""
    batch_size, jitted = config.training.batch_size, config.training.n_jitted_steps
    checks.positive("--steps", steps)
    distributed.check_batch_size("training.batch_size", batch_size)
    experiment = build_experiment(config)
    call = train_step.training_call(experiment, memory.compile_training(experiment))
    seconds = measuring.time_calls(call, steps).summary(jitted)
    return {
        "devices": distributed.device_count(),
        "seconds_per_step": seconds,
        "images_per_s": batch_size / seconds["median"],
    }


def run_point(arguments: Sequence[str], devices: int) -> dict[str, Any]:
    """Measure a point in a process of its own with that many CPU devices."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
    }
    command = [sys.executable, "-m", "benchmarks.scaling", *arguments, "--alone"]
    done = subprocess.run(
        command, cwd=measuring.ROOT, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-500:]}")
    point: dict[str, Any] = json.loads(done.stdout)
    if point["devices"] != devices:
        raise RuntimeError(f"{devices} devices were requested, {point['devices']} measured")
    return {name: point[name] for name in ("devices", "seconds_per_step", "images_per_s")}


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float | None:
    """Return the slope of log seconds over log size from the first to the last point; None for one."""
    if len(sizes) < 2 or sizes[0] == sizes[-1]:
        return None
    return math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0])


def measure(
    arguments: Sequence[str], axes: Mapping[str, Sequence[int]], batch_size: int, own: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Measure all points, each once."""
    for axis, sizes in axes.items():
        for size in sizes:
            checks.positive(axis, size)
    known: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}
    results = {}
    for axis, sizes in axes.items():
        points = []
        for size in sizes:
            batch = size if axis == "batch_size" else batch_size
            settings = [f"--config.{SETTING['batch_size']}={batch}", "--config.training.n_jitted_steps=1"]
            if axis in ("image_size", "nf") and size != (own or {}).get(axis):
                settings.append(f"--config.{SETTING[axis]}={size}")
            devices = size if axis == "devices" else 1
            point = (devices, tuple(settings))
            if point not in known:
                known[point] = run_point([*arguments, *settings], devices)
            points.append({axis: size, **known[point]})
            measuring.progress(f"{axis} {size}: {points[-1]['seconds_per_step']['median']:.4f} s a step")
        seconds = [point["seconds_per_step"]["median"] for point in points]
        results[axis] = {"points": points, "exponent": exponent(sizes, seconds)}
    return results


def _sizes(flag: str) -> list[int]:
    given: list[str] = flags.FLAGS[flag].value or []
    try:
        return [int(size) for size in given]
    except ValueError:
        raise UserError(f"--{flag}={','.join(given)}; expected whole numbers with commas") from None


def main() -> dict[str, Any]:
    """Measure all points, or this process's own with --alone."""
    values = flags.FLAGS
    if values.alone:
        return measure_point(values.config.lock(), values.steps)
    names = {"devices": "devices", "image_size": "image_sizes", "nf": "channels", "batch_size": "batch_sizes"}
    own = {"image_size": values.config.data.image_size, "nf": values.config.model.nf}
    result = measure(sys.argv[1:], {axis: _sizes(flag) for axis, flag in names.items()}, values.batch_size, own)
    return {"network": values.config.model.name, "global_batch_size": values.batch_size, **result}


if __name__ == "__main__":
    measuring.define_flags(
        batch_size=(64, "Images of a step, where the batch is not the axis."),
        steps=(5, "Steps of each point that are timed."),
    )
    flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Numbers of CPU devices.")
    flags.DEFINE_list("image_sizes", ["8", "16", "32"], "Heights and widths.")
    flags.DEFINE_list("channels", ["16", "32"], "Features of the first level.")
    flags.DEFINE_list("batch_sizes", ["16", "64", "256"], "Images of a step.")
    flags.DEFINE_boolean("alone", False, "Measure the configuration itself, in this process: one point.")
    measuring.main(main)
