"""Imputation, colorization and class conditions: exact posteriors, and the arrays of the 2021 code with their noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import MU, QUICK, S0, SDES, load, make_score_fn, sde_of

import rng
import sampling
from configs import base
from controllable_generation import GRAY_ROTATION, condition_on_class, known_gray, known_pixels
from models import wideresnet
from sde_lib import VESDE

CASES = ["inpaint_vpsde", "inpaint_subvpsde", "colorize_vesde", "colorize_subvpsde"]
COLORIZATIONS = [name for name in CASES if name.startswith("colorize")]


def known_of(stored, name):
    if name.startswith("colorize"):
        return known_gray(jnp.asarray(stored["gray"]))
    return known_pixels(jnp.asarray(stored["data"]), stored["mask"])


def sampler_config(meta, **changes):
    config = base.get_config()
    config.sampling.update(
        predictor=meta["predictor"], corrector=meta["corrector"], n_steps_each=meta["n_steps"], snr=meta["snr"]
    )
    config.sampling.update(num_steps=meta["sde"]["N"], **changes)
    return config


# --- the 2021 code's arrays ------------------------------------------------------------------------------------------


def test_rotation_is_that_of_the_2021_code_and_orthonormal():
    stored, _ = load("colorize_matrix")
    np.testing.assert_allclose(GRAY_ROTATION, stored["M"], atol=3e-7)  # its own distance from orthonormal
    np.testing.assert_allclose(GRAY_ROTATION.T, stored["invM"], atol=5e-7)
    np.testing.assert_allclose(GRAY_ROTATION @ GRAY_ROTATION.T, np.eye(3), atol=1e-15)


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
    draws = iter(jnp.asarray(stored["step_noise"]))
    monkeypatch.setattr(rng, "normal", lambda key, shape: next(draws))
    known = known_of(stored, name)

    @jax.jit
    def run(x):
        plain = step(jax.random.key(0), x, t, reverse_sde)
        return plain, known.replace(sde)(jax.random.key(0), *plain, t)

    plain, (got, got_mean) = run(x)
    scale, expected_mean = np.abs(stored["step_x"]).max(), stored[f"step_{part}_x_mean"]
    np.testing.assert_allclose(got, stored[f"step_{part}_x"], rtol=2e-5, atol=1e-5 * scale)
    mean = sde.marginal_prob(known._rotate(known.images), t)[0]
    np.testing.assert_allclose(known.combine(got, mean), expected_mean, rtol=2e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(got_mean, known.combine(plain[1], mean), rtol=1e-6, atol=1e-6 * scale)
    assert np.abs(got_mean - expected_mean).max() > 1e-3  # the departure is one


def inject_loop_noise(monkeypatch, noise, corrects):
    """Gives the sampler the reference's draws; a key says which stream it is of, and the number of its draw.

    The reference draws, after the prior, in each step: the corrector's noise if it has any, that of the known values,
    the predictor's, and that of the known values again.
    """
    steps = jnp.asarray(noise[1:]).reshape(-1, 4 if corrects else 3, *noise.shape[1:])
    flat = lambda draws: draws.reshape(-1, *noise.shape[1:])  # noqa: E731
    streams = {"own": flat(steps[:, [0, 2]] if corrects else steps[:, 1]), "known": flat(steps[:, [-3, -1]])}
    fold = lambda key, i: "known" if isinstance(i, int) and i > 2**31 else (key, i)  # noqa: E731
    monkeypatch.setattr(rng, "split", lambda key: ("prior", "own"))
    monkeypatch.setattr(rng, "fold_in", fold)
    monkeypatch.setattr(rng, "normal", lambda key, shape: streams[key[0]][key[1]])


def reference_start(sde, known, name, noise):
    """The state at t = T of the 2021 code: known values without noise, and in colorization a fault.

    It set the prior's red to zero where it meant the prior's grey, and then added the known grey.
    """
    prior = sde.prior_std * jnp.asarray(noise)
    values = known._rotate(known.images)
    if name in COLORIZATIONS:
        return prior.at[..., 0].set(0.0) + known.combine(jnp.zeros_like(prior), values)
    return known.combine(prior, values)


@pytest.mark.parametrize("name", CASES)
def test_whole_loop_matches_the_reference(name, monkeypatch):
    """From the reference's own start; what it returned is the last state, with the known values' mean in place."""
    stored, meta = load(name)
    sde, known = sde_of(meta), known_of(stored, name)
    start = reference_start(sde, known, name, stored["loop_noise"][0])
    inject_loop_noise(monkeypatch, stored["loop_noise"], meta["corrector"] != "none")
    draw = sampling.build_sampler(sampler_config(meta, noise_removal=False), sde, start.shape)
    score_fn, keys = make_score_fn(sde, meta["score_c"]), jax.random.split(jax.random.key(0))
    x, _ = jax.jit(lambda x: draw(keys, score_fn, x, known.replace(sde)))(start)
    mean = sde.marginal_prob(known._rotate(known.images), jnp.full(2, meta["eps"]))[0]
    x = known.combine(x, mean)
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


# --- exact posteriors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vesde", "vpsde", "subvpsde"])
def test_unknown_pixels_of_independent_data_do_not_see_the_known(name):
    """The pixels of the Gaussian data are independent: the posterior of the unknown is the data's own law."""
    sde, shape = SDES[name], (500, 4, 4, 1)
    mask = np.zeros((4, 4, 1))
    mask[:, :2] = 1
    images = jnp.full(shape, 0.9)
    known = known_pixels(images, mask)
    config = base.get_config()
    config.sampling.update(predictor="reverse_diffusion", num_steps=400)
    draw = sampling.build_sampler(config, sde, shape)

    @jax.jit
    def run(key):
        return draw(key, make_score_fn(sde), known.initial_state(jax.random.key(1), sde), known.replace(sde))[0]

    x = np.asarray(run.lower(jax.random.key(0)).compile(compiler_options=QUICK)(jax.random.key(0)))
    # The mean of the kernel at the last time, within its rounding: 1e-3 of VP's drift.
    np.testing.assert_allclose(x[:, :, :2], 0.9, atol=1e-3)
    unknown = x[:, :, 2:]
    assert abs(unknown.mean() - MU) < 4 * S0 / np.sqrt(unknown.size)
    assert unknown.std() == pytest.approx(S0, rel=0.05)


