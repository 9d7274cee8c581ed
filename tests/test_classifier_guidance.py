"""Guidance by a classifier: from its folder, against the gradient written out, and to the exact law of a class."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from analytic import QUICK, SDES, make_score_fn

import run_lib
import sampling
from classifier import experiment as classifier_experiment
from classifier import guidance as classifier_guidance
from classifier.experiment import Normalization
from classifier.guidance import condition_on_class
from configs.classifier import cifar10_wideresnet
from configs.ve import cifar10_ncsnpp_continuous
from experiment.build import Experiment, build_experiment
from models import wideresnet
from modes.evaluate import evaluate as eval_loop
from storage.files import read_npz, write_json
from workdir import folder as workdirs
from workdir.checkpoints import CheckpointError, Checkpoints
from workdir.folder import WorkdirError

GUIDED = {"sampling__labels": "0..9", "sampling__classifier_scale": 2.0}
NORMALIZATION = Normalization((-0.4,), (0.7,))


@pytest.fixture(scope="module", autouse=True)
def _small_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wideresnet, "BASE_WIDTHS", (8,))
        yield


def save(folder, experiment, *, seed=0):
    """Writes a snapshot of random averaged parameters, and others that are NaN; returns the averaged ones."""
    generator, template = np.random.default_rng(seed), experiment.state_template()
    draw = lambda leaf: 0.3 * generator.standard_normal(leaf.shape).astype("f4")  # noqa: E731
    params = jax.tree.map(draw, template.params_ema)
    workdirs.record_config(folder, experiment.config)
    with Checkpoints(folder, snapshot_freq=4, template=template) as checkpoints:
        unused = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
        checkpoints.save_snapshot(1, template.replace(step=np.int32(4), params=unused, params_ema=params))
        checkpoints.wait()
    return params


def make_classifier(folder, *, seed=0, **changes):
    """Writes the folder of a classifier of the tiny configuration; returns its averaged parameters."""
    folder.mkdir(parents=True)
    write_json(folder / "normalization.json", dataclasses.asdict(NORMALIZATION))
    config = classifier_experiment.classifier_config(tiny.make_config(**changes), 10)
    return save(folder, classifier_experiment.build_classifier_experiment(config, NORMALIZATION), seed=seed)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with a classifier, and one besides."""
    folder = tmp_path_factory.mktemp("run")
    make_classifier(folder / "classifier")
    make_classifier(folder / "other", seed=1)
    return folder


def load(workdir, **changes):
    return classifier_guidance.load_classifier(build_experiment(tiny.make_config(**GUIDED | changes)), workdir)


# --- the guided score ------------------------------------------------------------------------------------------------


def params_of(folder):
    config = classifier_experiment.classifier_config(tiny.make_config(), 10)
    template = classifier_experiment.build_classifier_experiment(config, NORMALIZATION).state_template()
    with Checkpoints(folder, snapshot_freq=4, template=template, read_only=True) as checkpoints:
        return checkpoints.restore_snapshot(1).params_ema


def test_the_classifier_is_that_of_the_folder(workdir):
    for classifier, folder in (
        (load(workdir), "classifier"),
        (load(workdir, sampling__classifier=str(workdir / "other")), "other"),
    ):
        assert (classifier.num_classes, classifier.normalization) == (10, NORMALIZATION)
        jax.tree.map(np.testing.assert_array_equal, classifier.params, params_of(workdir / folder))


def test_the_guided_score_is_score_and_gradient(workdir):
    """grad_x log p(label | x) written out in x itself, not in x / m."""
    experiment = build_experiment(tiny.make_config(**GUIDED))
    classifier, params = load(workdir), params_of(workdir / "classifier")
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    t, labels = jnp.array([0.02, 0.3, 0.9]), jnp.array([3, 0, 7])
    m, std = (fn(t)[:, None, None, None] for fn in (experiment.sde.mean_coeff, experiment.sde.std))

    def log_p(x):
        logits = classifier.model.apply({"params": params}, (x / m + 0.4) / 0.7, (std / m)[:, 0, 0, 0])
        return jax.nn.log_softmax(logits)[np.arange(3), labels].sum()

    score_fn = make_score_fn(experiment.sde)
    got = jax.jit(lambda classifier, x: classifier.guide(score_fn, labels)(x, t))(classifier, x)
    gradient = jax.jit(jax.grad(log_p))(x)
    np.testing.assert_allclose(got - score_fn(x, t), 2.0 * gradient, rtol=1e-3, atol=1e-4)
    assert np.abs(gradient).max() > 1e-3


