"""Imputation, colorization and class conditions: exact posteriors, and the arrays of the 2021 code with their noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import SDES, load, make_score_fn, sde_of

import sampling
from classifier import condition_on_class
from configs import base
from controllable_generation import operators
from controllable_generation.projection import put_in, put_in_each_step
from models import wideresnet
from parallel import rng

CASES = ["inpaint_vpsde", "inpaint_subvpsde", "colorize_vesde", "colorize_subvpsde"]
COLORIZATIONS = [name for name in CASES if name.startswith("colorize")]


def measurement_of(stored, name):
    """The operator, and the measurement of the known images."""
    if name in COLORIZATIONS:
        operator, images = operators.grayscale((*stored["gray"].shape[1:3], 3)), stored["gray"]
    else:
        images = stored["data"]
        mask = np.broadcast_to(stored["mask"], images.shape)[0].astype(np.float64)
        operator = operators.inpainting(mask)
    return operator, operator.apply(jnp.asarray(images))


def as_noise_of_images(noise, name):
    """The reference's noise of known values; in colorization it was drawn in the rotated basis of the channels."""
    return noise @ load("colorize_matrix")[0]["invM"] if name in COLORIZATIONS else noise


def sampler_config(meta, **changes):
    config = base.get_config()
    config.sampling.update(
        predictor=meta["predictor"], corrector=meta["corrector"], n_steps_each=meta["n_steps"], snr=meta["snr"]
    )
    config.sampling.update(num_steps=meta["sde"]["N"], **changes)
    return config


