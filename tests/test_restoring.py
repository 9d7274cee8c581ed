"""Restoration of pictures from a workdir: with a score in closed form, so that what is drawn has a known law."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import tiny
from analytic import MU, S0, score_of_kernel
from PIL import Image

import datasets
import run_lib
from controllable_generation import build_operator
from errors import UserError
from experiment import drawing
from experiment.build import Experiment, build_experiment
from metrics.fidelity import psnr, ssim
from modes.restore import inputs as restore_inputs
from modes.restore import restore as restoring
from modes.restore import rounds as restore_rounds
from parallel import distributed
from report.restorations import RestoredImage, summarize
from solvers.ode import SolverError
from storage.files import read_npz
from workdir.checkpoints import CheckpointError, Checkpoints
from workdir.folder import WorkdirError, record_config

K, NOISE = 6, 0.1  # draws; noise of the measurement in units of the data's range, twice that in the network's
SETTINGS = {
    "restore__operator": "inpaint",
    "restore__mask": "right",
    "restore__method": "pigdm",
    "restore__data_std": S0,
    "restore__noise": NOISE,
    "restore__num_draws": K,
    "sampling__method": "dpmpp_3m",
    "sampling__num_steps": 20,
    "sampling__noise_removal": False,
    "eval__batch_size": 8,  # so that images straddle rounds
}
LEVELS = datasets.load_digits("test").levels[:3]
NAMES = ["00000_a", "00001_b", "00002_c"]
KNOWN = np.zeros((8, 8, 1), bool)
KNOWN[:, :4] = True


def configure(**changes):
    return tiny.make_config(**SETTINGS | changes).lock()


def save_pictures(folder, levels=LEVELS):
    folder.mkdir(exist_ok=True)
    for name, image in zip("abcdefgh", levels, strict=False):
        grey = np.floor(image[..., 0] / 16 * 255 + 0.5).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{name}.png")
    return folder


def middle(levels):
    """Levels in the network's range [-1, 1]: dequantized data."""
    return (levels.astype(np.float64) + 0.5) / 17 * 2 - 1


@pytest.fixture(autouse=True, scope="module")
def _closed_form_network():
    """In the place of the network: the score of independent N(MU, S0^2) values."""

    def gaussian(self, params, *, smooth=False):
        assert smooth  # else a discretely trained network would be asked at its levels only
        return lambda x, t: score_of_kernel(x, self.sde.mean_coeff(t), self.sde.std(t), 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "score_fn", gaussian)
        yield


@pytest.fixture(autouse=True, scope="module")
def _shared_programs():
    """Compiles the program of a configuration once."""
    programs, build = {}, restore_rounds.RestorationProgram

    def shared(experiment, operator, batch_size):
        key = (str(experiment.config.restore.operator), str(experiment.config.sampling), batch_size)
        return programs.setdefault(key, build(experiment, operator, batch_size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoring, "RestorationProgram", shared)
        patch.setattr(
            drawing, "batch_size", lambda experiment, num_images: experiment.config.eval.batch_size
        )  # one for all
        yield


@pytest.fixture(autouse=True, scope="module")
def _shared_snapshot():
    """Reads the checkpoint once."""
    read, snapshots = drawing.restore, {}

    def shared(experiment, workdir, number=0):
        if number not in snapshots:
            snapshots[number] = read(experiment, workdir, number)
        return snapshots[number]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "restore", shared)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    template = EXPERIMENT.state_template()
    record_config(folder, configure())
    with Checkpoints(folder, snapshot_freq=12, template=template) as checkpoints:
        checkpoints.save(template.replace(step=np.int32(12)))
    return folder


EXPERIMENT = build_experiment(configure())


def restore(workdir, output, images, *, num_images=0, **options):
    """What run_lib.restore does, without building the network's module again."""
    config = configure(restore__images=str(images), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoring, "open_experiment", lambda config, _: dataclasses.replace(EXPERIMENT, config=config))
        return restoring.restore(config, workdir, output, num_images=num_images)


