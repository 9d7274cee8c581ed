"""Log-SNR, its inverse and the grids of times, against closed forms in float64."""

import jax
import numpy as np
import pytest
from analytic import SDES

from sde_lib import VESDE, VPSDE
from solvers import noise_levels


def test_levels_of_vp_and_ve_are_the_closed_forms_in_float64():
    t = np.array([1e-5, 1e-3, 0.5, 1.0])
    vp = noise_levels.noise_levels(VPSDE(), t)
    integral = 0.1 * t + 19.9 * t**2 / 2  # of beta; SNR = m^2 / s^2 = 1 / (exp(integral) - 1)
    np.testing.assert_allclose(vp.log_snr, -np.log(np.expm1(integral)) / 2, rtol=1e-12)
    np.testing.assert_allclose(vp.sigma, np.sqrt(np.expm1(integral)), rtol=1e-12)
    ve = noise_levels.noise_levels(VESDE(), t)
    np.testing.assert_allclose(ve.sigma, 0.01 * 5000**t, rtol=1e-12)
    np.testing.assert_array_equal(ve.t, t)


@pytest.mark.parametrize("name", SDES)
def test_time_of_log_snr_inverts_log_snr(name):
    t = np.linspace(1e-5, 1.0, 101)
    log_snr = noise_levels.noise_levels(SDES[name], t).log_snr
    assert (np.diff(log_snr) < 0).all()
    np.testing.assert_allclose(noise_levels.time_of_log_snr(SDES[name], log_snr), t, atol=1e-15)


@pytest.mark.parametrize("grid", noise_levels.TIME_GRIDS)
@pytest.mark.parametrize("name", SDES)
def test_a_grid_is_even_in_its_own_coordinate(name, grid):
    sde = SDES[name]
    times = noise_levels.time_grid(sde, 12, grid)
    assert times.shape == (13,)
    assert (times[0], times[-1]) == (sde.T, sde.sampling_eps)
    levels = noise_levels.noise_levels(sde, times)
    coordinate = {
        "karras": levels.sigma ** (1 / 7),
        "log_snr": levels.log_snr,
        "quadratic": np.sqrt(times),
        "uniform": times,
    }[grid]
    np.testing.assert_allclose(coordinate, np.linspace(coordinate[0], coordinate[-1], 13), rtol=1e-10, atol=1e-10)


def test_karras_grid_is_that_of_the_paper():
    """VE with sigma from 0.002 to 80, N = 18: sigma_i of Karras et al. 2022, Eq. 5, written out."""
    sde = VESDE(sigma_min=0.002, sigma_max=80.0, sampling_eps=1e-12)
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigma = noise_levels.noise_levels(sde, noise_levels.time_grid(sde, 17, "karras")).sigma
    np.testing.assert_allclose(sigma, expected, rtol=1e-9)


def test_grids_are_computed_while_tracing_and_stay_float64():
    dtypes = []

    @jax.jit
    def traced(x):
        times = noise_levels.time_grid(VPSDE(), 4, "karras")
        dtypes.append(times.dtype)
        return x * times[1]

    expected = noise_levels.time_grid(VPSDE(), 4, "karras")[1]
    assert float(traced(1.0)) == pytest.approx(expected, rel=1e-6)
    assert dtypes == [np.float64]
