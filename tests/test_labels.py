"""Samples of classes: the list of labels, classifier-free guidance in closed form, and the program that draws them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from analytic import QUICK, SDES, TRIANGLE, Mixture
from cases import by_default
from flax import struct

from experiment.build import Experiment, SamplingProgram, build_experiment
from parallel import distributed
from sampling import (
    build_classifier_free,
    build_labels,
    build_sampler,
    classifier_free_score,
    compose_score,
    labels_of_samples,
    parse_labels,
)
from sde_lib import SDE

NO_LABEL = 3  # of the triangle, whose three components are the classes
COMPONENTS = [Mixture(TRIANGLE.means[k : k + 1], np.ones(1), TRIANGLE.std) for k in range(3)]

# --- the list of labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", ()),
        ("3", (3,)),
        ("0..9", tuple(range(10))),
        ("0,2,5", (0, 2, 5)),
        (" 7, 1 .. 3", (7, 1, 2, 3)),
        ("4..4", (4,)),
    ],
)
def test_a_list_of_labels_is_read(text, labels):
    assert parse_labels(text, 10) == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-9", "sampling.labels='0-9': '0-9' is no label; expected such as 3, 0..9 or 0,2,5"),
        ("1,,2", "sampling.labels='1,,2': '' is no label"),
        ("-1", "sampling.labels='-1': '-1' is no label"),
        ("0...9", "'0...9' is no label"),
        ("9..0", "sampling.labels='9..0': '9..0' goes down; write 0..9"),
        ("0..10", "there is no label 10; the 10 classes are 0 to 9"),
        ("0..99999999999", "there is no label 99999999999"),
        ("1..3,2", "label 2 is there twice"),
    ],
)
def test_a_malformed_list_is_refused(text, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        parse_labels(text, 10)


def test_samples_have_the_labels_in_turn():
    labels = labels_of_samples((4, 0, 7), np.arange(5, 12))
    np.testing.assert_array_equal(labels, [7, 4, 0, 7, 4, 0, 7])
    assert labels.dtype == np.int32
    _, counts = np.unique(labels_of_samples(tuple(range(10)), np.arange(80)), return_counts=True)
    assert (counts == 8).all()


# --- the guided score ------------------------------------------------------------------------------------------------


def score_of(sde, labels, seen=None):
    """The exact score of the triangle's component that each label names, or of the whole triangle."""

    def score(x, t):
        if seen is not None:
            seen.append(len(x))  # once, while it is traced
        every = jnp.stack([mixture.score_fn(sde)(x, t) for mixture in (*COMPONENTS, TRIANGLE)])
        return every[labels, jnp.arange(len(x))]

    return score


@pytest.mark.parametrize("name", ["vesde", pytest.param("subvpsde", marks=pytest.mark.exhaustive)])
def test_the_guided_score_is_that_of_the_tilted_density(name):
    """Against the gradient of log p_t(x)^(1 - w) p_t(x | label)^w, which is differentiated here."""
    sde, w = SDES[name], 2.5
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)), jnp.float32)
    t, labels = jnp.array([0.05, 0.1, 0.2, 0.4, 0.7, 1.0]), np.array([0, 1, 2, 2, 1, 0])

    def log_density(x):
        m, std = sde.mean_coeff(t), sde.std(t)
        terms = [mixture.log_density(x, m, std) for mixture in (*COMPONENTS, TRIANGLE)]
        conditional = jnp.stack(terms)[labels, jnp.arange(6)]
        return jnp.sum((1 - w) * terms[NO_LABEL] + w * conditional)

    seen = []
    of_labels = lambda labels: score_of(sde, labels, seen)  # noqa: E731
    guided_fn = classifier_free_score(of_labels, jnp.asarray(labels), sde=sde, no_label=NO_LABEL, scale=w)
    guided = jax.jit(lambda x: guided_fn(x, t))(x)
    np.testing.assert_allclose(guided, jax.jit(jax.grad(log_density))(x), rtol=2e-4, atol=1e-5)
    assert seen == [12]  # both scores of six examples in one call


