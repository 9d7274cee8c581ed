"""The whole job on real images: train, get killed, resume, evaluate, report."""

import json
import math
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from cases import by_default
from PIL import Image

from experiment import startup
from experiment.build import build_experiment
from workdir.checkpoints import Checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(finished_run, digits_features, tmp_path_factory):
    """A run that nothing disturbed, on one device and without TensorFlow; trained and evaluated."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    shutil.copytree(finished_run, workdir)
    shutil.copytree(digits_features, workdir / "features")
    tiny.succeed(tiny.without_tensorflow(tiny.command("eval", workdir, eval__begin_ckpt=2)))
    return workdir


def final_state(workdir):
    experiment = build_experiment(tiny.make_config())
    with Checkpoints(workdir, snapshot_freq=12, template=experiment.state_template(), read_only=True) as checkpoints:
        return checkpoints.restore_snapshot(2)


def losses(workdir):
    return [json.loads(line) for line in (workdir / "losses.jsonl").read_text().splitlines()]


def report(workdir, number=2):
    stored = json.loads((workdir / "eval" / f"report_{number}.json").read_text())
    return stored, {metric["name"]: metric for metric in stored["metrics"]}


def test_the_workdir_holds_what_is_documented(unbroken):
    assert sorted(path.name for path in unbroken.iterdir()) == [
        "checkpoints",
        "checkpoints-meta",
        "config.json",
        "eval",
        "features",
        "losses.jsonl",
        "samples",
        "stdout.txt",
        "tensorboard",
    ]
    assert list(startup.parse((unbroken / "stdout.txt").read_text())) == ["total", *startup.PHASES]
    assert [record["step"] for record in losses(unbroken)] == list(range(2, 26, 2))
    assert "eval_loss" in losses(unbroken)[1]
    stored = np.load(unbroken / "samples" / "iter_12" / "sample.npz", allow_pickle=False)
    assert stored["samples"].shape == (8, 8, 8, 1)
    assert stored["samples"].max() <= 16
    assert int(stored["nfe"]) == 25
    with Image.open(unbroken / "samples" / "iter_12" / "sample.png") as image:
        assert len(image.getcolors()) > 2


def test_the_report_counts_every_image_once(unbroken):
    stored, metrics = report(unbroken)
    assert stored["checkpoint"] == {"number": 2, "step": 24, "ema": True}
    assert stored["sampler"]["num_samples"] == 200
    assert stored["sampler"]["nfe"] == 25
    assert stored["sampler"]["rounding"] == "the bin they lie in of 17 levels"
    assert len(stored["data"]["hash"]) == 64
    assert metrics["frechet_distance"]["num_samples"] == 200
    assert metrics["bits_per_dim"]["num_samples"] == 297
    assert metrics["bits_per_dim_bound"]["num_samples"] == 297
    for suffix in ("", "_bound"):  # -log2 p(x) / D of values in [-1, 1], whose 17 levels are 2 / 17 wide
        nats = metrics[f"log_likelihood{suffix}"]["value"]
        bits = math.log2(17 / 2) - nats / (64 * math.log(2))
        assert metrics[f"bits_per_dim{suffix}"]["value"] == pytest.approx(bits, rel=1e-4)
    assert metrics["loss"]["num_samples"] == 297
    assert metrics["gaussian_bits_per_dim"]["value"] == pytest.approx(2.949, abs=0.001)
    assert all(metric["stderr"] is not None for metric in metrics.values())
    page = (unbroken / "eval" / "report.md").read_text()
    assert "times the floor" in page
    assert "does **not** beat the Gaussian" in page  # 24 steps do not


def test_an_interrupted_evaluation_goes_on_where_it_was(unbroken, tmp_path):
    """Results that are there are used, the others are computed again, and the numbers are the same."""
    folder = unbroken / "eval" / "ckpt_2"
    before, kept = report(unbroken)[0], folder / "samples_from_0.npz"
    modified = kept.stat().st_mtime_ns
    for name in ("samples_from_152.npz", "bpd_0_1.npz", "loss.npz"):
        (folder / name).unlink()
    (unbroken / "eval" / "report_2.json").unlink()
    tiny.succeed(tiny.command("eval", unbroken, eval__begin_ckpt=2))
    after = report(unbroken)[0]
    assert kept.stat().st_mtime_ns == modified
    before["sampler"].pop("seconds")
    after["sampler"].pop("seconds")
    assert after == before


def test_results_of_other_settings_are_not_mixed(unbroken):
    result = tiny.run(tiny.command("eval", unbroken, eval__begin_ckpt=2, sampling__num_steps=30))
    assert result.returncode == 1
    assert "holds results of other settings (sampling.num_steps: 25 there, 30 now)" in result.stderr


def test_a_missing_checkpoint_ends_the_evaluation_at_once(unbroken):
    result = tiny.run(tiny.command("eval", unbroken, eval__end_ckpt=5))
    assert result.returncode == 1
    assert "checkpoint 3 is not in" in result.stderr
    assert "present: 1, 2" in result.stderr


# Runs main.py and sends the process a real signal when a step is recorded and the first snapshot is complete.
WITH_SIGNAL = """
import os, pathlib, runpy, signal, sys, time
from workdir import progress
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets jobs in the background ignore
sign, at_step, workdir = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
record = progress.TrainingProgress.record

