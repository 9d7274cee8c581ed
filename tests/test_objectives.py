"""Denoising and sliced score matching: their values and minimizers in closed form, and through real networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from analytic import MIX, MU, QUICK, S0, SDES
from cases import by_default

import losses
import models
from configs import base
from configs.ve import digits_ncsnpp_continuous
from models import cpu
from models.score import get_score_fn
from parallel import rng
from sde_lib import VESDE, VPSDE, build_sde, expand

EPS = losses.TRAINING_EPS
WEIGHTINGS = ("std", "likelihood", "likelihood, importance-sampled")
WRONG = 0.7 * (np.eye(3) + 0.5 * MIX.astype(np.float64))  # the score under test is this times the true one


@pytest.fixture
def numpy_draws(monkeypatch):
    """Draws by numpy, whose generator costs no compilation; the laws of `rng` have tests of their own."""
    generator = np.random.Generator(np.random.Philox(0))
    draws = {
        "uniform": lambda key, shape, minval=0.0, maxval=1.0: generator.uniform(minval, maxval, shape),
        "normal": lambda key, shape: generator.standard_normal(shape),
        "rademacher": lambda key, shape: generator.choice([-1.0, 1.0], shape),
    }
    for name, draw in draws.items():
        in_float32 = lambda *args, draw=draw, **kwargs: jnp.asarray(draw(*args, **kwargs), jnp.float32)  # noqa: E731
        monkeypatch.setattr(rng, name, in_float32)


def inject(monkeypatch, **draws):
    """Replaces draws of `rng` by given arrays."""
    for name, value in draws.items():
        monkeypatch.setattr(rng, name, lambda *args, value=value, **kwargs: jnp.asarray(value, jnp.float32))


class ScoreNetwork(nn.Module):
    """A network whose score is a given function of (module, x, t)."""

    sde: object
    score: object

    @nn.compact
    def __call__(self, x, labels, train=False):
        sde = self.sde
        if isinstance(sde, VESDE):  # is told sigma and returns the score
            return self.score(self, x, jnp.log(labels / sde.sigma_min) / np.log(sde.sigma_max / sde.sigma_min))
        return -expand(sde.std(labels / 999), x) * self.score(self, x, labels / 999)


def wrong_network(sde):
    """A network with a linear score and an asymmetric Jacobian: WRONG times the true score of N(MU, S0²) data."""

    def score(module, x, t):
        m, std = sde.mean_coeff(t), sde.std(t)
        true_score = -(x - expand(m, x) * MU) / expand(m**2 * S0**2 + std**2, x)
        return true_score @ WRONG.T.astype(np.float32)

    return ScoreNetwork(sde, score)


def coefficients(sde):
    """Times from eps to T and m, std and g there, in float64."""
    t = np.geomspace(EPS, 1.0, 20_001)
    with jax.enable_x64(True):
        return t, *(np.asarray(f) for f in (sde.mean_coeff(t), sde.std(t), sde.sde(jnp.zeros((t.size, 1)), t)[1]))


def expected_losses(sde, weighting):
    """Means of the losses of `wrong_network` in float64, with `reduce_mean`."""
    t, m, std, g = coefficients(sde)
    v = m**2 * S0**2 + std**2
    trace, square = -np.trace(WRONG) / v, np.sum(WRONG**2) / v  # of the Jacobian; the mean of ‖s‖²
    weight = std**2 if weighting == "std" else g**2
    mean = lambda values: np.trapezoid(values, t) / (1 - EPS)  # noqa: E731
    sliced = mean(weight * (2 * trace + square)) / 3
    rise = np.diff(np.log(std / m)[[0, -1]]).item()  # of -log_snr
    constant = 1.0 if weighting == "std" else 2 * rise / (1 - EPS)
    return {"denoising": sliced + constant, "sliced": sliced, "sliced_vr": sliced}


def make_loss(sde, model, objective="denoising", weighting="std", reduce_mean=True):
    draw_times = losses.make_importance_times(sde) if "importance" in weighting else None
    return losses.make_continuous_loss(
        sde,
        model,
        reduce_mean=reduce_mean,
        likelihood_weighting=weighting != "std",
        objective=objective,
        draw_times=draw_times,
    )


def variances_of_denoising(sde):
    """Variances of the likelihood-weighted denoising loss in float64, with uniform t and with p(t) ∝ g² / std².

    s + z / std is Gaussian with covariance C, so that the mean square of ‖s + z / std‖² is 2 tr C² + (tr C)².
    """
    t, m, std, g = coefficients(sde)
    v, factor = m**2 * S0**2 + std**2, g**2 / std**2
    v, of_noise = v[:, None, None], std[:, None, None] ** -2
    cov = (WRONG @ WRONG.T - WRONG - WRONG.T) / v + of_noise * np.eye(3)
    square = g**4 * (2 * np.sum(cov**2, axis=(1, 2)) + np.trace(cov, axis1=1, axis2=2) ** 2) / 9
    mean = lambda values: np.trapezoid(values, t) / (1 - EPS)  # noqa: E731
    expected = expected_losses(sde, "likelihood")["denoising"]
    return mean(square) - expected**2, mean(square / factor) * mean(factor) - expected**2


@pytest.mark.usefixtures("numpy_draws")
@pytest.mark.parametrize("name", by_default(["vpsde"], SDES))
def test_means_and_variances_are_the_closed_forms(name):
    """Every objective, weighting and density of times: the mean within 4 standard errors."""
    sde, variance = SDES[name], {}
    x = jnp.asarray(MU + S0 * np.random.RandomState(1).standard_normal((2**16, 1, 1, 3)), jnp.float32)
    for weighting in WEIGHTINGS:
        expected = expected_losses(sde, weighting)
        for objective in losses.OBJECTIVES:
            loss_fn = make_loss(sde, wrong_network(sde), objective, weighting)
            values = np.asarray(loss_fn(jax.random.key(0), {}, x, train=False), np.float64)
            variance[objective, weighting] = values.var()
            assert abs(values.mean() - expected[objective]) < 4 * values.std() / 256, (objective, weighting)
    for weighting in WEIGHTINGS:
        assert variance["sliced_vr", weighting] < variance["sliced", weighting]
    uniform, importance_sampled = variances_of_denoising(sde)
    assert variance["denoising", WEIGHTINGS[2]] == pytest.approx(importance_sampled, rel=0.05)
    # The uniform one is carried by a few t near eps, too few here to measure it, unless t was uniform as it is.
    if name == "vesde":
        assert variance["denoising", WEIGHTINGS[1]] == pytest.approx(importance_sampled, rel=0.05)
        assert uniform == pytest.approx(importance_sampled, rel=1e-6)
    else:
        assert uniform > 100 * importance_sampled


@pytest.mark.parametrize("objective", losses.OBJECTIVES)
def test_half_the_sum_is_half_the_dimensions_times_the_mean(monkeypatch, objective):
    """So the constant between the objectives is D / 2 where it is 1."""
    x = np.random.RandomState(0).standard_normal((3, 1, 4, 3)).astype(np.float32)
    inject(monkeypatch, uniform=[0.1, 0.5, 0.9], normal=x[::-1], rademacher=np.sign(x))
    mean, half_sum = (
        make_loss(VPSDE(), wrong_network(VPSDE()), objective, reduce_mean=reduce_mean)(
            jax.random.key(0), {}, jnp.asarray(x), train=False
        )
        for reduce_mean in (True, False)
    )
    np.testing.assert_allclose(half_sum, 6 * mean, rtol=1e-5)


@pytest.mark.exhaustive
def test_loss_of_an_image_does_not_depend_on_its_batch():
    """Other images and keys beside the second one change nothing of it."""
    network = wrong_network(VPSDE())
    loss_fns = [make_loss(VPSDE(), network, objective, WEIGHTINGS[2]) for objective in losses.OBJECTIVES]
    run = jax.jit(lambda keys, x: [fn(keys, {}, x, train=False) for fn in loss_fns], compiler_options=QUICK)
    x, keys = jax.random.normal(jax.random.key(1), (2, 3, 1, 4, 3)), jax.random.split(jax.random.key(2), (2, 3))
    values, others = run(keys[0], x[0]), run(keys[1].at[1].set(keys[0][1]), x[1].at[1].set(x[0][1]))
    for value, other in zip(values, others, strict=True):
        np.testing.assert_allclose(other[1], value[1], rtol=1e-6)
        assert abs(other[0] - value[0]) > 1e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize("objective", ["sliced", "sliced_vr"])
def test_score_and_jacobian_see_one_dropout_mask(monkeypatch, objective):
    """s = -x / (1 - rate) at a kept pixel, else 0: the loss of an image of one pixel has two values, not four."""
    ones = np.ones((32, 1, 1, 1))
    inject(monkeypatch, uniform=np.full(32, 0.5), normal=0 * ones, rademacher=ones)
    sde, x = VPSDE(), 1 + np.arange(32, dtype=np.float32).reshape(32, 1, 1, 1) / 32
    network = ScoreNetwork(sde, lambda module, x, t: -nn.Dropout(0.5, deterministic=False)(x))
    values = make_loss(sde, network, objective)(jax.random.key(3), {}, x, train=True)
    m, std = (float(f(jnp.array([0.5]))[0]) for f in (sde.mean_coeff, sde.std))
    is_kept = np.abs(values) > 1e-6
    np.testing.assert_allclose(values, np.where(is_kept, std**2 * (4 * (m * x.ravel()) ** 2 - 4), 0), rtol=1e-4)
    assert 6 < is_kept.sum() < 26


# --- learning a Gaussian ---------------------------------------------------------------------------------------------

DATA_MEAN = np.array([0.5, -0.3])
DATA_COVARIANCE = np.array([[0.6, 0.3], [0.3, 0.4]])


def gaussian_network(sde):
    """A network with the score of N(mean, L Lᵀ) data of two values; mean and the triangle of L are its parameters."""

    def score(module, x, t):
        mean = module.param("mean", nn.initializers.zeros, (2,))
        a, b, c = module.param("cholesky", nn.initializers.ones, (3,))
        m, noise = sde.mean_coeff(t), sde.std(t) ** 2
        centred = x.reshape(-1, 2) - m[:, None] * mean[None]
        xx, xy, yy = m**2 * a * a + noise, m**2 * a * b, m**2 * (b * b + c * c) + noise
        solved = jnp.stack([yy * centred[:, 0] - xy * centred[:, 1], xx * centred[:, 1] - xy * centred[:, 0]], axis=1)
        return (-solved / (xx * yy - xy**2)[:, None]).reshape(x.shape)

    return ScoreNetwork(sde, score)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "weighting"),
    by_default(
        [("denoising", "std"), ("sliced_vr", WEIGHTINGS[2])],
        [("denoising", "std"), ("sliced", "std"), ("sliced_vr", "std"), ("sliced_vr", WEIGHTINGS[2])],
    ),
)
def test_learns_a_gaussian(objective, weighting):
    """Mean and covariance of the data come out of training, to what noise the average of the parameters leaves."""
    num_steps, batch_size = 1500, 256
    noise = np.random.RandomState(0).standard_normal((num_steps, batch_size, 2))
    batches = (DATA_MEAN + noise @ np.linalg.cholesky(DATA_COVARIANCE).T).reshape(num_steps, batch_size, 1, 1, 2)
    optimizer = losses.make_optimizer(lr=1e-2, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=0, grad_clip=1.0)
    loss_fn = make_loss(VPSDE(), gaussian_network(VPSDE()), objective, weighting)
    steps = losses.make_train_steps(losses.make_train_step(loss_fn, optimizer, ema_rate=0.995))
    state = losses.init_state({"mean": jnp.zeros(2), "cholesky": jnp.array([1.0, 0.0, 1.0])}, optimizer)
    final, _ = jax.jit(steps, compiler_options=QUICK)(jax.random.key(0), state, jnp.asarray(batches, jnp.float32))
    learned = jax.device_get(final.params_ema)
    a, b, c = learned["cholesky"]
    covariance = np.array([[a * a, a * b], [a * b, b * b + c * c]])
    np.testing.assert_allclose(learned["mean"], DATA_MEAN, atol=0.03)
    np.testing.assert_allclose(covariance, DATA_COVARIANCE, atol=0.03)


# --- real networks ---------------------------------------------------------------------------------------------------


def sliced_loss_in_forward_mode(score_fn, sde, x, t, z, v):
    """The mean sliced_vr loss with half sums, J v by forward mode, where `losses` takes vᵀ J by reverse mode."""
    std = expand(sde.std(t), x)
    noisy = expand(sde.mean_coeff(t), x) * x + std * z
    score, along = jax.jvp(lambda noisy: score_fn(noisy, t), (noisy,), (v,))
    return (std**2 * (v * along + score**2 / 2)).sum() / len(x)


def real_network(leaf):
    """A configuration's SDE, its network of a few channels, and parameters none of which starts at zero."""
    config = leaf.get_config()
    config.update_from_flattened_dict(tiny.SETTINGS | {"model.dropout": 0.0})
    model, draws = models.create_model(config), np.random.RandomState(1)
    init = lambda: model.init({"params": jax.random.key(0)}, jnp.zeros((1, 8, 8, 1)), jnp.ones(1), train=False)  # noqa: E731
    fill = lambda leaf: jnp.asarray(0.2 * draws.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return build_sde(config), model, jax.tree.map(fill, jax.eval_shape(init)["params"])


@pytest.mark.exhaustive
def test_a_real_network_trains_inside_a_compiled_loop(monkeypatch):
    """Its own convolutions, which refuse forward mode, are differentiated twice here.

    The loss equals that by forward mode through XLA's own convolutions, and the gradient the differences of that.
    """
    sde, model, params = real_network(digits_ncsnpp_continuous)
    draws = np.random.RandomState(0)
    x, z = draws.uniform(size=(2, 4, 8, 8, 1)).astype(np.float32)
    t, v = np.array([0.01, 0.1, 0.5, 0.9], np.float32), np.sign(draws.standard_normal(x.shape)).astype(np.float32)
    inject(monkeypatch, uniform=t, normal=z, rademacher=v)
    loss_fn = make_loss(sde, model, "sliced_vr", reduce_mean=False)
    # Learning rate 0: both steps have one gradient g, and Adam's first moment becomes (1 - 0.9²) g.
    optimizer = losses.make_optimizer(lr=0.0, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=0, grad_clip=-1.0)
    train_step = losses.make_train_step(loss_fn, optimizer, ema_rate=0.9)
    steps = jax.jit(losses.make_train_steps(train_step), compiler_options=QUICK)
    final, metrics = steps(jax.random.key(1), losses.init_state(params, optimizer), jnp.stack([x, x]))
    gradient = jax.tree.map(lambda moment: moment / 0.19, optax.tree.get(final.opt_state, "mu"))

    score_fn = lambda params: get_score_fn(sde, model, params, train=False, continuous=True)  # noqa: E731
    along_gradient = lambda h: jax.tree.map(lambda p, g: p + h * g / metrics["grad_norm"][0], params, gradient)  # noqa: E731
    reference = jax.jit(
        lambda h: sliced_loss_in_forward_mode(score_fn(along_gradient(h)), sde, x, t, z, v), compiler_options=QUICK
    )
    step = 1e-3
    with cpu.for_platform("cuda"):  # a CPU's convolutions have no forward mode
        value, *sides = (reference(h) for h in (0.0, step, -step))
    np.testing.assert_allclose(metrics["loss"], np.full(2, value), rtol=1e-4)
    slope = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(slope, metrics["grad_norm"][0], rtol=2e-3)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "slice"}, "training.objective='slice' is unknown; known: denoising, sliced, sliced_vr"),
        ({"importance_sampling": True}, "importance_sampling=True needs training.likelihood_weighting=True.*=False"),
        (
            {"importance_sampling": True, "continuous": False},
            "importance_sampling=True needs training.continuous=True: the discrete losses draw a level, not a time",
        ),
        (
            {"objective": "sliced", "continuous": False},
            "objective='sliced' needs training.continuous=True: SMLD and DDPM are denoising by definition",
        ),
    ],
)
def test_undefined_settings_are_refused(changes, message):
    config = base.get_config()
    config.training.update(changes)
    with pytest.raises(ValueError, match=message):
        losses.build_loss(config, VPSDE(), wrong_network(VPSDE()))


def test_settings_choose_objective_and_times(monkeypatch):
    """Against the loss built by hand, with the same draws."""
    x = np.random.RandomState(0).standard_normal((3, 1, 4, 3)).astype(np.float32)
    inject(monkeypatch, uniform=[0.1, 0.5, 0.9], normal=x[::-1], rademacher=np.sign(x))
    sde, network, seen = VPSDE(), wrong_network(VPSDE()), []
    for objective in losses.OBJECTIVES:
        for sampling in (False, True):
            config = base.get_config()
            config.training.update(objective=objective, importance_sampling=sampling, likelihood_weighting=True)
            by_hand = make_loss(sde, network, objective, WEIGHTINGS[2 if sampling else 1])
            values = [
                fn(jax.random.key(0), {}, jnp.asarray(x), train=False)
                for fn in (losses.build_loss(config, sde, network), by_hand)
            ]
            np.testing.assert_array_equal(*values)
            seen.append(float(values[0][0]))
    assert len(set(seen)) == 6
