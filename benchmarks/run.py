"""Run the benchmarks of all speed goals and write benchmarks/RESULTS.md: `make bench`.

  python -m benchmarks.run                    all goals; under 20 minutes on two cores
  python -m benchmarks.run --only step-ve     one goal; --only can be given several times
  python -m benchmarks.run --table            write the table again from saved results

Each command runs in its own process and prints one JSON line (`benchmarks.measure.report`), which is saved at once in
benchmarks/results/. The table shows the newest result of each command. The machine should be otherwise idle.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.measure import ROOT, progress
from storage import files

FOLDER = ROOT / "benchmarks"
MAX_SECONDS = 600.0  # of one command
TEMPORARIES_2021 = 547e6  # bytes XLA plans for a step of the 2021 code, batch 8, JAX 0.12 on a CPU
PEER_PYTHON = "peer-venv/bin/python"  # `make peer` installs torch and diffusers there
COLUMNS = ("goal", "command", "machine", "measured", "to reach", "met")

Line = dict[str, Any]  # what a benchmark printed
FLAGS = flags.FLAGS


# --- the goals -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bound on `value`, computed as `detail` from the JSON lines of `commands`, which run once for all goals."""

    name: str
    title: str
    commands: tuple[str, ...]
    value: Callable[..., float]
    bound: float
    unit: str
    detail: Callable[..., str] = lambda *_: ""
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        """Return whether the value is on the right side of the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


VE, VP = "configs/ve/cifar10_ncsnpp_continuous.py", "configs/vp/cifar10_ddpmpp_continuous.py"
STEP_VE = f"benchmarks.train_step --config {VE} --batch_size 8 --steps 6"
STEP_VP = f"benchmarks.train_step --config {VP} --batch_size 8 --steps 6 --noread_cache"
STEP_BFLOAT16 = f"benchmarks.train_step --config {VE} --batch_size 8 --steps 6 --dtype bfloat16 --noread_cache"
STEPS_IN_SCAN = f"benchmarks.train_step --config {VE} --batch_size 8 --steps 8 --n_jitted_steps 4 --noread_cache"
FORWARD_VE = f"benchmarks.train_step --config {VE} --batch_size 8 --steps 12 --what forward"
FORWARD_VP = f"benchmarks.train_step --config {VP} --batch_size 8 --steps 12 --what forward"
PEER = f"benchmarks.peer --config {VE} --batch_size 8 --steps 8 --torch_python {PEER_PYTHON}"
SAMPLING = f"benchmarks.sampling --config {VE} --batch_size 8 --methods pc"
LIKELIHOOD = f"benchmarks.likelihood --config {VE} --batch_size 8"
STARTUP = f"benchmarks.startup --config {VE} --batch_size 8"


def _seconds(line: Line) -> float:
    return float(line["seconds_per_step"]["median"])


def _two(first: float, second: float) -> str:
    return f"{first:.3g} s and {second:.3g} s"


def _two_steps(first: Line, second: Line) -> str:
    return _two(_seconds(first), _seconds(second))


def _peer_times(line: Line) -> str:
    return _two(line["step"]["ours_seconds"]["median"], line["step"]["torch_seconds"]["median"])


def _sampling_times(line: Line) -> str:
    found = line["samplers"]["pc"]
    return _two(found["seconds_per_evaluation"]["median"], found["forward_seconds"]["median"])


def _fraction(name: str, title: str, command: str, bound: float) -> Goal:
    def detail(line: Line) -> str:
        work, rate = line["contraction_flops"] / 1e9, line["gemm_flops_per_s"] / 1e9
        return f"{_seconds(line):.3g} s, {work:.0f} GFLOP; matrix product {rate:.0f} GFLOP/s"

    unit = "of the float32 matrix product's rate"
    return Goal(name, title, (command,), lambda line: line["fraction_of_gemm"], bound, unit, detail)


def _startup(name: str, title: str, kind: str, bound: float) -> Goal:
    def detail(line: Line) -> str:
        return ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in line[f"{kind}_phases"].items())

    return Goal(name, title, (STARTUP,), lambda line: line[f"{kind}_seconds"], bound, "s", detail, at_most=True)


# fmt: off
GOALS = (
    _fraction("step-ve", "training step, NCSN++ VE, batch 8", STEP_VE, 0.7),
    Goal("scan", "a training step in a scan of 4 against a single one", (STEPS_IN_SCAN, STEP_VE),
         lambda scan, single: _seconds(scan) / _seconds(single), 1.05, "times", _two_steps, at_most=True),
    Goal("bfloat16", "training step in bfloat16 against float32, on a CPU with AMX", (STEP_VE, STEP_BFLOAT16),
         lambda single, half: _seconds(single) / _seconds(half), 2.5, "times as fast", _two_steps),
    Goal("temporaries", "temporary arrays of a training step, batch 8, without remat", (STEP_VE,),
         lambda line: line["temporaries_bytes"] / TEMPORARIES_2021, 0.7,
         f"times the {TEMPORARIES_2021 / 1e6:.0f} MB of 2021",
         lambda line: f"{line['temporaries_bytes'] / 1e6:.0f} MB", at_most=True),
    _fraction("step-vp", "training step, DDPM++ VP, batch 8", STEP_VP, 0.7),
    _fraction("forward-ve", "forward pass, NCSN++ VE, batch 8", FORWARD_VE, 0.8),
    _fraction("forward-vp", "forward pass, DDPM++ VP, batch 8", FORWARD_VP, 0.8),
    Goal("peer", "training step against diffusers' UNet2DModel on PyTorch", (PEER,),
         lambda line: line["speedup_over_torch"], 1.5, "times as fast", _peer_times),
    Goal("sampling", "step of a sampler against a bare forward pass", (SAMPLING,),
         lambda line: line["step_over_forward"], 1.1, "times", _sampling_times, at_most=True),
    Goal("likelihood",
         "stage of the likelihood's solver against one forward pass and its vector-Jacobian product alone",
         (LIKELIHOOD,), lambda line: line["step_over_parts"], 1.1, "times",
         lambda line: _two(line["seconds_per_stage"]["median"], line["parts_seconds"]["median"]), at_most=True),
    _startup("startup-cold", "start to the first completed training step, empty compilation cache", "cold", 45.0),
    _startup("startup-warm", "start to the first completed training step, warm compilation cache", "warm", 15.0),
)
# fmt: on


def commands_of(goals: Sequence[Goal]) -> list[str]:
    """Return the commands of goals, each once."""
    return list(dict.fromkeys(command for goal in goals for command in goal.commands))


# --- running ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run of a benchmark: its line, or why there is none."""

    seconds: float
    line: Line | None = None
    failure: str = ""

    @property
    def trouble(self) -> str:
        """Why nothing was measured; "" if something was."""
        skipped = (self.line or {}).get("skipped")
        return f"skipped: {skipped}" if skipped else f"failed: {self.failure}" if self.failure else ""


