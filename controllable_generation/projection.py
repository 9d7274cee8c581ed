"""Restoration by putting the noised measurement into the state after each step of a sampler.

Song et al. 2021, Appendix I.2 and I.3, replace known pixels and grey values; Song et al. 2022 (arXiv 2111.08005)
generalize this to linear measurements. The network sees the measurement only through the state, so the result is not
exactly the posterior; docs/controllable.md measures the bias.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from controllable_generation.operators import Operator
from parallel import rng
from sampling import StepResult, StepTransform
from sde_lib import SDE, Images, Scalars, State, expand


def put_in(operator: Operator, x: Images, y: State, *, ratio: Scalars | float = 0.0, strength: float = 1.0) -> Images:
    """Move x by the fraction `strength` of the way to the minimizer u of |u - x|^2 + |A u - y|^2 / ratio.

    `ratio` is the variance of the noise of y over that of x; at 0, u is the nearest image with A u = y.
    """
    return x + strength * operator.transpose(operator.solve(y - operator.apply(x), 1.0, ratio))


def put_in_each_step(operator: Operator, y: State, sde: SDE, *, noise: float, strength: float) -> StepTransform:
    """Return the step transform that puts the measurement, noised to the step's time, into the state.

    The measurement's mean goes into the step's mean, and the unmeasured part keeps its own, so that removing the last
    step's noise denoises both. y are measurements of clean images, with noise of std `noise` in the network's range;
    their weight falls as the noise of the state becomes small beside it. `strength` is lambda of Song et al. 2022.
    """

    def transform(key: PRNGKeyArray, x: Images, x_mean: Images, t: Scalars) -> StepResult:
        m, std = sde.mean_coeff(t), sde.std(t)
        mean = expand(m, y) * y
        noised = mean + expand(std, y) * operator.apply(rng.normal(key, x.shape))
        ratio = jnp.square(m * noise / std) if noise else 0.0
        pull = functools.partial(put_in, operator, ratio=ratio, strength=strength)
        return pull(x, noised), pull(x_mean, mean)

    return transform