CENTRES, SPREAD = jnp.array([-0.5, 0.7]), 0.2  # of two classes, in every dimension


def log_classes(x, m, std):
    """log p_t(x, class) of both classes, up to a constant of t."""
    variance = (m * SPREAD) ** 2 + std**2
    return -((x[:, :, None] - m[:, None, None] * CENTRES[None, None]) ** 2).sum(axis=1) / (2 * variance[:, None])


def bayes_gradient(x, sigma, labels):
    log_p = lambda x: jax.nn.log_softmax(log_classes(x, jnp.ones_like(sigma), sigma))  # noqa: E731
    return jax.grad(lambda x: jnp.take_along_axis(log_p(x), labels[:, None], 1).sum())(x)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"method": "pc", "predictor": "reverse_diffusion", "num_steps": 200}, marks=pytest.mark.exhaustive
        ),
        pytest.param({"method": "ode", "rtol": 1e-4, "atol": 1e-4}, marks=pytest.mark.exhaustive),
        {"method": "dpmpp_2m", "num_steps": 30},
    ],
    ids=lambda settings: settings["method"],
)
def test_samples_follow_the_law_of_their_class(settings):
    """By the exact classifier, at scale 1, with the labels of the batch in no order."""
    sde, num = SDES["vpsde"], 2000
    labels = jax.random.bernoulli(jax.random.key(1), 0.3, (num,)).astype(jnp.int32)
    config = tiny.make_config()
    config.sampling.update(settings)
    draw = sampling.build_sampler(config, sde, (num, 2))

    def score_of_mixture(x, t):
        m, std = sde.mean_coeff(t), sde.std(t)
        return jax.grad(lambda x: jax.nn.logsumexp(log_classes(x, m, std), axis=1).sum())(x)

    def run(key, labels):
        return draw(key, condition_on_class(score_of_mixture, bayes_gradient, sde, labels))[0]

    x = np.asarray(jax.jit(run, compiler_options=QUICK)(jax.random.key(0), labels))
    for label, centre in enumerate(CENTRES):
        of_class = x[np.asarray(labels) == label]
        assert abs(of_class.mean() - centre) < 4 * SPREAD / np.sqrt(of_class.size)
        # 2 %: the bias of so few steps, beside which 4 standard errors are 0.07 to 0.12 of it.
        assert of_class.std() == pytest.approx(SPREAD, rel=0.02 + 4 / np.sqrt(2 * of_class.size))


def test_without_a_scale_there_is_no_classifier(workdir):
    assert load(workdir, sampling__classifier_scale=0.0) is None


