"""Restoration by guidance: the score of p_t(x | y) = the score of p_t(x) + the gradient of log p_t(y | x).

For y = A x0 + noise the second term needs the distribution of the clean image x0 given x. Each method here assumes a
Gaussian around the network's prediction E[x0 | x]; they differ in its covariance. The gradient goes through the
network, which doubles the cost of an evaluation. Any sampler can use a guided score.

Under strong noise a small error of the score is a large error of the prediction (Tweedie's formula), and guidance
amplifies it: PiGDM diverged with networks of the digits. Predictions are therefore clipped to the range of the data.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from controllable_generation.operators import Operator, conjugate_gradients
from sde_lib import SDE, Images, Scalars, ScoreFn, State, expand

# Transposed Jacobian of the prediction E[x0 | x]: [B, H, W, C] -> [B, H, W, C].
Pullback = Callable[[Array], Array]
# (y - A E[x0 | x], pullback, t) -> v, a weighted residual: the guidance is J^T A^T v.
Weighting = Callable[[Array, Pullback, Scalars], Array]


def guide(
    score_fn: ScoreFn,
    operator: Operator,
    y: State,
    sde: SDE,
    weight: Weighting,
    *,
    bounds: tuple[float, float] | None = None,
) -> ScoreFn:
    """Return the score with the guidance of measurements y added.

    `weight` maps the residual to the cotangent for the vjp of the denoiser. Predictions, without and with the guidance,
    are clipped to the data's range `bounds`, if given.
    """
    clip = lambda x0: x0 if bounds is None else jnp.clip(x0, *bounds)  # noqa: E731

    def guided(x: Images, t: Scalars) -> Images:
        m, variance = expand(sde.mean_coeff(t), x), expand(jnp.square(sde.std(t)), x)

        def predict(x: Array) -> tuple[Array, Array]:
            score = score_fn(x, t)
            return (x + variance * score) / m, score  # Tweedie's formula

        x0, vjp, score = jax.vjp(predict, x, has_aux=True)
        pullback = lambda v: vjp(v)[0]  # noqa: E731
        residual = y - operator.apply(clip(x0))
        guidance = pullback(operator.transpose(weight(residual, pullback, t)))
        step = variance / m * guidance
        # Exactly 0, to the last digit, where nothing is clipped.
        return score + guidance + m / variance * (clip(clip(x0) + step) - (x0 + step))

    return guided


def dps_weighting(sde: SDE, *, scale: float, num_steps: int) -> Weighting:
    """Diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687, Algorithm 1): x0 is the prediction itself.

    A step of their sampler with N steps subtracts scale * gradient of |y - A E[x0 | x]|, from their step size
    zeta_i = scale / (2 |y - A E[x0 | x]|). Here this is a term of the score, divided by the factor of the score in a
    step, g(t)^2 T / N with N = `num_steps`. A whole run then subtracts the same with any sampler and number of steps.
    The scale is in units of the network's range.
    """

    def weight(residual: Array, pullback: Pullback, t: Scalars) -> Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(residual), axis=tuple(range(1, residual.ndim))))
        per_step = jnp.square(sde.sde(jnp.zeros_like(residual), t)[1]) * sde.T / num_steps
        return expand(scale / (per_step * jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)), residual) * residual

    return weight


def pigdm_weighting(operator: Operator, sde: SDE, *, noise: float, scale: float, data_std: float) -> Weighting:
    """Pseudo-inverse guided diffusion (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models"): one variance r^2.

    r^2 = data_std^2 std^2 / (m^2 data_std^2 + std^2), which is exact for independent normal data of this standard
    deviation; the paper has data_std = 1. `noise` is the standard deviation of the measurement's noise; it and
    `data_std` are in the network's range. `scale` multiplies the guidance; 1 is Bayes' rule.
    """

    def weight(residual: Array, pullback: Pullback, t: Scalars) -> Array:
        m, variance = sde.mean_coeff(t), jnp.square(sde.std(t))
        spread = data_std**2 * variance / (jnp.square(m) * data_std**2 + variance)
        return scale * operator.solve(residual, spread, noise**2)

    return weight


def mmps_weighting(operator: Operator, sde: SDE, *, noise: float, scale: float, num_steps: int) -> Weighting:
    """Moment matching posterior sampling (Rozet et al. 2024, arXiv 2405.13712): the network's own covariance.

    Cov[x0 | x] = std^2 / m times the Jacobian of E[x0 | x], which makes the guidance exact for any Gaussian data. Each
    of `num_steps` steps of conjugate gradients takes one product with the Jacobian. `noise` and `scale` as in
    `pigdm_weighting`.
    """

    def weight(residual: Array, pullback: Pullback, t: Scalars) -> Array:
        factor = jnp.square(sde.std(t)) / sde.mean_coeff(t)

        def covariance(u: Array) -> Array:
            return expand(factor, u) * operator.apply(pullback(operator.transpose(u))) + noise**2 * u

        return scale * conjugate_gradients(covariance, residual, num_steps)

    return weight
