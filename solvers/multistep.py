"""Linear multistep solvers: each step is a weighted sum of the state, of earlier predictions and of fresh noise.

With lambda = log(m / s) the probability-flow ODE (Song et al. 2021, Eq. 13) of any SDE with kernel N(m x0, s^2 I) reads

    x' = (s' / s) x + s' ∫ exp(u) D(u) du        in predictions D of the data, u from lambda to lambda'
    x' = (m' / m) x + m' ∫ e(sigma) d sigma      in predictions e of the noise, sigma = s / m

and the reverse SDE has 2 exp(2 u - lambda') under the first integral and noise of its own (Lu et al. 2022b, arXiv
2211.01095). A solver is a way to interpolate the predictions: the weights follow by integration, in float64, before
anything is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from errors import UserError
from parallel import rng
from sde_lib import SDE, ScoreFn
from solvers import noise_levels
from solvers.fixed_grid import Memory, Row, Solver
from solvers.interface import predict_data, predict_noise
from solvers.noise_levels import NoiseLevels

_QUADRATURE = np.polynomial.legendre.leggauss(32)  # exact to rounding for the smooth integrands of a step


# --- weights ---------------------------------------------------------------------------------------------------------


def quadrature_points(start: Float[np.ndarray, "..."], end: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return the points between `start` and `end` at which `lagrange_weights` wants the density, on the last axis."""
    return start + (end - start) * (_QUADRATURE[0] + 1) / 2


def lagrange_weights(
    nodes: Float[np.ndarray, "K"], start: float, end: float, density: Float[np.ndarray, "Q"]
) -> Float[np.ndarray, "K"]:
    """Integrate each Lagrange polynomial of the nodes times `density`, given at the `quadrature_points`, by Gauss."""
    points, weights = quadrature_points(np.array(start), np.array(end)), _QUADRATURE[1] * (end - start) / 2
    basis = [
        np.prod([(points - other) / (node - other) for other in np.delete(nodes, j)], axis=0)
        for j, node in enumerate(nodes)
    ]
    return np.array([np.sum(weights * density * values) for values in basis])


def data_weights(grid: NoiseLevels, i: int, nodes: Int[np.ndarray, "K"], *, rate: int = 1) -> Float[np.ndarray, "K"]:
    """Return the weights of the data predicted at grid points `nodes` in the step from point i to i + 1.

    They integrate the polynomial in lambda through the predictions against rate exp(rate (u - lambda')), with `rate` 1
    for the ODE and 2 for the reverse SDE.
    """
    lam = grid.log_snr
    density = rate * np.exp(rate * (quadrature_points(lam[i], lam[i + 1]) - lam[i + 1]))
    return grid.mean_coeff[i + 1] * lagrange_weights(lam[nodes], lam[i], lam[i + 1], density)


def _recent(i: int, number: int) -> Int[np.ndarray, "K"]:
    """Return the last `number` grid points up to i, newest first; fewer at the start."""
    return np.arange(i, max(i - number, -1), -1)


def _stack(weights: Iterable[Float[np.ndarray, "_"]], length: int) -> Float[np.ndarray, "N length"]:
    """Stack the weights of all steps, with zeros for predictions that are not there."""
    return np.stack([np.concatenate([w, np.zeros(length - len(w))]) for w in weights])


# --- steps -----------------------------------------------------------------------------------------------------------


def _step(
    keys: PRNGKeyArray,
    x: Array,
    memory: Memory,
    row: Row,
    score_fn: ScoreFn,
    *,
    of_data: bool,
    is_random: bool,
    has_corrections: bool,
) -> tuple[Array, Memory]:
    """Take the step of `_build`. Before it, x may be corrected, at no cost (UniC of Zhao et al. 2023).

    The step that led to x is then taken again with the prediction that x itself gave.
    """
    x_before, history = memory
    if of_data:
        prediction = predict_data(score_fn, x, row["t"], row["mean_coeff"], row["std"])
    else:
        prediction = predict_noise(score_fn, x, row["t"], row["std"])
    predictions = jnp.concatenate([prediction[None], history])
    if has_corrections:
        corrected = row["keep_before"] * x_before + jnp.tensordot(row["weights_correct"], predictions, axes=1)
        x = jnp.where(row["is_corrected"], corrected, x)
    predictions = predictions[: len(row["weights"])]
    x_next = row["keep"] * x + jnp.tensordot(row["weights"], predictions, axes=1)
    if is_random:
        x_next = x_next + row["noise"] * rng.normal(keys, x.shape)
    return x_next, (x, predictions[: len(history)])


def _build(
    grid: NoiseLevels,
    keep: Float[np.ndarray, "N"],
    weights: Float[np.ndarray, "N K"],
    *,
    noise: Float[np.ndarray, "N"] | None = None,
    corrections: Mapping[int, Float[np.ndarray, "_"]] | None = None,
    of_data: bool = True,
) -> Solver:
    """Return the solver of the step x' = keep x + weights predictions + noise z, the newest prediction first.

    `corrections` has, for each level whose state is corrected, the weights in the step to it, its own prediction first.
    """
    rows = {"t": grid.t[:-1], "mean_coeff": grid.mean_coeff[:-1], "std": grid.std[:-1]}
    rows |= {"keep": keep, "weights": weights}
    num_remembered = weights.shape[1] - 1
    if noise is not None:
        rows["noise"] = noise
    if corrections:
        num_remembered = max(num_remembered, *(len(w) - 1 for w in corrections.values()))
        of_level = [corrections.get(i, np.zeros(0)) for i in range(len(keep))]
        rows["weights_correct"] = _stack(of_level, num_remembered + 1)
        rows["keep_before"] = np.concatenate([[0.0], keep[:-1]])
        rows["is_corrected"] = np.isin(np.arange(len(keep)), list(corrections))
    return Solver(
        rows=rows,
        step=functools.partial(_step, of_data=of_data, is_random=noise is not None, has_corrections=bool(corrections)),
        start=lambda x: (x, jnp.zeros((num_remembered, *x.shape), x.dtype)),
        evaluations=1,
    )


