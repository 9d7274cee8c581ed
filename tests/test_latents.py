"""Latents of Gaussian data in closed form, and the ways from latent to latent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import MU, QUICK, S0, SDES, make_score_fn
from cases import by_default

import latents
import likelihood
from configs import base
from sde_lib import VESDE, VPSDE

SHAPE = (6, 2, 2, 3)
X = MU + S0 * np.random.RandomState(0).standard_normal(SHAPE).astype(np.float32)
Z = np.random.RandomState(1).standard_normal((4, 5, 3))


def build(sde, tolerance=1e-5, eps=None):
    codec = latents.build_codec(base.get_config(), sde)
    return latents.Codec(sde, eps or codec.eps, tolerance, tolerance)


@functools.cache
def programs(name):
    """Encoder and decoder of Gaussian data, compiled once."""
    codec, score_fn = build(SDES[name]), make_score_fn(SDES[name])
    encode = jax.jit(lambda x: codec.encode(score_fn, x), compiler_options=QUICK)
    decode = jax.jit(lambda z: codec.decode(score_fn, z), compiler_options=QUICK)
    return encode, decode


def moments(sde, t):
    """Mean and std of Gaussian data at t, in float64."""
    with jax.enable_x64(True):
        m, std = float(sde.mean_coeff(jnp.array([t]))[0]), float(sde.std(jnp.array([t]))[0])
    return m * MU, np.hypot(m * S0, std)


# ------------------------------------------------------------------------------------- there and back again


@pytest.mark.parametrize("name", by_default(["vpsde"], ["vesde", "vpsde", "subvpsde"]))
def test_the_latent_of_gaussian_data_and_back(name):
    """The flow maps x to m(T) MU + sqrt(v(T) / v(eps)) (x - m(eps) MU), whatever the SDE."""
    sde, (encode, decode) = SDES[name], programs(name)
    (mean0, std0), (mean1, std1) = moments(sde, sde.sampling_eps), moments(sde, sde.T)
    z, nfe = encode(X)
    np.testing.assert_allclose(z, mean1 + std1 / std0 * (X - mean0), rtol=1e-4, atol=1e-4 * std1)
    x, nfe_back = decode(z)
    np.testing.assert_allclose(x, X, rtol=2e-4, atol=2e-4)  # two integrations, each as good as the latent
    assert 30 < int(nfe) < 400
    assert 30 < int(nfe_back) < 400


@pytest.mark.exhaustive
def test_the_round_trip_is_as_good_as_the_tolerance():
    """The error of some tens of steps adds up to 10 to 20 tolerances, whatever the tolerance."""
    sde, score_fn = VPSDE(), make_score_fn(VPSDE())
    for tolerance in (1e-3, 1e-6):
        codec = build(sde, tolerance)
        there_and_back = lambda x, codec=codec: codec.decode(score_fn, codec.encode(score_fn, x)[0])[0]  # noqa: E731
        error = np.abs(jax.jit(there_and_back, compiler_options=QUICK)(X) - X).max()
        assert error < 30 * tolerance


def test_the_latent_is_that_of_the_likelihood():
    """Two integrations, one with the divergence beside it, of a score whose Jacobian is no multiple of the identity."""
    sde, score_fn, eps = VPSDE(), make_score_fn(VPSDE(), 0.1), likelihood.LIKELIHOOD_EPS
    codec, measure = build(sde, eps=eps), likelihood.build_likelihood(base.get_config(), sde)
    both = jax.jit(
        lambda x: (codec.encode(score_fn, x)[0], measure(jax.random.key(0), score_fn, x).latent), compiler_options=QUICK
    )
    ours, expected = jax.device_get(both(X))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
def test_a_latent_does_not_depend_on_its_batch():
    encode, decode = programs("vpsde")
    x = X * np.array([0.1, 1, 1, 1, 1, 8], np.float32).reshape(6, 1, 1, 1)  # the last needs other steps
    together = encode(x)[0]
    alone = encode(x[1:2])[0]
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decode(together[1:2])[0][0], decode(together)[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_refuses_a_tolerance_when_built(name):
    config = base.get_config()
    config.sampling[name] = 0.0
    with pytest.raises(ValueError, match=f"sampling.{name}=0.0: expected a positive number"):
        latents.build_codec(config, VPSDE())
    config.sampling[name] = 1e-4
    assert getattr(latents.build_codec(config, VPSDE()), name) == 1e-4


def test_images_lie_where_sampling_stops():
    assert latents.build_codec(base.get_config(), VESDE()).eps == 1e-5
    assert latents.build_codec(base.get_config(), VPSDE()).eps == 1e-3


# ------------------------------------------------------------------------------------------------ the way between


def test_orthonormal_latents_are_joined_by_a_quarter_of_a_circle():
    a = np.linspace(0, 1, 7)
    way = latents.slerp(np.array([[[1.0, 0], [0, 0]]]), np.array([[[0, 0], [0, 1.0]]]), a)
    assert way.shape == (1, 7, 2, 2)
    np.testing.assert_allclose(way[0, :, 0, 0], np.cos(a * np.pi / 2), atol=1e-7)
    np.testing.assert_allclose(way[0, :, 1, 1], np.sin(a * np.pi / 2), atol=1e-7)
    assert not way[0, :, [0, 1], [1, 0]].any()


def test_the_norm_grows_linearly_and_the_angle_too():
    a = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    way = latents.slerp(Z, 3 * Z[::-1], a).reshape(4, 5, -1).astype(np.float64)
    ends = Z.reshape(4, -1), 3 * Z[::-1].reshape(4, -1)
    norm0, norm1 = (np.linalg.norm(end, axis=1)[:, None] for end in ends)
    norms = np.linalg.norm(way, axis=2)
    np.testing.assert_allclose(norms, (1 - a) * norm0 + a * norm1, rtol=1e-6)
    angle = np.arccos((ends[0] * ends[1]).sum(1, keepdims=True) / norm0[:, 0, None] / norm1)
    travelled = np.arccos(np.clip((way * ends[0][:, None]).sum(2) / norms / norm0, -1, 1))
    np.testing.assert_allclose(travelled, a * angle, atol=1e-3)  # the arc cosine of a float32 near 1


def test_equal_norms_are_kept():
    unit = Z / np.linalg.norm(Z.reshape(4, -1), axis=1)[:, None, None]
    way = latents.slerp(unit[:2], unit[2:], np.linspace(0, 1, 9))
    np.testing.assert_allclose(np.linalg.norm(way.reshape(2, 9, -1), axis=2), 1, rtol=1e-6)


def test_the_ends_are_the_latents_themselves():
    first, second = Z.astype(np.float32), (50 * Z[::-1]).astype(np.float32)
    way = latents.slerp(first, second, (0.0, 1.0))
    np.testing.assert_array_equal(way[:, 0], first)
    np.testing.assert_array_equal(way[:, 1], second)


@pytest.mark.parametrize("tilt", [0.0, 1e-12, 1e-6, 1e-3])
def test_nearly_parallel_latents_are_joined_by_a_straight_line(tilt):
    """To first order in the tilt: on the straight line between unequal norms the angle does not grow evenly."""
    first = Z[:1]
    second = 2 * first + tilt * Z[1:2]
    a = np.linspace(0, 1, 5).reshape(1, 5, 1, 1)
    expected = (1 - a) * first[:, None] + a * second[:, None]
    np.testing.assert_allclose(latents.slerp(first, second, a.ravel()), expected, rtol=1e-6, atol=1e-6 + tilt)


def test_no_pair_is_no_way():
    assert latents.slerp(Z[:0], Z[:0], (0.0, 0.5, 1.0)).shape == (0, 3, 5, 3)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Z, -2 * Z, "latents of pair 0 are opposite, and no arc between them is the shortest; leave the pair out"),
        (
            Z,
            Z * np.array([1, 0, 1, 1]).reshape(4, 1, 1),
            r"latents of pair 1 have norms .* expected finite ones above 0",
        ),
        (np.full_like(Z, np.nan), Z, r"latents of pair 0 have norms \[ *nan"),
        (Z, Z[:2], r"latents have shapes \(4, 5, 3\) and \(2, 5, 3\); expected the same"),
    ],
)
def test_refuses_what_no_arc_joins(first, second, message):
    with pytest.raises(ValueError, match=message):
        latents.slerp(first, second, (0.0, 1.0))


# --------------------------------------------------------------------------------------- temperature and the prior


def test_scaled_latents_of_gaussian_data_decode_to_scaled_data():
    """The flow is affine there: latents scaled by tau decode to what has tau times the spread."""
    sde, (_, decode) = SDES["vpsde"], programs("vpsde")
    (mean0, std0), (mean1, std1) = moments(sde, sde.sampling_eps), moments(sde, sde.T)
    z = np.random.RandomState(2).standard_normal(SHAPE).astype(np.float32)
    scaled = latents.scale_temperature(z, (0.5, 1.0, 1.5))
    np.testing.assert_array_equal(scaled[:, 1], z)
    decoded = [np.asarray(decode(scaled[:, i])[0]) for i in range(3)]
    for tau, x in zip((0.5, 1.0, 1.5), decoded, strict=True):
        np.testing.assert_allclose(x, mean0 + std0 / std1 * (tau * z - mean1), atol=3e-4)
        assert x.std() / decoded[1].std() == pytest.approx(tau, abs=1e-3)


def test_refuses_a_temperature_below_zero():
    with pytest.raises(ValueError, match=r"temperatures=\[0.5, -1.0\]: expected factors of 0 or more"):
        latents.scale_temperature(Z, (0.5, -1.0))
    with pytest.raises(ValueError, match="expected factors of 0 or more"):
        latents.scale_temperature(Z, (np.nan,))


def deviations(compared):
    return {name: (c.value - c.expected) / c.stderr for name, c in compared.items()}


def test_draws_of_the_prior_are_told_from_other_latents():
    """Over 400 sets of draws the four statistics have mean and spread as promised; a wrong law is seen at once."""
    draws = 10 * np.random.RandomState(3).standard_normal((400, 16, 4, 4, 1))
    found = [deviations(latents.compare_with_prior(z, 10.0)) for z in draws]
    assert found[0].keys() == {"mean", "std", "dimension_means", "dimension_stds"}
    for name in found[0]:
        values = np.array([d[name] for d in found])
        assert abs(values.mean()) < 0.25, name  # second-order terms are a share of the standard error
        assert values.std() == pytest.approx(1, abs=4 / np.sqrt(800)), name
    narrow = deviations(latents.compare_with_prior(0.8 * draws[0], 10.0))
    assert narrow["std"] < -4
    assert narrow["dimension_stds"] < -4
    shifted = deviations(latents.compare_with_prior(draws[0] + 10 * Z[0, 0, 0] * np.ones((4, 4, 1)), 10.0))
    assert abs(shifted["mean"]) > 10
    assert shifted["dimension_means"] > 4


def test_one_image_alone_has_no_spread_over_images():
    compared = latents.compare_with_prior(Z[:1], 1.0)
    assert compared.keys() == {"mean", "std", "dimension_means"}
    assert compared["mean"].value == pytest.approx(Z[0].mean())
    assert compared["dimension_means"].value == pytest.approx(np.sqrt(np.mean(Z[0] ** 2)))
