"""The mode "train_classifier": its loss against numpy, its data, its numbers counted anew, and a run that is killed."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from analytic import SDES
from PIL import Image

import datasets
import losses
import run_lib
from classifier import accuracy as classifier_accuracy
from classifier import experiment as classifier_experiment
from classifier import training as classifier_training
from classifier.experiment import Normalization
from classifier.loss import classify_noisy, make_classifier_loss
from experiment.build import build_train_program
from models import wideresnet
from parallel import rng
from solvers import noise_levels
from sources.base import ArraySource
from training.divergence import DivergedError
from workdir.checkpoints import Checkpoints
from workdir.folder import WorkdirError

CENTRES = np.array([[-1.0, 0.5], [0.3, 0.2], [1.0, -0.7]])  # of three classes in two dimensions
SPREAD = 0.3


# --- the loss --------------------------------------------------------------------------------------------------------


def bayes_logits(x, sigma, xp=np):
    """Exact logits of the classes N(centre, SPREAD^2) in images x + sigma z."""
    squares = ((x.reshape(len(x), 1, 2) - CENTRES[None]) ** 2).sum(axis=2)
    return -squares / (2 * (SPREAD**2 + sigma[:, None] ** 2))


@pytest.mark.parametrize("name", ["vesde", "vpsde", "subvpsde"])
def test_cross_entropy_is_that_of_the_images_that_the_sde_makes_noisy(name, monkeypatch):
    """x_t = m x + std z, brought to x_t / m, in float64 and with the noise given."""
    sde, generator = SDES[name], np.random.default_rng(0)
    labels = generator.integers(0, 3, 50)
    x = (CENTRES[labels] + SPREAD * generator.standard_normal((50, 2))).reshape(50, 1, 2, 1)
    z, t = generator.standard_normal(x.shape), generator.uniform(0.01, 0.9, 50)
    levels = noise_levels.noise_levels(sde, t)
    noisy = levels.mean_coeff[:, None, None, None] * x + levels.std[:, None, None, None] * z
    logits = bayes_logits(noisy / levels.mean_coeff[:, None, None, None], levels.sigma)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    monkeypatch.setattr(rng, "normal", lambda key, shape: jnp.asarray(z, jnp.float32))
    arrays = (jnp.asarray(x, jnp.float32), jnp.asarray(labels), jnp.asarray(t, jnp.float32))
    got, is_right = classify_noisy(jax.random.key(0), bayes_logits, sde, *arrays)
    np.testing.assert_allclose(got, -log_p[np.arange(50), labels], rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(is_right, logits.argmax(axis=1) == labels)


class Affine:
    """In the network's place: logits = W (mean over the pixels of x), and -log sigma for the last class."""

    def apply(self, variables, x, sigmas):
        return (x.mean((1, 2)) @ variables["params"]).at[:, -1].set(-jnp.log(sigmas))


def test_the_loss_draws_times_as_the_score_does_and_normalizes_the_images(monkeypatch):
    """The same key gives the times of `make_uniform_times`, weights included."""
    sde, x = SDES["vpsde"], jnp.linspace(-1, 1, 32).reshape(4, 2, 2, 2)
    labels, params = jnp.array([0, 1, 2, 2]), jnp.array([[1.0, -2.0, 0.0], [0.5, 1.0, 0.0]])
    times = jnp.array([0.1, 0.3, 0.5, 0.9])
    draw_times = lambda key, num: (times, jnp.arange(1.0, num + 1))  # noqa: E731
    mean, std = (0.2, -0.1), (2.0, 0.5)
    loss = make_classifier_loss(sde, Affine(), mean=mean, std=std, draw_times=draw_times)
    got = loss(jax.random.key(3), params, x, train=True, class_labels=labels)
    key_z = rng.split(jax.random.key(3))[1]
    sigma = noise_levels.noise_levels(sde, times).sigma
    noisy = x + sigma[:, None, None, None] * rng.normal(key_z, x.shape)
    logits = np.array((np.asarray(noisy).mean((1, 2)) - mean) / std @ np.asarray(params))
    logits[:, -1] = -np.log(sigma)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(got, -np.arange(1, 5) * log_p[np.arange(4), labels], rtol=1e-5)
    default = make_classifier_loss(sde, Affine(), mean=mean, std=std)
    drawn = losses.make_uniform_times(sde)(rng.split(jax.random.key(3))[0], 4)
    monkeypatch.setattr("classifier.loss.make_uniform_times", lambda sde: lambda key, num: drawn)
    again = make_classifier_loss(sde, Affine(), mean=mean, std=std)
    given = {"train": True, "class_labels": labels}
    of_default, of_drawn = (each(jax.random.key(3), params, x, **given) for each in (default, again))
    np.testing.assert_array_equal(of_default, of_drawn)