def test_a_scale_of_one_is_the_conditional_score_itself():
    sde, labels = SDES["vpsde"], jnp.array([0, 2])
    x, t, seen = jnp.ones((2, 2)), jnp.array([0.2, 0.6]), []
    of_labels = lambda labels: score_of(sde, labels, seen)  # noqa: E731
    guided = jax.jit(classifier_free_score(of_labels, labels, sde=sde, no_label=NO_LABEL, scale=1.0))(x, t)
    np.testing.assert_array_equal(guided, jax.jit(score_of(sde, labels))(x, t))
    assert seen == [2]


def test_outside_the_interval_there_is_no_guidance():
    """sigma of this SDE is std / mean_coeff: about 0.32, 1.15 and 40 at these times; high itself is inside."""
    sde, labels, x = SDES["vpsde"], jnp.array([0, 1, 2]), jnp.full((3, 2), 0.3)
    t = jnp.array([0.1, 0.3, 0.9])
    sigma = np.sqrt(np.expm1(0.1 * t + 9.95 * t**2))  # the variance is 1 - m^2, m^-2 = exp of the integral of beta

    @functools.partial(jax.jit, static_argnums=0)
    def parts(interval):
        of_labels = functools.partial(score_of, sde)
        return classifier_free_score(of_labels, labels, sde=sde, no_label=NO_LABEL, scale=3.0, interval=interval)(x, t)

    plain, everywhere = jax.jit(score_of(sde, labels))(x, t), parts((0.0, math.inf))
    assert (np.abs(everywhere - plain).max(axis=1) > 1e-4).all()
    for interval, inside in (
        ((0.5, 5.0), [False, True, False]),
        ((float(sigma[1]) * (1 + 1e-5), math.inf), [False, False, True]),
    ):
        expected = np.where(np.array(inside)[:, None], everywhere, plain)
        np.testing.assert_allclose(parts(interval), expected, rtol=1e-6)


@pytest.mark.parametrize("method", by_default(["pc"], ["pc", "ode", "adaptive_sde", "heun"]))
def test_every_sampler_takes_a_guided_score(method):
    """Guided samples lie around the component of their own label, in the order of the labels."""
    changes = {"num_steps": 10, "predictor": "euler_maruyama", "rtol": 1e-2, "atol": 1e-2, "adaptive_rtol": 0.1}
    config = tiny.make_config(sampling__method=method, **{f"sampling__{key}": value for key, value in changes.items()})
    sde, labels = SDES["vpsde"], np.tile(np.arange(3), 40)
    guidance = {"sde": sde, "no_label": NO_LABEL, "scale": 1.5, "interval": (0.1, 50.0)}
    sampler = build_sampler(config, sde, (len(labels), 2))

    def sample(key, labels):
        classifier_free = functools.partial(classifier_free_score, **guidance)
        of_labels = functools.partial(score_of, sde)
        return sampler(key, compose_score(of_labels, labels, classifier_free=classifier_free))[0]

    x = np.asarray(jax.jit(sample, compiler_options=QUICK)(jax.random.key(0), jnp.asarray(labels)))
    nearest = np.argmin(((x[:, None] - TRIANGLE.means) ** 2).sum(-1), axis=1)
    assert (nearest == labels).mean() > 0.9


def test_a_score_is_composed_in_order():
    """Of the network, its classes, what guides besides it, and clipping; without labels, of the first and the last."""
    parts = {
        "classifier_free": lambda score_of, labels: lambda x, t: score_of(labels)(x, t) + 1,
        "guide": lambda score_fn, labels: lambda x, t: score_fn(x, t) * labels,
        "clip": lambda score_fn: lambda x, t: -score_fn(x, t),
    }
    score_of_classes = lambda labels: lambda x, t: x if labels is None else 10 * x  # noqa: E731
    assert compose_score(score_of_classes, 3, **parts)(1, 0) == -33
    assert compose_score(score_of_classes, None, **parts)(1, 0) == -1
    assert compose_score(score_of_classes, 3, guide=parts["guide"])(1, 0) == 3  # a network that knows no classes
    assert compose_score(score_of_classes)(2, 0) == 2


