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
    """Returns the points between `start` and `end` at which `lagrange_weights` wants the density, on the last axis."""
    return start + (end - start) * (_QUADRATURE[0] + 1) / 2


def lagrange_weights(
    nodes: Float[np.ndarray, "K"], start: float, end: float, density: Float[np.ndarray, "Q"]
) -> Float[np.ndarray, "K"]:
    """Integrates each Lagrange polynomial of the nodes times a density from `start` to `end`, by Gauss's quadrature.

    Args:
      nodes: where the polynomials are 0 or 1.
      start: of the integral.
      end: of the integral.
      density: at the `quadrature_points`.
    """
    points, weights = quadrature_points(np.array(start), np.array(end)), _QUADRATURE[1] * (end - start) / 2
    basis = [
        np.prod([(points - other) / (node - other) for other in np.delete(nodes, j)], axis=0)
        for j, node in enumerate(nodes)
    ]
    return np.array([np.sum(weights * density * values) for values in basis])


def data_weights(levels: NoiseLevels, i: int, nodes: Int[np.ndarray, "K"], *, rate: int = 1) -> Float[np.ndarray, "K"]:
    """Returns the weights of the data predicted at levels `nodes` in the step from level i to i + 1.

    They integrate the polynomial in lambda through the predictions against rate exp(rate (u - lambda')).

    Args:
      levels: of the grid.
      i: level where the step starts.
      nodes: indices of levels.
      rate: 1 for the ODE, 2 for the reverse SDE.
    """
    lam = levels.log_snr
    density = rate * np.exp(rate * (quadrature_points(lam[i], lam[i + 1]) - lam[i + 1]))
    return levels.mean_coeff[i + 1] * lagrange_weights(lam[nodes], lam[i], lam[i + 1], density)


def _recent(i: int, number: int) -> Int[np.ndarray, "K"]:
    """Returns the last `number` levels up to i, newest first; fewer at the start."""
    return np.arange(i, max(i - number, -1), -1)