def test_a_flat_image_has_a_gradient_and_leaves_others_theirs(monkeypatch):
    """Its standard deviation is 0, where the root has none; behind the mean it is 0, where ReLU's is taken to be 0."""
    monkeypatch.setattr(wideresnet, "BASE_WIDTHS", (8,))
    monkeypatch.setattr(wideresnet, "WideGroup", lambda *args, **kwargs: lambda h, embedding: h)  # quicker to compile
    model = wideresnet.WideResNet(1, 1, num_classes=3)
    textured = jnp.linspace(0, 1, 64).reshape(1, 8, 8, 1) ** 2
    x = jnp.concatenate([jnp.full((1, 8, 8, 1), 0.25), textured])
    params = jax.jit(model.init)(jax.random.key(0), x, jnp.ones(2))["params"]
    grad_fn = wideresnet.make_classifier_grad_fn(wideresnet.make_logit_fn(model, params, mean=(0.0,), std=(1.0,)))
    gradient = jax.jit(lambda x: grad_fn(x, jnp.ones(2), jnp.array([1, 1])))
    got = gradient(x)
    np.testing.assert_allclose(got[0], 0, atol=1e-6)
    np.testing.assert_allclose(got[1], gradient(x.at[0].set(x[1]))[0], rtol=1e-4, atol=1e-6)
    assert np.abs(got[1]).max() > 1e-3


# --- the data --------------------------------------------------------------------------------------------------------


