"""Restoration against exact posteriors of Gaussian data, and the approximate methods' bias as the docs state it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import QUICK, SDES
from cases import by_default

import sampling
from configs import base
from controllable_generation import build_operator, build_restoration, guidance
from controllable_generation.projection import put_in

N = 4000
HALF = {"operator": "inpaint", "mask": "right"}
NOISE = 0.2
QUICK_ODE = {"method": "dpmpp_3m", "num_steps": 40, "noise_removal": False}
PC = {"method": "pc", "predictor": "reverse_diffusion", "num_steps": 200, "noise_removal": False}


def configure(restore, **sampling_settings):
    config = base.get_config()
    config.restore.update({"clip": False} | restore)  # Gaussian data have no bounds
    config.sampling.update(sampling_settings)
    return config


class Gaussian:
    """Gaussian images whose neighbouring values are correlated, or independent ones of standard deviation 1/2."""

    def __init__(self, shape, correlated):
        places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
        distances = ((places[:, None] - places[None]) ** 2).sum(-1)
        self.shape, self.mean = shape, 0.3 * np.random.default_rng(0).standard_normal(len(places))
        self.covariance = 0.25 * (np.exp(-distances / 4) + 0.2 * np.eye(len(places))) if correlated else None
        self.covariance = 0.25 * np.eye(len(places)) if self.covariance is None else self.covariance

    def score_fn(self, sde):
        eigenvalues, basis = np.linalg.eigh(self.covariance)

        def score(x, t):
            m, std = sde.mean_coeff(t)[:, None], sde.std(t)[:, None]
            difference = x.reshape(len(x), -1) - m * self.mean[None].astype(np.float32)
            weights = 1 / (m**2 * eigenvalues[None].astype(np.float32) + std**2)
            q = jnp.asarray(basis, jnp.float32)
            return -jnp.einsum("bi,ij,bj,kj->bk", difference, q, weights, q, precision="highest").reshape(x.shape)

        return score

    def measure(self, operator, noise):
        """A measurement of one image, and the mean and covariance of the images given it."""
        unit = jnp.eye(len(self.mean)).reshape(-1, *self.shape)
        matrix = np.asarray(operator.apply(unit), np.float64).reshape(len(unit), -1).T
        is_measured = np.abs(matrix).sum(axis=1) > 0
        y, A = np.zeros(len(matrix)), matrix[is_measured]
        generator = np.random.default_rng(1)
        # By the Cholesky factor, which is unique: the same image on every machine and by every version of NumPy.
        image = self.mean + np.linalg.cholesky(self.covariance) @ generator.standard_normal(len(self.mean))
        y[is_measured] = A @ image + noise * generator.standard_normal(len(A))
        gain = self.covariance @ A.T @ np.linalg.inv(A @ self.covariance @ A.T + noise**2 * np.eye(len(A)))
        posterior = self.mean + gain @ (y[is_measured] - A @ self.mean), self.covariance - gain @ A @ self.covariance
        return y.reshape(operator.measurement_shape).astype(np.float32), posterior


def restore_whitened(name, data, config):
    """Draws N restorations of a measurement; returns them such that the exact ones were N(0, I)."""
    sde, operator = SDES[name], build_operator(config, data.shape)
    y, (mean, covariance) = data.measure(operator, config.restore.noise)
    restore = build_restoration(config, sde, operator)
    draw = sampling.build_sampler(config, sde, (N, *data.shape))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(key, y):
        conditional = restore(data.score_fn(sde), jnp.broadcast_to(y, (N, *y.shape)))
        start = conditional.initial_state(jax.random.fold_in(key, 1)) if conditional.initial_state else None
        return draw(key, conditional.score_fn, start, conditional.transform)[0]

    x = np.asarray(run(jax.random.key(0), y), np.float64).reshape(N, -1)
    variances, basis = np.linalg.eigh(covariance)
    kept = variances > 1e-8  # what is measured without noise does not vary
    return (x - mean) @ basis[:, kept] / np.sqrt(variances[kept])


EXACT = [
    ("vpsde", "mmps", HALF, QUICK_ODE),
    ("vesde", "mmps", HALF, {"method": "ode", "rtol": 1e-3, "atol": 1e-3, "noise_removal": False}),
    ("subvpsde", "mmps", {"operator": "gaussian_blur"}, QUICK_ODE),
    ("vpsde", "mmps", {"operator": "colorize"}, QUICK_ODE),
    ("vesde", "mmps", {"operator": "super_resolution"}, QUICK_ODE),
    ("subvpsde", "pigdm", HALF, QUICK_ODE),
    ("vpsde", "pigdm", {"operator": "gaussian_blur"}, QUICK_ODE),
    ("vesde", "pigdm", {"operator": "colorize"}, QUICK_ODE),
    ("vpsde", "pigdm", {"operator": "super_resolution"}, {"method": "stochastic_heun", "num_steps": 80}),
]


@pytest.mark.parametrize(
    ("sde", "method", "operator", "sampler"),
    by_default([EXACT[0], EXACT[2], EXACT[7]], EXACT),
    ids=[f"{m}-{o['operator']}-{s}" for s, m, o, _ in EXACT],
)
def test_exact_methods_draw_from_the_posterior(sde, method, operator, sampler):
    """mmps for any Gaussian data, pigdm for independent values of its data_std: mean and covariance within 4 errors."""
    data = Gaussian((2, 2, 3) if operator["operator"] == "colorize" else (4, 4, 1), correlated=method == "mmps")
    settings = operator | {"method": method, "noise": NOISE, "cg_steps": 16, "data_std": 0.5}
    z = restore_whitened(sde, data, configure(settings, **{"noise_removal": False} | sampler))
    assert np.abs(z.mean(axis=0)).max() < 4 / np.sqrt(N)
    errors = np.where(np.eye(z.shape[1]), np.sqrt(2 / N), np.sqrt(1 / N))
    assert (np.abs(np.cov(z.T) - np.eye(z.shape[1])) / errors).max() < 4


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("settings", "mean_bias", "variances"),
    [
        ({"method": "replacement"}, 0.20, (1.0, 1.26)),
        ({"method": "dps", "noise": NOISE, "scale": 0.01}, 0.08, (0.71, 1.62)),
    ],
    ids=["replacement", "dps"],
)
def test_approximate_methods_are_off_by_what_the_docs_say(settings, mean_bias, variances):
    """In standard deviations of the posterior and as ratios to its variances; docs/controllable.md has the numbers."""
    z = restore_whitened("vpsde", Gaussian((4, 4, 1), correlated=True), configure(HALF | settings, **PC))
    assert np.sqrt(np.mean(z.mean(axis=0) ** 2)) == pytest.approx(mean_bias, abs=0.02)
    ratios = z.var(axis=0)
    assert (ratios.min(), ratios.max()) == pytest.approx(variances, rel=0.06)


# --- the parts -------------------------------------------------------------------------------------------------------


def test_putting_in_is_the_nearest_image_that_fits():
    """Least squares in float64: |u - x|^2 + |A u - y|^2 / ratio."""
    operator = build_operator(configure({"operator": "gaussian_blur"}), (4, 4, 1))
    generator = np.random.default_rng(2)
    x, y, ratio = generator.standard_normal((2, 4, 4, 1)), generator.standard_normal((2, 4, 4, 1)), [0.3, 2.0]
    with jax.enable_x64(True):
        A = np.asarray(operator.apply(jnp.eye(16).reshape(16, 4, 4, 1))).reshape(16, 16).T
        got = put_in(operator, jnp.asarray(x), jnp.asarray(y), ratio=jnp.array(ratio))
        half_way = put_in(operator, jnp.asarray(x), jnp.asarray(y), ratio=jnp.array(ratio), strength=0.5)
    for i in range(2):
        system = np.concatenate([np.eye(16), A / np.sqrt(ratio[i])])
        target = np.concatenate([x[i].ravel(), y[i].ravel() / np.sqrt(ratio[i])])
        expected = np.linalg.lstsq(system, target, rcond=None)[0].reshape(4, 4, 1)
        np.testing.assert_allclose(got[i], expected, atol=1e-10)
        np.testing.assert_allclose(half_way[i], (x[i] + expected) / 2, atol=1e-10)


@pytest.mark.parametrize("name", by_default(["vesde"], ["vesde", "vpsde", "subvpsde"]))
def test_dps_takes_the_step_of_its_algorithm(name):
    """A reverse-diffusion step with N steps ends scale * grad |y - A E[x0 | x]| below the unguided one."""
    sde, data, scale = SDES[name], Gaussian((4, 4, 1), correlated=True), 0.3
    operator = build_operator(configure(HALF), data.shape)
    y = jnp.asarray(data.measure(operator, NOISE)[0])[None]
    score_fn, t = data.score_fn(sde), jnp.array([0.6])
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 1)) * sde.std(t)[0]

    def distance(x):
        m, std = sde.mean_coeff(t)[0], sde.std(t)[0]
        return jnp.linalg.norm(y - operator.apply((x + std**2 * score_fn(x, t)) / m))

    guided = guidance.guide(score_fn, operator, y, sde, guidance.dps_weighting(sde, scale=scale, num_steps=1000))
    step = lambda score_fn: sampling.euler_maruyama(jax.random.key(1), x, t, sde.reverse(score_fn))[0]  # noqa: E731
    taken = np.asarray(step(score_fn) - step(guided))
    np.testing.assert_allclose(taken, scale * jax.grad(distance)(x), rtol=2e-3, atol=2e-5 * float(sde.std(t)[0] + 1))


def test_clipping_changes_a_prediction_outside_the_range_and_no_other():
    """With scores of a network that is wrong by a constant: Tweedie's formula of the result stays in the range."""
    sde, data = SDES["vpsde"], Gaussian((4, 4, 1), correlated=True)
    config = configure(HALF | {"method": "pigdm", "noise": NOISE, "clip": True})
    config.data.centered = True
    operator = build_operator(config, data.shape)
    with jax.enable_x64(True):
        y = operator.apply(jnp.full((2, *data.shape), 0.2))
        x, t = 0.1 * jax.random.normal(jax.random.key(0), (2, *data.shape)), jnp.array([0.02, 0.999])
        wrong = lambda x, t: data.score_fn(sde)(x, t) + jnp.where(t > 0.5, 1.0, 0.0)[:, None, None, None]  # noqa: E731
        clipped = build_restoration(config, sde, operator)(wrong, y).score_fn(x, t)
        config.restore.clip = False
        free = build_restoration(config, sde, operator)(wrong, y).score_fn(x, t)
        m, std = (value[:, None, None, None] for value in (sde.mean_coeff(t), sde.std(t)))
        predicted, unclipped = (np.asarray((x + std**2 * score) / m) for score in (clipped, free))
    np.testing.assert_array_equal(clipped[0], free[0])
    assert np.abs(unclipped[1]).min() > 10
    assert np.abs(predicted[1]).max() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("method", by_default(["mmps"], ["dps", "pigdm", "mmps"]))