Results = Mapping[str, Outcome]  # by command


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def run_command(command: str, *, max_seconds: float = MAX_SECONDS) -> Outcome:
    """Run a benchmark in its own process group, killed after `max_seconds`, and return its outcome."""
    if PEER_PYTHON in command and not (ROOT / PEER_PYTHON).exists():
        return Outcome(0.0, {"skipped": f"there is no {PEER_PYTHON}; run `make peer`"})
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=max_seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Outcome(time.monotonic() - start, failure=f"took more than {max_seconds:g} s")
    seconds = time.monotonic() - start
    if process.returncode:
        progress(err)
        last = [line for line in err.splitlines() if line.strip()][-1:]
        return Outcome(seconds, failure=" ".join(last) or f"ended with exit code {process.returncode}")
    try:
        line = json.loads(out.splitlines()[-1], parse_constant=_refuse)
    except (IndexError, ValueError):
        line = None
    if not isinstance(line, dict):
        return Outcome(seconds, failure=f"printed no line of JSON: {out[-200:]!r}")
    return Outcome(seconds, line)


def run_all(commands: Sequence[str], path: Path) -> bool:
    """Run commands in order, save all outcomes after each; return whether every one printed a line."""
    results: dict[str, Outcome] = {}
    for number, command in enumerate(commands, 1):
        progress(f"[{number}/{len(commands)}] python -m {command}")
        outcome = results[command] = run_command(command)
        progress(f"    {outcome.trouble or 'done'}, {outcome.seconds:.0f} s")
        files.write_json(path, {name: dataclasses.asdict(each) for name, each in results.items()})
    return not any(outcome.failure for outcome in results.values())