def test_normalization_is_that_of_all_training_images(tmp_path):
    source = datasets.load_digits("train")
    scaler = datasets.build_scaler(tiny.make_config())
    measured = Normalization.of_folder(tmp_path, source, scaler)
    x = (source.levels.astype(np.float64) + 0.5) / 17 * 2 - 1
    assert measured.mean == pytest.approx([x.mean()], rel=1e-6)
    assert measured.std == pytest.approx([x.std()], rel=1e-6)
    assert Normalization.of_folder(tmp_path, None, scaler) == measured  # read, not measured again
    (tmp_path / "normalization.json").write_text('{"mean": ')
    with pytest.raises(ValueError, match=r"normalization.json is damaged .*; remove it and run --mode train_cl"):
        Normalization.of_folder(tmp_path, source, scaler)
    with pytest.raises(ValueError, match="has one value only, so that there is nothing to learn"):
        Normalization.measure(dataclasses.replace(source, levels=np.full_like(source.levels, 3)), scaler)


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _small_network():
    """One group of 8 channels, and each program compiled once."""
    programs = {}

    def share(build):
        return lambda experiment, *args: programs.setdefault(build.__name__, build(experiment, *args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wideresnet, "BASE_WIDTHS", (8,))
        patch.setattr(classifier_training, "build_train_program", share(classifier_training.build_train_program))
        patch.setattr(classifier_accuracy, "build_measure", share(classifier_accuracy.build_measure))
        patch.setattr(classifier_accuracy, "NUM_SIGMAS", 3)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    run_lib.train_classifier(tiny.make_config(), workdir)
    return workdir / "classifier"


def experiment_of(folder):
    config = classifier_experiment.classifier_config(tiny.make_config(), 10)
    return classifier_experiment.build_classifier_experiment(config, Normalization.read(folder / "normalization.json"))


def last_state(folder):
    template = experiment_of(folder).state_template()
    with Checkpoints(folder, snapshot_freq=4, template=template, read_only=True) as checkpoints:
        return checkpoints.restore_snapshot(1)


def records(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_the_folder_holds_what_the_readme_says(unbroken):
    names = ["accuracy.json", "accuracy.png", "checkpoints", "checkpoints-meta", "config.json", "losses.jsonl"]
    assert sorted(path.name for path in unbroken.iterdir()) == [
        *names,
        "normalization.json",
        "tensorboard",
        "training.png",
    ]
    assert [path.name for path in (unbroken / "checkpoints").iterdir()] == ["1"]
    assert [record["step"] for record in records(unbroken)] == [1, 2, 3, 4]
    assert ["eval_accuracy" in record for record in records(unbroken)] == [False, True, False, True]
    stored = json.loads((unbroken / "config.json").read_text())["config"]
    assert (stored["model.name"], stored["model.num_classes"]) == ("wideresnet_noise_conditional", 10)
    for name in ("accuracy.png", "training.png"):
        with Image.open(unbroken / name) as image:
            assert len(image.getcolors(maxcolors=100_000)) > 10


def test_a_killed_run_ends_like_an_unbroken_one(unbroken, tmp_path, monkeypatch):
    """Bit for bit: parameters, moving average, optimizer, records."""
    test_values = classifier_training.ClassifierTrainer.test_values

    def kill(self, state, step):
        if step == 4:
            raise KeyboardInterrupt
        return test_values(self, state, step)

    monkeypatch.setattr(classifier_training.ClassifierTrainer, "test_values", kill)
    with pytest.raises(KeyboardInterrupt):
        run_lib.train_classifier(tiny.make_config(), tmp_path)
    folder = tmp_path / "classifier"
    assert not (folder / "accuracy.json").exists()
    assert list((folder / "checkpoints").iterdir()) == []
    monkeypatch.setattr(classifier_training.ClassifierTrainer, "test_values", test_values)
    run_lib.train_classifier(tiny.make_config(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, last_state(folder), last_state(unbroken))
    assert records(folder) == records(unbroken)
    assert (folder / "accuracy.json").read_text() == (unbroken / "accuracy.json").read_text()


@pytest.mark.exhaustive
def test_accuracies_are_those_of_the_averaged_parameters(unbroken):
    """Counted anew: every test image once, by another route to the noisy images."""
    test, experiment = datasets.load_digits("test"), experiment_of(unbroken)
    report = json.loads((unbroken / "accuracy.json").read_text())
    assert (report["step"], report["num_classes"], report["num_images"]) == (4, 10, 297)
    assert [row["t"] for row in report["levels"]] == pytest.approx([1e-3, report["levels"][1]["t"], 1.0])
    sigmas = [row["sigma"] for row in report["levels"]]
    assert sigmas[1] == pytest.approx(np.sqrt(sigmas[0] * sigmas[2]), rel=1e-6)
    params = last_state(unbroken).params_ema
    keys = jax.vmap(jax.random.fold_in, (None, 0))(experiment.keys["eval"], np.arange(297))
    key_data, key_noise = rng.split(keys)
    x = datasets.build_preparation(experiment.config, train=False)(key_data, test.levels)
    stored = json.loads((unbroken / "normalization.json").read_text())
    (mean,), (std,) = stored["mean"], stored["std"]
    apply = jax.jit(lambda x, sigma: experiment.model.apply({"params": params}, x, sigma))
    for row in report["levels"]:
        noisy = x + np.float32(row["sigma"]) * rng.normal(key_noise, x.shape)
        logits = np.asarray(apply((noisy - mean) / std, jnp.full(297, row["sigma"])), np.float64)
        right = (logits.argmax(axis=1) == test.classes).mean()
        assert row["accuracy"] == pytest.approx(right, abs=1.5 / 297)  # one image on the edge may go either way
        assert row["stderr"] == pytest.approx(np.sqrt(row["accuracy"] * (1 - row["accuracy"]) / 297))
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert row["cross_entropy"] == pytest.approx(-log_p[np.arange(297), test.classes].mean(), rel=1e-3)


def test_training_starts_at_the_loss_of_ten_equal_classes(unbroken):
    assert records(unbroken)[0]["loss"] == pytest.approx(np.log(10), abs=0.4)
    state, first = last_state(unbroken), experiment_of(unbroken).init_state()
    assert (
        max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, first.params)), strict=True)) > 0
    )


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"classifier__log_freq": 3, "classifier__n_jitted_steps": 2},
            "classifier.log_freq=3 is not a multiple of",
        ),
        ({"classifier__n_jitted_steps": 0}, "classifier.n_jitted_steps=0: expected 1 or more"),
        ({"classifier__channel_multiplier": 0}, "classifier.channel_multiplier=0: expected 1 or more"),
        ({"classifier__lr": 0.0}, "classifier.lr=0.0: expected a positive number"),
        ({"classifier__weight_decay": -1.0}, "classifier.weight_decay=-1.0: expected 0 or more"),
        ({"classifier__ema_rate": 1.0}, "classifier.ema_rate=1.0: expected 0 or more and less than 1"),
        ({"training__sde": "vp"}, "training.sde='vp' is unknown; known: "),
    ],
)
def test_a_bad_setting_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_lib.train_classifier(tiny.make_config(**changes), tmp_path)
    assert not (tmp_path / "classifier" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((0, 0), r"data.dataset='digits' has no labels, which a classifier is trained on"),
        ((1, 1), r"has one class only, so that there is nothing to tell apart"),
        ((3, 4), r"has 3 classes to train on, but 4 to test on; label both splits by the same classes"),
    ],
)
def test_data_without_the_labels_needed_are_refused(classes, message, tmp_path, monkeypatch):
    splits = {
        split: ArraySource(np.zeros((5, 8, 8, 1), np.uint8), np.zeros(5, np.int64), 17, num)
        for split, num in zip(("train", "test"), classes, strict=True)
    }
    monkeypatch.setitem(datasets.SOURCES, "digits", lambda config, split: splits[split])
    with pytest.raises(ValueError, match=message):
        run_lib.train_classifier(tiny.make_config(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_classifier_in_the_folder_is_refused(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "classifier")
    message = r"model.channel_multiplier: 1 there, 2 now\); choose a new --workdir, or remove .*/classifier to train"
    with pytest.raises(WorkdirError, match=message):
        run_lib.train_classifier(tiny.make_config(classifier__channel_multiplier=2), tmp_path)


@pytest.mark.exhaustive
def test_a_diverged_classifier_names_its_own_learning_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_experiment, "make_classifier_loss", lambda *args, **kwargs: _nan_loss)
    monkeypatch.setattr(classifier_training, "build_train_program", build_train_program)  # not the shared one
    with pytest.raises(DivergedError, match=r"lower classifier.lr or set optim.grad_clip") as raised:
        run_lib.train_classifier(tiny.make_config(), tmp_path)
    by_level = str(raised.value).partition("by noise level sigma: ")[2].partition(";")[0].split(", ")
    cross_entropies = [float(text.partition(": ")[2]) for text in by_level]
    assert len(cross_entropies) == 10
    assert cross_entropies == pytest.approx([np.log(10)] * 10, abs=0.4)  # an untrained classifier's


def _nan_loss(key, params, x, *, train, class_labels=None):
    return jnp.full(len(x), np.nan) * jax.tree.leaves(params)[0].sum()
