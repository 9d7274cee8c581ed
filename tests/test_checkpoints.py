"""Checkpoints: exact round trips, damage that is noticed, and waits that end."""

import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import losses
from workdir.checkpoints import CheckpointError, Checkpoints

OPTIMIZER = losses.make_optimizer(lr=1e-3, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=10, grad_clip=1.0)


def make_state(step, value=0.0):
    params = {"block": {"kernel": np.full((3, 4), value, np.float32)}, "bias": np.arange(3, dtype=np.float32)}
    state = jax.tree.map(np.asarray, losses.init_state(params, OPTIMIZER))
    return state.replace(step=np.int32(step), params_ema=jax.tree.map(lambda leaf: leaf + 1, params))


def open_checkpoints(workdir, **kwargs):
    return Checkpoints(workdir, snapshot_freq=10, template=make_state(0), **kwargs)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_states_are_filed_by_their_step(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (10, 14, 16, 18, 20):
            checkpoints.save(make_state(step, value=step))
        checkpoints.wait()
        assert checkpoints.numbers() == [1, 2]
        assert_equal(checkpoints.restore_snapshot(1), make_state(10, value=10))
    kept = sorted(path.name for path in (tmp_path / "checkpoints-meta").iterdir() if path.is_dir())
    assert kept == ["16", "18"]  # the two newest


def test_the_newest_state_of_either_folder_is_restored(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_newest() is None
        checkpoints.save(make_state(10, value=1))
        checkpoints.save(make_state(14, value=2))
        checkpoints.wait()
        assert_equal(checkpoints.restore_newest(), make_state(14, value=2))
        checkpoints.save(make_state(20, value=3))
        checkpoints.wait()
    with open_checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore_newest(), make_state(20, value=3))


def test_the_last_step_of_a_run_is_a_snapshot_which_a_longer_run_replaces(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(10, value=10))
        checkpoints.save(make_state(14, value=14), is_last=True)
        checkpoints.wait()
        assert checkpoints.numbers() == [1, 2]
        assert_equal(checkpoints.restore_snapshot(2), make_state(14, value=14))
        assert_equal(checkpoints.restore_newest(), make_state(14, value=14))
    with open_checkpoints(tmp_path) as checkpoints:  # the run is continued
        checkpoints.save(make_state(16, value=16))
        checkpoints.wait()
        assert_equal(checkpoints.restore_newest(), make_state(16, value=16))
        checkpoints.save(make_state(18, value=18), is_last=True)  # and again
        checkpoints.wait()
        assert_equal(checkpoints.restore_snapshot(2), make_state(18, value=18))
        checkpoints.save(make_state(20, value=20))
        checkpoints.wait()
        assert_equal(checkpoints.restore_snapshot(2), make_state(20, value=20))
        checkpoints.save(make_state(20, value=21))  # this one is there
        checkpoints.wait()
        assert_equal(checkpoints.restore_snapshot(2), make_state(20, value=20))
        assert checkpoints.numbers() == [1, 2]


def test_states_to_resume_from_are_restored_by_their_step(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (10, 14, 16):
            checkpoints.save(make_state(step, value=step))
        checkpoints.wait()
    with open_checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.resumable_steps() == [14, 16]
        assert_equal(checkpoints.restore_snapshot(14), make_state(14, value=14))
        with pytest.raises(CheckpointError, match="present: 1; states to resume from at the steps 14, 16; set"):
            checkpoints.require([3])


def damage(folder, how):
    """Damages the data files below a checkpoint's arrays; OCDBT keeps small arrays in more than one of them."""
    for path in [p for p in Path(folder).rglob("d/*") if p.is_file()]:
        content = bytearray(path.read_bytes())
        if how == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif how == "deleted":
            path.unlink()
        else:
            content[len(content) // 2 :] = bytes(byte ^ 0x55 for byte in content[len(content) // 2 :])
            path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "deleted", "flipped"])
def test_a_damaged_newest_state_is_named_and_the_one_before_it_used(tmp_path, caplog, how):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (12, 14):
            checkpoints.save(make_state(step, value=step))
        checkpoints.wait()
        damage(tmp_path / "checkpoints-meta" / "14" / "state", how)
        assert_equal(checkpoints.restore_newest(), make_state(12, value=12))
        assert "checkpoint 14 in" in caplog.text
        assert "using the one before it" in caplog.text
        damage(tmp_path / "checkpoints-meta" / "12" / "state", how)
        with pytest.raises(CheckpointError, match=r"no checkpoint of this workdir can be read.*checkpoint 12"):
            checkpoints.restore_newest()


def test_a_changed_value_is_noticed_by_its_checksum(tmp_path, monkeypatch):
    """A file that reads well but holds other numbers: only the checksum can tell."""
    with open_checkpoints(tmp_path) as checkpoints:
        checksums = {"step": 10, "checksums": {}}
        monkeypatch.setattr("workdir.checkpoints._checksums", lambda tree: dict.fromkeys(checksums, 1))
        checkpoints.save(make_state(10))
        checkpoints.wait()
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=r"checkpoint 1 in .* is damaged: the checksum of .* differs"):
            checkpoints.restore_snapshot(1)


def test_a_missing_checkpoint_is_named_at_once(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(20))
        checkpoints.wait()
    start = time.monotonic()
    with (
        open_checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"checkpoint 7 is not in .*present: 2; set eval.begin_ckpt"),
    ):
        checkpoints.restore_snapshot(7)
    assert time.monotonic() - start < 5


def test_a_wait_ends_when_the_checkpoint_arrives(tmp_path):
    with open_checkpoints(tmp_path) as writer, open_checkpoints(tmp_path, read_only=True) as reader:
        timer = threading.Timer(0.5, lambda: writer.save(make_state(30, value=5)))
        timer.start()
        assert_equal(reader.restore_snapshot(3, wait_seconds=30), make_state(30, value=5))
        timer.join()
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=r"checkpoint 4 is not in .*present: 3"):
            reader.restore_snapshot(4, wait_seconds=0.2)
        assert 0.2 <= time.monotonic() - start < 5


def test_a_workdir_without_checkpoints_can_be_asked(tmp_path):
    with (
        open_checkpoints(tmp_path / "nothing", read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"present: none"),
    ):
        checkpoints.restore_snapshot(1)
