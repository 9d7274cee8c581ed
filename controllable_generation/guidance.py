"""Restoration by guidance: the score of p_t(x | y) = the score of p_t(x) + the gradient of log p_t(y | x).

For y = A x0 + noise the second term needs the law of the clean image x0 given x. Each method here takes it to be a
Gaussian around the network's own prediction E[x0 | x], and they differ in its covariance. The gradient goes through the
network: an evaluation costs about as much as two. A guided score is a score like any other, for any sampler.

A score is a prediction of x0 and the other way round (Tweedie's formula). Where the noise is strong, a small error of
the network's score is a large one of its prediction, far outside the range of any image, and guidance makes more of it:
so diverged PiGDM with networks of the digits. Therefore predictions are clipped to the range of the data.
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

    `weight` maps the residual to the cotangent for the vjp of the denoiser. Predictions are clipped to the data's range
    `bounds`, without and with the guidance; None: not at all.
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
        # What clipping changes is 0 where it does nothing, to the last digit.
        return score + guidance + m / variance * (clip(clip(x0) + step) - (x0 + step))

    return guided


def dps_weighting(sde: SDE, *, scale: float, num_steps: int) -> Weighting:
    """Diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687, Algorithm 1): x0 is the prediction itself.

    A step of their sampler with N steps takes off scale * gradient of |y - A E[x0 | x]|, which is their step size
    zeta_i = scale / (2 |y - A E[x0 | x]|). Here that is a term of the score, divided by what a step multiplies the
    score with, g(t)^2 T / N, N being `num_steps`: any sampler with any number of steps so takes off as much over the
    whole run. The scale is in units of the network's range.
    """

    def weight(residual: Array, pullback: Pullback, t: Scalars) -> Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(residual), axis=tuple(range(1, residual.ndim))))
        per_step = jnp.square(sde.sde(jnp.zeros_like(residual), t)[1]) * sde.T / num_steps
        return expand(scale / (per_step * jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)), residual) * residual

    return weight


def pigdm_weighting(operator: Operator, sde: SDE, *, noise: float, scale: float, data_std: float) -> Weighting:
    """Pseudo-inverse guided diffusion (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models"): one variance r^2.

    r^2 = data_std^2 std^2 / (m^2 data_std^2 + std^2), what it is for independent normal values of that standard
    deviation, for which the guidance is exact; the paper has data_std = 1. `noise` is the standard deviation of a
    measurement's noise, as `data_std` in the network's range; `scale` multiplies the guidance, 1 is Bayes' rule.
    """

    def weight(residual: Array, pullback: Pullback, t: Scalars) -> Array:
        m, variance = sde.mean_coeff(t), jnp.square(sde.std(t))
        spread = data_std**2 * variance / (jnp.square(m) * data_std**2 + variance)
        return scale * operator.solve(residual, spread, noise**2)

    return weight


def mmps_weighting(operator: Operator, sde: SDE, *, noise: float, scale: float, num_steps: int) -> Weighting:
    """Moment matching posterior sampling (Rozet et al. 2024, arXiv 2405.13712): the network's own covariance.

    Cov[x0 | x] = std^2 / m times the Jacobian of E[x0 | x], so that the guidance is exact for any Gaussian data. The
    Jacobian enters through products with it, one in each of `num_steps` steps of conjugate gradients. `noise` and
    `scale` as in `pigdm_weighting`.
    """

    def weight(residual: Array, pullback: Pullback, t: Scalars) -> Array:
        factor = jnp.square(sde.std(t)) / sde.mean_coeff(t)

        def covariance(u: Array) -> Array:
            return expand(factor, u) * operator.apply(pullback(operator.transpose(u))) + noise**2 * u

        return scale * conjugate_gradients(covariance, residual, num_steps)

    return weight
