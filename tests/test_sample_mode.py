"""The modes "sample" and "compare_samplers" on a workdir with a checkpoint of a tiny network."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import datasets
import run_lib
import sampling
from configs.settings import affecting
from evaluation import sample_metrics
from experiment import drawing
from experiment.build import Experiment, SamplingProgram, build_experiment
from metrics.classifier import build_feature_extractor
from modes import sample as sample_run
from modes.compare_samplers import compare
from modes.evaluate import evaluate as eval_loop
from parallel import distributed
from report import plots
from storage.files import read_npz
from workdir import folder as workdirs
from workdir import results
from workdir.checkpoints import CheckpointError, Checkpoints

QUICK_ODE = {"sampling__method": "ode", "sampling__rtol": 1e-2, "sampling__atol": 1e-2}
SAMPLING = {
    "sampling__predictor": "euler_maruyama",  # which may take any number of steps
    "sampling__num_steps": 4,
    "eval__batch_size": 8,
    "eval__num_samples": 16,
}


def configure(**changes):
    return tiny.make_config(**SAMPLING | changes).lock()


def make_workdir(folder, config):
    """A workdir with checkpoints 1 and 2 of a network whose averaged parameters are random; the others are NaN."""
    experiment = build_experiment(config)
    state = experiment.init_state()
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, state.params_ema))
    generator = np.random.default_rng(0)
    params = tree.unflatten([leaf + 0.1 * generator.standard_normal(leaf.shape).astype("f4") for leaf in leaves])
    unused = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
    state = jax.tree.map(np.asarray, state.replace(params=unused, params_ema=params))
    workdirs.record_config(folder, config)
    with Checkpoints(folder, snapshot_freq=12, template=state) as checkpoints:
        for number, scale in ((1, 0.5), (2, 1.0)):
            scaled = jax.tree.map(lambda leaf, scale=scale: (leaf * scale).astype(leaf.dtype), params)
            step = np.asarray(12 * number, np.int32)
            checkpoints.save_snapshot(number, state.replace(step=step, params_ema=scaled))
        checkpoints.wait()
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, digits_features):
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(digits_features, folder / "features")
    return make_workdir(folder, configure())


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Compiles each sampler of these tests once."""
    programs = {}

    def build(experiment, batch_size, guide=None):
        assert guide is None
        key = (str(experiment.config.sampling), experiment.image_shape, batch_size)
        return programs.setdefault(key, SamplingProgram(experiment, batch_size))

    with pytest.MonkeyPatch.context() as patch:
        for module in (compare, eval_loop, sample_run):
            patch.setattr(module, "SamplingProgram", build)
        yield


@pytest.fixture
def rounds_drawn(monkeypatch):
    """Records the first sample of each round that is drawn."""
    drawn, draw = [], SamplingProgram.__call__

    def record(self, params, indices):
        drawn.append(int(indices[0]))
        return draw(self, params, indices)

    monkeypatch.setattr(SamplingProgram, "__call__", record)
    return drawn


@pytest.fixture(scope="module")
def sixteen(workdir):
    """Sixteen samples in two rounds, by a command that was killed in the second round and given again."""
    draw = SamplingProgram.__call__

    def draw_the_first_round(self, params, indices):
        if indices[0] > 0:
            raise KeyboardInterrupt
        return draw(self, params, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplingProgram, "__call__", draw_the_first_round)
        with pytest.raises(KeyboardInterrupt):
            run_lib.sample(configure(), workdir, "sixteen", num_images=16)
    left = sorted(str(path.relative_to(workdir / "sixteen")) for path in (workdir / "sixteen").glob("**/*"))
    assert left == ["rounds", "rounds/samples_from_0.npz", "settings.json"]
    first = workdir / "sixteen" / "rounds" / "samples_from_0.npz"
    written = first.stat().st_mtime_ns
    folder = run_lib.sample(configure(), workdir, "sixteen", num_images=16, png=True)
    assert first.stat().st_mtime_ns == written
    return folder


def levels_of(folder):
    return read_npz(folder / "samples.npz")["samples"]


def settings_of(folder):
    return json.loads((folder / "settings.json").read_text())


# --- sample ----------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_evaluation(workdir, sixteen):
    """Bit for bit, although the evaluation was not killed."""
    config = configure(eval__enable_loss=False, eval__enable_bpd=False, eval__begin_ckpt=2, eval__end_ckpt=2)
    run_lib.evaluate(config, workdir)
    rounds = [read_npz(workdir / "eval" / "ckpt_2" / f"samples_from_{first}.npz")["samples"] for first in (0, 8)]
    np.testing.assert_array_equal(levels_of(sixteen), np.concatenate(rounds))
    assert len(np.unique(levels_of(sixteen))) > 5  # of 17 levels: no constant picture
    assert len(np.unique(levels_of(sixteen), axis=0)) == 16


