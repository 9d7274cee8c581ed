"""Runs the benchmarks of all goals one after the other and writes benchmarks/RESULTS.md: `make bench`.

  python -m benchmarks.run                    all goals; under 20 minutes on two cores
  python -m benchmarks.run --only step-ve     one goal; --only can be given several times
  python -m benchmarks.run --nobefore         without measuring the commit before the work
  python -m benchmarks.run --table            the table again, from saved results

Each command runs in a process of its own, and what it prints is saved in benchmarks/results/ at once: a benchmark that
fails, or a run that is stopped, loses nothing of the others. The table takes the newest result of each command. Nothing
else should run on the machine meanwhile.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags

from benchmarks import table
from benchmarks.checkouts import OWN
from benchmarks.goals import BEFORE, GOALS, Command
from benchmarks.measure import progress
from benchmarks.table import Outcome
from storage import files

FOLDER = Path(__file__).resolve().parent
MAX_SECONDS = 600.0  # of one command

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_multi_enum("only", [], [goal.name for goal in GOALS], "Goal whose commands are run; none: all.")
    flags.DEFINE_boolean("before", True, f"Measure commit {BEFORE} as well.")
    flags.DEFINE_boolean("table", False, "Run nothing; write the table from saved results.")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def run_command(command: Command, root: Path | None = None, *, max_seconds: float = MAX_SECONDS) -> Outcome:
    """Runs a benchmark in a process of its own and returns the line that it printed, or why there is none.

    Args:
      command: what is run, from our own checkout.
      root: checkout that it measures; None: our own.
      max_seconds: after which it is stopped, with all processes of its group.
    """
    if command.needs and not (OWN / command.needs).exists():
        return Outcome(0.0, {"skipped": f"there is no {command.needs}; {command.way_out}"})
    arguments = [sys.executable, "-m", *shlex.split(command.text), *(["--root", str(root)] if root else [])]
    start = time.monotonic()
    with subprocess.Popen(
        arguments, cwd=OWN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
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


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path | None]:
    """Checks a commit out in a temporary folder; None if git cannot, since this is no clone or a shallow one."""
    with tempfile.TemporaryDirectory(prefix="score_sde_before_") as temporary:
        folder, git = Path(temporary) / "checkout", ["git", "-C", str(OWN), "worktree"]
        added = subprocess.run(
            [*git, "add", "--detach", str(folder), commit], capture_output=True, text=True, check=False
        )
        if added.returncode:
            progress(f"nothing is measured of commit {commit}: {added.stderr.strip()}")
            yield None
            return
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True, check=False)


def run_all(commands: Sequence[Command], before: Path | None, path: Path) -> bool:
    """Runs each command on our own checkout and then, if it can, on that of before; saves all after each run.

    Args:
      commands: what is run, in this order.
      before: checkout of the commit before the work; None: it is not measured.
      path: JSON file of the results.

    Returns:
      Whether all of them printed a line.
    """
    results: dict[tuple[str, str], Outcome] = {}
    for number, command in enumerate(commands, 1):
        for when, root in (("after", None), ("before", before)):
            if when == "before" and not (command.takes_root and before):
                continue
            progress(f"[{number}/{len(commands)}] {when}: python -m {command.text}")
            outcome = results[command.text, when] = run_command(command, root)
            progress(f"    {outcome.trouble or 'done'}, {outcome.seconds:.0f} s")
            files.write_json(path, table.save(results))
    return not any(outcome.failure for outcome in results.values())


def main(argv: Sequence[str]) -> None:
    """Runs what is asked for and writes the table; exit code 1 if a benchmark failed."""
    goals, is_complete = [goal for goal in GOALS if not FLAGS.only or goal.name in FLAGS.only], True
    if not FLAGS.table:
        started = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        with worktree(BEFORE) if FLAGS.before else contextlib.nullcontext() as before:
            is_complete = run_all(table.commands_of(goals), before, FOLDER / "results" / f"{started}.json")
    text = table.write(GOALS, table.load(FOLDER / "results"))
    files.write_bytes(FOLDER / "RESULTS.md", text.encode())
    progress(f"wrote {FOLDER / 'RESULTS.md'}")
    sys.exit(0 if is_complete else 1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
