"""The times that a training step sees: drawn from a density, each with the weight that makes up for it."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import noise_levels
import rng
from sde_lib import SDE

TRAINING_EPS = 1e-5  # smallest time that training sees, for every SDE, as in the 2021 code
# Pieces of the importance density. A power of two, so that a uniform float32 splits into piece and place exactly.
NUM_PIECES = 4096

# (key, B) -> times and weights, such that the mean of weight * f(t) is that of f over [eps, T] for every f.
DrawTimes = Callable[[PRNGKeyArray, int], tuple[Float[Array, "B"], Float[Array, "B"]]]


def make_uniform_times(sde: SDE, *, eps: float = TRAINING_EPS) -> DrawTimes:
    """Returns what draws times uniformly from [eps, T], with weights 1."""

    def draw(key: PRNGKeyArray, num_examples: int) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        t = rng.uniform(key, (num_examples,), minval=eps, maxval=sde.T)
        return t, jnp.ones_like(t)

    return draw


def make_importance_times(sde: SDE, *, eps: float = TRAINING_EPS, num_pieces: int = NUM_PIECES) -> DrawTimes:
    """Returns what draws times from p(t) ∝ g(t)² / std(t)² on [eps, T], with weights 1 / (p(t) (T - eps)).

    The importance sampling of Song, Durkan, Murray and Ermon 2021, "Maximum Likelihood Training of Score-Based
    Diffusion Models": weight * g² / std², the factor of the likelihood-weighted loss that rises as 1 / t, is then the
    same at every t. For every SDE with drift linear in x, d log(std² / mean_coeff²) / dt = g² / std², so that such a
    t is uniform in log-SNR, with no formula of its own.

    The density drawn from is constant on each of `num_pieces` intervals of equal length in log-SNR, and the weight is
    its exact reciprocal: the mean is right for any number of pieces, which decides only how even weight * g² / std² is.

    Args:
      sde: forward SDE.
      eps: smallest time.
      num_pieces: intervals.
    """
    first, last = noise_levels.noise_levels(sde, np.array([eps, sde.T])).log_snr
    nodes = noise_levels.time_of_log_snr(sde, np.linspace(first, last, num_pieces + 1))
    nodes[0], nodes[-1] = eps, sde.T
    starts, widths = nodes[:-1], np.diff(nodes)  # the difference in float64: near eps it is 6e-8 wide

    def draw(key: PRNGKeyArray, num_examples: int) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        place = num_pieces * rng.uniform(key, (num_examples,))
        piece = place.astype(jnp.int32)
        width = jnp.asarray(widths)[piece]
        return jnp.asarray(starts)[piece] + (place - piece) * width, width * (num_pieces / (sde.T - eps))

    return draw