@pytest.fixture(scope="module")
def restored(workdir):
    """Three pictures in three rounds, by a command that was killed in the second round and given again."""
    draw, calls = restore_rounds.RestorationProgram.__call__, []

    def draw_one_round(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    pictures = save_pictures(workdir / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore_rounds.RestorationProgram, "__call__", draw_one_round)
        config = configure(restore__images=str(pictures))
        with pytest.raises(KeyboardInterrupt):
            run_lib.restore(config, workdir, "restored")
        folder = workdir / "restored"
        assert {path.name for path in folder.iterdir()} == {"settings.json", "rounds", NAMES[0]}  # the first is whole
        before = (folder / NAMES[0] / "restorations.npz").stat().st_mtime_ns
        assert run_lib.restore(config, workdir, "restored") == folder
    assert len(calls) == 4  # 18 pairs are rounds of 8, 8 and 2; one call was killed
    assert (folder / NAMES[0] / "restorations.npz").stat().st_mtime_ns == before
    return folder


def arrays_of(folder):
    return [read_npz(folder / name / "restorations.npz") for name in NAMES]


def summary_of(folder):
    return json.loads((folder / "restore.json").read_text())


def picture(path):
    with Image.open(path) as image:
        return np.array(image)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_measurements_are_the_known_pixels_with_noise(restored):
    noises = []
    for image, arrays in zip(LEVELS, arrays_of(restored), strict=True):
        np.testing.assert_array_equal(arrays["truth"], image)
        np.testing.assert_array_equal(arrays["measurement"][~KNOWN], 0.0)
        noises.append((arrays["measurement"] - middle(image))[KNOWN])
    noises = np.array(noises)
    count = noises.size
    assert abs(noises.mean()) < 4 * 2 * NOISE / np.sqrt(count)
    assert noises.std() == pytest.approx(2 * NOISE, rel=4 / np.sqrt(2 * count))
    correlations = np.corrcoef(noises)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(32)  # each image has its own


def test_draws_have_the_law_of_the_posterior(restored):
    """Values are independent: known ones N(gain y + (1 - gain) MU, gain (2 NOISE)^2), unknown ones as the data."""
    gain = S0**2 / (S0**2 + (2 * NOISE) ** 2)
    z = []
    for arrays in arrays_of(restored):
        mean = np.where(KNOWN, gain * arrays["measurement"] + (1 - gain) * MU, MU)
        z.append((arrays["x"] - mean[None]) / np.where(KNOWN, np.sqrt(gain) * 2 * NOISE, S0)[None])
    z = np.array(z)  # [images, draws, 8, 8, 1]
    for part in (z[..., :4, :], z[..., 4:, :]):
        assert abs(part.mean()) < 4 / np.sqrt(part.size)
        assert part.var() == pytest.approx(1, abs=4 * np.sqrt(2 / part.size))
    flat = z.reshape(3 * K, -1)
    assert np.abs(np.corrcoef(flat)[np.triu_indices(3 * K, 1)]).max() < 5 / np.sqrt(64)  # no two draws are alike


def test_a_draw_follows_from_image_and_draw_alone(workdir, restored):
    """In another order, beside others, and of an image that is the only one."""
    experiment, operator = EXPERIMENT, build_operator(configure(), (8, 8, 1))
    arrays = arrays_of(restored)
    images, draws = np.array([2, 0, 1, 1, 2, 0, 0, 1]), np.array([5, 0, 3, 2, 1, 4, 0, 2])
    y = np.stack([arrays[i]["measurement"] for i in images])
    program = restoring.RestorationProgram(experiment, operator, 8)
    x, nfe, _ = program(distributed.replicate(experiment.state_template().params_ema), y, images, draws)
    assert nfe == arrays[0]["nfe"]
    for index, (i, j) in enumerate(zip(images, draws, strict=True)):
        np.testing.assert_array_equal(x[index], arrays[i]["x"][j])
    folder = restore(workdir, "alone", workdir / "pictures", num_images=1)
    alone = read_npz(folder / NAMES[0] / "restorations.npz")
    for name in ("x", "measurement", "restorations"):
        np.testing.assert_array_equal(alone[name], arrays[0][name])


def test_bad_files_change_nothing_for_the_others(workdir, restored, caplog):
    """And the run was not killed: bit for bit what the killed one drew."""
    pictures = save_pictures(workdir / "with_bad_ones")
    (pictures / "aa.png").write_bytes(b"damaged")
    Image.new("L", (9, 8)).save(pictures / "b_wide.png")
    folder = restore(workdir, "bad", pictures)
    for one, other in zip(arrays_of(folder), arrays_of(restored), strict=True):
        for name in ("x", "measurement", "restorations", "truth"):
            np.testing.assert_array_equal(one[name], other[name])
    summary, before = summary_of(folder), summary_of(restored)
    assert set(summary["skipped"]) == {"aa.png", "b_wide.png"}
    assert "2 file(s) were left out: aa.png, b_wide.png" in caplog.text
    assert "## 2 file(s) left out" in (folder / "restore.md").read_text()
    assert summary["metrics"] == before["metrics"]
    assert before["skipped"] == {}


def test_levels_are_those_of_what_is_drawn(restored):
    for arrays in arrays_of(restored):
        expected = np.clip(np.floor((arrays["x"] + 1) / 2 * 17), 0, 16)
        np.testing.assert_array_equal(arrays["restorations"], expected)


# --- how good it is --------------------------------------------------------------------------------------------------


def brightness(x):
    return np.clip(((np.asarray(x, np.float64) + 1) / 2 * 17 - 0.5) / 16, 0, 1)


def test_qualities_are_those_of_the_arrays(restored):
    summary = summary_of(restored)
    means = {metric["name"]: metric for metric in summary["metrics"]}
    of_images = {name: [] for name in means}
    for image, arrays, row in zip(LEVELS, arrays_of(restored), summary["images"], strict=True):
        truth, draws = image / 16, brightness(arrays["x"])
        seen = brightness(np.where(KNOWN, arrays["measurement"], 0.0))
        distance = np.sqrt(np.mean((arrays["x"] - arrays["measurement"])[:, KNOWN].astype(np.float64) ** 2, axis=1))
        expected = {
            "psnr_draws": [psnr(truth, draw) for draw in draws],
            "psnr_mean": [psnr(truth, draws.mean(axis=0))],
            "psnr_measurement": [psnr(truth, seen)],
            "ssim_draws": [ssim(truth, draw) for draw in draws],
            "ssim_mean": [ssim(truth, draws.mean(axis=0))],
            "ssim_measurement": [ssim(truth, seen)],
            "residual_noise": distance / (2 * NOISE),
            "residual_levels": distance / (2 / 17),
            "spread_levels": [np.sqrt(np.mean(draws.var(axis=0, ddof=1))) * 16],
        }
        assert row["qualities"].keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(row["qualities"][name], values, rtol=1e-4)
            of_images[name].append(np.mean(values))
    for name, values in of_images.items():
        assert means[name]["value"] == pytest.approx(np.mean(values), rel=1e-4)
        assert means[name]["stderr"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(3), rel=1e-3)
        assert means[name]["num_samples"] == 3


def test_the_summary_says_what_it_depends_on(restored):
    summary, page = summary_of(restored), (restored / "restore.md").read_text()
    facts = json.loads((restored / "settings.json").read_text())["facts"]
    assert summary["checkpoint"] == facts["checkpoint"] == {"number": 1, "step": 12, "ema": True}
    assert (summary["num_measured"], summary["num_draws"], summary["ssim_window"]) == (32, K, 7)
    assert summary["nfe"] == facts["nfe"] == int(arrays_of(restored)[0]["nfe"])
    rounds = [read_npz(path) for path in (restored / "rounds").iterdir()]
    assert summary["seconds"] == pytest.approx(sum(float(each["seconds"]) for each in rounds))
    assert summary["settings"]["restore.mask"] == "right"
    assert summary["machine"]["versions"]["jax"] == jax.__version__
    metric = next(metric for metric in summary["metrics"] if metric["name"] == "psnr_mean")
    [row] = [line.split(" | ") for line in page.splitlines() if line.startswith("| PSNR of the mean |")]
    assert float(row[1].split(" ")[0]) == pytest.approx(metric["value"], abs=metric["stderr"])
    assert all(f"[{name}]({name}/comparison.png)" in page for name in NAMES)


def image_of(qualities):
    return RestoredImage("a.png", "00000_a", qualities, 3, 1.0)


def test_a_perfect_restoration_is_left_out_of_the_mean_and_told():
    images = [image_of({"psnr_mean": [value], "ssim_mean": [1.0]}) for value in (20.0, np.inf, 30.0)]
    similarity, ratio = sorted(summarize(images), key=lambda metric: metric.name == "psnr_mean")
    assert (ratio.value, ratio.stderr, ratio.num_samples) == (25.0, 5.0, 2)
    assert ratio.note.endswith("; 1 image(s) with an infinite value left out")
    assert similarity.num_samples == 3
    assert images[1].to_dict()["qualities"] == {"psnr_mean": [None], "ssim_mean": [1.0]}
    [alone] = summarize(images[:1])[:1]
    assert (alone.value, alone.stderr) == (20.0, None)


# --- how it looks ----------------------------------------------------------------------------------------------------


def shade(values):
    return np.floor(np.clip(values, 0, 1) * 255 + 0.5)[..., 0]


def test_pictures_show_the_arrays(restored):
    """Eight pixels are drawn as 80, with 2 between them; the caption's strip is 20 pixels high."""
    arrays = arrays_of(restored)
    draws = [brightness(each["x"]) for each in arrays]
    stds = [each.std(axis=0, ddof=1) for each in draws]
    columns = [
        [image / 16 for image in LEVELS],
        [brightness(np.where(KNOWN, each["measurement"], 0.0)) for each in arrays],
        [each.mean(axis=0) for each in draws],
        [std / np.max(stds) for std in stds],
        *[[each[j] for each in draws] for j in range(K)],
    ]
    shown = picture(restored / "comparison.png")
    assert shown.shape == (20 + 2 + 82 * 3, 84 * len(columns), 3)
    for column, images in enumerate(columns):
        for row, image in enumerate(images):
            pixels = shown[22 + 82 * row :, 2 + 84 * column :][:80:10, :80:10, 0]
            np.testing.assert_allclose(pixels, shade(image), atol=1)  # float32 against float64 at the edge of a level
    one = {"truth": columns[0][1], "measurement": columns[1][1], "mean": columns[2][1], "std": stds[1] / stds[1].max()}
    one |= {f"draw_{j}": draws[1][j] for j in range(K)}
    files = {path.stem: path for path in (restored / NAMES[1]).glob("*.png")}
    assert files.keys() == {*one, "comparison"}
    for name, image in one.items():
        np.testing.assert_allclose(picture(files[name]), shade(image), atol=1)


def test_one_draw_has_no_standard_deviation(workdir, restored):
    folder = restore(workdir, "single", workdir / "pictures", restore__num_draws=1)
    assert {path.stem for path in (folder / NAMES[0]).glob("*.png")} == {
        *("truth", "measurement", "mean", "draw_0", "comparison")
    }
    assert picture(folder / "comparison.png").shape[1] == 84 * 3  # truth, measurement, the draw
    assert "spread_levels" not in summary_of(folder)["images"][0]["qualities"]
    for one, other in zip(arrays_of(folder), arrays_of(restored), strict=True):
        np.testing.assert_array_equal(one["x"], other["x"][:1])


# --- what is given ---------------------------------------------------------------------------------------------------


def test_a_measurement_that_was_written_can_be_given(workdir, restored):
    """measurement.png is rounded to 8 bits, and clipped; PSNR is not known then, and no truth is shown."""
    files = workdir / "measured"
    files.mkdir()
    for name, stem in zip(NAMES, "abc", strict=True):
        (restored / name / "measurement.png").rename(files / f"{stem}.png")
    folder = restore(workdir, "from_measured", files, restore__input="measurement")
    for one, other in zip(arrays_of(folder), arrays_of(restored), strict=True):
        inside = np.abs(other["measurement"]) < 16 / 17
        assert (inside & KNOWN).sum() > 5
        rounding = 0.5 / 255 * 16 / 17 * 2
        np.testing.assert_allclose(one["measurement"][inside], other["measurement"][inside], atol=1.01 * rounding)
        np.testing.assert_array_equal(one["measurement"][~KNOWN], 0.0)
        assert "truth" not in one
    assert set(summary_of(folder)["images"][0]["qualities"]) == {"residual_noise", "residual_levels", "spread_levels"}
    assert not (folder / NAMES[0] / "truth.png").exists()
    assert picture(folder / "comparison.png").shape[1] == 84 * (3 + K)


def test_the_test_split_is_the_default(workdir):
    inputs = restore_inputs.load_inputs(configure(), build_operator(configure(), (8, 8, 1)), 0)
    np.testing.assert_array_equal(inputs.levels, datasets.load_digits("test").levels[:8])
    assert (inputs.names[7], inputs.source) == ("test_7", "the test split of digits")


@pytest.mark.parametrize(("centered", "dequantize"), [(True, True), (False, False), (True, False)])
def test_brightness_undoes_the_middle_of_a_level(centered, dequantize):
    scaler = datasets.Scaler(17, centered, dequantize)
    levels = np.arange(17, dtype=np.uint8)
    np.testing.assert_allclose(restore_inputs.brightness(scaler.middle(levels), scaler), levels / 16, atol=1e-6)
    np.testing.assert_array_equal(restore_inputs.brightness(np.array([-9.0, 9.0]), scaler), [0.0, 1.0])


def test_a_measurement_is_seen_as_the_image_nearest_to_grey(monkeypatch):
    """In the range [0, 1], too: what is not known is grey, a small picture is enlarged by its own measurement."""
    scaler = datasets.Scaler(17, centered=False, dequantize=False)
    y = np.random.default_rng(0).uniform(0.2, 0.8, (4, 4, 1)).astype(np.float32)
    small = build_operator(configure(restore__operator="super_resolution"), (8, 8, 1))
    judge = restoring.Judge(small, scaler, 0.0)
    np.testing.assert_allclose(judge.measurement_as_image(y), y.repeat(2, axis=0).repeat(2, axis=1), atol=1e-6)
    np.testing.assert_allclose(judge.measurement_as_file(y), y, atol=1e-6)
    half = restoring.Judge(build_operator(configure(), (8, 8, 1)), scaler, 0.0)
    known = np.where(KNOWN, 0.25, 0.0).astype(np.float32)
    for seen in (half.measurement_as_image(known), half.measurement_as_file(known)):
        np.testing.assert_allclose(seen, np.where(KNOWN, 0.25, 0.5), atol=1e-6)
    spectrum = build_operator(configure(restore__operator="fourier", restore__fourier_share=1.0), (8, 8, 1))
    image = np.random.default_rng(1).uniform(size=(1, 8, 8, 1)).astype(np.float32)
    judge = restoring.Judge(spectrum, scaler, 0.0)
    y = np.asarray(spectrum.apply(image))[0]
    np.testing.assert_allclose(judge.measurement_as_file(y), image[0], atol=1e-5)  # all is measured; it is no picture
    np.testing.assert_allclose(judge.residual(image + 0.1, y), np.sqrt(0.01 * 64 / spectrum.num_measured), rtol=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"restore__num_draws": 0}, ValueError, "restore.num_draws=0: expected 1 or more"),
        ({"restore__input": "photo"}, ValueError, "restore.input='photo' is unknown; known: image, measurement"),
        ({"restore__resize": "fit"}, ValueError, "restore.resize='fit' is unknown; known: crop, none, stretch"),
        ({"num_images": -1}, ValueError, "--num_images=-1: expected 0 or more"),
        ({"images": "", "num_images": 298}, ValueError, "num_images=298, but the test split of digits has 297 images"),
        ({"images": "none"}, UserError, "restore.images='none' does not exist"),
        ({"restore__operator": "inpainting"}, ValueError, "restore.operator='inpainting' is unknown; known: "),
        ({"restore__mask": "middle"}, UserError, "restore.mask='middle': no such file"),
        ({"restore__method": "magic"}, ValueError, "restore.method='magic' is unknown; known: "),
        (
            {"images": "", "restore__input": "measurement"},
            ValueError,
            "restore.input='measurement' needs restore.images",
        ),
        (
            {"restore__input": "measurement", "restore__resize": "crop"},
            ValueError,
            "restore.resize='crop' would change what was measured",
        ),
        (
            {"restore__input": "measurement", "restore__operator": "fourier"},
            ValueError,
            "restore.operator='fourier': a measurement is no picture",
        ),
        (
            {"restore__input": "measurement", "restore__operator": "super_resolution"},
            ValueError,
            r"no picture that can be used: a.png: it has 8x8 pixels \(height x width\), expected 4x4",
        ),
    ],
)
def test_a_mistake_is_named_before_the_checkpoint_is_read(workdir, restored, monkeypatch, options, error, message):
    monkeypatch.setattr(drawing, "restore", None)
    with pytest.raises(error, match=message):
        restore(workdir, "none", options.pop("images", workdir / "pictures"), **options)
    assert not (workdir / "none").exists()