def load(folder: Path) -> dict[str, Outcome]:
    """Return the newest outcome of each command in a folder of results, whose names sort by time."""
    results: dict[str, Outcome] = {}
    for path in sorted(folder.glob("*.json")):
        results |= {command: Outcome(**outcome) for command, outcome in json.loads(path.read_text()).items()}
    return results


# --- the table -------------------------------------------------------------------------------------------------------


def _machine(line: Line) -> str:
    machine = line.get("machine") or {}
    return ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in machine.items())


def _measured(goal: Goal, results: Results) -> tuple[str, str]:
    """Return what was measured and whether that meets the goal; "" if nothing was."""
    outcomes = [results[command] for command in goal.commands if command in results]
    if len(outcomes) < len(goal.commands):
        return "not measured", ""
    if trouble := next((outcome.trouble for outcome in outcomes if outcome.trouble), ""):
        return trouble, ""
    lines = [outcome.line or {} for outcome in outcomes]
    try:
        value, detail = goal.value(*lines), goal.detail(*lines)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        return f"failed: no value in what was printed ({type(error).__name__}: {error})", ""
    met = "met" if goal.is_met(value) else "not met"
    return f"{value:.3g} {goal.unit}" + (f" ({detail})" if detail else ""), met


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def write_table(goals: Sequence[Goal], results: Results) -> str:
    """Return the text of RESULTS.md: a row for each goal."""
    found = [results[command] for command in commands_of(goals) if command in results]
    known = [outcome.line for outcome in found if outcome.line]
    machines = list(dict.fromkeys(map(_machine, known)))
    commits = [
        f"{line['commit']}{' with changes' if line.get('modified') else ''}" for line in known if line.get("commit")
    ]
    rows = []
    for goal in goals:
        measured, met = _measured(goal, results)
        lines = [results[command].line for command in goal.commands if command in results]
        numbers = sorted({machines.index(_machine(line)) + 1 for line in lines if line})
        commands = " and ".join(f"`python -m {command}`" for command in goal.commands)
        to_reach = f"at {'most' if goal.at_most else 'least'} {goal.bound:g} {goal.unit}"
        rows.append((goal.title, commands, ", ".join(map(str, numbers)) if met else "", measured, to_reach, met))
    minutes = sum(outcome.seconds for outcome in found) / 60
    table = "\n".join(map(_cells, (COLUMNS, ["---"] * len(COLUMNS), *rows)))
    numbered = "\n".join(f"{number}. {machine}" for number, machine in enumerate(machines, 1))
    return f"""# Speed: the goals and what was measured

`make bench` wrote this file from the JSON lines that the commands below printed, kept in `results/`.
Commit {", ".join(dict.fromkeys(commits)) or "unknown"}. All runs together took {minutes:.1f} minutes.
Operations are those of the network's convolutions and products as a GPU does them. A CPU needs fewer for
most convolutions (docs/performance.md), so their rate may exceed that of a matrix product.
docs/performance.md says why a goal is missed.

{table}

Machines:

{numbered}
"""


def main(argv: Sequence[str]) -> None:
    """Run what is asked for and write the table; exit code 1 if a benchmark failed."""
    goals, is_complete = [goal for goal in GOALS if not FLAGS.only or goal.name in FLAGS.only], True
    if not FLAGS.table:
        started = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        is_complete = run_all(commands_of(goals), FOLDER / "results" / f"{started}.json")
    files.write_bytes(FOLDER / "RESULTS.md", write_table(GOALS, load(FOLDER / "results")).encode())
    progress(f"wrote {FOLDER / 'RESULTS.md'}")
    sys.exit(0 if is_complete else 1)


if __name__ == "__main__":
    flags.DEFINE_multi_enum("only", [], [goal.name for goal in GOALS], "Goal whose commands are run; none: all.")
    flags.DEFINE_boolean("table", False, "Run nothing; write the table from saved results.")
    app.run(main)