# --- solvers ---------------------------------------------------------------------------------------------------------


def ddim(grid: NoiseLevels, *, eta: float) -> Solver:
    """DDIM (Song, Meng and Ermon 2021, Eqs. 12 and 16): order 1; eta 0 for the ODE, 1 for the posterior of DDPM.

    The noise added is eta s' sqrt(1 - sigma'^2 / sigma^2), which for VP is their sigma(eta).

    Raises:
      UserError: if eta is negative, or so large that a step would add more noise than its level has.
    """
    ratio = grid.sigma[1:] / grid.sigma[:-1]
    fresh = eta * np.sqrt(1 - ratio**2)  # fraction of the next level's noise that is new
    if not (eta >= 0 and fresh.max() <= 1):
        most = 1 / np.sqrt(1 - ratio**2).max()
        raise UserError(
            f"sampling.eta={eta}: expected 0 (deterministic) to {most:.4g} with these {len(ratio)} steps, beyond which "
            "a step adds more noise than its level has; 1 is ancestral sampling"
        )
    std, mean_coeff = grid.std, grid.mean_coeff
    keep = std[1:] * np.sqrt(1 - fresh**2) / std[:-1]
    weights = (mean_coeff[1:] - mean_coeff[:-1] * keep)[:, None]
    return _build(grid, keep, weights, noise=std[1:] * fresh if eta else None)


def _second_order(grid: NoiseLevels, total: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N 2"]:
    """Return `total` times the weights of D_i + (D_i - D_{i-1}) / (2 r), r the ratio of the last step to this one."""
    h = np.diff(grid.log_snr)
    slope = np.concatenate([[0.0], h[1:] / h[:-1] / 2])
    return total[:, None] * np.stack([1 + slope, -slope], axis=1)


def dpmpp_2m(grid: NoiseLevels) -> Solver:
    """DPM-Solver++(2M), order 2 (Lu et al. 2022b, Algorithm 2); its first step is of order 1."""
    weights = _second_order(grid, -grid.mean_coeff[1:] * np.expm1(-np.diff(grid.log_snr)))
    return _build(grid, grid.std[1:] / grid.std[:-1], weights)


def dpmpp_3m(grid: NoiseLevels) -> Solver:
    """DPM-Solver++ with three predictions, order 3: the exponential Adams-Bashforth method.

    The weights integrate the quadratic through the last three predictions exactly, where the authors' published code
    takes half of the quadratic term and is of order 2 (see docs/samplers.md). The first step, of order 1, is corrected
    once its end has been evaluated: otherwise its error would outweigh all others.
    """
    weights = _stack((data_weights(grid, i, _recent(i, 3)) for i in range(len(grid.t) - 1)), 3)
    corrections = {1: data_weights(grid, 0, np.array([1, 0]))}
    return _build(grid, grid.std[1:] / grid.std[:-1], weights, corrections=corrections)


def dpmpp_sde(grid: NoiseLevels) -> Solver:
    """SDE-DPM-Solver++(2M) of the reverse SDE (Lu et al. 2022b): one evaluation and one noise a step."""
    h = np.diff(grid.log_snr)
    keep = grid.std[1:] / grid.std[:-1] * np.exp(-h)
    weights = _second_order(grid, -grid.mean_coeff[1:] * np.expm1(-2 * h))
    return _build(grid, keep, weights, noise=grid.std[1:] * np.sqrt(-np.expm1(-2 * h)))


def deis(grid: NoiseLevels, sde: SDE, *, order: int) -> Solver:
    """DEIS (Zhang and Chen 2023), tAB-DEIS: the last `order` predictions of the noise, extrapolated in t.

    Order 1 is DDIM. From 2 on, the first step is corrected as in `dpmpp_3m`.
    """
    # d sigma / dt, by differentiating the SDE's own m and s.
    sigma = lambda t: sde.std(t[None])[0] / sde.mean_coeff(t[None])[0]  # noqa: E731
    points = quadrature_points(grid.t[:-1, None], grid.t[1:, None])
    slopes = noise_levels.in_float64(jax.vmap(jax.grad(sigma)), points.ravel()).reshape(points.shape)

    def weights_of(i: int, nodes: Int[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
        return grid.mean_coeff[i + 1] * lagrange_weights(grid.t[nodes], grid.t[i], grid.t[i + 1], slopes[i])

    weights = _stack((weights_of(i, _recent(i, order)) for i in range(len(grid.t) - 1)), order)
    corrections = {1: weights_of(0, np.array([1, 0]))} if order > 1 else None
    keep = grid.mean_coeff[1:] / grid.mean_coeff[:-1]
    return _build(grid, keep, weights, corrections=corrections, of_data=False)


def unipc(grid: NoiseLevels, *, order: int) -> Solver:
    """UniPC (Zhao et al. 2023): UniP-p with p = `order`, corrected by UniC-p, in predictions of the data; order p + 1.

    Their weights solve for exactness on polynomials in lambda, of degree p - 1 for the predictor and p for the
    corrector. Those here are the integrals that this determines, so that no function B(h) is left to choose.
    """
    steps = range(len(grid.t) - 1)
    weights = _stack((data_weights(grid, i, _recent(i, order)) for i in steps), order)
    corrections = {i: data_weights(grid, i - 1, _recent(i, order + 1)) for i in steps[1:]}
    return _build(grid, grid.std[1:] / grid.std[:-1], weights, corrections=corrections)