def test_the_folder_holds_samples_pictures_and_facts(sixteen):
    assert sorted(path.name for path in sixteen.iterdir()) == [
        "png",
        "rounds",
        "samples.npz",
        "samples.png",
        "settings.json",
    ]
    stored, levels = read_npz(sixteen / "samples.npz"), levels_of(sixteen)
    assert levels.dtype == np.uint8
    assert levels.shape == (16, 8, 8, 1)
    assert int(stored["nfe"]) == 4
    rounds = [read_npz(path) for path in (sixteen / "rounds").iterdir()]
    assert float(stored["seconds"]) == pytest.approx(sum(float(each["seconds"]) for each in rounds))
    settings = settings_of(sixteen)
    facts = settings["facts"]
    assert facts["checkpoint"] == {"number": 2, "step": 24, "ema": True}
    assert (facts["seed"], facts["nfe"], facts["num_images"]) == (42, 4, 16)
    assert facts["sampler"]["sampling.num_steps"] == 4
    assert facts["images_per_second"] == pytest.approx(16 / facts["seconds"])
    assert "data.dataset" not in settings  # samples do not depend on it
    with Image.open(sixteen / "samples.png") as image:
        np.testing.assert_array_equal(np.array(image), plots.grid_of_levels(levels, 17))


def test_each_sample_is_a_png_of_its_own(sixteen):
    paths = sorted((sixteen / "png").iterdir())
    assert [path.name for path in paths] == [f"{index:05d}.png" for index in range(16)]
    expected = np.floor(levels_of(sixteen)[..., 0] / 16 * 255 + 0.5)
    for path, image in zip(paths, expected, strict=True):
        with Image.open(path) as stored:
            assert stored.mode == "L"
            np.testing.assert_array_equal(np.array(stored), image)


def test_a_sample_does_not_depend_on_how_many_there_are(workdir, sixteen, rounds_drawn):
    folder = run_lib.sample(configure(), workdir, "five", num_images=5)
    np.testing.assert_array_equal(levels_of(folder), levels_of(sixteen)[:5])
    assert rounds_drawn == [0]


def test_what_is_there_is_not_drawn_again(workdir, sixteen, rounds_drawn):
    """Whatever the number asked for, as long as the rounds hold it; a damaged one is drawn again."""
    folder, levels = shutil.copytree(sixteen, workdir / "copy"), levels_of(sixteen)
    for count in (16, 5, 12, 16):
        run_lib.sample(configure(), workdir, "copy", num_images=count, png=count < 16)
        np.testing.assert_array_equal(levels_of(folder), levels[:count])
        assert settings_of(folder)["facts"]["num_images"] == count
        if count < 16:
            assert [path.name for path in sorted((folder / "png").iterdir())] == [f"{i:05d}.png" for i in range(count)]
    assert rounds_drawn == []
    (folder / "rounds" / "samples_from_8.npz").write_bytes(b"damaged")
    (folder / "samples.npz").unlink()
    run_lib.sample(configure(), workdir, "copy", num_images=16)
    np.testing.assert_array_equal(levels_of(folder), levels)
    assert rounds_drawn == [8]


def test_a_round_is_no_larger_than_what_is_wanted_and_divided_by_the_devices(monkeypatch):
    monkeypatch.setattr(distributed, "device_count", lambda: 4)
    sizes = [
        drawing.batch_size(build_experiment(configure(eval__batch_size=10)), count) for count in (1, 4, 5, 10, 100)
    ]
    assert sizes == [4, 4, 8, 12, 12]


@pytest.mark.exhaustive
def test_no_data_set_is_touched(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a data set was opened")

    config = configure(
        data__dataset="CIFAR10", data__image_size=4, data__num_channels=3, data__num_levels=256, sampling__num_steps=2
    )
    make_workdir(tmp_path, config)
    monkeypatch.setattr(datasets, "build_source", refuse)
    monkeypatch.setattr(datasets, "SOURCES", dict.fromkeys(datasets.SOURCES, refuse))
    folder = run_lib.sample(config, tmp_path, num_images=3, snapshot=1, png=True)
    assert folder == tmp_path / "samples" / "ckpt_1_pc_2"
    assert settings_of(folder)["facts"]["checkpoint"]["step"] == 12
    with Image.open(folder / "png" / "00002.png") as image:
        np.testing.assert_array_equal(np.array(image), levels_of(folder)[2])


@pytest.mark.parametrize(
    ("arguments", "changes", "error", "message"),
    [
        ({"snapshot": 7}, {}, CheckpointError, "checkpoint 7 is not in .*; present: 1, 2; set --snapshot to one of"),
        ({"snapshot": -1}, {}, ValueError, "--snapshot=-1: expected 0 or more"),
        ({"num_images": -3}, {}, ValueError, "--num_images=-3: expected 0 or more"),
        ({"output": "../elsewhere"}, {}, ValueError, r"--output=\.\./elsewhere is outside --workdir=.*; give the name"),
        (
            {"output": "sixteen"},
            {"sampling__noise_removal": False},
            workdirs.WorkdirError,
            r"settings \(sampling.noise_removal: True there, False now\); choose a new --output",
        ),
        ({"output": "sixteen", "snapshot": 1}, {}, workdirs.WorkdirError, r"\(params_crc32: "),
        ({}, {"model__nf": 16}, workdirs.WorkdirError, r"another experiment \(model.nf: 8 there, 16 now\)"),
    ],
)
def test_mistakes_are_refused_before_anything_is_drawn(workdir, sixteen, arguments, changes, error, message):
    with pytest.raises(error, match=message):
        run_lib.sample(configure(**changes), workdir, **arguments)


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path):
    workdirs.record_config(tmp_path, configure())
    with pytest.raises(CheckpointError, match="checkpoints holds no checkpoint; train until one is written"):
        run_lib.sample(configure(), tmp_path)


