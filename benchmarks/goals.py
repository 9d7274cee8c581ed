"""The goals of speed: what is run for each, how its value comes out of the JSON lines, and what it has to be.

A new goal is one entry of GOALS. A benchmark prints one JSON line with `benchmarks.measure.report`; a line with the key
`skipped` says in a sentence why there is nothing to measure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

BEFORE = "61d65f0"  # the commit before any work on speed
TEMPORARIES_2021 = 547e6  # bytes, as XLA plans a step of the 2021 code of batch 8, with JAX 0.12 on a CPU

Line = dict[str, Any]  # what a benchmark printed


@dataclasses.dataclass(frozen=True)
class Command:
    """A benchmark with its arguments.

    Attributes:
      text: what comes after `python -m`.
      takes_root: whether it can measure another checkout with `--root`, and so what was before.
      needs: file in our checkout without which it is skipped; "": none.
      way_out: what makes that file.
    """

    text: str
    takes_root: bool = False
    needs: str = ""
    way_out: str = ""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
      name: for `--only`.
      title: what the table calls it.
      commands: whose JSON lines it needs; one that several goals name is run once.
      value: of these lines, in their order.
      bound: least value, or the greatest if `at_most`.
      at_most: whether less is better.
      unit: of the value.
      detail: of the same lines: what the value was made of, in a few words.
      shortfall: why it is not met, printed only then; the text, or what makes it of the lines.
    """

    name: str
    title: str
    commands: tuple[Command, ...]
    value: Callable[..., float]
    bound: float
    at_most: bool = False
    unit: str = ""
    detail: Callable[..., str] = lambda *_: ""
    shortfall: str | Callable[..., str] = "not known"

    def is_met(self, value: float) -> bool:
        """Returns whether the value is good enough."""
        return value <= self.bound if self.at_most else value >= self.bound


def _train_step(config: str, *more: str, steps: int = 6) -> Command:
    arguments = (f"--config configs/{config}.py --batch_size 8 --steps {steps}", *more)
    return Command(" ".join(("benchmarks.train_step", *arguments)), takes_root=True)


VE, VP = "ve/cifar10_ncsnpp_continuous", "vp/cifar10_ddpmpp_continuous"
STEP_VE, STEP_VP = _train_step(VE), _train_step(VP, "--noread_cache")
STEP_BFLOAT16 = _train_step(VE, "--dtype bfloat16 --noread_cache")
STEPS_IN_SCAN = _train_step(VE, "--n_jitted_steps 4 --noread_cache", steps=8)
FORWARD_VE, FORWARD_VP = (_train_step(config, "--what forward", steps=12) for config in (VE, VP))
PEER_PYTHON = "peer-venv/bin/python"
PEER = Command(
    f"benchmarks.peer --config configs/{VE}.py --batch_size 8 --steps 8 --torch_python {PEER_PYTHON}",
    needs=PEER_PYTHON,
    way_out="`make peer` installs torch and diffusers there",
)
SAMPLING = Command(f"benchmarks.sampling --config configs/{VE}.py --batch_size 8 --methods pc", takes_root=True)
LIKELIHOOD = Command(f"benchmarks.likelihood --config configs/{VE}.py --batch_size 8")
STARTUP = Command(f"benchmarks.startup --config configs/{VE}.py --batch_size 8")


def _seconds(line: Line) -> float:
    return float(line["seconds_per_step"]["median"])


def _rates(line: Line) -> str:
    work, rate = line["contraction_flops"] / 1e9, line["gemm_flops_per_s"] / 1e9
    return f"{_seconds(line):.3g} s, {work:.0f} GFLOP; matrix product {rate:.0f} GFLOP/s"


def _two_times(first: float, second: float) -> str:
    return f"{first:.3g} s and {second:.3g} s"


def _sampling_times(line: Line) -> str:
    found = line["samplers"]["pc"]
    return _two_times(found["seconds_per_evaluation"]["median"], found["forward_seconds"]["median"])


def _peer_times(line: Line) -> str:
    return _two_times(line["step"]["ours_seconds"]["median"], line["step"]["torch_seconds"]["median"])


def _phases(line: Line, kind: str) -> str:
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in line[f"{kind}_phases"].items())


def _fraction(name: str, title: str, command: Command, bound: float, shortfall: str | Callable[..., str]) -> Goal:
    return Goal(
        name=name,
        title=title,
        commands=(command,),
        value=lambda line: line["fraction_of_gemm"],
        bound=bound,
        unit="of the float32 matrix product's rate",
        detail=_rates,
        shortfall=shortfall,
    )