def test_an_imported_classifier_of_the_2021_code_guides(tmp_path):
    """Its folder has no normalization of its own: CIFAR-10's."""
    config = cifar10_wideresnet.get_config()
    config.model.update(blocks_per_group=1, channel_multiplier=1)
    params = save(tmp_path, build_experiment(config))
    config = cifar10_ncsnpp_continuous.get_config()
    config.sampling.update(labels="3", classifier_scale=1.0, classifier=str(tmp_path))
    config.model.update(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    classifier = classifier_guidance.load_classifier(build_experiment(config), tmp_path / "none")
    assert classifier.normalization == Normalization(wideresnet.CIFAR10_MEAN, wideresnet.CIFAR10_STD)
    assert (classifier.model.blocks_per_group, classifier.num_classes) == (1, 10)
    jax.tree.map(np.testing.assert_array_equal, classifier.params, params)


# --- the mode "sample" -----------------------------------------------------------------------------------------------


def test_samples_of_classes_are_drawn_from_the_command_line(workdir, monkeypatch):
    """Labels go round; another classifier in the same folder is noticed; without one the labels are refused."""
    score_fn = lambda self, params, **kwargs: make_score_fn(self.sde)  # noqa: E731
    monkeypatch.setattr(Experiment, "score_fn", score_fn)
    settings = {"sampling__predictor": "euler_maruyama", "sampling__num_steps": 3, "eval__batch_size": 12}
    config = tiny.make_config(**settings | GUIDED)
    experiment = build_experiment(config)
    state = jax.tree.map(np.asarray, experiment.state_template())
    workdirs.record_config(workdir, config)
    with Checkpoints(workdir, snapshot_freq=12, template=state) as checkpoints:
        checkpoints.save_snapshot(1, state.replace(step=np.int32(12)))
        checkpoints.wait()
    folder = run_lib.sample(config, workdir, num_images=12)
    assert folder.name == "ckpt_1_pc_3_labels_0..9_classifier_2"
    stored = read_npz(folder / "samples.npz")
    np.testing.assert_array_equal(stored["labels"], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    other = tiny.make_config(**settings | GUIDED, sampling__classifier=str(workdir / "other"))
    with pytest.raises(WorkdirError, match=r"params_crc32: .* now"):
        run_lib.sample(other, workdir, folder.relative_to(workdir), num_images=12)
    with pytest.raises(ValueError, match="there is no label 10; the 10 classes are 0 to 9"):
        run_lib.sample(tiny.make_config(**settings | GUIDED | {"sampling__labels": "0..10"}), workdir)
    with pytest.raises(ValueError, match=r"no classifier guides it; .*set sampling.classifier_scale"):
        run_lib.sample(tiny.make_config(**settings | GUIDED | {"sampling__classifier_scale": 0.0}), workdir)


def test_an_evaluation_is_guided_by_the_same_classifier(workdir):
    """And so are its labels; without samples no classifier is looked for."""
    experiment = build_experiment(tiny.make_config(**GUIDED))
    classifier = eval_loop._load_classifier(experiment, workdir)
    program = eval_loop.Evaluator(experiment, classifier).draw
    assert program.labels == tuple(range(10))
    got = jax.tree.map(lambda leaf: leaf[0], program._guide.params)
    jax.tree.map(np.testing.assert_array_equal, got, params_of(workdir / "classifier"))
    without = build_experiment(tiny.make_config(**GUIDED, eval__enable_sampling=False))
    assert eval_loop._load_classifier(without, workdir / "none") is None


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__num_levels": 16}, r"of another experiment \(data.num_levels: 17 there, 16 now\); train one with --mo"),
        ({"training__sde": "subvpsde"}, r"\(training.sde: 'vpsde' there, 'subvpsde' now\)"),
        ({"model__beta_max": 15.0}, r"\(model.beta_max: 20.0 there, 15.0 now\)"),
        ({"data__image_size": 16}, r"\(data.image_size: 8 there, 16 now\)"),
        ({"sampling__classifier_scale": -1.0}, r"sampling.classifier_scale=-1.0: expected 0 or more"),
        (
            {"sampling__labels": ""},
            r"sampling.classifier_scale=2.0 guides towards labels, but sampling.labels is empty",
        ),
        (
            {"sampling__classifier_scale": 0.0, "sampling__classifier": "x"},
            "sampling.classifier='x' is not used, since",
        ),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(workdir, changes, message):
    with pytest.raises(ValueError, match=message):
        load(workdir, **changes)


def test_a_setting_that_the_classifier_does_not_depend_on_may_differ(workdir):
    assert load(workdir, model__nf=16, model__sigma_max=3.0, classifier__channel_multiplier=2) is not None


def test_a_folder_without_a_classifier_is_named(workdir, tmp_path):
    with pytest.raises(ValueError, match="holds no classifier; run --mode train_classifier with this config"):
        load(tmp_path)
    workdirs.record_config(tmp_path / "score", tiny.make_config())
    with pytest.raises(ValueError, match="holds a score network, 'ncsnpp', no classifier; run --mode train_class"):
        load(tmp_path, sampling__classifier=str(tmp_path / "score"))
    classifier = tmp_path / "classifier"
    workdirs.record_config(classifier, classifier_experiment.classifier_config(tiny.make_config(), 10))
    with pytest.raises(ValueError, match=r"normalization.json does not exist, .*run --mode train_classifier"):
        load(tmp_path)
    write_json(classifier / "normalization.json", dataclasses.asdict(NORMALIZATION))
    with pytest.raises(CheckpointError, match="holds no checkpoint; let --mode train_classifier train until"):
        load(tmp_path)