def test_samples_that_depend_on_their_batch_are_told_and_kept_apart(caplog):
    langevin = {"sampling__corrector": "langevin", "sampling__num_steps": 20}
    for changes, depends in ((langevin, True), (langevin | {"sampling__langevin_norm": "sample"}, False), ({}, False)):
        experiment = build_experiment(configure(**changes))
        caplog.clear()
        drawing.warn_of_batch(experiment)
        assert ("depends on the others of its batch" in caplog.text) == depends
        assert ("eval.batch_size" in affecting(experiment.config, *drawing.kinds_of_samples(experiment))) == depends
    assert not drawing.depends_on_batch(build_experiment(configure(**langevin | QUICK_ODE)))  # it has no corrector


@pytest.mark.parametrize(("method", "smooth"), [("pc", False), ("ode", True), ("of_steps", True)])
def test_only_the_predictor_corrector_asks_a_discrete_network_at_its_levels_alone(monkeypatch, method, smooth):
    asked = []
    sampler = lambda key, score_fn: (score_fn(jax.numpy.zeros((2, 8, 8, 1)), key), jax.numpy.int32(1))  # noqa: E731
    monkeypatch.setitem(sampling.METHODS, method, lambda config, sde, shape: sampler)
    monkeypatch.setattr(
        Experiment, "score_fn", lambda self, params, **kwargs: lambda x, t: asked.append(kwargs["smooth"]) or x
    )
    program = SamplingProgram(build_experiment(configure(sampling__method=method)), 2)
    program(np.zeros((1, 1), np.float32), np.arange(2))
    assert asked == [smooth]


# --- compare_samplers ------------------------------------------------------------------------------------------------

SAMPLERS = "ode:rtol=1e-2:atol=1e-2, pc:4"


@pytest.fixture(scope="module")
def comparison(workdir):
    """A comparison that was killed while it drew the second sampler, and started again."""
    draw = compare.Comparer.draw

    def draw_the_first_sampler(self, spec, experiment):
        if spec.text == "pc:4":
            raise KeyboardInterrupt
        return draw(self, spec, experiment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.Comparer, "draw", draw_the_first_sampler)
        with pytest.raises(KeyboardInterrupt):
            run_lib.compare_samplers(configure(), workdir, "comparison", samplers=SAMPLERS)
    folder = workdir / "comparison"
    [before] = comparison_of(folder)["results"]
    assert "ode" in (folder / "samplers.md").read_text()
    assert run_lib.compare_samplers(configure(), workdir, "comparison", samplers=SAMPLERS) == folder
    after = comparison_of(folder)["results"]
    assert after[0] == before  # its seconds, too
    return folder


def comparison_of(folder):
    return json.loads((folder / "samplers.json").read_text())


