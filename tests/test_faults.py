"""Faults in the small: full disks, damaged checkpoints, locks, steps that go wrong."""

import errno
import json
import logging as standard_logging
import os
import resource
import signal
import subprocess
import sys

import disks
import jax
import numpy as np
import optax
import pytest
import tiny
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from test_checkpoints import assert_equal, make_state, open_checkpoints

import losses
from parallel import distributed
from sources.tfrecord import find_records
from storage import files
from workdir import event_file
from workdir.checkpoints import CheckpointError

# --- what the system refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "told", "way_out"),
    [
        (errno.ENOSPC, "No space left on device", "free some space there"),
        (errno.EIO, "Input/output error", "check the disk and the connection to it"),
        (errno.EROFS, "Read-only file system", "mount it for writing"),
        (errno.ESTALE, "Stale file handle", "check that the network file system is mounted"),
        (errno.EDQUOT, "Disk quota exceeded", "free some of your quota there"),
        (errno.ENOTDIR, "Not a directory", "fix this"),
    ],
)
def test_an_error_of_the_system_is_one_sentence(tmp_path, number, told, way_out):
    path = tmp_path / "missing" / "file"
    sentence = files.explain(OSError(number, os.strerror(number), str(path)))
    disk = files.disk_of(tmp_path)
    assert os.path.ismount(disk)
    assert tmp_path.is_relative_to(disk)
    assert sentence.startswith(f"{path} (on the disk {disk}): {told}; {way_out}")
    assert sentence.endswith("then rerun the same command: it resumes from the completed work")


