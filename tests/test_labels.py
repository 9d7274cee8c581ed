"""Samples of classes: the list of labels, classifier-free guidance in closed form, and the program that draws them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from analytic import QUICK, SDES, TRIANGLE, Mixture

from controllable_generation.labels import (
    ClassifierFree,
    build_classifier_free,
    build_labels,
    labels_of_samples,
    parse_labels,
)
from experiment.build import Experiment, Guide, SamplingProgram, build_experiment
from parallel import distributed
from sampling import build_sampler

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
    guidance = ClassifierFree(sde, NO_LABEL, scale=w)
    guide = jax.jit(lambda x: guidance.guide(lambda labels: score_of(sde, labels, seen), jnp.asarray(labels))(x, t))
    guided = guide(x)
    np.testing.assert_allclose(guided, jax.jit(jax.grad(log_density))(x), rtol=2e-4, atol=1e-5)
    assert (seen, guidance.evaluations) == ([12], 2)  # both scores of six examples in one call


def test_a_scale_of_one_is_the_conditional_score_itself():
    sde, labels = SDES["vpsde"], jnp.array([0, 2])
    x, t, seen = jnp.ones((2, 2)), jnp.array([0.2, 0.6]), []
    guidance = ClassifierFree(sde, NO_LABEL, scale=1.0)
    guided = jax.jit(guidance.guide(lambda labels: score_of(sde, labels, seen), labels))(x, t)
    np.testing.assert_array_equal(guided, jax.jit(score_of(sde, labels))(x, t))
    assert (seen, guidance.evaluations) == ([2], 1)


def test_outside_the_interval_there_is_no_guidance():
    """sigma of this SDE is std / mean_coeff: about 0.32, 1.15 and 40 at these times; high itself is inside."""
    sde, labels, x = SDES["vpsde"], jnp.array([0, 1, 2]), jnp.full((3, 2), 0.3)
    t = jnp.array([0.1, 0.3, 0.9])
    sigma = np.sqrt(np.expm1(0.1 * t + 9.95 * t**2))  # the variance is 1 - m^2, m^-2 = exp of the integral of beta
    everywhere = ClassifierFree(sde, NO_LABEL, scale=3.0)

    @functools.partial(jax.jit, static_argnums=0)
    def parts(guidance):
        return guidance.guide(lambda labels: score_of(sde, labels), labels)(x, t)

    plain = jax.jit(score_of(sde, labels))(x, t)
    assert (np.abs(parts(everywhere) - plain).max(axis=1) > 1e-4).all()
    for interval, inside in (
        ((0.5, 5.0), [False, True, False]),
        ((float(sigma[1]) * (1 + 1e-5), math.inf), [False, False, True]),
    ):
        guidance = ClassifierFree(sde, NO_LABEL, 3.0, interval)
        expected = np.where(np.array(inside)[:, None], parts(everywhere), plain)
        np.testing.assert_allclose(parts(guidance), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "method",
    ["pc", "ode", *(pytest.param(method, marks=pytest.mark.exhaustive) for method in ("adaptive_sde", "heun"))],
)
def test_every_sampler_takes_a_guided_score(method):
    """Guided samples lie around the component of their own label, in the order of the labels."""
    changes = {"num_steps": 10, "predictor": "euler_maruyama", "rtol": 1e-2, "atol": 1e-2, "adaptive_rtol": 0.1}
    config = tiny.make_config(sampling__method=method, **{f"sampling__{key}": value for key, value in changes.items()})
    sde, labels = SDES["vpsde"], np.tile(np.arange(3), 40)
    guidance = ClassifierFree(sde, NO_LABEL, scale=1.5, interval=(0.1, 50.0))
    sampler = build_sampler(config, sde, (len(labels), 2))

    def sample(key, labels):
        return sampler(key, guidance.guide(lambda labels: score_of(sde, labels), labels))[0]

    x = np.asarray(jax.jit(sample, compiler_options=QUICK)(jax.random.key(0), jnp.asarray(labels)))
    nearest = np.argmin(((x[:, None] - TRIANGLE.means) ** 2).sum(-1), axis=1)
    assert (nearest == labels).mean() > 0.9


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
        ({"sampling__guidance_scale": 2.0}, r"the network is told no classes \(model.num_classes=0\)"),
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
    assert (unbounded.no_label, unbounded.interval) == (10, (0.0, math.inf))


# --- the compiled program --------------------------------------------------------------------------------------------


def test_a_guide_and_its_parameters_reach_the_samples(monkeypatch):
    """The guide stands for the score of N(mean of the label, 0.1^2); other parameters need no other program."""
    monkeypatch.setattr(Experiment, "score_fn", lambda self, params, smooth: lambda x, t: jnp.zeros_like(x))
    changes = {"sampling__labels": "2,0", "sampling__method": "ddim", "sampling__num_steps": 12}
    experiment = build_experiment(tiny.make_config(**changes))
    sde = experiment.sde

    def apply(means, score_fn, labels):
        def score(x, t):
            m, std = sde.mean_coeff(t), sde.std(t)
            mean = (m * means[labels])[:, None, None, None]
            return score_fn(x, t) - (x - mean) / (0.01 * m**2 + std**2)[:, None, None, None]

        return score

    def draw(program, means, indices):
        program._guide = Guide(apply, distributed.replicate(np.float32(means)), num_classes=3)
        return program(distributed.replicate(np.zeros(1, np.float32)), np.asarray(indices))[0] / 8.5 - 1

    guide = Guide(apply, distributed.replicate(np.zeros(3, np.float32)), num_classes=3)
    program = SamplingProgram(experiment, 4, guide=guide)
    for means in ([-0.5, 0.9, 0.5], [0.4, 0.9, 0.0]):
        x = draw(program, means, range(4)).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(x, np.array(means)[[2, 0, 2, 0]], atol=0.1)
    two = draw(SamplingProgram(experiment, 2, guide=guide), means, [1, 2])
    np.testing.assert_array_equal(two, draw(program, means, range(4))[1:3])