def test_results_of_other_images_or_settings_are_kept(workdir, restored):
    before = {path: path.read_bytes() for path in restored.glob("**/*") if path.is_file()}
    others = save_pictures(workdir / "others", LEVELS[::-1])
    with pytest.raises(WorkdirError, match=r"other settings \(images_sha256: .* now\); choose a new --output"):
        restore(workdir, "restored", others)
    with pytest.raises(WorkdirError, match=r"restore.num_draws: 6 there, 2 now"):
        restore(workdir, "restored", workdir / "pictures", restore__num_draws=2)
    with pytest.raises(WorkdirError, match=r"measured_sha256: .*; restore.mask: 'right' there, 'left' now"):
        restore(workdir, "restored", workdir / "pictures", restore__mask="left")
    with pytest.raises(ValueError, match=r"--output=\.\./out is outside"):
        restore(workdir, "../out", workdir / "pictures")
    with pytest.raises(CheckpointError, match="checkpoint 7 is not in"):
        run_lib.restore(configure(), workdir, "none", snapshot=7)
    assert before == {path: path.read_bytes() for path in restored.glob("**/*") if path.is_file()}


def test_a_folder_is_named_after_operator_and_method(tmp_path):
    assert restoring.default_output(configure(), 3) == "restore/ckpt_3_inpaint_pigdm"
    path = tmp_path / "mine.py"
    path.write_text("first")
    config, operator = configure(restore__operator=f"{path}:blur"), build_operator(configure(), (8, 8, 1))
    assert restoring.default_output(config, 3) == "restore/ckpt_3_blur_pigdm"
    inputs = restore_inputs.Inputs(("a",), "", LEVELS[:1], None, {})
    first = restoring.contents_of_restorations(config, inputs, operator)
    path.write_text("second")
    second = restoring.contents_of_restorations(config, inputs, operator)
    assert {name for name in first if first[name] != second[name]} == {"operator"}