def _without_amx(_: Line, bfloat16: Line) -> str:
    extensions = bfloat16["machine"]["extensions"]
    gain = bfloat16["gemm_flops_per_s"] / bfloat16["float32_gemm_flops_per_s"]
    faster = f"a matrix product alone is {gain:.3g} times as fast in bfloat16"
    if "amx_bf16" in extensions:
        return f"this CPU has AMX; {faster}"
    extensions = ", ".join(extensions) or "no extension"
    return (
        f"the goal is of a CPU with AMX, and this one has {extensions}; {faster}; and float32 needs 2.25 times fewer "
        "multiplications for 3x3 taps, in a way that would round bfloat16 too much"
    )


BETWEEN_PRODUCTS = (
    "between the products lie normalization, activation, transformations of tiles, copies, and in training the update "
    "of the parameters, whose time counts and whose operations do not"
)


def _needed_of_torch(line: Line) -> str:
    ours, torch = (line["step"][f"{side}_seconds"]["median"] for side in ("ours", "torch"))
    return f"a step would have to take {torch / 1.5:.3g} s and takes {ours:.3g} s; see the first goal"


def _warm_without_compiling(line: Line) -> str:
    phases = line["warm_phases"]
    return (
        "the compiled program is loaded without tracing the network, which takes the seconds of init and compile; half "
        "of them went to XLA's search for each fusion among all instructions (a profile with perf); the first "
        f"step takes {phases['step']:.1f} s"
    )


GOALS = (
    _fraction("step-ve", f"training step, {VE}, batch 8", STEP_VE, 0.7, BETWEEN_PRODUCTS),
    Goal(
        name="scan",
        title="a training step in a scan of 4 against a single one",
        commands=(STEPS_IN_SCAN, STEP_VE),
        value=lambda scan, single: _seconds(scan) / _seconds(single),
        bound=1.05,
        at_most=True,
        unit="times",
        detail=lambda scan, single: _two_times(_seconds(scan), _seconds(single)),
    ),
    Goal(
        name="bfloat16",
        title="training step in bfloat16 against float32",
        commands=(STEP_VE, STEP_BFLOAT16),
        value=lambda single, half: _seconds(single) / _seconds(half),
        bound=2.5,
        unit="times as fast",
        detail=lambda single, half: _two_times(_seconds(single), _seconds(half)),
        shortfall=_without_amx,
    ),
    Goal(
        name="temporaries",
        title="temporary arrays of a training step, batch 8, without remat",
        commands=(STEP_VE,),
        value=lambda line: line["temporaries_bytes"] / TEMPORARIES_2021,
        bound=0.7,
        at_most=True,
        unit=f"times the {TEMPORARIES_2021 / 1e6:.0f} MB of 2021",
        detail=lambda line: f"{line['temporaries_bytes'] / 1e6:.0f} MB",
    ),
    _fraction("step-vp", f"training step, {VP}, batch 8", STEP_VP, 0.7, BETWEEN_PRODUCTS),
    _fraction("forward-ve", f"forward pass, {VE}, batch 8", FORWARD_VE, 0.8, BETWEEN_PRODUCTS),
    _fraction("forward-vp", f"forward pass, {VP}, batch 8", FORWARD_VP, 0.8, BETWEEN_PRODUCTS),
    Goal(
        name="peer",
        title="training step against diffusers' UNet2DModel on PyTorch",
        commands=(PEER,),
        value=lambda line: line["speedup_over_torch"],
        bound=1.5,
        unit="times as fast",
        detail=_peer_times,
        shortfall=_needed_of_torch,
    ),
    Goal(
        name="sampling",
        title="step of a sampler against a bare forward pass",
        commands=(SAMPLING,),
        value=lambda line: line["step_over_forward"],
        bound=1.1,
        at_most=True,
        unit="times",
        detail=_sampling_times,
    ),
    Goal(
        name="likelihood",
        title="stage of the likelihood's solver against one forward pass and its vector-Jacobian product alone",
        commands=(LIKELIHOOD,),
        value=lambda line: line["step_over_parts"],
        bound=1.1,
        at_most=True,
        unit="times",
        detail=lambda line: _two_times(line["seconds_per_stage"]["median"], line["parts_seconds"]["median"]),
    ),
    Goal(
        name="startup-cold",
        title="start to the first completed training step, nothing compiled before",
        commands=(STARTUP,),
        value=lambda line: line["cold_seconds"],
        bound=45.0,
        at_most=True,
        unit="s",
        detail=lambda line: _phases(line, "cold"),
    ),
    Goal(
        name="startup-warm",
        title="start to the first completed training step, with a warm cache",
        commands=(STARTUP,),
        value=lambda line: line["warm_seconds"],
        bound=15.0,
        at_most=True,
        unit="s",
        detail=lambda line: _phases(line, "warm"),
        shortfall=_warm_without_compiling,
    ),
)