def test_colours_of_independent_data_follow_their_conditional_law():
    """Given the mean of three independent normal channels, the rest has mean MU and variance S0^2 per direction."""
    sde, shape = SDES["vpsde"], (2000, 1, 1, 3)
    known = known_gray(jnp.full(shape, 0.7))
    config = base.get_config()
    config.sampling.update(predictor="reverse_diffusion", num_steps=400)
    draw = sampling.build_sampler(config, sde, shape)
    run = jax.jit(lambda key: draw(key, make_score_fn(sde), None, known.replace(sde))[0], compiler_options=QUICK)
    rotated = np.asarray(run(jax.random.key(0)))[:, 0, 0] @ GRAY_ROTATION
    np.testing.assert_allclose(rotated[:, 0], 0.7 * np.sqrt(3), atol=2e-3)
    for colour in rotated[:, 1:].T:  # the mean of equal channels is 0 in these directions
        assert abs(colour.mean()) < 4 * S0 / np.sqrt(len(colour))
        assert colour.std() == pytest.approx(S0, rel=4 / np.sqrt(2 * len(colour)))


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


def test_initial_state_is_noised_where_values_are_known():
    sde, shape = VESDE(sigma_max=2.0), (4000, 1, 2, 1)
    known = known_pixels(jnp.full(shape, 5.0), np.array([[[1], [0]]]))
    x = np.asarray(known.initial_state(jax.random.key(0), sde))[:, 0, :, 0]
    assert abs(x[:, 0].mean() - 5.0) < 4 * 2.0 / np.sqrt(4000)
    assert abs(x[:, 1].mean()) < 4 * 2.0 / np.sqrt(4000)
    np.testing.assert_allclose(x.std(0), 2.0, rtol=4 / np.sqrt(8000))
    assert abs(np.corrcoef(x.T)[0, 1]) < 4 / np.sqrt(4000)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_bad_measurements_are_refused():
    images = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4, 1\), images have \(2, 4, 4, 1\); give it"):
        known_pixels(images, np.ones((3, 4, 1)))
    with pytest.raises(ValueError, match=r"mask has values besides 0 \(unknown\) and 1 \(known\)"):
        known_pixels(images, np.full((4, 4, 1), 0.5))
    with pytest.raises(ValueError, match="images have 1 channels; colorization needs 3"):
        known_gray(images)


def test_a_method_without_steps_refuses_a_transform():
    config = base.get_config()
    config.sampling.update(method="ode")
    draw = sampling.build_sampler(config, SDES["vpsde"], (1, 2))
    with pytest.raises(ValueError, match=r"sampling.method='ode' has no steps that a transform could change"):
        draw(jax.random.key(0), make_score_fn(SDES["vpsde"]), None, lambda key, x, x_mean, t: (x, x_mean))
