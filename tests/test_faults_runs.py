"""Faults that really happen to a run of main.py: what it says, and that nothing complete is lost.

The kill of a run in training is in test_end_to_end.py, evaluations are in test_faults_results.py.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import disks
import jax
import numpy as np
import pytest
import tiny
from faulty import (
    AT_14,
    FILL_AT,
    QUIET,
    SHELLS_SAY,
    WAIT_FOR_SNAPSHOT,
    assert_same_end,
    checkpoints_of,
    evaluation,
    hooked,
    refuse,
    succeed,
    train,
)

pytestmark = pytest.mark.slow


# --- SIGKILL ---------------------------------------------------------------------------------------------------------

# Kills the process while Orbax writes the state of step 16: when its folder has just been made, when the arrays are
# written, or when all is written and only the name is missing.
KILL_WHILE_WRITING = """
import os, pathlib, signal
from orbax.checkpoint._src.path import atomicity
path = atomicity.AtomicRenameTemporaryPath
method = path.{method}
async def kill(self, *args, **kwargs):
    result = await method(self, *args, **kwargs) if "{method}" == "create" else None
    folder = pathlib.Path(str(self.get()))
    if folder.name.startswith("{name}.") and "/16.orbax-checkpoint-tmp" in str(folder):
        wait_for_snapshot()
        os.kill(os.getpid(), signal.SIGKILL)
    return result if "{method}" == "create" else await method(self, *args, **kwargs)
path.{method} = kill
"""


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param("finalize", "state", marks=pytest.mark.exhaustive),
        pytest.param("create", "state", marks=pytest.mark.exhaustive),
        pytest.param("finalize", "16", marks=pytest.mark.exhaustive),
    ],
)
def test_a_kill_while_a_checkpoint_is_written(finished_run, tmp_path, method, name):
    hook = WAIT_FOR_SNAPSHOT.format(workdir=str(tmp_path)) + KILL_WHILE_WRITING.format(method=method, name=name)
    result = train(tmp_path, hook=hook)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    (half,) = [path for path in (tmp_path / "checkpoints-meta").iterdir() if "tmp" in path.name]
    assert half.name.startswith("16.")
    assert not (tmp_path / "checkpoints-meta" / "16").exists()
    result = succeed(train(tmp_path))
    assert f"restored step 12 from {tmp_path / 'checkpoints'}" in result.stderr
    assert not half.exists()
    assert_same_end(tmp_path, finished_run)


# --- SIGTERM ---------------------------------------------------------------------------------------------------------

# Sends SIGTERM to the process when a function of the program is called, and once.
TERMINATE_AT = """
import os, signal
import {module} as module
function = module.{function}
def terminate(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return function(*args, **kwargs)
module.{function} = terminate
"""


def test_two_runs_in_a_workdir_and_a_sigterm_before_the_first_step(tmp_path):
    """The second is refused at once and writes nothing; SIGTERM ends the first, which has not begun, and frees it."""
    pause = """
import datasets, time
datasets.build_source = lambda *args, **kwargs: (print("paused", flush=True), time.sleep(300))
"""
    arguments = hooked(pause, tiny.command("train", tmp_path, **QUIET))
    environment = tiny.environment()
    first = subprocess.Popen(
        arguments, cwd=tiny.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert first.stdout.readline() == "paused\n"
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        start = time.monotonic()
        result = train(tmp_path)
        refuse(result, f"--workdir={tmp_path} is in use by process {first.pid} on {os.uname().nodename}, since ")
        assert time.monotonic() - start < 60  # imports take most of it
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert 128 - first.returncode == SHELLS_SAY
    # The second would now be let in; that a killed holder frees the folder is shown in test_faults.


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("module", "function", "code"),
    [
        ("modes.train", "build_train_program", -15),  # nothing is compiled yet
        ("training.divergence", "LossWatch", -15),  # the state is restored, the first step is not compiled
    ],
)
def test_sigterm_before_the_first_step_loses_nothing(finished_run, tmp_path, module, function, code):
    succeed(train(tmp_path, training__n_iters=12))
    hook = TERMINATE_AT.format(module=module, function=function)
    if function == "LossWatch":
        hook = hook.replace("import training.divergence as module", "import training.loop as module")
    assert train(tmp_path, hook=hook).returncode == code
    succeed(train(tmp_path))
    assert_same_end(tmp_path, finished_run)


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_in_training(finished_run, tmp_path):
    """Log, loss curve and TensorBoard go on without; a checkpoint that cannot be written ends the run. Then resume."""
    with disks.small_disk(tmp_path / "disk", 700) as resize:
        workdir = tmp_path / "disk" / "run"
        result = train(workdir)
        refuse(result, f"(on the disk {tmp_path / 'disk'}): No space left on device; free some space there")
        assert not list(workdir.rglob("*orbax-checkpoint-tmp*"))  # which would fill the disk for good
        with checkpoints_of(workdir) as checkpoints:
            reached = int(checkpoints.restore_newest().step)
        assert 4 <= reached < 24
        resize(16_000)
        result = succeed(train(workdir))
        assert f"restored step {reached} from" in result.stderr
        assert_same_end(workdir, finished_run)


# Has the system refuse every file beyond a size from step 14 on.
LIMIT_AT_14 = """
import resource
from workdir import progress
record = progress.TrainingProgress.record
def record_and_limit(self, step, **values):
    record(self, step, **values)
    if step == 14:
        wait_for_snapshot()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))
