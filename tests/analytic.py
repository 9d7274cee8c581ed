"""Closed forms that several tests share: the score of Gaussian data, the reference's score, and an SDE of one's own."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sde_lib import SDE, VESDE, VPSDE, expand, subVPSDE

GOLDEN = Path(__file__).parent / "golden" / "math"
QUICK = {"xla_backend_optimization_level": "1"}  # of jax.jit: compiling is what the tests spend their time on
MU, S0 = 0.3, 0.5  # mean and standard deviation of the Gaussian data, in every dimension
MIX = np.array([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6], [-0.1, 0.2, 0.7]], np.float32)


@dataclasses.dataclass(frozen=True)
class OrnsteinUhlenbeck(SDE):
    """An SDE by its primitives alone: dx = -rate x dt + sqrt(2 rate) dw, which keeps N(0, 1) as it is."""

    rate: float = 5.0
    N: int = 1000
    sampling_eps: float = 1e-3

    def mean_coeff(self, t):
        return jnp.exp(-self.rate * t)

    def std(self, t):
        return jnp.sqrt(-jnp.expm1(-2 * self.rate * t))

    def sde(self, x, t):
        return -self.rate * x, jnp.full_like(t, np.sqrt(2 * self.rate))


SDES = {"vesde": VESDE(), "vpsde": VPSDE(), "subvpsde": subVPSDE(), "ou": OrnsteinUhlenbeck()}


def load(name):
    """Returns the arrays of a reference file and what its `meta` says."""
    stored = np.load(GOLDEN / f"{name}.npz")
    return stored, json.loads(str(stored["meta"]))


def sde_of(meta):
    """Builds the SDE of a reference file."""
    given = meta["sde"]
    if given["class"] == "VESDE":
        return VESDE(given["sigma_min"], given["sigma_max"], given["N"])
    return {"VPSDE": VPSDE, "subVPSDE": subVPSDE}[given["class"]](given["beta_0"], given["beta_1"], given["N"])


def score_of_kernel(x, mean_coeff, std, c):
    """Score of Gaussian data under the given kernel, plus a non-linear field with an asymmetric Jacobian times c."""
    score = -(x - expand(mean_coeff, x) * MU) / expand(mean_coeff**2 * S0**2 + std**2, x)
    return score + c * jnp.tanh((x / expand(1 + std, x)) @ MIX) if c else score


def make_score_fn(sde, c=0.0):
    """The exact score of N(MU, S0^2) data under `sde`; with c, the reference's test function."""
    return lambda x, t: score_of_kernel(x, sde.mean_coeff(t), sde.std(t), c)


def make_discrete_score_fn(sde, c):
    """The same at the discrete noise levels, which a discretely trained network would know."""

    def score_fn(x, t):
        if isinstance(sde, VPSDE):
            i = (t * (sde.N - 1)).astype(jnp.int32)
            return score_of_kernel(x, sde.sqrt_alphas_cumprod[i], sde.sqrt_1m_alphas_cumprod[i], c)
        i = jnp.round((1 - t) * (sde.N - 1)).astype(jnp.int32)
        return score_of_kernel(x, jnp.ones_like(t), sde.discrete_sigmas[::-1][i], c)

    return score_fn


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of isotropic Gaussians, whose score and density are known under every SDE.

    Attributes:
      means: of the components, [K, D].
      weights: of the components, [K].
      std: of every component.
    """

    means: np.ndarray
    weights: np.ndarray
    std: float

    def _terms(self, x, mean_coeff, std):
        """Differences to the means [B, K, D], log of each component's share [B, K], variance [B]."""
        variance = (mean_coeff * self.std) ** 2 + std**2
        difference = mean_coeff[:, None, None] * self.means[None] - x.reshape(len(x), 1, -1)
        log_density = -jnp.sum(difference**2, axis=-1) / (2 * variance[:, None])
        return difference, np.log(self.weights)[None] + log_density, variance

    def score_fn(self, sde):
        def score(x, t):
            difference, log_share, variance = self._terms(x, sde.mean_coeff(t), sde.std(t))
            share = jax.nn.softmax(log_share, axis=1)
            return (jnp.sum(share[..., None] * difference, axis=1) / variance[:, None]).reshape(x.shape)

        return score

    def log_density(self, x, mean_coeff=1.0, std=0.0):
        """log p_t(x), by default of the data themselves."""
        ones = jnp.ones(len(x))
        _, log_share, variance = self._terms(x, mean_coeff * ones, std * ones)
        num_dims = self.means.shape[1]
        return jax.nn.logsumexp(log_share, axis=1) - num_dims / 2 * jnp.log(2 * np.pi * variance)

    def second_moment(self, mean_coeff=1.0, std=0.0):
        """E |x|^2 at a time."""
        variance = (mean_coeff * self.std) ** 2 + std**2
        return mean_coeff**2 * np.sum(self.weights * np.sum(self.means**2, axis=1)) + self.means.shape[1] * variance


TRIANGLE = Mixture(np.array([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.0]]), np.array([0.5, 0.3, 0.2]), 0.4)
