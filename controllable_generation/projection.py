"""Restoration by putting the noised measurement into the state after each step of a sampler.

Song et al. 2021, Appendix I.2 and I.3, replace known pixels and grey values; Song et al. 2022 (arXiv 2111.08005) do so
for other linear measurements. What is drawn around the measurement sees it only through the state, so the result is not
quite the posterior: docs/controllable.md has the bias, measured.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from controllable_generation.operators import Operator
from parallel import rng
from sampling import StepResult, StepTransform
from sde_lib import SDE, expand


def put_in(
    operator: Operator,
    x: Float[Array, "B H W C"],
    y: Float[Array, "B ..."],
    *,
    ratio: Float[Array, "B"] | float = 0.0,
    strength: float = 1.0,
) -> Float[Array, "B H W C"]:
    """Moves x towards the images whose measurement is y, by no more than that takes.

    Returns the least of |u - x|^2 + |A u - y|^2 / ratio at `strength` 1, and at `ratio` 0 the nearest u with A u = y.

    Args:
      operator: A.
      x: images.
      y: measurements.
      ratio: variance of the noise of y over that of x.
      strength: share of the way that is taken.
    """
    return x + strength * operator.transpose(operator.solve(y - operator.apply(x), 1.0, ratio))


def put_in_each_step(
    operator: Operator, y: Float[Array, "B ..."], sde: SDE, *, noise: float, strength: float
) -> StepTransform:
    """Returns the step transform that puts the measurement, noised to the step's time, into the state.

    In the step's mean goes the measurement's mean, and what is not measured keeps its own, so that removing the last
    step's noise denoises both. A measurement with noise pulls the less the smaller the noise of the state is beside it.

    Args:
      operator: A.
      y: measurements of clean images.
      sde: forward SDE.
      noise: standard deviation of the noise of y, in the network's range.
      strength: share of the way that is taken, lambda of Song et al. 2022.
    """

    def transform(
        key: PRNGKeyArray, x: Float[Array, "B H W C"], x_mean: Float[Array, "B H W C"], t: Float[Array, "B"]
    ) -> StepResult:
        m, std = sde.mean_coeff(t), sde.std(t)
        mean = expand(m, y) * y
        noised = mean + expand(std, y) * operator.apply(rng.normal(key, x.shape))
        ratio = jnp.square(m * noise / std) if noise else 0.0
        pull = functools.partial(put_in, operator, ratio=ratio, strength=strength)
        return pull(x, noised), pull(x_mean, mean)

    return transform
