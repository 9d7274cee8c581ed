"""The folder of a run: files that appear whole, and runs that do not mix."""

import json
import os

import pytest

from configs import base
from storage import files
from workdir import compatibility
from workdir import folder as workdirs
from workdir.folder import WorkdirError


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    files.write_json(path, {"value": 1})

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"value": 1}
    assert os.listdir(tmp_path) == ["report.json"]


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"value": float("nan")})
    assert os.listdir(tmp_path) == []


def test_the_configuration_is_recorded_with_versions_and_commit(tmp_path):
    config = base.get_config()
    workdirs.record_config(tmp_path, config)
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["config"]["model.ch_mult"] == [1, 2, 2, 2]
    assert recorded["config"]["seed"] == 42
    assert recorded["versions"].keys() >= {"jax", "flax", "orbax-checkpoint"}
    assert recorded["commit"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.nf", 64, r"model.nf: 128 there, 64 now"),
        ("model.sigma_max", 10.0, r"model.sigma_max: 50.0 there, 10.0 now"),
        ("training.sde", "vesde", r"training.sde: 'vpsde' there, 'vesde' now"),
        ("data.centered", True, r"data.centered: False there, True now"),
        ("training.snapshot_freq", 100_000, r"training.snapshot_freq: 50000 there, 100000 now"),
    ],
)
def test_another_experiment_is_refused_by_name(tmp_path, key, value, message):
    workdirs.record_config(tmp_path, base.get_config())
    other = base.get_config()
    other.update_from_flattened_dict({key: value})
    with pytest.raises(WorkdirError, match=message):
        compatibility.check_same_experiment(tmp_path, other)


def test_what_may_change_between_runs_may_change(tmp_path):
    workdirs.record_config(tmp_path, base.get_config())
    other = base.get_config()
    other.update_from_flattened_dict(
        {
            "training.n_iters": 5,
            "training.snapshot_freq_for_preemption": 100,
            "classifier.snapshot_freq": 100,
            "sampling.snr": 0.1,
            "data.path": "/elsewhere",
        }
    )
    compatibility.check_same_experiment(tmp_path, other)
    compatibility.check_same_experiment(tmp_path / "new", other)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(WorkdirError, match=r"cannot write in --workdir=.*file/run.*choose a folder"):
        workdirs.check_writable(file / "run")
