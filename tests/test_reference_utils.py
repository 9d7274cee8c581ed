"""Small things of the 2021 code: noise levels, tables, scaling, broadcasting and random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GOLDEN

import datasets
from sde_lib import VESDE, VPSDE, expand


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "math" / "utils.npz") as file:
        return dict(file)


@pytest.mark.parametrize(
    ("name", "sde"),
    [
        ("ve/cifar10_ncsnpp", VESDE(0.01, 50.0, 1000)),
        ("ve/ffhq_ncsnpp_continuous", VESDE(0.01, 1348.0, 2000)),
        ("ve/ncsn/cifar10", VESDE(0.01, 1.0, 10)),
    ],
)
def test_noise_levels_are_those_of_the_networks(golden, name, sde):
    """Descending. The reference takes the exponential of a float32 line; ours is rounded once: 6e-7 apart."""
    np.testing.assert_allclose(sde.discrete_sigmas[::-1], golden[f"get_sigmas/{name}"], rtol=1e-6)


def test_ddpm_tables_are_those_of_the_original(golden):
    """Its helper has 1,000 levels whatever `num_scales` is; ours has N, the same for the N of every configuration."""
    sde = VPSDE(0.1, 20.0, 1000)
    tables = {
        "betas": sde.discrete_betas,
        "alphas": 1 - sde.discrete_betas,
        "alphas_cumprod": sde.alphas_cumprod,
        "sqrt_alphas_cumprod": sde.sqrt_alphas_cumprod,
        "sqrt_1m_alphas_cumprod": sde.sqrt_1m_alphas_cumprod,
    }
    for name, table in tables.items():
        np.testing.assert_allclose(table, golden[f"get_ddpm_params/{name}"], rtol=2e-7, atol=3e-8, err_msg=name)
    steps = int(golden["get_ddpm_params/num_diffusion_timesteps"])
    assert steps == sde.N
    ends = golden["get_ddpm_params/beta_min"], golden["get_ddpm_params/beta_max"]
    # What it calls beta_min and beta_max are the table's ends times N - 1; the continuous SDE's are 0.1 and 20.
    np.testing.assert_allclose(np.asarray(tables["betas"])[[0, -1]] * (steps - 1), ends, rtol=1e-6)


@pytest.mark.parametrize("centered", [0, 1])
def test_scaling_is_that_of_the_original(golden, centered):
    scaler = datasets.Scaler(num_levels=256, centered=bool(centered), dequantize=False)
    x = jnp.asarray(golden["scaler/x"])
    np.testing.assert_array_equal(scaler.center(x), golden[f"scaler/centered{centered}"])
    np.testing.assert_array_equal(scaler.uncenter(x), golden[f"inverse_scaler/centered{centered}"])


def test_coefficients_of_examples_broadcast_as_in_the_original(golden):
    a, b = jnp.asarray(golden["batch_mul/a"]), jnp.asarray(golden["batch_mul/b"])
    np.testing.assert_array_equal(expand(a, b) * b, golden["batch_mul/out"])
    np.testing.assert_array_equal(expand(a, b) + b, golden["batch_add/out"])


def test_random_streams_are_those_of_todays_jax():
    """The 2021 streams come back with a flag of JAX's; without it, as here, the same seed draws other numbers."""
    with np.load(GOLDEN / "math" / "prng_legacy.npz") as file:
        golden = dict(file)

    def draws():
        key = jax.random.PRNGKey(42)
        return {
            "key42": key,
            "split2": jax.random.split(key),
            "split4": jax.random.split(key, 4),
            "fold_in_0": jax.random.fold_in(key, 0),
            "normal": jax.random.normal(key, (2, 5)),
            "uniform": jax.random.uniform(key, (6,), minval=1e-5, maxval=1.0),  # as the loss draws t
            "choice1000": jax.random.choice(key, 1000, (8,)),
            "randint01": jax.random.randint(key, (10,), 0, 2),
            "bernoulli09": jax.random.bernoulli(key, 0.9, (10,)),
        }

    with jax.threefry_partitionable(False):
        legacy = {name: np.asarray(value) for name, value in draws().items()}
    for name, value in legacy.items():
        np.testing.assert_allclose(value, golden[name], rtol=1e-6, err_msg=name)
    assert legacy.keys() == golden.keys() - {"meta"}
    ours = draws()
    np.testing.assert_array_equal(ours["key42"], golden["key42"])
    for name in ("split2", "normal", "uniform"):
        assert not np.array_equal(ours[name], golden[name]), name