progress.TrainingProgress.record = record_and_limit
"""


@pytest.mark.exhaustive
def test_a_checkpoint_that_the_system_refuses(finished_run, tmp_path):
    """The same without a disk of its own."""
    hook = WAIT_FOR_SNAPSHOT.format(workdir=str(tmp_path)) + LIMIT_AT_14
    refuse(train(tmp_path, hook=hook), "File too large; raise the limit on the size of a file (ulimit -f)")
    assert "restored step 12 from" in succeed(train(tmp_path)).stderr
    assert_same_end(tmp_path, finished_run)


@pytest.mark.exhaustive
def test_a_disk_that_is_full_when_the_grid_is_drawn(finished_run, tmp_path):
    """Training goes on without it, and makes the checkpoints for which there is room."""
    with disks.small_disk(tmp_path / "disk", 16_000):
        workdir = tmp_path / "disk" / "run"
        make_room = f"""
import time
from training.trainer import ScoreTrainer
after = ScoreTrainer.after_snapshot
def draw_and_make_room(self, state, step, progress):
    while not pathlib.Path({str(workdir / "checkpoints")!r}, str(step // 12)).exists():
        time.sleep(0.01)  # the checkpoint of this step is to have its room
    after(self, state, step, progress)
    pathlib.Path({str(tmp_path / "disk" / "filler")!r}).unlink(missing_ok=True)
ScoreTrainer.after_snapshot = draw_and_make_room
"""
        hook = FILL_AT.format(name="sample.npz", disk=tmp_path / "disk") + make_room
        result = succeed(train(workdir, hook=hook, training__snapshot_sampling=True))
        assert "no samples of step 12: " in result.stderr
        assert "No space left on device; free some space there" in result.stderr
        assert not (workdir / "samples" / "iter_12" / "sample.npz").exists()
        assert_same_end(workdir, finished_run)


@pytest.mark.exhaustive
def test_a_workdir_that_may_not_be_written(finished_run, tmp_path):
    with disks.small_disk(tmp_path / "disk", 16_000):
        workdir = tmp_path / "disk" / "run"
        shutil.copytree(finished_run, workdir)
        disks.make_read_only(tmp_path / "disk")
        refuse(train(workdir), f"cannot write in --workdir={workdir}: Read-only file system; choose a folder")
        refuse(tiny.run(evaluation(workdir)), f"cannot write in --workdir={workdir}: Read-only file system")


# Takes from root the right to write where others may not; it takes effect in what is executed next.
AS_ANYBODY = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.exhaustive
def test_a_workdir_of_somebody_else(finished_run, tmp_path):
    """As a user whom the permissions hold for; root may write everywhere."""
    closed = tmp_path / "closed"
    shutil.copytree(finished_run, closed / "run")
    for folder in (closed, closed / "run"):
        folder.chmod(0o555)
    for workdir in (closed / "new", closed / "run"):
        arguments = tiny.command("train", workdir, **QUIET)
        result = tiny.run([arguments[0], "-c", AS_ANYBODY, *arguments])
        refuse(result, f"cannot write in --workdir={workdir}: Permission denied; choose a folder that you may write in")
    closed.chmod(0o755)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("step", "log_freq"), [(14, 2), (12, 12)])
def test_a_workdir_that_vanishes(tmp_path, step, log_freq):
    """Noticed when something is recorded, be it while a checkpoint is written; or when the next checkpoint is due."""
    workdir, away = tmp_path / "run", tmp_path / "away"
    is_written = f"pathlib.Path({str(workdir / 'checkpoints-meta' / '8')!r}).exists()"
    wait = f"[time.sleep(0.01) for _ in iter(lambda: {is_written}, True)]"
    action = f"workdir.rename({str(away)!r}); shutil.rmtree({str(away)!r}, ignore_errors=True)"
    action = action if step == 14 else f"{wait}; {action}"
    hook = "import time\n" + AT_14.format(workdir=str(workdir), action=action).replace("== 14", f"== {step}")
    result = train(workdir, hook=hook, training__log_freq=log_freq, training__eval_freq=24)
    refuse(result, f"{workdir} is gone: somebody has removed, moved or replaced it while the run wrote there")
    assert "step 20/24" not in result.stderr
    assert not (workdir / "losses.jsonl").exists()
    if step == 12:  # nothing was under way
        assert not workdir.exists()


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", ["cut short", "flipped", "array deleted", "emptied", "folder deleted"])
def test_a_damaged_last_checkpoint(finished_run, tmp_path, damage):
    """The run resumes from the one before, and writes the number again; until then an evaluation says which."""
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    folder = workdir / "checkpoints" / "2"
    arrays = [path for path in folder.rglob("d/*") if path.is_file()]
    if damage == "cut short":
        for path in arrays:
            path.write_bytes(path.read_bytes()[:-100])
    elif damage == "flipped":
        for path in arrays:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    elif damage == "array deleted":
        arrays[0].unlink()
        shutil.rmtree(folder / "state" / "d", ignore_errors=True)
    else:
        shutil.rmtree(folder)
        if damage == "emptied":
            folder.mkdir()
    told = "checkpoint 2 is not in" if damage == "folder deleted" else "checkpoint 2 in"
    refuse(tiny.run(evaluation(workdir)), told, "eval.begin_ckpt")
    result = succeed(train(workdir))
    assert f"restored step 20 from {workdir / 'checkpoints-meta'}" in result.stderr
    assert ("moved the damaged checkpoint 2 to" in result.stderr) == (damage != "folder deleted")
    assert (workdir / "checkpoints-damaged" / "checkpoints-2").exists() == (damage != "folder deleted")
    assert_same_end(workdir, finished_run)


# --- the clock -------------------------------------------------------------------------------------------------------

# The wall clock goes back an hour at every reading from step 8 on.
CLOCK_BACK = """
import time, datetime
from workdir import progress
now, record, back = time.time, progress.TrainingProgress.record, [0]
def turned_back():
    back[0] += 3600 if back[0] else 0
    return now() - back[0]
def record_and_turn(self, step, **values):
    record(self, step, **values)
    if step == 8 and not back[0]:
        back[0] = 3600
time.time = turned_back
time.time_ns = lambda: int(1e9 * turned_back())
progress.TrainingProgress.record = record_and_turn
"""


@pytest.mark.exhaustive
def test_a_clock_that_goes_back(finished_run, tmp_path):
    """Checkpoints go by steps: the run that goes on after a kill takes the last step, not the latest time."""
    result = train(tmp_path, hook=CLOCK_BACK, training__n_iters=20)
    succeed(result)
    rates = [
        float(line.split(", ")[1].split(" ")[0].replace(",", ""))
        for line in result.stderr.splitlines()
        if "images/s" in line
    ]
    assert all(rate >= 0 for rate in rates)
    assert {path.name for path in (tmp_path / "checkpoints-meta").iterdir()} == {"8", "16"}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}  # the last step is a snapshot
    assert "restored step 20 from" in succeed(train(tmp_path, hook=CLOCK_BACK)).stderr
    assert_same_end(tmp_path, finished_run)


# --- steps that go wrong ---------------------------------------------------------------------------------------------

# The loss of the batch of the seventh step is not a number.
POISON = """
import jax, jax.numpy as jnp
import losses
make = losses.make_train_step
def make_poisoned(loss_fn, optimizer, **kwargs):
    def make_step(poison):
        loss = lambda *args, **kwargs: loss_fn(*args, **kwargs) * poison
        return make(loss, optimizer, **kwargs)
    def step(key, state, batch):
        poison = jnp.where(state.step == 6, jnp.nan, 1.0)
        return make_step(poison)(key, state, batch)
    return step
losses.make_train_step = make_poisoned
"""


@pytest.mark.exhaustive
def test_a_loss_that_is_not_a_number(finished_run, tmp_path):
    """Under "stop" the run says which step, where, and what is good; under "skip" it goes on to the end."""
    sentence = refuse(
        train(tmp_path, hook=POISON),
        "the loss became nan at step 7",
        "step 6 was the last good step, 8 the last that was taken",
        "the parameters are not finite",
        f"the last good checkpoint is {tmp_path / 'checkpoints-meta' / '4'} (step 4)",
        "lower optim.lr or set optim.grad_clip, or set training.on_nan='skip'",
    )
    by_level = sentence.partition("by noise level sigma: ")[2].partition(";")[0].split(", ")
    assert len(by_level) == 10
    assert all(0.5 < float(text.partition(": ")[2]) < 1.5 for text in by_level)  # a network that knows little
    result = succeed(train(tmp_path, hook=POISON, training__on_nan="skip"))
    assert "restored step 4 from" in result.stderr
    assert "skipped 1 step(s), whose loss or gradient is not finite: 7" in result.stderr
    records = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record.get("skipped")] == [8]
    undisturbed = [json.loads(line) for line in (finished_run / "losses.jsonl").read_text().splitlines()]
    assert records[:3] == undisturbed[:3]
    assert [record["step"] for record in records] == [record["step"] for record in undisturbed]
    with checkpoints_of(tmp_path) as checkpoints:
        state = checkpoints.restore_snapshot(2)
    assert int(state.step) == 24
    assert {int(leaf) for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf) == 0} == {23}
