"""Encoding of images from a workdir: with a score in closed form, so that latents and pictures are known."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from analytic import S0, score_of_kernel
from PIL import Image

import datasets
import latents
import run_lib
from errors import UserError
from experiment.build import Experiment, build_experiment
from modes import encode as encoding
from solvers import ode
from workdir.checkpoints import CheckpointError, Checkpoints
from workdir.folder import WorkdirError

MEANS = {1: -0.4, 2: 0.6}  # of the data that each snapshot's network has learnt
SETTINGS = {"eval__batch_size": 4, "sampling__rtol": 1e-5, "sampling__atol": 1e-5}
EPS = 1e-3  # where the images of the VP SDE lie


def gaussian_score_fn(self, params, *, smooth=False):
    """In the place of the network: the score of N(mean, S0^2) data, the mean being the first of the parameters."""
    assert smooth  # else a discretely trained network would be asked at its levels only
    mean = jax.tree.leaves(params)[0].ravel()[0]

    def score_fn(x, t):
        m = self.sde.mean_coeff(t)
        shifted = x - m.reshape(-1, 1, 1, 1) * (mean - 0.3)  # analytic.MU
        return score_of_kernel(shifted, m, self.sde.std(t), 0.0)

    return score_fn


def closed_form(mean, x, start, end):
    """Where the flow of those data takes x, from one time to the other, in float64."""
    sde = build_experiment(tiny.make_config()).sde
    with jax.enable_x64(True):
        t = jnp.array([start, end])
        m, std = np.asarray(sde.mean_coeff(t)), np.asarray(sde.std(t))
    v = (m * S0) ** 2 + std**2
    return m[1] * mean + np.sqrt(v[1] / v[0]) * (np.asarray(x, np.float64) - m[0] * mean)


def to_levels(x):
    return np.clip(np.floor((x + 1) / 2 * 17), 0, 16)


def assert_levels_agree(levels, x):
    """The levels are those of x, but for values that the solver's error has moved over an edge."""
    differences = np.abs(levels - to_levels(x))
    assert differences.max() <= 1
    assert (differences > 0).mean() < 0.01


def middle(levels):
    return (np.asarray(levels, np.float64) + 0.5) / 17 * 2 - 1


@pytest.fixture(autouse=True, scope="module")
def _closed_form_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "score_fn", gaussian_score_fn)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with two snapshots, whose parameters are all one number; the averaged ones count."""
    folder = tmp_path_factory.mktemp("run")
    template = build_experiment(tiny.make_config()).state_template()
    with Checkpoints(folder, snapshot_freq=12, template=template) as checkpoints:
        for number, mean in MEANS.items():
            filled = jax.tree.map(lambda leaf, mean=mean: np.full_like(leaf, mean), template.params)
            checkpoints.save(template.replace(step=np.int32(12 * number), params_ema=filled))
    return folder


def encode(workdir, output, *, images=None, snapshot=0, num_images=5, **changes):
    config = tiny.make_config(**SETTINGS | changes)
    run_lib.encode(config, workdir, output, snapshot=snapshot, num_images=num_images, images=images)
    return read(workdir / output)


def read(folder):
    with np.load(folder / "latents.npz") as stored:
        return dict(stored), json.loads((folder / "encode.json").read_text())


@pytest.fixture(scope="module")
def encoded(workdir):
    """Five images in two batches of four, by the snapshot that is not the newest."""
    return encode(workdir, "encoded", snapshot=1)


def test_latents_are_those_of_the_snapshot(encoded):
    arrays, summary = encoded
    np.testing.assert_array_equal(arrays["levels"], datasets.load_digits("test").levels[:5])
    z = closed_form(MEANS[1], middle(arrays["levels"]), EPS, 1.0)
    np.testing.assert_allclose(arrays["latents"], z, rtol=2e-4, atol=2e-4)
    assert arrays["latents"].dtype == np.float32
    assert summary["checkpoint"] == {"number": 1, "step": 12, "ema": True}
    assert summary["images"]["source"] == "the test split of digits"
    assert summary["solver"] == {"eps": EPS, "rtol": 1e-5, "atol": 1e-5}
    assert summary["latents"]["std"]["value"] == pytest.approx(z.std(), rel=1e-3)
    assert summary["seed"] == 42


def test_images_come_back_and_the_error_is_reported(encoded):
    arrays, summary = encoded
    np.testing.assert_array_equal(arrays["reconstruction"], arrays["levels"])
    metrics = {metric["name"]: metric for metric in summary["metrics"]}
    rms = metrics["reconstruction_rms"]
    assert 1e-7 < rms["value"] < 3e-4  # of 10 to 20 tolerances, see test_latents.py
    assert rms["value"] == pytest.approx(arrays["rms"].mean())
    assert rms["stderr"] == pytest.approx(arrays["rms"].std(ddof=1) / np.sqrt(5))
    assert metrics["reconstruction_rms_levels"]["value"] == pytest.approx(rms["value"] * 17 / 2)
    assert metrics["reconstruction_max_levels"]["value"] == arrays["max_levels"].max()
    assert metrics["unchanged_levels"]["value"] == 1.0
    assert summary["nfe"] == {name: int(arrays[f"nfe_{name}"]) for name in ("encode", "decode")}
    assert 20 < summary["nfe"]["encode"] < 400


def test_the_ways_between_images_and_scaled_latents_are_decoded(encoded):
    arrays, _ = encoded
    z = arrays["latents"]
    way = latents.slerp(z[[0, 2]], z[[1, 3]], np.linspace(0, 1, 9))  # the fifth image has no partner
    assert arrays["interpolation"].shape == way.shape
    assert_levels_agree(arrays["interpolation"], closed_form(MEANS[1], way, 1.0, EPS))
    np.testing.assert_array_equal(arrays["interpolation"][:, 0], arrays["reconstruction"][[0, 2]])
    np.testing.assert_array_equal(arrays["interpolation"][:, -1], arrays["reconstruction"][[1, 3]])
    scaled = z[:, None] * np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]).reshape(1, 7, 1, 1, 1)
    assert_levels_agree(arrays["temperature"], closed_form(MEANS[1], scaled, 1.0, EPS))


def picture(path):
    with Image.open(path) as image:
        return np.array(image)


def test_pictures_show_the_arrays(encoded, workdir):
    """Eight pixels are drawn as 32, with 2 between them; the caption's strip is 20 pixels high."""
    arrays, _ = encoded
    grey = lambda levels: np.floor(levels[..., 0] / 16 * 255 + 0.5).astype(np.uint8)  # noqa: E731
    for name, images in (
        ("interpolation", arrays["interpolation"]),
        ("temperature", np.concatenate([arrays["levels"][:, None], arrays["temperature"]], axis=1)),
    ):
        shown = picture(workdir / "encoded" / f"{name}.png")
        rows, columns = images.shape[:2]
        assert shown.shape == (20 + 2 + 34 * rows, 36 * columns, 3)
        for row in range(rows):
            for column in range(columns):
                pixels = shown[22 + 34 * row :, 2 + 36 * column :][:32:4, :32:4, 0]
                np.testing.assert_array_equal(pixels, grey(images[row, column]))
    shown = picture(workdir / "encoded" / "reconstruction.png")
    left, right = shown[22:54:4, 2:34:4, 0], shown[22:54:4, 2 + 3 * 34 + 2 + 16 :][:, :32:4, 0]
    np.testing.assert_array_equal(left, grey(arrays["levels"][0]))
    np.testing.assert_array_equal(right, grey(arrays["reconstruction"][0]))