def test_a_restoration_that_diverged_is_named():
    x = np.zeros((4, 2, 2, 1))
    restore_rounds.require_finite(x, np.arange(4), 3)
    x[2, 0, 0] = np.inf
    x[3, 0, 0] = np.nan
    with pytest.raises(SolverError, match="2 of 4 restorations are not finite, the first of them draw 1 of image 2; "):
        restore_rounds.require_finite(x, np.arange(5, 9), 3)


ON_FOUR_DEVICES = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_restoring
from experiment.build import Experiment

gaussian = lambda self, params, smooth: lambda x, t: test_restoring.score_of_kernel(
    x, self.sde.mean_coeff(t), self.sde.std(t), 0.0
)
Experiment.score_fn = gaussian
workdir = test_restoring.tiny.Path(sys.argv[3])
test_restoring.restore(workdir, "on_four", workdir / "pictures")
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_four_devices_draw_what_one_draws(workdir, restored):
    command = [sys.executable, "-c", ON_FOUR_DEVICES, str(tiny.ROOT), str(tiny.ROOT / "tests"), str(workdir)]
    done = tiny.run(command, devices=4)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, other in zip(arrays_of(workdir / "on_four"), arrays_of(restored), strict=True):
        np.testing.assert_allclose(one["x"], other["x"], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(one["measurement"], other["measurement"])
