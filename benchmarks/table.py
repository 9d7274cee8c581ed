"""RESULTS.md, made of what the benchmarks printed and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import BEFORE, Command, Goal, Line

TIMES = ("before", "after")
COLUMNS = ("goal", "command", "machine", "before", "after", "to reach", "met", "why not")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one run of a benchmark: a line, or why there is none.

    Attributes:
      seconds: that it took.
      line: what it printed.
      failure: why it printed none, in a sentence; "": it did.
    """

    seconds: float
    line: Line | None = None
    failure: str = ""

    @property
    def trouble(self) -> str:
        """Returns why nothing was measured, "" if something was."""
        skipped = (self.line or {}).get("skipped")
        return f"skipped: {skipped}" if skipped else f"failed: {self.failure}" if self.failure else ""


Results = Mapping[tuple[str, str], Outcome]  # (command, "before" or "after") -> the newest outcome


def save(results: Results) -> dict[str, Any]:
    """Returns the outcomes as what JSON can hold; `load` reads it."""
    saved: dict[str, Any] = {}
    for (command, when), outcome in results.items():
        saved.setdefault(command, {})[when] = dataclasses.asdict(outcome)
    return saved


def load(folder: Path) -> dict[tuple[str, str], Outcome]:
    """Returns the newest outcome of each command in the files of a folder, whose names sort by time."""
    results: dict[tuple[str, str], Outcome] = {}
    for path in sorted(folder.glob("*.json")):
        for command, by_time in json.loads(path.read_text()).items():
            results |= {(command, when): Outcome(**outcome) for when, outcome in by_time.items()}
    return results


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A goal before or after the work: what the table says of it, and the value if there is one."""

    text: str
    value: float | None = None
    why_not: str = ""
    lines: Sequence[Line] = ()


def _measured(goal: Goal, results: Results, when: str) -> _Measured:
    outcomes = [results.get((command.text, when)) for command in goal.commands]
    present = [outcome for outcome in outcomes if outcome]
    if len(present) < len(outcomes):
        return _Measured("not measured" if when == "after" else "")
    if trouble := next((outcome.trouble for outcome in present if outcome.trouble), ""):
        return _Measured(trouble)
    lines = [outcome.line or {} for outcome in present]
    try:
        value, detail = goal.value(*lines), goal.detail(*lines)
        why_not = "" if goal.is_met(value) else _why_not(goal, lines)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        return _Measured(f"failed: no value in what was printed ({type(error).__name__}: {error})")
    return _Measured(f"{value:.3g} {goal.unit}" + (f" ({detail})" if detail else ""), value, why_not, lines)


def _why_not(goal: Goal, lines: Sequence[Line]) -> str:
    return goal.shortfall if isinstance(goal.shortfall, str) else goal.shortfall(*lines)


def _machine(line: Line) -> str:
    """Returns one line of text about the machine."""
    machine = line.get("machine") or {}
    return ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in machine.items()
    )


def _row(goal: Goal, results: Results, machines: list[str]) -> Sequence[str]:
    before, after = (_measured(goal, results, when) for when in TIMES)
    numbers = {machines.index(_machine(line)) + 1 for line in after.lines}
    return (
        goal.title,
        " and ".join(f"`python -m {command.text}`" for command in goal.commands),
        ", ".join(map(str, sorted(numbers))),
        before.text,
        after.text,
        f"at {'most' if goal.at_most else 'least'} {goal.bound:g} {goal.unit}",
        "" if after.value is None else "met" if goal.is_met(after.value) else "not met",
        after.why_not,
    )


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _unique(values: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(values))


def commands_of(goals: Sequence[Goal]) -> list[Command]:
    """Returns the commands of goals, each once."""
    return list(dict.fromkeys(command for goal in goals for command in goal.commands))


def write(goals: Sequence[Goal], results: Results) -> str:
    """Returns the text of RESULTS.md.

    Args:
      goals: rows, in their order.
      results: what was measured, as `load` returns it.
    """
    wanted = [
        (when, outcome)
        for command in commands_of(goals)
        for when in TIMES
        if (outcome := results.get((command.text, when)))
    ]
    lines = [(when, outcome.line) for when, outcome in wanted if outcome.line]
    machines = _unique(_machine(line) for _, line in lines)
    commits = _unique(
        f"{line['commit']}{' with changes' if line.get('modified') else ''}"
        for when, line in lines
        if when == "after" and line.get("commit")
    )
    minutes = sum(outcome.seconds for _, outcome in wanted) / 60
    return "\n".join(
        (
            "# Speed: the goals and what was measured",
            "",
            "`make bench` wrote this file from the JSON lines that the commands below printed, kept in `results/`;",
            "nothing in it was typed by hand but the goals, and why one is missed, in `goals.py`.",
            f"Before: the same command with `--root` on commit {BEFORE}, run right after the other one.",
            f"After: commit {', '.join(commits) or 'unknown'}. All runs together took {minutes:.1f} minutes.",
            "Operations are those of the network's convolutions and products as a GPU does them. A CPU needs fewer for",
            "most convolutions (docs/performance.md), so that their rate may exceed that of a matrix product.",
            "",
            _cells(COLUMNS),
            _cells(["---"] * len(COLUMNS)),
            *(_cells(_row(goal, results, machines)) for goal in goals),
            "",
            "Machines:",
            "",
            *(f"{number}. {machine}" for number, machine in enumerate(machines, 1)),
            "",
        )
    )
