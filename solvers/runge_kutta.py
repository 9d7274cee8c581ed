"""Runge-Kutta solvers: several evaluations in a step, no memory of earlier ones.

Those of the ODE work in the coordinates of Karras et al. 2022 that make every SDE the same: x / m, with sigma = s / m
as the clock, where dx / d sigma is the noise e(x, sigma). That of the reverse SDE works in lambda = log(m / s), where
all that is stiff is linear and solved exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from parallel import rng
from sde_lib import SDE, ScoreFn
from solvers.fixed_grid import Memory, Row, Solver
from solvers.interface import predict_data, predict_noise
from solvers.multistep import data_weights
from solvers.noise_levels import NoiseLevels, noise_levels, time_of_log_snr

# Butcher tableaux: rows of coefficients of the earlier slopes, the last row that of the step itself.
HEUN = ((), (1.0,), (1 / 2, 1 / 2))
CLASSICAL = ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))  # "the" method of Kutta

MAX_CHURN = np.sqrt(2) - 1  # Karras et al. 2022, Algorithm 2: a step at most doubles the noise's variance


def _explicit_step(
    keys: PRNGKeyArray,
    x: Array,
    memory: Memory,
    row: Row,
    score_fn: ScoreFn,
    *,
    tableau: Sequence[Sequence[float]],
    is_random: bool,
) -> tuple[Array, Memory]:
    """Take a step in x / m along sigma; `row` has t, mean_coeff and std of every stage, [S]."""
    y = x / row["mean_coeff_before"]
    if is_random:
        y = y + row["noise"] * rng.normal(keys, x.shape)
    slopes: list[Array] = []
    for j, coefficients in enumerate(tableau):
        terms = [row["step"] * a * slope for a, slope in zip(coefficients, slopes, strict=True) if a]
        stage = sum(terms, start=y)
        if j < len(tableau) - 1:
            slopes.append(predict_noise(score_fn, row["mean_coeff"][j] * stage, row["t"][j], row["std"][j]))
    return row["mean_coeff_after"] * stage, memory


def _explicit(
    grid: NoiseLevels, sde: SDE, tableau: Sequence[Sequence[float]], noise: Float[np.ndarray, "N"] | None = None
) -> Solver:
    """Return the explicit Runge-Kutta method; with `noise`, a step first rises by it from the sigma of its level."""
    num_stages, sigma = len(tableau) - 1, grid.sigma
    top = sigma[:-1] if noise is None else np.hypot(sigma[:-1], noise)
    nodes = np.array([sum(row) for row in tableau[:-1]])
    at = top[:, None] + nodes * (sigma[1:] - top)[:, None]
    stages = noise_levels(sde, time_of_log_snr(sde, -np.log(at.ravel())))
    rows = {name: getattr(stages, name).reshape(at.shape) for name in ("t", "mean_coeff", "std")}
    rows |= {"mean_coeff_before": grid.mean_coeff[:-1], "mean_coeff_after": grid.mean_coeff[1:]}
    rows |= {"step": sigma[1:] - top} | ({} if noise is None else {"noise": noise})
    step = functools.partial(_explicit_step, tableau=tableau, is_random=noise is not None)
    return Solver(rows=rows, step=step, start=lambda x: (), evaluations=num_stages)


def heun(
    grid: NoiseLevels,
    sde: SDE,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
) -> Solver:
    """Heun's method, order 2 (Karras et al. 2022, Algorithm 1), or with churn their stochastic Algorithm 2.

    Here sigma ends above 0, so that the last step has two evaluations, too. For sigma in [s_tmin, s_tmax], a step first
    raises it by the fraction min(s_churn / N, sqrt(2) - 1), with noise of std `s_noise`, but not above the sigma of
    t = T, beyond which the network knows nothing.
    """
    if not s_churn:
        return _explicit(grid, sde, HEUN)
    sigma = grid.sigma[:-1]
    churn = np.where((s_tmin <= sigma) & (sigma <= s_tmax), min(s_churn / len(sigma), MAX_CHURN), 0.0)
    top = np.minimum(sigma * (1 + churn), grid.sigma[0])
    solver = _explicit(grid, sde, HEUN, np.sqrt(top**2 - sigma**2))
    return dataclasses.replace(solver, rows={**solver.rows, "noise": s_noise * solver.rows["noise"]})


def rk4(grid: NoiseLevels, sde: SDE) -> Solver:
    """The classical Runge-Kutta method, order 4, in x / m along sigma: four evaluations a step."""
    return _explicit(grid, sde, CLASSICAL)


def _stochastic_heun_step(
    keys: PRNGKeyArray, x: Array, memory: Memory, row: Row, score_fn: ScoreFn
) -> tuple[Array, Memory]:
    """Predict the end of the step with the data predicted at its start, then averages both predictions' weights."""
    fixed = row["keep"] * x + row["noise"] * rng.normal(keys, x.shape)
    before = predict_data(score_fn, x, row["t"][0], row["mean_coeff"][0], row["std"][0])
    x = fixed + jnp.sum(row["weights"]) * before
    after = predict_data(score_fn, x, row["t"][1], row["mean_coeff"][1], row["std"][1])
    return fixed + row["weights"][0] * before + row["weights"][1] * after, memory


def stochastic_heun(grid: NoiseLevels) -> Solver:
    """An exponential stochastic Runge-Kutta method for the reverse SDE, weak order 2, two evaluations a step.

    The linear part and the noise of dx are integrated exactly, the data prediction by the line through its values at
    both ends (Heun's method in its exponential form); both stages have the step's one noise, which is what an SDE with
    additive noise needs for weak order 2 (Kloeden and Platen 1992, Section 15.1).
    """
    h = np.diff(grid.log_snr)
    weights = [data_weights(grid, i, np.array([i, i + 1]), rate=2) for i in range(len(h))]
    pairs = {name: getattr(grid, name) for name in ("t", "mean_coeff", "std")}
    rows = {name: np.stack([values[:-1], values[1:]], axis=1) for name, values in pairs.items()}
    rows |= {"keep": grid.std[1:] / grid.std[:-1] * np.exp(-h), "weights": np.stack(weights)}
    rows |= {"noise": grid.std[1:] * np.sqrt(-np.expm1(-2 * h))}
    return Solver(rows=rows, step=_stochastic_heun_step, start=lambda x: (), evaluations=2)
