"""Data files that disappear while a run trains on them."""

import contextlib
import shutil

import jax
import numpy as np
import pytest
import tiny
from faulty import AT_14, refuse, succeed, train
from PIL import Image

from experiment.build import build_experiment
from workdir.checkpoints import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.mark.parametrize("cached", [False, True])
def test_a_picture_that_disappears(tmp_path, cached):
    """Not cached: the file is named, the state saved, and with the file back the run ends as if nothing had been."""
    generator, data = np.random.default_rng(0), tmp_path / "data"
    data.mkdir()
    for number in range(40):
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(data / f"{number:02d}.png")
    changes = {"data__dataset": "folder", "data__path": data, "data__num_levels": 256}
    # Enough steps after the fault: some are read ahead.
    changes |= {"data__cache_gib": 1.0 if cached else 0.0, "training__eval_freq": 48, "training__n_iters": 48}
    other = tmp_path / "unbroken"
    succeed(train(other, **changes))
    shutil.copytree(data, tmp_path / "copy")
    action = f"[path.unlink() for path in pathlib.Path({str(data)!r}).iterdir()]"
    workdir = tmp_path / "run"
    result = train(workdir, hook=AT_14.format(workdir=str(workdir), action=action), **changes)
    if cached:
        succeed(result)
    else:
        refuse(result, ".png of data.path=", "could be read when the run began: it cannot be read: No such file")
        saved = [int(path.name) for path in (workdir / "checkpoints-meta").iterdir()]
        assert max(saved) >= 14
        assert f"the data fail: step {max(saved)} is saved; the same command resumes from it" in result.stderr
        for path in (tmp_path / "copy").iterdir():
            shutil.copy2(path, data)
        assert f"restored step {max(saved)} from" in succeed(train(workdir, **changes)).stderr
    with _snapshot_of(workdir, changes) as one, _snapshot_of(other, changes) as two:
        jax.tree.map(np.testing.assert_array_equal, one.restore_snapshot(4), two.restore_snapshot(4))


@contextlib.contextmanager
def _snapshot_of(workdir, changes):
    template = build_experiment(
        tiny.make_config(**(changes | {"data__path": str(changes["data__path"])}))
    ).state_template()
    with Checkpoints(workdir, snapshot_freq=12, template=template, read_only=True) as checkpoints:
        yield checkpoints


def test_an_npz_file_that_disappears(tmp_path):
    """The run that has it open goes on; the next one says which file is missing, and goes on when it is back."""
    levels = np.random.default_rng(0).integers(0, 17, (60, 8, 8, 1), dtype=np.uint8)
    data = tmp_path / "data.npz"
    np.savez(data, images=levels)
    changes = {"data__dataset": "npz", "data__path": data}
    action = f"pathlib.Path({str(data)!r}).unlink(); shutil.rmtree(os.environ['SCORE_SDE_CACHE'])"
    hook = f"import os; os.environ['SCORE_SDE_CACHE'] = {str(tmp_path / 'cache')!r}\n"
    workdir = tmp_path / "run"
    hook_at = hook + AT_14.format(workdir=str(workdir), action=action)
    succeed(train(workdir, hook=hook_at, **changes, training__n_iters=20))
    assert not (tmp_path / "cache").exists()
    refuse(train(workdir, hook=hook, **changes), f"{data} does not exist; data.dataset='npz' reads")
    np.savez(data, images=levels)
    assert "restored step 20 from" in succeed(train(workdir, hook=hook, **changes)).stderr