@pytest.mark.exhaustive
def test_the_newest_snapshot_is_the_default_and_results_of_the_same_settings_are_replaced(workdir, tmp_path, caplog):
    """A single image has no partner, and its error no standard error; then samples of a file, in its place."""
    folder = workdir / "replaced"
    folder.mkdir()
    (folder / "interpolation.png").write_bytes(b"of an older run")
    with caplog.at_level("INFO", logger="absl"):
        arrays, summary = encode(workdir, "replaced", num_images=1)
    assert summary["checkpoint"]["number"] == 2
    z = closed_form(MEANS[2], middle(arrays["levels"]), EPS, 1.0)
    np.testing.assert_allclose(arrays["latents"], z, rtol=2e-4, atol=2e-4)
    assert arrays["interpolation"].shape == (0, 9, 8, 8, 1)
    assert {path.name for path in folder.iterdir()} == {
        *("settings.json", "encode.json", "latents.npz", "reconstruction.png", "temperature.png")
    }
    assert "no interpolation.png: it needs two images or more" in caplog.text
    assert "1 image(s) of the test split of digits" in caplog.text
    assert summary["metrics"][0]["stderr"] is None
    assert "dimension_stds" not in summary["latents"]

    levels = datasets.load_digits("train").levels[:3]
    np.savez(tmp_path / "drawn.npz", samples=levels)
    arrays, summary = encode(workdir, "replaced", num_images=1, images=tmp_path / "drawn.npz")
    np.testing.assert_array_equal(arrays["levels"], levels[:1])
    assert summary["images"]["source"] == str(tmp_path / "drawn.npz")


def test_results_of_other_settings_are_refused_before_the_work(encoded, workdir, monkeypatch):
    monkeypatch.setattr(encoding, "encode_and_decode", None)
    before = (workdir / "encoded" / "encode.json").read_bytes()
    with pytest.raises(WorkdirError, match=r"holds results of other settings \(sampling.rtol: 1e-05 there, 0.001 now"):
        encode(workdir, "encoded", snapshot=1, sampling__rtol=1e-3)
    with pytest.raises(WorkdirError, match="params_crc32"):
        encode(workdir, "encoded", snapshot=2)
    assert (workdir / "encoded" / "encode.json").read_bytes() == before