@pytest.mark.exhaustive
def test_the_numbers_are_those_of_the_metrics(workdir, comparison):
    """Against the features of an extractor built here, of the images that the sampler's own folder holds."""
    train, test = (datasets.build_source(configure(), split) for split in ("train", "test"))
    split = lambda source: (source.images(np.arange(len(source))), source.labels(np.arange(len(source))))  # noqa: E731
    extractor = build_feature_extractor(
        *split(train), *split(test), num_levels=17, folder=workdir / "features", seed=42
    )
    real, floor = extractor(split(train)[0])[0], extractor(split(test)[0])
    stored = comparison_of(comparison)
    folders = ["ode_rtol=1e-2_atol=1e-2", "pc_4"]
    for result, name in zip(stored["results"], folders, strict=True):
        rounds = [read_npz(comparison / name / f"samples_from_{first}.npz") for first in (0, 8)]
        levels = np.concatenate([each["samples"] for each in rounds])
        measured = sample_metrics(extractor(levels), reference=real, test=floor, extractor="classifier")
        expected = {m.name: m for m in measured}
        for metric in (*result["metrics"], *stored["floor"]):
            assert metric["value"] == expected[metric["name"]].value
            assert metric["stderr"] == expected[metric["name"]].stderr
        assert result["nfe"] == max(int(each["nfe"]) for each in rounds)
        assert result["seconds"] == pytest.approx(sum(float(each["seconds"]) for each in rounds))
        assert result["images_per_second"] == pytest.approx(16 / result["seconds"])
    assert [len(result["metrics"]) for result in stored["results"]] == [8, 8]
    assert (stored["num_images"], stored["seed"], stored["checkpoint"]["number"]) == (16, 42, 2)
    assert [result["steps"] for result in stored["results"]] == [None, 4]
    assert stored["results"][0]["settings"]["sampling.rtol"] == 1e-2
    assert stored["machine"]["versions"]["jax"] == jax.__version__


def test_the_table_is_sorted_and_ends_at_the_floor(comparison):
    page = (comparison / "samplers.md").read_text()
    stored = {result["sampler"]: result for result in comparison_of(comparison)["results"]}
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    rows, last = [line.strip("| ").split(" | ") for line in lines], lines[-1]
    assert [row[0].strip("`") for row in rows] == sorted(stored, key=lambda name: stored[name]["nfe"])
    for row in rows:
        result = stored[row[0].strip("`")]
        steps, grid = (str(result["steps"]), "uniform") if result["steps"] else ("its own", "its own")
        assert row[1:4] == [steps, grid, str(result["nfe"])]
        for cell, name in zip(row[6:], ("frechet_distance", "kernel_distance"), strict=True):
            metric = next(metric for metric in result["metrics"] if metric["name"] == name)
            value, stderr = (float(part) for part in cell.split(" ± "))
            assert value == pytest.approx(metric["value"], abs=metric["stderr"] / 10)
            assert stderr == pytest.approx(metric["stderr"], rel=0.06)
    assert page.splitlines()[page.splitlines().index(last) + 1].startswith("| *floor: real test images* |")
    with Image.open(comparison / "samplers.png") as image:
        assert len(image.getcolors(1 << 16)) > 50


@pytest.mark.slow
@pytest.mark.exhaustive
def test_four_devices_draw_the_same_from_the_command_line(workdir, comparison):
    """nfe is that of the slowest sample, on whichever device it is: 50, of which the first device needs 44."""
    here = [read_npz(comparison / "ode_rtol=1e-2_atol=1e-2" / f"samples_from_{first}.npz") for first in (0, 8)]
    flags = ("--num_images=16", "--output=four", "--png")
    result = tiny.run(tiny.command("sample", workdir, *flags, **SAMPLING | QUICK_ODE), devices=4)
    assert result.returncode == 0, result.stderr[-3000:]
    difference = levels_of(workdir / "four").astype(int) - np.concatenate([each["samples"] for each in here])
    assert np.abs(difference).max() <= 1  # a value on the edge of a level may round either way
    assert (difference == 0).mean() > 0.99
    for first, each in zip((0, 8), here, strict=True):
        assert read_npz(workdir / "four" / "rounds" / f"samples_from_{first}.npz")["nfe"] == each["nfe"]
    assert len(list((workdir / "four" / "png").iterdir())) == 16


def test_every_sampler_is_checked_before_anything_is_opened(workdir, monkeypatch):
    monkeypatch.setattr(drawing, "restore", None)
    monkeypatch.setattr(datasets, "build_source", None)
    with pytest.raises(
        ValueError, match=r"--samplers: 'pc:4:snr=high': sampling.snr=high is not a value of type float"
    ):
        run_lib.compare_samplers(configure(), workdir, samplers="ode,pc:4:snr=high")


def test_data_without_labels_are_refused(workdir, monkeypatch):
    monkeypatch.setattr(
        datasets,
        "build_source",
        lambda config, split: type("Bare", (), {"num_classes": 0, "__len__": lambda self: 3})(),
    )
    with pytest.raises(ValueError, match=r"data.dataset='digits' has no labels to train a feature extractor on"):
        run_lib.compare_samplers(configure(), workdir, samplers="pc")


def test_results_open_only_for_their_own_settings(tmp_path):
    results.open_folder(tmp_path, configure(), ("samples",), {}, flag="--output")
    results.record_facts(tmp_path, {"nfe": 3})
    results.open_folder(tmp_path, configure(), ("samples",), {}, flag="--output")  # facts are no setting
    with pytest.raises(workdirs.WorkdirError, match=r"\(seed: 42 there, 1 now\); choose a new --eval_folder"):
        results.open_folder(tmp_path, configure(seed=1), ("samples",), {}, flag="--eval_folder")
