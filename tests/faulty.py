"""Runs of main.py to which something happens, for the tests of faults."""

import jax
import numpy as np
import tiny

from experiment.build import build_experiment
from workdir.checkpoints import Checkpoints

QUIET = {"training__snapshot_sampling": False}  # no samples: their program takes as long to compile as the training's
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path("main.py", run_name="__main__")
"""


def hooked(hook, arguments):
    """The command line of a run in which some Python is run first."""
    return [arguments[0], "-c", hook + RUN, *arguments[1:]]


def train(workdir, *flags, hook="", **changes):
    return tiny.run(hooked(hook, tiny.command("train", workdir, *flags, **(QUIET | changes))))


def evaluation(workdir, *flags, **changes):
    settings = {"eval__begin_ckpt": 2, "eval__end_ckpt": 2}
    return tiny.command("eval", workdir, *flags, **(settings | changes))


def succeed(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def refuse(result, *parts):
    """Checks that a run ended in one sentence that has these parts."""
    assert result.returncode == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("score_sde: ")]
    for part in parts:
        assert part in sentence, sentence
    return sentence


def checkpoints_of(workdir):
    template = build_experiment(tiny.make_config()).state_template()
    return Checkpoints(workdir, snapshot_freq=12, template=template, read_only=True)


def assert_same_end(workdir, other):
    """Checks that two runs ended alike, bit for bit: parameters, moving average, optimizer, and the loss curve."""
    with checkpoints_of(workdir) as one, checkpoints_of(other) as two:
        jax.tree.map(np.testing.assert_array_equal, one.restore_snapshot(2), two.restore_snapshot(2))
    assert (workdir / "losses.jsonl").read_text() == (other / "losses.jsonl").read_text()


# Returns when the first snapshot is complete, which is written in the background.
WAIT_FOR_SNAPSHOT = """
import pathlib, time
def wait_for_snapshot():
    while not (pathlib.Path({workdir!r}) / "checkpoints" / "1").exists():
        time.sleep(0.01)
"""

# Does something to the workdir when the losses of step 14 are recorded.
AT_14 = """
import os, pathlib, shutil
from workdir import progress
workdir = pathlib.Path({workdir!r})
record = progress.TrainingProgress.record
def record_and_act(self, step, **values):
    record(self, step, **values)
    if step == 14:
        {action}
progress.TrainingProgress.record = record_and_act
"""

# Writes half of a file and kills the process.
KILL_AT_FILE = """
import os, signal
from storage import files
write = files.write_atomically
def write_half(path, content):
    if path.name != "{name}":
        return write(path, content)
    class Half:
        def __init__(self, file):
            self.file = file
        def __getattr__(self, name):
            return getattr(self.file, name)
        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return write(path, lambda file: content(Half(file)))
files.write_atomically = write_half
"""

# Fills the disk of the workdir when a file is about to be written, and says so.
FILL_AT = """
import pathlib
from storage import files
write = files.write_atomically
def fill_and_write(path, content):
    if path.name == "{name}":
        filler = pathlib.Path("{disk}") / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
    return write(path, content)
files.write_atomically = fill_and_write
"""

SHELLS_SAY = 143  # of a process that SIGTERM ended, 128 + 15, whether it had a handler or not