def record_and_signal(self, step, **values):
    record(self, step, **values)
    if step == at_step:
        while not (workdir / "checkpoints" / "1").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), sign)

progress.TrainingProgress.record = record_and_signal
sys.argv = sys.argv[4:]
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("sign", "step", "code"),
    by_default(
        [(signal.SIGKILL, 18, -9)], [(signal.SIGKILL, 18, -9), (signal.SIGINT, 14, 130), (signal.SIGTERM, 14, 143)]
    ),
)
def test_a_killed_run_ends_like_an_unbroken_one(unbroken, tmp_path, sign, step, code):
    """Bit for bit: parameters, moving average, optimizer, and the recorded losses."""
    arguments = tiny.command("train", tmp_path)
    result = tiny.run(
        [arguments[0], "-c", WITH_SIGNAL, str(int(sign)), str(step), str(tmp_path), *arguments[1:]],
    )
    assert result.returncode == code
    if sign != signal.SIGKILL:
        assert "is saved; the same command resumes from it" in (tmp_path / "stdout.txt").read_text()
    tiny.succeed(arguments)
    assert "restored step" in (tmp_path / "stdout.txt").read_text()
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), final_state(unbroken))
    assert losses(tmp_path) == losses(unbroken)


@pytest.mark.exhaustive
def test_a_run_shorter_than_the_distance_of_snapshots_can_be_used(tmp_path):
    """Its last step is checkpoint 1, with its grid; before that a state to resume from is."""
    settings = {"training__n_iters": 8, "training__snapshot_freq": 1000, "training__log_freq": 2}
    tiny.succeed(tiny.command("train", tmp_path, **settings))
    assert (tmp_path / "samples" / "iter_8" / "sample.png").exists()
    tiny.succeed(tiny.command("eval", tmp_path, **settings, eval__end_ckpt=1))
    assert report(tmp_path, 1)[0]["checkpoint"] == {"number": 1, "step": 8, "ema": True}
    tiny.succeed(tiny.command("sample", tmp_path, "--num_images=2", "--snapshot=4", "--output=early", **settings))
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    result = tiny.succeed(tiny.command("sample", tmp_path, "--num_images=2", "--output=newest", **settings))
    assert "restored checkpoint 4 (step 4)" in result.stderr


def test_another_network_in_the_same_workdir_is_refused(unbroken):
    result = tiny.run(tiny.command("train", unbroken, model__nf=16))
    assert result.returncode == 1
    assert "holds another experiment (model.nf: 8 there, 16 now); choose a new --workdir" in result.stderr


@pytest.mark.exhaustive
def test_a_run_that_diverges_stops_and_keeps_its_good_checkpoints(tmp_path):
    tiny.succeed(tiny.command("train", tmp_path, training__n_iters=12))
    result = tiny.run(tiny.command("train", tmp_path, optim__lr=1e30, optim__warmup=0, optim__grad_clip=-1.0))
    assert result.returncode == 1
    assert "the checkpoints before it are kept: lower optim.lr" in result.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1"]


@pytest.mark.exhaustive
def test_a_mixed_folder_trains_and_evaluates(tmp_path):
    """Pictures of many sizes, one of them grey, one with transparency and one broken; the network is not square."""
    generator = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "data" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        shape = (*generator.integers(6, 30, 2), 4 if number == 1 else 3)
        picture = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        (picture.convert("L") if number == 2 else picture).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / f"{number}.png").read_bytes()[:100])
    changes = {"path": tmp_path / "data", "dataset": "folder", "num_levels": 256, "num_channels": 3, "image_width": 12}
    settings = {f"data__{key}": value for key, value in changes.items()}
    settings |= {"eval__batch_size": 8, "eval__num_samples": 12, "training__n_iters": 12, "eval__end_ckpt": 1}
    for mode in ("train", "eval"):
        result = tiny.succeed(tiny.command(mode, tmp_path / "run", **settings))
        assert (
            "36 pictures to train on, 4 to test (held out by data.test_share=0.1), 2 classes: cat, dog" in result.stderr
        )
        assert "left out 1 of 41 pictures: cat/broken.png: it cannot be read: " in result.stderr
    stored, metrics = report(tmp_path / "run", 1)
    assert (stored["data"]["train_images"], stored["data"]["test_images"]) == (36, 4)
    assert metrics["loss"]["num_samples"] == metrics["bits_per_dim"]["num_samples"] == 4
    assert metrics["frechet_distance"]["num_samples"] == 12
    with np.load(tmp_path / "run/eval/ckpt_1/samples_from_0.npz") as drawn:
        assert drawn["samples"].shape[1:] == (8, 12, 3)
    strict = tiny.run(tiny.command("train", tmp_path / "other", **settings, data__strict=True))
    assert strict.returncode == 1
    assert "1 of 41 pictures of data.path=" in strict.stderr