# --- the 2021 code's arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["predictor", "corrector"])
@pytest.mark.parametrize("name", CASES)
def test_one_step_matches_the_reference(name, part, monkeypatch):
    """x is the reference's. Its x_mean took the unknown values from x, noise included; ours from the step's mean."""
    stored, meta = load(name)
    if f"step_{part}_x" not in stored.files:
        assert meta["corrector"] == "none"
        return
    sde, x, t = sde_of(meta), jnp.asarray(stored["step_x"]), jnp.full(2, 0.6)
    reverse_sde = sde.reverse(make_score_fn(sde, meta["score_c"]))
    settings = sampler_config(meta).sampling
    step = sampling.PREDICTORS[meta["predictor"]] if part == "predictor" else sampling._build_corrector(settings)
    own, known = stored["step_noise"]
    draws = iter([jnp.asarray(own), jnp.asarray(as_noise_of_images(known, name))])
    monkeypatch.setattr(rng, "normal", lambda key, shape: next(draws))
    operator, y = measurement_of(stored, name)
    replace = put_in_each_step(operator, y, sde, noise=0.0, strength=1.0)

    @jax.jit
    def run(x):
        plain = step(jax.random.key(0), x, t, reverse_sde)
        return plain, replace(jax.random.key(0), *plain, t)

    plain, (got, got_mean) = run(x)
    scale, expected_mean = np.abs(stored["step_x"]).max(), stored[f"step_{part}_x_mean"]
    np.testing.assert_allclose(got, stored[f"step_{part}_x"], rtol=2e-5, atol=1e-5 * scale)
    mean = sde.marginal_prob(y, t)[0]
    np.testing.assert_allclose(put_in(operator, got, mean), expected_mean, rtol=2e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(got_mean, put_in(operator, plain[1], mean), rtol=1e-6, atol=1e-6 * scale)
    assert np.abs(got_mean - expected_mean).max() > 1e-3  # the departure is one


def inject_loop_noise(monkeypatch, noise, name, corrects):
    """Gives the sampler the reference's draws; a key says which stream it is of, and the number of its draw.

    The reference draws, after the prior, in each step: the corrector's noise if it has any, that of the known values,
    the predictor's, and that of the known values again.
    """
    steps = jnp.asarray(noise[1:]).reshape(-1, 4 if corrects else 3, *noise.shape[1:])
    flat = lambda draws: draws.reshape(-1, *noise.shape[1:])  # noqa: E731
    streams = {
        "own": flat(steps[:, [0, 2]] if corrects else steps[:, 1]),
        "known": flat(as_noise_of_images(steps[:, [-3, -1]], name)),
    }
    fold = lambda key, i: "known" if isinstance(i, int) and i > 2**31 else (key, i)  # noqa: E731
    monkeypatch.setattr(rng, "split", lambda key: ("prior", "own"))
    monkeypatch.setattr(rng, "fold_in", fold)
    monkeypatch.setattr(rng, "normal", lambda key, shape: streams[key[0]][key[1]])


def reference_start(sde, operator, y, name, noise):
    """The state at t = T of the 2021 code: known values without noise, and in colorization a fault.

    It set the prior's red to zero where it meant the prior's grey, and then added the known grey.
    """
    prior = sde.prior_std * jnp.asarray(noise)
    if name in COLORIZATIONS:
        return prior.at[..., 0].set(0.0) + operator.pseudo_inverse(y)
    return put_in(operator, prior, y)


@pytest.mark.parametrize("name", CASES)
def test_whole_loop_matches_the_reference(name, monkeypatch):
    """From the reference's own start; what it returned is the last state, with the known values' mean in place."""
    stored, meta = load(name)
    sde, (operator, y) = sde_of(meta), measurement_of(stored, name)
    replace = put_in_each_step(operator, y, sde, noise=0.0, strength=1.0)
    start = reference_start(sde, operator, y, name, stored["loop_noise"][0])
    inject_loop_noise(monkeypatch, stored["loop_noise"], name, meta["corrector"] != "none")
    draw = sampling.build_sampler(sampler_config(meta, noise_removal=False), sde, start.shape)
    score_fn, keys = make_score_fn(sde, meta["score_c"]), jax.random.split(jax.random.key(0))
    x, _ = jax.jit(lambda x: draw(keys, score_fn, x, replace))(start)
    x = put_in(operator, x, sde.marginal_prob(y, jnp.full(2, meta["eps"]))[0])
    x = (x + 1) / 2 if meta["inverse_scaler"] == "(x+1)/2" else x
    np.testing.assert_allclose(x, stored["loop_samples"], rtol=2e-4, atol=5e-5)


class ReferenceClassifier:
    """logits(x, sigma) = mean over pixels of tanh(x), times W, / (1 + sigma)."""

    def apply(self, variables, x, sigmas):
        return jnp.tanh(x).mean((1, 2)) @ variables["params"]["W"] / (1 + sigmas)[:, None]


def test_class_condition_matches_the_reference(monkeypatch):
    stored, meta = load("class_conditional_vesde")
    sde, labels = sde_of(meta), jnp.asarray(stored["labels"])
    logit_fn = wideresnet.make_logit_fn(ReferenceClassifier(), {"W": jnp.asarray(stored["W"])})
    grad_fn = wideresnet.make_classifier_grad_fn(logit_fn)
    x, sigma = jnp.asarray(stored["grad_x"]), jnp.asarray(stored["grad_sigma"])
    np.testing.assert_allclose(logit_fn(x, sigma), stored["grad_logits"], rtol=1e-5, atol=1e-6)
    # Far from 0 the derivative 1 - tanh^2 has no digits left: the absolute error counts.
    atol = 1e-6 * np.abs(stored["grad_out"]).max()
    np.testing.assert_allclose(grad_fn(x, sigma, labels), stored["grad_out"], rtol=1e-5, atol=atol)

    noise = jnp.asarray(stored["noise"])
    monkeypatch.setattr(rng, "split", lambda key: (0, key))
    monkeypatch.setattr(rng, "fold_in", lambda key, i: i + 1)
    monkeypatch.setattr(rng, "normal", lambda i, shape: noise[i])
    draw = sampling.build_sampler(sampler_config(meta), sde, stored["samples"].shape)
    score_fn = condition_on_class(make_score_fn(sde, meta["score_c"]), grad_fn, sde, labels)
    x, _ = jax.jit(lambda: draw(jax.random.split(jax.random.key(0)), score_fn))()
    np.testing.assert_allclose(x, stored["samples"], rtol=2e-4, atol=2e-5)


# --- classes in closed form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vesde", "vpsde", "subvpsde"])
def test_class_condition_is_bayes_rule(name):
    """A logistic classifier of a two-sided Gaussian mixture: score + its gradient is the score of one side."""
    sde, side = SDES[name], jnp.array([1, 0, 1])
    x, t = jnp.array([[0.3], [-0.2], [1.1]]), jnp.array([0.05, 0.4, 0.9])

    def log_sides(x, m, std):  # of the data N(+-1, 0.2^2) after the kernel
        variance = (m * 0.2) ** 2 + std**2
        centres = jnp.array([-1.0, 1.0])[None, :] * m[:, None]
        return -0.5 * (x - centres) ** 2 / variance[:, None]

    def log_prior(x, t):
        return jax.nn.logsumexp(log_sides(x, sde.mean_coeff(t), sde.std(t)), axis=1).sum()

    def log_class(x, sigma, labels):  # knows clean images plus noise of sigma
        log_p = jax.nn.log_softmax(log_sides(x, jnp.ones_like(sigma), sigma))
        return jnp.take_along_axis(log_p, labels[:, None], 1).sum()

    score_fn = lambda x, t: jax.grad(log_prior)(x, t)  # noqa: E731
    got = condition_on_class(score_fn, jax.grad(log_class), sde, side)(x, t)
    m = sde.mean_coeff(t)[:, None]
    expected = -(x - m * (2 * side[:, None] - 1)) / ((0.2 * m) ** 2 + sde.std(t)[:, None] ** 2)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5)
    plain = condition_on_class(score_fn, jax.grad(log_class), sde, side, scale=0.0)(x, t)
    np.testing.assert_allclose(plain, score_fn(x, t), rtol=1e-6)


def test_a_method_without_steps_refuses_a_transform():
    config = base.get_config()
    config.sampling.update(method="ode")
    draw = sampling.build_sampler(config, SDES["vpsde"], (1, 2))
    with pytest.raises(ValueError, match=r"sampling.method='ode' has no steps that a transform could change"):
        draw(jax.random.key(0), make_score_fn(SDES["vpsde"]), None, lambda key, x, x_mean, t: (x, x_mean))
