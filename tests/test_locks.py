"""One writer in a folder, and a folder that vanishes."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from parallel import distributed
from workdir import locks
from workdir.folder import Presence, WorkdirError

HOLD = """
import sys, time
sys.path[:0] = sys.argv[1:2]
from workdir import locks
with locks.hold(sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_folder_has_one_writer_and_a_kill_frees_it(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tiny.ROOT, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        start = time.monotonic()
        host = os.uname().nodename
        with pytest.raises(
            locks.LockedError, match=rf"--workdir=.*run is in use by process {holder.pid} on {host}, since"
        ):
            locks.hold(folder).__enter__()
        assert time.monotonic() - start < 1
    finally:
        holder.kill()
        holder.communicate()
    assert holder.returncode == -signal.SIGKILL
    with locks.hold(folder):  # what the killed one left behind locks nobody out
        assert json.loads((folder / locks.FILE).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_a_lock_leaves_nothing_behind(tmp_path):
    with locks.hold(tmp_path / "none"):
        assert (tmp_path / "none" / locks.FILE).exists()
    assert not (tmp_path / "none").exists()
    with locks.hold(tmp_path / "some"):
        (tmp_path / "some" / "result").write_text("")
    assert os.listdir(tmp_path / "some") == ["result"]


def test_a_lock_is_not_lost_to_one_who_opened_the_file_before_it_was_removed(tmp_path, monkeypatch):
    """The holder may remove the file between our opening and locking it: what we then lock is nobody's."""
    flock, calls = fcntl.flock, []

    def flock_after_removal(descriptor, operation):
        if not calls:
            (tmp_path / locks.FILE).unlink()
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with locks.hold(tmp_path):
        assert len(calls) == 2
        with pytest.raises(locks.LockedError):
            locks.hold(tmp_path).__enter__()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locks.hold(tmp_path):
        assert "does not support locks: make sure that no other run writes there" in caplog.text


def test_only_the_first_process_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    with locks.hold(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_folder_that_vanishes_is_noticed(tmp_path, how):
    folder = tmp_path / "run"
    folder.mkdir()
    presence = Presence(folder)
    presence.require()
    folder.rename(tmp_path / "elsewhere") if how != "removed" else folder.rmdir()
    if how == "replaced":
        folder.mkdir()
    with pytest.raises(WorkdirError, match=r"run is gone: somebody has removed, moved or replaced it"):
        presence.require()
