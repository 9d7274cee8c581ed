"""The extractor "tfgan": tensorflow_gan with a SavedModel, in a process of its own."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import tfgan_extractor
import tiny

import checks
from errors import UserError
from metrics import tfgan
from metrics.extractors import build_extractor


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("tensorflow_gan") is None, reason="tensorflow_gan is not installed")
def test_a_saved_model_is_applied_by_tensorflow_gan(tmp_path):
    command = [sys.executable, tiny.ROOT / "tests/tfgan_extractor.py", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tiny.ROOT, env=tiny.environment())
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    for channels in (1, 3):
        expected = tfgan_extractor.expected(tfgan_extractor.images(channels))
        for array, true in zip(found["outputs"][str(channels)], expected, strict=True):
            np.testing.assert_allclose(array, true, rtol=1e-5, atol=1e-6)
    assert (found["key"], found["num_features"]) == ("tfgan", tfgan_extractor.NUM_FEATURES)
    assert found["name"] == f"tensorflow_gan with {tmp_path}/model"
    assert found["hash"] == tfgan._folder_hash(tmp_path / "model")
    message = f"the SavedModel {tmp_path}/other has no output logits; the extractor 'tfgan' needs it"
    assert found["refusal"] == message


def test_the_hash_is_of_every_file(tmp_path):
    (tmp_path / "variables").mkdir()
    (tmp_path / "variables/data").write_bytes(b"123")
    hashes = {tfgan._folder_hash(tmp_path)}
    (tmp_path / "variables/data").write_bytes(b"124")
    hashes.add(tfgan._folder_hash(tmp_path))
    (tmp_path / "variables/data").rename(tmp_path / "variables/other")
    hashes.add(tfgan._folder_hash(tmp_path))
    assert len(hashes) == 3


def test_what_is_missing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(tfgan, "_import_tfgan", lambda: None)
    with pytest.raises(ValueError, match=f"{tmp_path} is not a SavedModel: it has no saved_model.pb"):
        build_extractor("tfgan", num_levels=256, weights=str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    tfgan._import_tfgan.cache_clear()
    with pytest.raises(UserError, match=r"needs tensorflow_gan, .* pip install -r requirements.txt"):
        build_extractor("tfgan", num_levels=256)
    assert "tensorflow" not in sys.modules


def test_a_model_that_cannot_be_downloaded_is_told(monkeypatch):
    def resolve(handle):
        raise OSError("Name or service not known")

    monkeypatch.setattr(tfgan, "_import_tfgan", lambda: None)
    hub = type("Hub", (), {"resolve": staticmethod(resolve)})
    monkeypatch.setitem(sys.modules, "tensorflow_hub", hub)
    with pytest.raises(ValueError, match=r"cannot get https://tfhub.dev/.*/1: Name or .*; download it where there is"):
        build_extractor("tfgan", num_levels=256)