def test_nothing_is_written_when_the_solver_gives_up(workdir, monkeypatch):
    monkeypatch.setattr(Experiment, "score_fn", lambda self, params, smooth: lambda x, t: x * jnp.nan)
    with pytest.raises(ode.SolverError, match="encoding: the solver gave up on 2 of 2 examples"):
        encode(workdir, "failed", num_images=2)
    assert not (workdir / "failed").exists()


@pytest.mark.parametrize("name", ["samples", "images"])
def test_images_of_a_file_are_its_first(tmp_path, name):
    levels = datasets.load_digits("train").levels[:3]
    np.savez(tmp_path / "file.npz", **{name: levels})
    loaded, described = encoding.load_images(build_experiment(tiny.make_config()), 2, tmp_path / "file.npz")
    np.testing.assert_array_equal(loaded, levels[:2])
    assert described == str(tmp_path / "file.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"levels": np.zeros((2, 8, 8, 1), np.uint8)}, "bad.npz has levels; expected an array 'samples' or 'images'"),
        ({}, "bad.npz has nothing; expected"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, r"are uint8 of shape \(2, 8, 8, 3\); expected .*\(N, 8, 8, 1\)"),
        ({"samples": np.zeros((2, 8, 8, 1))}, r"samples of .* are float64 of shape \(2, 8, 8, 1\); expected levels"),
        ({"images": np.full((2, 8, 8, 1), 17, np.uint8)}, "have level 17; expected levels below data.num_levels=17"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8)}, r"num_images=5, but .*bad.npz has 2 images; ask for at most"),
    ],
)
def test_a_file_of_other_images_is_refused(workdir, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        encode(workdir, "none", images=tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_images": -1}, ValueError, "num_images=-1; expected 1 or more"),
        ({"num_images": 298}, ValueError, "num_images=298, but the test split of digits has 297 images; ask for at"),
        ({"sampling__atol": 0.0}, ValueError, "sampling.atol=0.0: expected a positive number"),
        ({"eval__batch_size": 0}, ValueError, "eval.batch_size=0: expected 1 or more"),
        (
            {"snapshot": 7},
            CheckpointError,
            "checkpoint 7 is not in .*; present: 1, 2; set --snapshot to one of",
        ),
        ({"snapshot": -1}, ValueError, "--snapshot=-1: expected 0 or more"),
        ({"images": "/dev/shm/none.npz"}, UserError, "/dev/shm/none.npz"),
    ],
)
def test_a_mistake_is_named_before_the_work(workdir, monkeypatch, options, error, message):
    monkeypatch.setattr(encoding, "encode_and_decode", None)
    with pytest.raises(error, match=message):
        encode(workdir, "none", **options)
    assert not (workdir / "none").exists()


def test_a_workdir_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; train until one is written"):
        encode(tmp_path, "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training__sde": "vesde", "training__continuous": False}, "its flow is a staircase in time"),
        (
            {"training__continuous": False, "model__num_scales": 50},
            "trained at 50 noise levels; the flow also uses times",
        ),
        ({}, ""),
    ],
)
def test_a_discretely_trained_network_is_warned_of(settings, message, caplog):
    encoding._warn_of_discrete(build_experiment(tiny.make_config(**settings)))
    assert message in caplog.text
    assert bool(message) == bool(caplog.text)


def test_errors_of_each_image():
    """One image that is off by a quarter of a level everywhere, and one by two levels in one of 16 values."""
    x = np.zeros((2, 4, 4, 1), np.float32)
    x_decoded, reconstruction = x.copy(), np.zeros((2, 4, 4, 1), np.uint8)
    x_decoded[0] += 0.025
    x_decoded[1, 2, 2], reconstruction[1, 2, 2] = 0.2, 2
    result = encoding.Encoded(
        levels=np.zeros((2, 4, 4, 1), np.uint8),
        x=x,
        latents=x,
        x_decoded=x_decoded,
        reconstruction=reconstruction,
        interpolation=x,
        temperature=x,
        nfe={},
    )
    errors = result.errors(0.1)
    np.testing.assert_allclose(errors["rms"], [0.025, 0.05], rtol=1e-6)
    np.testing.assert_allclose(errors["rms_levels"], [0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(errors["max_levels"], [0.25, 2.0], rtol=1e-6)
    np.testing.assert_allclose(errors["unchanged"], [1, 15 / 16])


ON_FOUR_DEVICES = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_encoding
from experiment.build import Experiment

Experiment.score_fn = test_encoding.gaussian_score_fn
test_encoding.encode(test_encoding.tiny.Path(sys.argv[3]), "on_four", snapshot=1)
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_four_devices_give_the_latents_of_one(encoded, workdir):
    command = [sys.executable, "-c", ON_FOUR_DEVICES, str(tiny.ROOT), str(tiny.ROOT / "tests"), str(workdir)]
    done = tiny.run(command, devices=4)
    assert done.returncode == 0, done.stderr[-3000:]
    arrays, summary = read(workdir / "on_four")
    for name in ("latents", "rms"):
        np.testing.assert_allclose(arrays[name], encoded[0][name], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(arrays["reconstruction"], encoded[0]["reconstruction"])
    assert summary["nfe"] == encoded[1]["nfe"]
