"""--mode prepare: what TFDS must do once, in a process of its own, and what stops it in one sentence."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import tfds_files
import tiny
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

import checks
import run_lib
from configs import base
from errors import UserError
from sources import tfds_build

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tfds_build, "require_tensorflow", lambda package, purpose: None)  # its process is stood in for


def make_config(path, dataset, **changes):
    config = base.get_config()
    config.data.update(dataset=dataset, path=str(path), image_size=4, num_channels=3, **changes)
    return config


def write_own(root):
    records = [{"image": image, "label": i % 3} for i, image in enumerate(IMAGES)]
    features = {"image": tfds_files.image((4, 4, 3)), "label": tfds_files.label()}
    return tfds_files.write(root, "tiny_own", features, {"train": records[:4], "test": records[4:]})


# --- the whole mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "changes", "says"),
    [
        (
            "tfds:tiny_own",
            {},
            ["TFDS has tiny_own in", "train: 4 images of 4x4 pixels, 3 channel(s), 256 levels, 3 clas"],
        ),
        (
            "tfds:tiny_own",
            {"cache_gib": 0.0},
            ["test: 2 images", "decoded at every read: they exceed"],
        ),
        ("npz", {}, ["train: 5 images", "no labels; as stored; mapped from", "test: 1 images"]),
    ],
)
def test_prepare_says_what_there_is_and_where(tmp_path, caplog, dataset, changes, says):
    path = tmp_path / "own.npy"
    if dataset == "npz":
        np.save(path, IMAGES)
    else:
        write_own(path)
    caplog.set_level(logging.INFO)
    run_lib.prepare(make_config(path, dataset, **changes))
    for text in says:
        assert text in caplog.text
    kept = list((tmp_path / "cache/data").glob("*/images.npy"))
    assert len(kept) == (2 if dataset.startswith("tfds") and not changes else 0)


def test_data_inside_packages_need_no_preparation(caplog):
    caplog.set_level(logging.INFO)
    config = tiny.make_config()
    run_lib.prepare(config)
    assert "train: 1,500 images of 8x8 pixels, 1 channel(s), 17 levels, 10 classes; as stored; in memory" in caplog.text


# --- the process of TFDS ---------------------------------------------------------------------------------------------


def serve(monkeypatch, code, stdout=""):
    """Puts a result in the place of the process; returns the list of commands."""
    commands = []

    def run(command, **options):
        commands.append((command, options))
        return SimpleNamespace(returncode=code, stdout=stdout)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_what_is_not_there_is_prepared_by_a_process_of_its_own(tmp_path, monkeypatch):
    def run(command, **options):
        write_own(tmp_path)
        folder = tmp_path / "mnist" / "3.0.1"
        (tmp_path / "tiny_own" / "1.0.0").rename(folder.parent.mkdir() or folder)
        for file in folder.iterdir():
            file.rename(folder / file.name.replace("tiny_own", "mnist"))
        info = folder / "dataset_info.json"
        info.write_text(info.read_text().replace("tiny_own", "mnist").replace("1.0.0", "3.0.1"))
        ran.append((command, options))
        return SimpleNamespace(returncode=0, stdout="")

    ran = []
    monkeypatch.setattr(subprocess, "run", run)
    run_lib.prepare(make_config(tmp_path, "MNIST"))
    run_lib.prepare(make_config(tmp_path, "MNIST"))
    ((command, options),) = ran  # the second time it is there
    assert command == [sys.executable, "-m", "sources.tfds_build", "mnist", str(tmp_path)]
    assert options["cwd"] == tiny.ROOT
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("code", "stdout", "message"),
    [
        (3, "Downloading ...\n\ntfds_build: it rains\n", "'mnist' cannot be prepared in .*: it rains$"),
        (1, "", "'mnist' cannot be prepared in .*: TFDS ended with exit code 1; see its output above"),
    ],
)
def test_a_failure_of_the_process_is_told(tmp_path, monkeypatch, code, stdout, message):
    serve(monkeypatch, code, stdout)
    with pytest.raises(ValueError, match=message):
        run_lib.prepare(make_config(tmp_path, "MNIST"))


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        ("3.13", "not installed; to install it: python -m pip install -r requirements.txt"),
        ("3.14", "not available for Python 3.14, only up to 3.13; .*: sh tools/make_venv.sh python3.13 .venv "),
    ],
)
def test_without_tensorflow_the_error_says_how_to_install_it(tmp_path, monkeypatch, python, expected):
    commands = serve(monkeypatch, 0)
    monkeypatch.setattr(tfds_build, "require_tensorflow", checks.require_tensorflow)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(checks.platform, "python_version_tuple", lambda: (*python.split("."), "0"))
    with pytest.raises(UserError, match=rf"preparing 'cifar10' .* needs tensorflow, which is {expected}"):
        run_lib.prepare(make_config(tmp_path, "CIFAR10"))
    assert not commands


def test_data_in_files_of_another_kind_are_refused(tmp_path):
    folder = write_own(tmp_path)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(
        ValueError, match=r"'tiny_own' is prepared in .*, but not as ArrayRecord files.*--config.data.path"
    ):
        run_lib.prepare(make_config(tmp_path, "tfds:tiny_own"))


# --- what stops TFDS -------------------------------------------------------------------------------------------------


def builder(*files, instructions=None):
    infos = {f"https://host/{name}": SimpleNamespace(filename=name) for name in files}
    return SimpleNamespace(url_infos=infos, MANUAL_DOWNLOAD_INSTRUCTIONS=instructions)


def refused(url):
    return requests.exceptions.ConnectionError("no route", request=requests.Request("GET", url).prepare())


def caused(error):
    try:
        raise RuntimeError("around it") from error
    except RuntimeError as outer:
        return outer


MANUAL = Path("data/downloads/manual")
MANY = [f"{i}.zip" for i in range(9)]


@pytest.mark.parametrize(
    ("error", "of", "expected"),
    [
        (
            caused(refused("https://host/a.tar")),
            builder("a.tar", "b.tar"),
            "a download failed: https://host/a.tar (ConnectionError); connect this machine to the network, or put "
            "a.tar, b.tar, downloaded elsewhere, in data/downloads/manual",
        ),
        (refused("https://host/7.zip"), builder(*MANY), "or put 7.zip, downloaded elsewhere, in data/downloads/manual"),
        (DownloadError("HTTP code: 404."), builder("a"), "a download failed: HTTP code: 404. (DownloadError); connect"),
        (
            NonMatchingChecksumError("tmp/a.tar has wrong checksum:\n* Expected: 3"),
            builder("a.tar"),
            "a file is not the one that TFDS expects, get it again: tmp/a.tar has",
        ),
        (
            ModuleNotFoundError("No module named 'tensorflow_io'", name="tensorflow_io"),
            builder(),
            "TFDS lacks a package for it: No module named 'tensorflow_io'; install that, or get the pictures and use ",
        ),
        (
            AssertionError("Manual directory x does not exist or is empty."),
            builder(instructions="Register,\n  then put A.tar here."),
            "it must be downloaded by hand to data/downloads/manual: Register, then put A.tar here.",
        ),
        (
            OSError("Not enough disk space. Needed: 160 GiB (download: 155 GiB, generated: 5 GiB)"),
            builder("a.tar"),
            "its files cannot be written: Not enough disk space. Needed: 160 GiB (download: 155 GiB, generated: 5 GiB)",
        ),
        (
            PermissionError(13, "Permission denied", "/data"),
            builder("a"),
            "cannot be written: [Errno 13] Permission denied",
        ),
        (AssertionError("a defect"), builder(), ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stops_tfds_is_one_sentence(error, of, expected):
    sentence = tfds_build._explain(error, of, MANUAL)
    assert expected in sentence
    assert bool(sentence) == bool(expected)
    assert "\n" not in sentence


@pytest.mark.slow
def test_a_machine_without_network_is_told_within_seconds(tmp_path):
    """TFDS itself tries for 204 s. Nobody listens at the port of the proxy."""
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "sources.tfds_build", "mnist", str(tmp_path)]
    result = subprocess.run(
        command, cwd=tiny.ROOT, env=tiny.environment() | proxy, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == tfds_build.EXIT_REFUSED, result.stderr[-2000:]
    assert "tfds_build: a download failed: https://" in result.stdout
    assert f"train-labels-idx1-ubyte.gz, downloaded elsewhere, in {tmp_path}/downloads/manual" in result.stdout
    assert "Traceback" not in result.stderr
