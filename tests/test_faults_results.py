"""Faults that really happen to an evaluation or a sampling: finished work is used again, the numbers are equal."""

import json
import shutil
import signal
import subprocess

import disks
import pytest
import tiny
from faulty import FILL_AT, KILL_AT_FILE, SHELLS_SAY, evaluation, hooked, refuse, succeed

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def evaluated(finished_run, tmp_path_factory):
    """The same run, evaluated at its last checkpoint and not disturbed."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(finished_run, workdir)
    succeed(tiny.run(evaluation(workdir)))
    return workdir


def report(workdir, folder="eval"):
    stored = json.loads((workdir / folder / "report_2.json").read_text())
    stored["sampler"].pop("seconds")
    return stored


@pytest.mark.parametrize(
    ("name", "complete"),
    [
        ("samples_from_152.npz", ["samples_from_0.npz"]),
        ("bpd_0_1.npz", ["samples_from_0.npz", "samples_from_152.npz", "bpd_0_0.npz"]),
        ("report_2.json", ["samples_from_0.npz", "samples_from_152.npz", "bpd_0_0.npz", "bpd_0_1.npz", "loss.npz"]),
    ],
)
def test_a_kill_in_an_evaluation(finished_run, evaluated, tmp_path, name, complete):
    """In the middle of a file of samples, of bits/dim, or of the report; the rest is used, the numbers are equal."""
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    result = tiny.run(hooked(KILL_AT_FILE.format(name=name), evaluation(workdir)))
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    of_checkpoint = workdir / "eval" / "ckpt_2"
    assert not list((workdir / "eval").rglob(name))
    before = {each: (of_checkpoint / each).stat().st_mtime_ns for each in complete}
    succeed(tiny.run(evaluation(workdir)))
    assert {each: (of_checkpoint / each).stat().st_mtime_ns for each in complete} == before
    assert not [path for path in (workdir / "eval").rglob(".*") if path.is_file()]  # what the killed one left
    assert report(workdir) == report(evaluated)


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_sigterm_in_evaluation_and_sampling_keeps_what_is_complete(finished_run, evaluated, tmp_path, mode):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    if mode == "eval":
        arguments, folder = evaluation(workdir), workdir / "eval" / "ckpt_2"
    else:
        arguments = tiny.command("sample", workdir, "--num_images=300", "--output=drawn")
        folder = workdir / "drawn" / "rounds"
    hook = KILL_AT_FILE.replace("SIGKILL", "SIGTERM").format(name="samples_from_152.npz")
    assert 128 - tiny.run(hooked(hook, arguments)).returncode == SHELLS_SAY
    kept = folder / "samples_from_0.npz"
    before = kept.stat().st_mtime_ns
    succeed(tiny.run(arguments))
    assert kept.stat().st_mtime_ns == before
    if mode == "eval":
        assert report(workdir) == report(evaluated)


@pytest.mark.parametrize("name", ["samples_from_152.npz", "bpd_0_1.npz", "report_2.json", "report.md"])
def test_a_disk_that_is_full_in_an_evaluation(finished_run, evaluated, tmp_path, name):
    with disks.small_disk(tmp_path / "disk", 16_000):
        workdir = tmp_path / "disk" / "run"
        shutil.copytree(finished_run, workdir)
        result = tiny.run(hooked(FILL_AT.format(name=name, disk=tmp_path / "disk"), evaluation(workdir)))
        refuse(result, f"{name} (on the disk {tmp_path / 'disk'}): No space left on device; free some space there")
        (tmp_path / "disk" / "filler").unlink()
        kept = workdir / "eval" / "ckpt_2" / "samples_from_0.npz"
        before = kept.stat().st_mtime_ns
        succeed(tiny.run(evaluation(workdir)))
        assert kept.stat().st_mtime_ns == before
        assert report(workdir) == report(evaluated)


# --- two at a time ---------------------------------------------------------------------------------------------------


def test_a_folder_of_results_has_one_writer_beside_a_training(finished_run, tmp_path):
    """An evaluation runs beside a training of the same workdir, but not beside another one into its folder."""
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    wait = """
import sys, time
sys.path[:0] = ["."]
from workdir import locks
with locks.hold(sys.argv[1]), locks.hold(sys.argv[2]), locks.hold(sys.argv[3]):
    print("held", flush=True)
    time.sleep(600)
"""
    folders = [workdir, workdir / "eval", workdir / "drawn"]
    arguments = [tiny.command("eval", workdir)[0], "-c", wait, *map(str, folders)]
    holder = subprocess.Popen(arguments, cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        refuse(tiny.run(evaluation(workdir)), f"--eval_folder={workdir / 'eval'} is in use by process {holder.pid}")
        refuse(
            tiny.run(tiny.command("sample", workdir, "--output=drawn")),
            f"--output={workdir / 'drawn'} is in use by process {holder.pid}",
        )
        succeed(tiny.run(evaluation(workdir, "--eval_folder=other", eval__enable_bpd=False)))
    finally:
        holder.kill()
        holder.communicate()