# --- settings --------------------------------------------------------------------------------------------------------


CONDITIONAL = {"model__num_classes": 10, "sampling__labels": "0..9"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling__labels": "3"}, r"sampling.labels='3', but the network was trained without labels"),
        (CONDITIONAL | {"sampling__labels": "0..12"}, "there is no label 12; the 10 classes are 0 to 9"),
        (CONDITIONAL | {"sampling__guidance_scale": -1.0}, r"sampling.guidance_scale=-1.0: expected 0 or more"),
        (CONDITIONAL | {"sampling__guidance_interval": (2.0, 1.0)}, r"sampling.guidance_interval=\(2.0, 1.0\): expect"),
        (CONDITIONAL | {"sampling__guidance_interval": (1.0,)}, r"sampling.guidance_interval=\(1.0,\): expected"),
        ({"sampling__guidance_scale": 2.0}, r"the network is not class-conditional \(model.num_classes=0\)"),
        (CONDITIONAL | {"sampling__labels": "", "sampling__guidance_scale": 2.0}, "sampling.labels is empty; set the"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingProgram(build_experiment(tiny.make_config(**changes)), 2)


def test_labels_need_somebody_who_knows_them():
    config = tiny.make_config(sampling__labels="0..4")
    assert build_labels(config, guide_classes=5) == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="there is no label 4; the 4 classes are 0 to 3"):
        build_labels(config, guide_classes=4)
    assert build_classifier_free(config, SDES["vpsde"], (0, 1)) is None  # a classifier's own work
    unbounded = build_classifier_free(tiny.make_config(**CONDITIONAL), SDES["vpsde"], (0, 1))
    assert (unbounded.keywords["no_label"], unbounded.keywords["interval"]) == (10, (0.0, math.inf))


# --- the compiled program --------------------------------------------------------------------------------------------


@struct.dataclass
class NormalGuide:
    """Adds the score of N(mean of the label, 0.1^2)."""

    means: jax.Array
    sde: SDE = struct.field(pytree_node=False)
    num_classes: int = struct.field(pytree_node=False, default=3)

    def guide(self, score_fn, labels):
        def score(x, t):
            m, std = self.sde.mean_coeff(t), self.sde.std(t)
            mean = (m * self.means[labels])[:, None, None, None]
            return score_fn(x, t) - (x - mean) / (0.01 * m**2 + std**2)[:, None, None, None]

        return score


def test_a_guide_and_its_parameters_reach_the_samples(monkeypatch):
    """Other parameters need no other program."""
    monkeypatch.setattr(Experiment, "score_fn", lambda self, params, **kwargs: lambda x, t: jnp.zeros_like(x))
    changes = {"sampling__labels": "2,0", "sampling__method": "ddim", "sampling__num_steps": 12}
    experiment = build_experiment(tiny.make_config(**changes))
    make = lambda means: NormalGuide(np.float32(means), experiment.sde)  # noqa: E731

    def draw(program, means, indices):
        program._guide = distributed.replicate(make(means))
        return program(distributed.replicate(np.zeros(1, np.float32)), np.asarray(indices))[0] / 8.5 - 1

    program = SamplingProgram(experiment, 4, guide=make(np.zeros(3)))
    for means in ([-0.5, 0.9, 0.5], [0.4, 0.9, 0.0]):
        x = draw(program, means, range(4)).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(x, np.array(means)[[2, 0, 2, 0]], atol=0.1)
    two = draw(SamplingProgram(experiment, 2, guide=make(np.zeros(3))), means, [1, 2])
    np.testing.assert_array_equal(two, draw(program, means, range(4))[1:3])
