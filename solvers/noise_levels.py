"""Noise levels of an SDE with a Gaussian kernel N(m x0, s^2 I): log-SNR, its inverse, and grids of times.

In the coordinates x / m and sigma = s / m every such SDE is the variance-exploding one with sigma as its clock, so that
whatever is written in them works for all. Everything here is numpy in float64 on the host: what a solver needs of its
steps is computed once, before anything is compiled, and rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sde_lib import SDE

KARRAS_RHO = 7.0  # Karras et al. 2022, Table 1: exponent of their grid
_BISECTIONS = 64  # of [0, T]: down to the spacing of float64


@dataclasses.dataclass(frozen=True)
class NoiseLevels:
    """Times and what the kernel is there; float64[N] each.

    Attributes:
      t: times.
      mean_coeff: m(t).
      std: s(t).
    """

    t: Float[np.ndarray, "N"]
    mean_coeff: Float[np.ndarray, "N"]
    std: Float[np.ndarray, "N"]

    @property
    def sigma(self) -> Float[np.ndarray, "N"]:
        """Noise-to-signal ratio s / m, the noise level of Karras et al. 2022."""
        return self.std / self.mean_coeff

    @property
    def log_snr(self) -> Float[np.ndarray, "N"]:
        """log(m / s), the lambda of Lu et al. 2022: half the logarithm of the signal-to-noise ratio of powers."""
        return np.log(self.mean_coeff) - np.log(self.std)


def in_float64(fn: Callable[[Float[Array, "N"]], Array], t: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Evaluate a function of time on the host in float64, also while JAX is tracing something else."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return np.asarray(fn(jnp.asarray(t, jnp.float64)))


def noise_levels(sde: SDE, t: Float[np.ndarray, "N"]) -> NoiseLevels:
    """Return the levels at times `t`."""
    t = np.asarray(t, np.float64)
    return NoiseLevels(t, in_float64(sde.mean_coeff, t), in_float64(sde.std, t))


def time_of_log_snr(sde: SDE, log_snr: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Return the times at which log(m / s), which falls with time, has these values; by bisection of [0, T]."""
    log_snr = np.asarray(log_snr, np.float64)
    low, high = np.zeros_like(log_snr), np.full_like(log_snr, sde.T)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_early = noise_levels(sde, middle).log_snr > log_snr
        low, high = np.where(is_early, middle, low), np.where(is_early, high, middle)
    return (low + high) / 2


# --- grids -----------------------------------------------------------------------------------------------------------


def _uniform(sde: SDE, u: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    return sde.T + u * (sde.sampling_eps - sde.T)


def _quadratic(sde: SDE, u: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    first, last = np.sqrt(sde.T), np.sqrt(sde.sampling_eps)
    return (first + u * (last - first)) ** 2


def _log_snr(sde: SDE, u: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    first, last = noise_levels(sde, np.array([sde.T, sde.sampling_eps])).log_snr
    return time_of_log_snr(sde, first + u * (last - first))


def _karras(sde: SDE, u: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    first, last = noise_levels(sde, np.array([sde.T, sde.sampling_eps])).sigma ** (1 / KARRAS_RHO)
    return time_of_log_snr(sde, -KARRAS_RHO * np.log(first + u * (last - first)))


# Each maps the fraction u of the steps that are done, from 0 to 1, to a time from T down to `sampling_eps`.
TIME_GRIDS: dict[str, Callable[[SDE, Float[np.ndarray, "N"]], Float[np.ndarray, "N"]]] = {
    "karras": _karras,  # evenly in sigma^(1/7) (Karras et al. 2022, Eq. 5)
    "log_snr": _log_snr,  # evenly in log(m / s) (Lu et al. 2022)
    "quadratic": _quadratic,  # evenly in sqrt(t) (Song, Meng and Ermon 2021, Appendix D.2)
    "uniform": _uniform,  # evenly in t
}


def time_grid(sde: SDE, num_steps: int, name: str) -> Float[np.ndarray, "N+1"]:
    """Return the `num_steps` + 1 times of a solver's steps, from T down to `sampling_eps`, both included exactly."""
    times = TIME_GRIDS[name](sde, np.linspace(0.0, 1.0, num_steps + 1))
    times[0], times[-1] = sde.T, sde.sampling_eps
    return times