def test_only_errors_of_the_machine_are_the_users():
    assert files.is_of_machine(PermissionError(errno.EACCES, "Permission denied"))
    assert files.is_of_machine(OSError(errno.ENOSPC, "No space left on device"))
    assert not files.is_of_machine(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    assert not files.is_of_machine(OSError("a sentence of a library"))


def test_a_file_on_a_full_disk_is_named_and_the_old_one_stays(tmp_path):
    with disks.small_disk(tmp_path / "disk", 64):
        path = tmp_path / "disk" / "report.json"
        files.write_json(path, {"value": 1})
        with pytest.raises(OSError, match="No space left on device") as raised:
            files.write_bytes(path, bytes(200_000))
        assert raised.value.filename == str(path)
        assert f"{path} (on the disk {tmp_path / 'disk'})" in files.explain(raised.value)
        assert json.loads(path.read_text()) == {"value": 1}
        assert os.listdir(tmp_path / "disk") == ["report.json"]  # what was half written gave its room back


def test_what_a_killed_process_left_of_a_file_is_removed_and_nothing_of_others(tmp_path):
    host = os.uname().nodename
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    leftover = tmp_path / f".report.json.{host}-{ended.stdout.strip()}.abcd"
    kept = [tmp_path / f".report.json.{host}-{os.getppid()}.abcd", tmp_path / ".report.json.elsewhere-1.abcd"]
    kept += [tmp_path / f"report.md.{host}-{ended.stdout.strip()}.abcd"]
    for each in (leftover, *kept):
        each.write_text("half")
    files.remove_leftovers(tmp_path.parent)
    assert set(tmp_path.iterdir()) == set(kept)


def test_a_growing_file_keeps_what_a_full_disk_refuses(tmp_path, caplog):
    """Also the part of a line that still had room is written once: nine bytes do not divide the disk's blocks."""
    lines = [f"{number:08d}\n".encode() for number in range(2000)]
    with disks.small_disk(tmp_path / "disk", 8) as resize:
        file = files.Appender(tmp_path / "disk" / "losses.jsonl")
        for line in lines:
            file.append(line)
        assert caplog.text.count("No space left on device") == 1  # told once, not 1000 times
        assert 0 < (tmp_path / "disk" / "losses.jsonl").stat().st_size < 9 * 2000
        resize(64)
        file.close()
        assert (tmp_path / "disk" / "losses.jsonl").read_bytes() == b"".join(lines)


class _Refusing:
    """A raw file that takes three bytes a call, and none at all as long as the disk is full."""

    def __init__(self):
        self.content, self.is_full = b"", False

    def write(self, content):
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.content += content[:3]
        return len(content[:3])

    def close(self):
        pass


def test_a_growing_file_without_a_disk_to_fill(tmp_path, caplog):
    """The same where nothing may be mounted."""
    file = files.Appender(tmp_path / "losses.jsonl")
    file._file.close()
    file._file = raw = _Refusing()
    file.append(b"first")
    raw.is_full = True
    file.append(b"second")
    file.append(b"third")
    assert raw.content == b"first"
    assert caplog.text.count("No space left on device") == 1
    raw.is_full = False
    file.close()
    assert raw.content == b"firstsecondthird"


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def events(path):
    content = path.read_bytes()
    records = [(content[a : a + n], content[a + n : a + n + 4]) for a, n in find_records(str(path), len(content), 0)]
    assert all(int.from_bytes(checksum, "little") == masked_crc32c(record) for record, checksum in records)
    return [Event.FromString(record) for record, _ in records]


def test_tensorboard_files_hold_what_was_recorded(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    file = event_file.EventFile(tmp_path, first_step=7)
    file.add_scalar("loss", 0.5, 8)
    file.add_image("samples", picture, 9)
    file.close()
    (path,) = tmp_path.iterdir()
    version, start, scalar, image = events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, 1)  # 1: START, from which on TensorBoard forgets
    assert (scalar.step, scalar.summary.value[0].tag, scalar.summary.value[0].simple_value) == (8, "loss", 0.5)
    assert (image.step, image.summary.value[0].image.height) == (9, 4)


def test_tensorboard_files_keep_their_order_when_the_clock_goes_back(tmp_path, monkeypatch):
    now = [1_800_000_000.0]
    monkeypatch.setattr(event_file.time, "time", lambda: now[0])
    for run in range(3):
        file = event_file.EventFile(tmp_path, first_step=10 * run)
        for step in range(3):
            file.add_scalar("loss", step, 10 * run + step)
            now[0] -= 3600
        file.close()
    paths = sorted(tmp_path.iterdir())  # as TensorBoard reads them
    assert [events(path)[1].step for path in paths] == [0, 10, 20]
    for path in paths:
        times = [event.wall_time for event in events(path)]
        assert times == sorted(times)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def large_state(step):
    """A state whose arrays do not compress."""
    generator = np.random.default_rng(step)
    params = {"kernel": generator.standard_normal(50_000).astype(np.float32)}
    state = jax.tree.map(np.asarray, losses.init_state(params, optax.sgd(0.1)))
    return state.replace(step=np.int32(step))


def open_large(workdir):
    from workdir.checkpoints import Checkpoints

    return Checkpoints(workdir, snapshot_freq=10, template=large_state(0))


def _save_all(checkpoints, steps):
    for step in steps:
        checkpoints.save(large_state(step))
        checkpoints.wait()


def test_a_checkpoint_on_a_full_disk_costs_no_other(tmp_path):
    """It is told, its remains give their room back, and with room the same number is written."""
    with disks.small_disk(tmp_path / "disk", 900) as resize:
        workdir = tmp_path / "disk"
        with open_large(workdir) as checkpoints, pytest.raises(CheckpointError, match="No space left") as raised:
            _save_all(checkpoints, (10, 12, 14, 16))
        assert "free some space there" in str(raised.value)
        assert f"(on the disk {workdir})" in str(raised.value)
        assert not list(workdir.rglob("*tmp*"))
        with open_large(workdir) as checkpoints:
            newest = checkpoints.restore_newest()
            assert int(newest.step) in (10, 12, 14)
            assert_equal(newest, large_state(int(newest.step)))
            resize(8000)
            checkpoints.save(large_state(20))
            checkpoints.wait()
            assert_equal(checkpoints.restore_newest(), large_state(20))


WITH_LIMIT = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
import test_faults
from workdir.checkpoints import CheckpointError
with test_faults.open_large(sys.argv[3]) as checkpoints:
    checkpoints.save(test_faults.large_state(10))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        checkpoints.save(test_faults.large_state(12))
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_checkpoint_that_the_system_refuses_costs_no_other(tmp_path):
    """The same where nothing may be mounted: a limit on the size of files that the process sets itself."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", WITH_LIMIT, tiny.ROOT, tiny.ROOT / "tests", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=tiny.environment(), check=False)
    assert "File too large; raise the limit on the size of a file (ulimit -f)" in result.stdout, result.stderr[-2000:]
    assert not list(tmp_path.rglob("*tmp*"))
    with open_large(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore_newest(), large_state(10))


def damages(folder):
    """All the ways to damage one file of a checkpoint, as (name, what does it)."""
    flip = lambda content, places: bytes(b ^ 0x55 if i in places else b for i, b in enumerate(content))  # noqa: E731
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        name = path.relative_to(folder)
        yield f"{name} cut short", lambda path=path, content=content: path.write_bytes(content[: len(content) // 2])
        yield f"{name} empty", lambda path=path: path.write_bytes(b"")
        yield f"{name} deleted", lambda path=path: path.unlink()
        for place in (0, len(content) // 3, len(content) // 2, len(content) - 1):
            changed = flip(content, {place})
            yield f"{name} byte {place}", lambda path=path, changed=changed: path.write_bytes(changed)
        changed = flip(content, range(len(content)))
        yield f"{name} all bytes", lambda path=path, changed=changed: path.write_bytes(changed)


@pytest.mark.slow
def test_whatever_file_is_damaged_the_state_is_right_or_the_one_before(tmp_path, caplog):
    """Every file of a checkpoint, in eight ways: never another number, never an error that is not told."""
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (10, 20):
            checkpoints.save(make_state(step, value=step))
        checkpoints.wait()
    newest = tmp_path / "checkpoints" / "2"
    whole = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    outcomes = {10: 0, 20: 0}
    for name, damage in list(damages(newest)):
        caplog.clear()
        damage()
        with open_checkpoints(tmp_path, read_only=True) as checkpoints:
            state = checkpoints.restore_newest()
        step = int(state.step)
        assert_equal(state, make_state(step, value=step))
        outcomes[step] += 1
        assert ("checkpoint 2 in" in caplog.text and "using the one before it" in caplog.text) == (step == 10), name
        for path, content in whole.items():
            path.write_bytes(content)
    assert outcomes[10] > 20  # those of the arrays, their description and the checksums
    assert outcomes[20] > 20  # those that Orbax keeps twice, or nobody reads


@pytest.mark.parametrize("what", ["arrays", "checksums", "folder"])
def test_a_damaged_checkpoint_is_moved_aside_and_written_anew(tmp_path, caplog, what):
    """Its number would else be taken for ever, and what resumes from there would find it damaged again."""
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (14, 20):
            checkpoints.save(make_state(step, value=step))
        checkpoints.wait()
    damaged = tmp_path / "checkpoints" / "2"
    if what == "arrays":
        for path in damaged.glob("state/d/*"):
            path.write_bytes(path.read_bytes()[:-9])
    elif what == "checksums":
        (damaged / "info" / "metadata").write_text("{")
    else:
        for path in sorted(damaged.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    before = sorted(path.relative_to(damaged) for path in damaged.rglob("*"))
    for number in ("", "-2"):  # it may happen twice
        with open_checkpoints(tmp_path) as checkpoints:
            assert_equal(checkpoints.restore_newest(), make_state(14, value=14))
            aside = tmp_path / "checkpoints-damaged" / f"checkpoints-2{number}"
            assert f"moved the damaged checkpoint 2 to {aside}" in caplog.text
            checkpoints.save(make_state(20, value=3))
            checkpoints.wait()
            assert_equal(checkpoints.restore_newest(), make_state(20, value=3))
        if not number:
            assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == before
            (damaged / "info" / "metadata").write_text("{")


def test_an_evaluation_names_the_damaged_checkpoint_and_moves_nothing(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(make_state(step))
        checkpoints.wait()
    (tmp_path / "checkpoints" / "2" / "info" / "metadata").write_text("{")
    with (
        open_checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(
            CheckpointError, match=r"checkpoint 2 in .* cannot be read: .*choose another one \(there are: 1, 3\)"
        ),
    ):
        checkpoints.restore_snapshot(2)
    assert (tmp_path / "checkpoints" / "2").exists()
    assert not (tmp_path / "checkpoints-damaged").exists()


def test_if_all_are_damaged_nothing_is_changed(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(10))
        checkpoints.wait()
    (tmp_path / "checkpoints" / "1" / "info" / "metadata").write_text("{")
    with (
        open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="nothing was changed: put a copy of one in its place"),
    ):
        checkpoints.restore_newest()
    assert (tmp_path / "checkpoints" / "1").exists()


def test_the_newest_checkpoint_is_that_of_the_last_step_whatever_the_clock_says(tmp_path):
    """Times of change that fall from step to step, as after the clock went back."""
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (12, 14, 16, 20):
            checkpoints.save(make_state(step, value=step))
            checkpoints.wait()
            for folder in [path for path in tmp_path.rglob("*") if path.name in (str(step), str(step // 10))]:
                os.utime(folder, (2e9 - 1e5 * step, 2e9 - 1e5 * step))
    with open_checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore_newest(), make_state(20, value=20))
        checkpoints.save(make_state(22))
        checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints-meta").iterdir()) == ["16", "22"]


# --- the log and the loss curve ---------------------------------------------------------------------------------------


def test_a_damaged_loss_curve_is_no_obstacle(tmp_path):
    from workdir.progress import TrainingProgress

    lines = ['{"step": 2, "loss": 1.0}\n', "\x00\x00\x00\n", '{"step": 4, "loss": 2.0}\n', '{"st']
    (tmp_path / "losses.jsonl").write_text("".join(lines))
    with TrainingProgress(tmp_path, first_step=4, num_steps=9, batch_size=1) as progress:
        progress.record(6, loss=3.0)
    kept = [json.loads(line)["step"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert kept == [2, 4, 6]


def test_a_log_on_a_full_disk_is_told_once(tmp_path, capsys):
    from workdir.logs import _LogFile

    with disks.small_disk(tmp_path / "disk", 4):
        handler = _LogFile(tmp_path / "disk" / "stdout.txt")
        for number in range(300):
            record = standard_logging.LogRecord("name", standard_logging.INFO, "p", 1, f"line {number} " * 4, (), None)
            handler.handle(record)
        handler.close()
    told = capsys.readouterr().err
    assert told.count("No space left on device") == 1
    assert "Traceback" not in told


LOST_ERROR = """
import asyncio, gc
from absl import logging
from workdir import logs
logging.use_absl_handler()
logs.set_up_console()
async def fail():
    raise ValueError("of an array after the first that failed")
async def main():
    asyncio.ensure_future(fail())
    await asyncio.sleep(0)
asyncio.run(main())
gc.collect()
logging.error("the end")
"""


def test_errors_that_nobody_asked_for_are_not_on_the_console():
    """Of an array's write after the first that failed, which asyncio tells with a traceback."""
    result = tiny.run([sys.executable, "-c", LOST_ERROR])
    assert "the end" in result.stderr
    assert "of an array" not in result.stderr


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_the_first_interrupt_is_noticed_and_the_second_stops_at_once(capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets jobs in the background ignore it
    with distributed.preemption() as asked:
        assert asked() == 0
        signal.raise_signal(signal.SIGINT)
        assert asked() == signal.SIGINT
        assert "press it again to stop at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_process_in_the_background_goes_on_ignoring_interrupts():
    """A shell starts them so in a script, and whoever presses Ctrl-C means another program."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with distributed.preemption() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked() == 0
    finally:
        signal.signal(signal.SIGINT, before)
