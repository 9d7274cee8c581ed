"""A training step and a forward pass beside those of diffusers and torch, in turn: one JSON line on stdout.

  python -m benchmarks.peer --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8 --steps 10 \
      --torch_python peer-venv/bin/python

The peer is diffusers' UNet2DModel in its NCSN++ configuration on the CPU, with Adam, clipping, warm-up and average as
ours. It needs torch and diffusers (requirements-bench.txt), best in an environment of their own, whose Python
`--torch_python` names: that side is a process of its own, benchmarks/peer_torch.py. Both are warm before anything is
timed. Then they take turns, with a pause in which the threads of the one that was busy go to sleep; which side begins
changes from pair to pair, so that a machine that slows down slows both.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

import checks
from benchmarks import measure, train_step
from benchmarks.measure import Seconds
from errors import UserError
from experiment.build import Experiment, build_experiment

PAUSE = 0.5  # seconds; OpenMP's threads spin for up to 0.2 s after their work
WARM_UP = 2  # calls of each side that are not timed
IMPORT_LIMIT, ANSWER_LIMIT = 120.0, 900.0  # seconds that the torch side may take to import, and to answer
ATTENTION_GROUPS = 32  # groups of diffusers' attention layers, whatever the channels
DIFFERENCES = (
    "diffusers adds the image to each level by a 1x1 convolution of a FIR-filtered copy, and collects the output the "
    "same way (input and output skips); ours has the growing residual input of the CIFAR-10 model and a plain output",
    "diffusers filters by FIR as one-channel convolutions, ours as slices and adds",
    "diffusers normalizes its attention in 32 groups; the other options are the same",
)


def torch_settings(config: ConfigDict, *, batch_size: int, compiled: bool) -> dict[str, Any]:
    """Return what the torch side has to build."""
    model, size = config.model, config.data.image_size
    needed = {"model.name": "ncsnpp", "model.fir": True, "model.embedding_type": "fourier"}
    needed |= {"model.resblock_type": "biggan", "model.scale_by_sigma": True, "training.sde": "vesde"}
    needed |= {"model.dtype": "float32", "data.num_channels": 3, "training.reduce_mean": False}
    for name, value in needed.items():
        found = functools.reduce(getattr, name.split("."), config)
        if found != value:
            raise UserError(f"{name}={found!r}; the peer is diffusers' NCSN++, which has {value!r}")
    channels = [model.nf * mult for mult in model.ch_mult]
    attention = [size >> level in model.attn_resolutions for level in range(len(channels))]
    for width, attends in zip(channels, attention, strict=True):
        if attends and width % ATTENTION_GROUPS:
            raise UserError(
                f"{width} channels where model.attn_resolutions has attention; diffusers' attention needs a multiple "
                f"of {ATTENTION_GROUPS}: change model.nf or model.ch_mult"
            )
    optim = {name: config.optim[name] for name in ("lr", "beta1", "eps", "warmup", "grad_clip")}
    network = {name: model[name] for name in ("num_res_blocks", "dropout", "sigma_min", "sigma_max", "ema_rate")}
    shape = {"image_size": size, "num_channels": 3, "channels": channels, "attention": attention}
    return {**optim, **network, **shape, "batch_size": batch_size, "compile": compiled, "warm_up": WARM_UP}


class TorchSide:
    """The other process.

    Args:
      python: interpreter that has torch and diffusers.
      settings: what it builds.

    Raises:
      UserError: if there is no such interpreter, or if it lacks a package.
      TimeoutError: if it takes too long.
    """

    def __init__(self, python: str, settings: dict[str, Any]):
        command = [python, str(Path(__file__).with_name("peer_torch.py"))]
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise UserError(f"--torch_python={python}: {error}; give a Python that has torch and diffusers") from error
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout, self._unread = process, process.stdin, process.stdout, b""
        try:
            found = self._ask(settings, IMPORT_LIMIT)
            if "missing" in found:
                raise UserError(
                    f"--torch_python={python} cannot import {found['missing']}; install the packages of "
                    "requirements-bench.txt in an environment and name its Python"
                )
        except BaseException:
            self.close()
            raise

    def describe(self) -> dict[str, Any]:
        """Wait until the other side is warm, and return its description of itself."""
        return self._receive(ANSWER_LIMIT)

    def run(self, name: str) -> float:
        """Run "step" or "forward" once and return its seconds, as the other side measures them."""
        return float(self._ask({"run": name}, ANSWER_LIMIT)["seconds"])

    def close(self) -> None:
        """End the other process, by closing its input."""
        with contextlib.suppress(BrokenPipeError):  # of what it did not read
            self._stdin.close()
        try:
            self._process.wait(timeout=PAUSE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    def _ask(self, message: dict[str, Any], limit: float) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has ended; there will be no answer
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()
        return self._receive(limit)

    def _receive(self, limit: float) -> dict[str, Any]:
        end = time.monotonic() + limit
        while b"\n" not in self._unread:
            if not select.select([self._stdout], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError(f"waited {limit:.0f} s for an answer of the torch side")
            read = os.read(self._stdout.fileno(), 2**16)
            if not read:
                raise RuntimeError(f"the torch side ended with exit code {self._process.wait()}; see its message above")
            self._unread += read
        line, self._unread = self._unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer


def our_side(experiment: Experiment) -> tuple[dict[str, Callable[[], float]], dict[str, Any]]:
    """Compile and warm up our programs; return them as functions that return their seconds, and a description."""
    start = time.perf_counter()
    compiled = {name: program[0](experiment) for name, program in train_step.PROGRAMS.items()}
    compile_seconds = time.perf_counter() - start
    runs: dict[str, Callable[[], float]] = {}
    for name, (_, make_call, summarize) in train_step.PROGRAMS.items():
        call = make_call(experiment, compiled[name])
        runs[name] = functools.partial(lambda call: measure.time_calls(call, 1, warm_up=0).min, call)
        for _ in range(WARM_UP):
            runs[name]()
        if not math.isfinite(summarize(call()[1])):
            raise FloatingPointError(f"our {name} does not give finite numbers; its time is meaningless")
    counted = {name: train_step.count_contractions(experiment, name) for name in train_step.PROGRAMS}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(experiment.state_shapes.params))
    return runs, {"parameters": parameters, "flops": counted, "compile_seconds": compile_seconds}


def take_turns(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int, *, pause: float = PAUSE
) -> tuple[Seconds, Seconds]:
    """Run both in turn, beginning with each alternately, and return the seconds of either, pair by pair."""
    found: dict[Callable[[], float], list[float]] = {ours: [], theirs: []}
    for pair in range(pairs):
        for side in (ours, theirs) if pair % 2 == 0 else (theirs, ours):
            time.sleep(pause)
            found[side].append(side())
    return Seconds(tuple(found[ours])), Seconds(tuple(found[theirs]))


def compare(ours: Seconds, theirs: Seconds) -> dict[str, Any]:
    """Return the times of both, and the median over the pairs of theirs over ours."""
    ratios = [their / our for our, their in zip(ours.all, theirs.all, strict=True)]
    return {
        "ours_seconds": ours.summary(),
        "torch_seconds": theirs.summary(),
        "speedup_over_torch": statistics.median(ratios),
        "speedup_of_each_pair": ratios,
    }


def measure_peer(
    config: ConfigDict, *, batch_size: int, steps: int, torch_python: str, torch_compile: bool
) -> dict[str, Any]:
    """Run both sides in turn."""
    checks.positive("--batch_size", batch_size)
    checks.positive("--steps", steps)
    settings = torch_settings(config, batch_size=batch_size, compiled=torch_compile)
    if (jax.default_backend(), jax.device_count()) != ("cpu", 1):
        raise UserError(
            f"{jax.device_count()} devices of platform {jax.default_backend()!r}; the torch side runs on the CPU, so "
            "ours has to, on one device: set JAX_PLATFORMS=cpu"
        )
    config.training.update(batch_size=batch_size, n_jitted_steps=1)
    experiment = build_experiment(config)
    side = TorchSide(torch_python, settings)
    try:
        measure.progress("the torch side builds its network and warms up")
        theirs = side.describe()
        measure.progress("our side compiles and warms up")
        runs, ours = our_side(experiment)
        found = {}
        for name, run in runs.items():
            measure.progress(f"in turn: {name}")
            found[name] = compare(*take_turns(run, functools.partial(side.run, name), steps))
    finally:
        side.close()
    parameters = theirs["parameters"] / ours["parameters"]
    flops = theirs["flops_with_padding"]["step"] / ours["flops"]["step"]
    sizes = (
        f"diffusers' network has {parameters:.3f} times our parameters and {flops:.3f} times the operations of a step; "
        "torch counts those with zeros of padding, which our count leaves out"
    )
    settings = {"batch_size": batch_size, "steps": steps, "torch_compile": torch_compile}
    return {
        **settings,
        "ours": ours,
        "torch": theirs,
        **found,
        "speedup_over_torch": found["step"]["speedup_over_torch"],
        "note": [sizes, *DIFFERENCES],
    }


if __name__ == "__main__":
    measure.define_flags(batch_size=(8, "Images of a step."), steps=(10, "Steps, and forward passes, of each side."))
    flags.DEFINE_string("torch_python", sys.executable, "Python that has torch and diffusers; by default this one.")
    flags.DEFINE_bool("torch_compile", False, "Compile the network of the torch side with torch.compile.")
    names = ("batch_size", "steps", "torch_python", "torch_compile")
    measure.main(lambda: measure_peer(flags.FLAGS.config, **measure.flag_values(*names)))