def test_guidance_of_an_image_does_not_see_the_batch(method):
    sde, data = SDES["vpsde"], Gaussian((4, 4, 1), correlated=True)
    config = configure(HALF | {"method": method, "noise": NOISE})
    operator = build_operator(config, data.shape)
    restore = build_restoration(config, sde, operator)
    with jax.enable_x64(True):  # at late times the prediction is a small difference of large numbers
        x, y = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
        y, t = operator.apply(y), jnp.array([0.1, 0.5, 0.9])
        together = restore(data.score_fn(sde), y).score_fn(x, t)
        for i in range(3):
            alone = restore(data.score_fn(sde), y[i : i + 1]).score_fn(x[i : i + 1], t[i : i + 1])
            np.testing.assert_allclose(together[i], alone[0], rtol=1e-9, atol=1e-9)


def test_replacement_starts_with_the_noised_measurement():
    sde, data = SDES["vesde"], Gaussian((4, 4, 1), correlated=False)
    config = configure(HALF | {"method": "replacement"})
    operator = build_operator(config, data.shape)
    y = operator.apply(jnp.full((N, *data.shape), 500.0))
    x = build_restoration(config, sde, operator)(data.score_fn(sde), y).initial_state(jax.random.key(0))
    left, right = np.asarray(x)[:, :, :2], np.asarray(x)[:, :, 2:]
    std = float(sde.prior_std)
    assert abs(left.mean() - 500.0) < 4 * std / np.sqrt(left.size)
    assert abs(right.mean()) < 4 * std / np.sqrt(right.size)
    for part in (left, right):
        assert part.std() == pytest.approx(std, rel=4 / np.sqrt(2 * part.size))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "method", "message"),
    [
        ({"method": "magic"}, "pc", "restore.method='magic' is unknown; known: dps, mmps"),
        ({"scale": 0.0}, "pc", "restore.scale=0.0: expected a positive number"),
        ({"noise": -1.0}, "pc", "restore.noise=-1.0: expected 0 or more"),
        ({"method": "replacement"}, "ode", "changes the steps of a sampler, and sampling.method='ode' has none"),
        ({"method": "projection"}, "adaptive_sde", "sampling.method='adaptive_sde' has none of its own"),
        ({"method": "replacement", "noise": 0.1}, "pc", "needs restore.noise=0, .* not noise=0.1"),
        ({"method": "replacement", "operator": "gaussian_blur"}, "pc", "scale=1.0, 'gaussian_blur'; use 'projection'"),
        ({"method": "projection", "scale": 2.0}, "pc", "restore.scale=2.0: a projection goes at most the whole way"),
        ({"method": "pigdm", "data_std": 0.0}, "pc", "restore.data_std=0.0: expected a positive number"),
        ({"method": "mmps", "cg_steps": 0}, "pc", "restore.cg_steps=0: expected 1 or more"),
    ],
)
def test_undefined_pairings_are_refused_when_built(settings, method, message):
    config = configure(HALF | settings, method=method)
    with pytest.raises(ValueError, match=message):
        build_restoration(config, SDES["vpsde"], build_operator(config, (4, 4, 1)))