def _stack(weights: Iterable[Float[np.ndarray, "_"]], length: int) -> Float[np.ndarray, "N length"]:
    """Stacks the weights of all steps, with zeros for predictions that are not there."""
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
    """Takes the step x' = keep x + Σ weights predictions + noise z, the newest prediction first.

    Before it, x may be corrected: the step that led to it is taken again with the prediction that x itself gave, which
    costs no evaluation (UniC of Zhao et al. 2023).
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
    levels: NoiseLevels,
    keep: Float[np.ndarray, "N"],
    weights: Float[np.ndarray, "N K"],
    *,
    noise: Float[np.ndarray, "N"] | None = None,
    corrections: Mapping[int, Float[np.ndarray, "_"]] | None = None,
    of_data: bool = True,
) -> Solver:
    """Returns the solver with these coefficients.

    Args:
      levels: of the grid.
      keep: factor of the state in each step.
      weights: of the predictions, the newest first.
      noise: standard deviation added; None for an ODE.
      corrections: for each level whose state is corrected, the weights in the step to it, its own prediction first.
      of_data: predictions are of the data; otherwise of the noise.
    """
    rows = {"t": levels.t[:-1], "mean_coeff": levels.mean_coeff[:-1], "std": levels.std[:-1]}
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


def ddim(levels: NoiseLevels, *, eta: float) -> Solver:
    """DDIM (Song, Meng and Ermon 2021, Eqs. 12 and 16): order 1; eta 0 for the ODE, 1 for the posterior of DDPM.

    The noise added is eta s' sqrt(1 - sigma'^2 / sigma^2), which for VP is their sigma(eta).

    Raises:
      UserError: if eta is negative, or so large that a step would add more noise than its level has.
    """
    ratio = levels.sigma[1:] / levels.sigma[:-1]
    share = eta * np.sqrt(1 - ratio**2)  # of the noise at the next level that is fresh
    if not (eta >= 0 and share.max() <= 1):
        most = 1 / np.sqrt(1 - ratio**2).max()
        raise UserError(
            f"sampling.eta={eta}: expected 0 (deterministic) to {most:.4g} with these {len(ratio)} steps, beyond which "
            "a step adds more noise than its level has; 1 is ancestral sampling"
        )
    std, mean_coeff = levels.std, levels.mean_coeff
    keep = std[1:] * np.sqrt(1 - share**2) / std[:-1]
    weights = (mean_coeff[1:] - mean_coeff[:-1] * keep)[:, None]
    return _build(levels, keep, weights, noise=std[1:] * share if eta else None)


def _second_order(levels: NoiseLevels, total: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N 2"]:
    """Returns `total` times the weights of D_i + (D_i - D_{i-1}) / (2 r), r the ratio of the last step to this one."""
    h = np.diff(levels.log_snr)
    slope = np.concatenate([[0.0], h[1:] / h[:-1] / 2])
    return total[:, None] * np.stack([1 + slope, -slope], axis=1)


def dpmpp_2m(levels: NoiseLevels) -> Solver:
    """DPM-Solver++(2M), order 2 (Lu et al. 2022b, Algorithm 2); its first step is of order 1."""
    weights = _second_order(levels, -levels.mean_coeff[1:] * np.expm1(-np.diff(levels.log_snr)))
    return _build(levels, levels.std[1:] / levels.std[:-1], weights)


def dpmpp_3m(levels: NoiseLevels) -> Solver:
    """DPM-Solver++ with three predictions, order 3: the exponential Adams-Bashforth method.

    The weights integrate the quadratic through the last three predictions exactly, where the authors' published code
    takes half of the quadratic term and is of order 2 (see docs/samplers.md). The first step, of order 1, is corrected
    once its end has been evaluated: otherwise its error would outweigh all others.
    """
    weights = _stack((data_weights(levels, i, _recent(i, 3)) for i in range(len(levels.t) - 1)), 3)
    corrections = {1: data_weights(levels, 0, np.array([1, 0]))}
    return _build(levels, levels.std[1:] / levels.std[:-1], weights, corrections=corrections)


def dpmpp_sde(levels: NoiseLevels) -> Solver:
    """SDE-DPM-Solver++(2M) of the reverse SDE (Lu et al. 2022b): one evaluation and one noise a step."""
    h = np.diff(levels.log_snr)
    keep = levels.std[1:] / levels.std[:-1] * np.exp(-h)
    weights = _second_order(levels, -levels.mean_coeff[1:] * np.expm1(-2 * h))
    return _build(levels, keep, weights, noise=levels.std[1:] * np.sqrt(-np.expm1(-2 * h)))


def deis(levels: NoiseLevels, sde: SDE, *, order: int) -> Solver:
    """DEIS (Zhang and Chen 2023), tAB-DEIS: predictions of the noise extrapolated by a polynomial in t.

    Args:
      levels: of the grid.
      sde: forward SDE.
      order: predictions that the polynomial goes through; 1 is DDIM. From 2 on, the first step is corrected as in
        `dpmpp_3m`.
    """
    # d sigma / dt, by differentiating the SDE's own m and s.
    sigma = lambda t: sde.std(t[None])[0] / sde.mean_coeff(t[None])[0]  # noqa: E731
    points = quadrature_points(levels.t[:-1, None], levels.t[1:, None])
    slopes = noise_levels.in_float64(jax.vmap(jax.grad(sigma)), points.ravel()).reshape(points.shape)

    def weights_of(i: int, nodes: Int[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
        return levels.mean_coeff[i + 1] * lagrange_weights(levels.t[nodes], levels.t[i], levels.t[i + 1], slopes[i])

    weights = _stack((weights_of(i, _recent(i, order)) for i in range(len(levels.t) - 1)), order)
    corrections = {1: weights_of(0, np.array([1, 0]))} if order > 1 else None
    keep = levels.mean_coeff[1:] / levels.mean_coeff[:-1]
    return _build(levels, keep, weights, corrections=corrections, of_data=False)


def unipc(levels: NoiseLevels, *, order: int) -> Solver:
    """UniPC (Zhao et al. 2023): UniP-p, corrected by UniC-p, in predictions of the data; order p + 1.

    Their weights solve for exactness on polynomials in lambda, of degree p - 1 for the predictor and p for the
    corrector. Those here are the integrals that this determines, so that no function B(h) is left to choose.

    Args:
      levels: of the grid.
      order: p, predictions that the predictor uses.
    """
    steps = range(len(levels.t) - 1)
    weights = _stack((data_weights(levels, i, _recent(i, order)) for i in steps), order)
    corrections = {i: data_weights(levels, i - 1, _recent(i, order + 1)) for i in steps[1:]}
    return _build(levels, levels.std[1:] / levels.std[:-1], weights, corrections=corrections)
