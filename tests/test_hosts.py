"""Two processes of two devices each, on the loopback: the numbers of one process, and one end for both."""

import functools
import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import processes
import pytest
import tiny
from cases import by_default
from processes import Processes

import run_lib
from experiment.build import build_experiment
from storage import files
from workdir.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

CHANGES = {"training__snapshot_sampling": False, "eval__begin_ckpt": 2, "eval__end_ckpt": 2}
# The mean of a batch is summed in another order, and XLA may fuse otherwise: float32 differs in its last bits, which 24
# steps of Adam magnify where a gradient is nearly 0, and so its direction is that of the rounding error.
LOSS_RTOL = 2e-4
PARAMS_ATOL = 2e-4  # a tenth of what 24 steps of Adam can move a parameter during warm-up


def state_of(workdir, number=2):
    experiment = build_experiment(tiny.make_config())
    with Checkpoints(workdir, snapshot_freq=12, template=experiment.state_template(), read_only=True) as checkpoints:
        return checkpoints.restore_snapshot(number)


def assert_close(state, expected):
    for name in ("params", "params_ema"):
        for a, b in zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(expected, name)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=PARAMS_ATOL)


def assert_same_losses(workdir, expected, last_step=24):
    one, two = processes.recorded(expected)[: last_step // 2], processes.recorded(workdir)
    assert [record["step"] for record in two] == [record["step"] for record in one] == list(range(2, last_step + 1, 2))
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=LOSS_RTOL)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two processes, of which the second alone got SIGTERM; the workdir, and the processes."""
    workdir = tmp_path_factory.mktemp("stopped")
    with Processes(tiny.command("train", workdir, **CHANGES), workdir) as run:
        # While they compile: 24 steps would be over before the processes have agreed where to stop.
        run.wait_for(lambda: "network ncsnpp" in run.text(0))
        run.kill(1, signal.SIGTERM)
        return workdir, run.codes(), [run.text(i) for i in (0, 1)]


def test_sigterm_of_one_process_stops_both_after_one_step(stopped, finished_run):
    workdir, codes, texts = stopped
    assert codes == [143, 143], texts
    (step,) = re.findall(r"SIGTERM: step (\d+) is saved", texts[0])
    assert "is saved" not in texts[1]  # one process speaks for all
    assert processes.recorded(workdir)[-1]["step"] == int(step) < 24
    assert step in {
        path.name for folder in ("checkpoints", "checkpoints-meta") for path in (workdir / folder).iterdir()
    }
    assert_same_losses(workdir, finished_run, last_step=int(step))


@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [4, 1])
def test_a_run_goes_on_with_another_number_of_processes(stopped, finished_run, tmp_path, devices):
    """Two processes of two devices, then one process: the numbers of an undisturbed run on one device."""
    shutil.copytree(stopped[0], tmp_path / "run")
    tiny.succeed(tiny.command("train", tmp_path / "run", **CHANGES), devices=devices)
    assert_same_losses(tmp_path / "run", finished_run)
    assert_close(state_of(tmp_path / "run"), state_of(finished_run))


@pytest.mark.exhaustive
def test_two_processes_evaluate_as_one(finished_run, tmp_path):
    settings = CHANGES | {"eval__num_samples": 40, "eval__batch_size": 160}
    shutil.copytree(finished_run, tmp_path / "run")
    run_lib.evaluate(tiny.make_config(**settings), tmp_path / "run", "alone")
    processes.run(tiny.command("eval", tmp_path / "run", **settings), tmp_path)
    one, two = (json.loads((tmp_path / "run" / name / "report_2.json").read_text()) for name in ("alone", "eval"))
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        assert (b["name"], b["num_samples"]) == (a["name"], a["num_samples"])
        if a["value"] is None:
            assert b["value"] is None
        else:
            assert b["value"] == pytest.approx(a["value"], rel=1e-3, abs=1e-4), a["name"]
    for name in ("samples_from_0", "bpd_0_0", "bpd_0_1", "loss"):
        a, b = (files.read_npz(tmp_path / "run" / folder / "ckpt_2" / f"{name}.npz") for folder in ("alone", "eval"))
        assert set(a) == set(b)
        for key in set(a) - {"seconds", "compile_seconds"}:
            if a[key].dtype == np.uint8:
                assert np.abs(a[key].astype(int) - b[key]).max() <= 1  # the edge of a level may round either way
                assert (a[key] == b[key]).mean() > 0.99
            else:
                np.testing.assert_allclose(b[key], a[key], rtol=1e-3, atol=1e-3)


# --- one process is gone ---------------------------------------------------------------------------------------------

SECONDS = 2 * processes.HEARTBEAT_SECONDS + 15  # the last are for a machine that other tests load


@pytest.mark.exhaustive
def test_a_process_killed_in_training_leaves_its_checkpoints(tmp_path):
    """Process 1 is killed; process 0 ends, and what was complete can be restored."""
    with Processes(tiny.command("train", tmp_path, **CHANGES, training__n_iters=4000), tmp_path) as run:
        run.wait_for((tmp_path / "checkpoints-meta" / "4").exists)
        run.kill(1, signal.SIGKILL)
        killed = time.monotonic()
        codes = run.codes()
        assert time.monotonic() - killed < SECONDS
        assert codes[0] in (1, -signal.SIGABRT)
        assert codes[1] == -signal.SIGKILL
        assert "another task died" in run.text(0) or "is gone" in run.text(0)
    assert any((tmp_path / "checkpoints-meta").iterdir())
    with_freq = {"snapshot_freq": 12, "template": build_experiment(tiny.make_config()).state_template()}
    with Checkpoints(tmp_path, **with_freq, read_only=True) as checkpoints:
        assert int(checkpoints.restore_newest().step) >= 4


@pytest.mark.parametrize(("victim", "seconds"), by_default([(1, SECONDS)], [(0, 15), (1, SECONDS)]))
def test_the_end_of_one_process_ends_the_other(finished_run, tmp_path, victim, seconds):
    """One is killed while process 0 waits for a checkpoint, and process 1 for process 0: no device is at work."""
    shutil.copytree(finished_run, tmp_path / "run")
    waiting = {"eval__begin_ckpt": 3, "eval__end_ckpt": 3, "eval__wait_seconds": 1000.0, "eval__enable_sampling": False}
    with Processes(tiny.command("eval", tmp_path / "run", **CHANGES | waiting), tmp_path) as run:
        run.wait_for(lambda: "network ncsnpp" in run.text(0))
        time.sleep(1.0)
        run.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        codes = run.codes()
        assert time.monotonic() - killed < seconds
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == -signal.SIGABRT  # JAX's way
        assert "another task died; see the other task logs" in run.text(1 - victim)


def environ_of_slurm(i):
    """What srun sets for task i of two on this machine; port by JAX_COORDINATOR_PORT."""
    names = {"JOB_ID": 4711, "STEP_ID": 0, "PROCID": i, "LOCALID": i, "STEP_NUM_TASKS": 2, "NTASKS": 2}
    names |= {"STEP_NODELIST": "127.0.0.1", "STEP_TASKS_PER_NODE": "2"}
    return {f"SLURM_{name}": str(value) for name, value in names.items()}


def environ_of_open_mpi(i):
    """What mpirun of Open MPI 5 sets for process i of two on this machine."""
    names = {"SIZE": 2, "RANK": i, "LOCAL_SIZE": 2, "LOCAL_RANK": i}
    return {"PMIX_NAMESPACE": "prterun-test-1@1"} | {f"OMPI_COMM_WORLD_{name}": str(names[name]) for name in names}


@pytest.mark.parametrize(
    "environ",
    [
        environ_of_slurm,
        pytest.param(environ_of_open_mpi, marks=pytest.mark.exhaustive),
        pytest.param(None, marks=pytest.mark.exhaustive),
    ],
)
def test_an_error_of_one_process_ends_both_with_its_message(finished_run, tmp_path, environ):
    """Both are asked for a checkpoint that is not there; process 1, which has no files, hears of it."""
    shutil.copytree(finished_run, tmp_path / "run")
    missing = {"eval__begin_ckpt": 3, "eval__end_ckpt": 3, "eval__enable_sampling": False}
    command = tiny.command("eval", tmp_path / "run", **CHANGES | missing)
    started_by = {"flags": False, "environ": environ} if environ else {}
    with Processes(command, tmp_path, **started_by) as run:
        assert run.codes() == [1, 1]
        # JAX's own threads may end with an empty line.
        assert run.text(0).strip().splitlines()[-1].startswith("score_sde: checkpoint 3 is not in")
        assert "checkpoint 3 is not in" in run.text(1).strip().splitlines()[-1]
        assert "process 0 stopped" in run.text(1)
        assert "another task died" not in run.text(0) + run.text(1)


@pytest.mark.exhaustive
def test_processes_of_different_settings_are_refused(tmp_path):
    command = tiny.command("train", tmp_path, **CHANGES)
    with Processes(command, tmp_path, own=lambda i: [f"--config.seed={i}"]) as run:
        assert run.codes() == [1, 1]
        expected = "--config.seed: 1 on process 1, but 0 on process 0; it must be the same on all"
        assert run.text(1).splitlines()[-1] == f"score_sde: {expected}"
        assert f"process 1 stopped, and with it all others: {expected}" in run.text(0)


@pytest.mark.exhaustive
def test_process_0_alone_says_what_it_waited_for(tmp_path):
    with Processes(tiny.command("train", tmp_path, "--start_seconds=3"), tmp_path, started=1) as run:
        assert run.codes() == [-signal.SIGABRT]
        expected = f"process 0 of 2, with process 0 at 127.0.0.1:{run.port}: waiting up to 3 s for the others"
        assert expected in run.text(0)


MODES = {
    "train_classifier": (),
    "sample": ("--num_images=20",),
    "compare_samplers": ("--samplers=ode,heun:5", "--num_images=40"),
    "encode": ("--num_images=3",),
    "restore": ("--num_images=2", "--config.restore.mask=top"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_do_in_every_mode_what_one_does(finished_run, tmp_path, mode):
    """They write the files of one, and the arrays in them are the same but for rounding and for times."""
    for name in ("one", "two"):
        shutil.copytree(finished_run, tmp_path / name)
    command = functools.partial(tiny.command, mode, **CHANGES | {"eval__batch_size": 40})
    result = tiny.run(command(tmp_path / "one", *MODES[mode]))
    assert result.returncode == 0, result.stderr[-3000:]
    processes.run(command(tmp_path / "two", *MODES[mode]), tmp_path)
    one, two = ({path.relative_to(root) for path in root.rglob("*")} for root in (tmp_path / "one", tmp_path / "two"))
    volatile = ("tfevents", "ocdbt", "/d/", "manifest")  # files of TensorBoard and Orbax have names of their own
    stable = lambda paths: {path for path in paths if not any(part in str(path) for part in volatile)}  # noqa: E731
    assert stable(one) == stable(two)
    for path in sorted(path for path in stable(one) if path.suffix == ".npz"):
        a, b = (files.read_npz(tmp_path / name / path) for name in ("one", "two"))
        assert set(a) == set(b)
        for key in set(a) - {"seconds", "compile_seconds", "hash"}:
            if a[key].dtype == np.uint8:
                assert (np.abs(a[key].astype(int) - b[key]) <= 1).mean() > 0.99, (path, key)
            else:
                np.testing.assert_allclose(b[key], a[key], rtol=1e-2, atol=2e-2, err_msg=f"{path} {key}")


@pytest.mark.exhaustive
def test_two_processes_measure_a_data_set_as_one(tmp_path):
    command = [*tiny.command("stats", tmp_path)[:4], "--mode", "stats", "--split=test"]
    result = tiny.run([*command, f"--output={tmp_path}/one.npz"])
    assert result.returncode == 0, result.stderr[-3000:]
    processes.run([*command, f"--output={tmp_path}/two.npz"], tmp_path)
    one, two = (files.read_npz(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert set(one) == set(two)
    for key in one:
        if one[key].dtype.kind == "f":
            np.testing.assert_allclose(two[key], one[key], rtol=1e-5, atol=1e-6, err_msg=key)
