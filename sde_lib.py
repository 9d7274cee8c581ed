"""Stochastic differential equations in closed form: forward kernels, priors, discretizations and time reversal.

A new SDE is one subclass of `SDE` with the primitives; samplers, likelihood and losses then work unchanged. Equation
numbers are those of Song et al. 2021 (arXiv 2011.13456).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

import checks
from configs.settings import check
from errors import UserError
from parallel import rng

# score(x, t) = grad_x log p_t(x): (float[B, ...], float[B]) -> float[B, ...]
ScoreFn = Callable[[Float[Array, "B ..."], Float[Array, "B"]], Float[Array, "B ..."]]

# Share of a time step by which t may lie below a grid point through rounding and still count as that point:
# a few units in the last place of float32 at N = 2000.
_INDEX_SLACK = 2.0**-12


def expand(coef: Float[Array, "B"], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Reshapes a coefficient for each example, [B], to broadcast against `x`, [B, ...]."""
    return jnp.expand_dims(coef, tuple(range(1, x.ndim)))


def _event_axes(x: Float[Array, "B ..."]) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


class SDE(abc.ABC):
    """Forward process dx = f(x, t) dt + g(t) dw on t in [0, T], with the kernel N(mean_coeff(t) x0, std(t)^2 I).

    A subclass is a frozen dataclass with the fields `N` and `sampling_eps` and the abstract methods; the methods that
    are marked as defaults may be replaced.
    """

    N: int  # steps of the discretization
    sampling_eps: float  # time at which sampling stops
    T: ClassVar[float] = 1.0  # time at which the data are forgotten

    @abc.abstractmethod
    def mean_coeff(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns m(t), where x(t) has mean m(t) x0."""

    @abc.abstractmethod
    def std(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns the standard deviation of x(t) given x0."""

    @abc.abstractmethod
    def sde(self, x: Float[Array, "B ..."], t: Float[Array, "B"]) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns drift f(x, t), of the shape of `x`, and diffusion g(t), [B] (Eq. 5)."""

    @property
    def prior_std(self) -> float | Float[Array, ""]:
        """Standard deviation of the prior; by default that of the kernel at T."""
        return self.std(jnp.asarray([self.T]))[0]

    def check_steps(self) -> None:  # noqa: B027 - a hook that most subclasses leave empty
        """Raises ValueError if the process cannot be discretized in `N` steps; by default it always can."""

    def discretize(
        self, x: Float[Array, "B ..."], t: Float[Array, "B"]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns f and G of the step x' = x + f + G z that ends at t; by default Euler-Maruyama with step T/N."""
        drift, diffusion = self.sde(x, t)
        step = self.T / self.N
        return drift * step, diffusion * math.sqrt(step)

    def step_alpha(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns alpha_i of the step that ends at t: the share of the signal's power that survives it.

        The correctors scale their step size with it (Appendix G). By default (mean_coeff(t) / mean_coeff(t - T/N))^2,
        which agrees with DDPM's 1 - beta_i to second order in 1/N and is 1 for an SDE without drift.
        """
        before = jnp.maximum(t - self.T / self.N, 0.0)
        return (self.mean_coeff(t) / self.mean_coeff(before)) ** 2

    def marginal_prob(
        self, x: Float[Array, "B ..."], t: Float[Array, "B"]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns the mean, of the shape of `x`, and the std, [B], of x(t) given x(0) = `x` (Appendix B)."""
        return expand(self.mean_coeff(t), x) * x, self.std(t)

    def prior_sampling(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
        """Draws from the prior N(0, prior_std^2 I); `key` is one key or one for each example."""
        return self.prior_std * rng.normal(key, shape)

    def prior_logp(self, z: Float[Array, "B ..."]) -> Float[Array, "B"]:
        """Returns the log-density of the prior at `z`, in nats, summed over each example's values."""
        num_dims = math.prod(z.shape[1:])
        normalizer = 0.5 * math.log(2 * math.pi) + jnp.log(self.prior_std)
        return -num_dims * normalizer - jnp.sum((z / self.prior_std) ** 2, axis=_event_axes(z)) / 2

    def reverse(self, score_fn: ScoreFn, probability_flow: bool = False) -> ReverseSDE:
        """Returns the reverse-time SDE (Eq. 6), or the probability-flow ODE (Eq. 13)."""
        return ReverseSDE(self, score_fn, probability_flow)

    def sampling_times(self) -> Float[Array, "N"]:
        """Returns the times of a sampler's steps, N of them evenly from T down to `sampling_eps`, rounded once."""
        return jnp.asarray(np.linspace(self.T, self.sampling_eps, self.N))

    def with_steps(self, num_steps: int) -> Self:
        """Returns the same SDE discretized in `num_steps` steps."""
        return dataclasses.replace(self, N=num_steps)  # type: ignore[type-var]

    def time_index(self, t: Float[Array, "B"]) -> Int[Array, "B"]:
        """Returns the index i of the discretization, 0 .. N - 1: t (N - 1) / T, truncated.

        A grid point keeps its index when rounding has put it a little below: the same index on every backend.
        """
        return jnp.floor(t * (self.N - 1) / self.T + _INDEX_SLACK).astype(jnp.int32)

    def _check_fields(self) -> None:
        if self.N < 1:
            raise UserError(f"N={self.N} steps: expected at least 1; set model.num_scales or sampling.num_steps")
        checks.inner_time("sampling_eps", self.sampling_eps, self.T)


@dataclasses.dataclass(frozen=True)
class ReverseSDE:
    """Time reversal of `forward`: drift f - g^2 score, or the ODE with drift f - 1/2 g^2 score and no diffusion."""

    forward: SDE
    score_fn: ScoreFn
    probability_flow: bool = False

    @property
    def T(self) -> float:
        """Time from which it runs backwards."""
        return self.forward.T

    @property
    def N(self) -> int:
        """Steps of the discretization."""
        return self.forward.N

    def sde(self, x: Float[Array, "B ..."], t: Float[Array, "B"]) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns drift and diffusion, for dt < 0 (Eqs. 6 and 13)."""
        return self._reverse(*self.forward.sde(x, t), x, t)

    def discretize(
        self, x: Float[Array, "B ..."], t: Float[Array, "B"]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns f and G of the reverse-diffusion step x' = x - f + G z (Appendix E)."""
        return self._reverse(*self.forward.discretize(x, t), x, t)

    def _reverse(
        self, drift: Float[Array, "B ..."], diffusion: Float[Array, "B"], x: Float[Array, "B ..."], t: Float[Array, "B"]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        share = 0.5 if self.probability_flow else 1.0
        reverse_drift = drift - expand(share * diffusion**2, x) * self.score_fn(x, t)
        return reverse_drift, jnp.zeros_like(diffusion) if self.probability_flow else diffusion


@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
    """Variance-exploding SDE: noise of std sigma_min (sigma_max / sigma_min)^t, no drift (Eq. 9)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    N: int = 1000
    sampling_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._check_fields()
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: expected 0 < sigma_min < sigma_max; "
                "set model.sigma_min and model.sigma_max"
            )

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior: sigma_max."""
        return float(self.sigma_max)

    @property
    def discrete_sigmas(self) -> Float[Array, "N"]:
        """Noise levels of SMLD, ascending: a geometric sequence from sigma_min to sigma_max."""
        return jnp.asarray(self._sigmas())

    def _sigmas(self) -> np.ndarray:
        return np.exp(np.linspace(np.log(self.sigma_min), np.log(self.sigma_max), self.N))

    def noise_added(self, t: Float[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """Returns the std that SMLD's step to the level at t adds, sqrt(sigma_i^2 - sigma_{i-1}^2), and sigma_{i-1}.

        sigma_{-1} is 0. The difference is taken in float64, for neighbouring levels are close.
        """
        sigmas = self._sigmas()
        lower = np.concatenate([[0.0], sigmas[:-1]])
        index = self.time_index(t)
        return jnp.asarray(np.sqrt(sigmas**2 - lower**2))[index], jnp.asarray(lower)[index]

    def mean_coeff(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns 1: the mean stays at x0."""
        return jnp.ones_like(t)

    def std(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns sigma(t), without the -sigma(0)^2 of the exact kernel, as the original does."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x: Float[Array, "B ..."], t: Float[Array, "B"]) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns drift 0 and diffusion sigma(t) sqrt(2 ln(sigma_max / sigma_min)) (Eq. 9)."""
        return jnp.zeros_like(x), self.std(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def discretize(
        self, x: Float[Array, "B ..."], t: Float[Array, "B"]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns f = 0 and G = sqrt(sigma_i^2 - sigma_{i-1}^2), the Markov chain of SMLD."""
        return jnp.zeros_like(x), self.noise_added(t)[0]


@dataclasses.dataclass(frozen=True)
class _LinearBetaSDE(SDE):
    """What VP and sub-VP share: beta(t) linear from beta_min to beta_max, and the drift -1/2 beta(t) x."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    N: int = 1000
    sampling_eps: float = 1e-3

    def __post_init__(self) -> None:
        self._check_fields()
        if not 0 < self.beta_min <= self.beta_max:
            raise UserError(
                f"beta_min={self.beta_min}, beta_max={self.beta_max}: expected 0 < beta_min <= beta_max; "
                "set model.beta_min and model.beta_max"
            )

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior: 1, which the kernel reaches at T to 1e-4."""
        return 1.0

    def beta(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns the rate beta at t, per unit of time."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_mean_coeff(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns log m(t) = -1/2 ∫ beta = -1/4 t^2 (beta_max - beta_min) - 1/2 t beta_min (Appendix C)."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def mean_coeff(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns exp(-1/2 ∫ beta)."""
        return jnp.exp(self.log_mean_coeff(t))

    def _drift(self, x: Float[Array, "B ..."], t: Float[Array, "B"]) -> Float[Array, "B ..."]:
        return expand(-0.5 * self.beta(t), x) * x


@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBetaSDE):
    """Variance-preserving SDE: dx = -1/2 beta x dt + sqrt(beta) dw (Eq. 11); discretized as DDPM."""

    def std(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns sqrt(1 - m(t)^2); expm1, because 1 - exp loses 1 % of it at t = 1e-5 in float32."""
        return jnp.sqrt(-jnp.expm1(2 * self.log_mean_coeff(t)))

    def sde(self, x: Float[Array, "B ..."], t: Float[Array, "B"]) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns drift -1/2 beta x and diffusion sqrt(beta) (Eq. 11)."""
        return self._drift(x, t), jnp.sqrt(self.beta(t))

    @property
    def discrete_betas(self) -> Float[Array, "N"]:
        """beta_i of DDPM: linear from beta_min / N to beta_max / N."""
        return jnp.asarray(self._betas())

    @property
    def alphas_cumprod(self) -> Float[Array, "N"]:
        """alpha_bar_i of DDPM: the product of 1 - beta_j up to i."""
        return jnp.asarray(self._alpha_bars())

    @property
    def sqrt_alphas_cumprod(self) -> Float[Array, "N"]:
        """Mean coefficient of DDPM's level i."""
        return jnp.asarray(np.sqrt(self._alpha_bars()))

    @property
    def sqrt_1m_alphas_cumprod(self) -> Float[Array, "N"]:
        """Standard deviation of DDPM's level i."""
        return jnp.asarray(np.sqrt(1 - self._alpha_bars()))

    def _betas(self) -> np.ndarray:
        self.check_steps()
        return np.linspace(self.beta_min / self.N, self.beta_max / self.N, self.N)

    def _alpha_bars(self) -> np.ndarray:
        return np.cumprod(1 - self._betas())

    def check_steps(self) -> None:
        """Raises ValueError if beta_i would exceed 1, where DDPM's chain is not defined."""
        if self.beta_max > self.N:
            raise UserError(
                f"the discretization of VPSDE (DDPM) in N={self.N} steps has beta_i up to beta_max / N = "
                f"{self.beta_max / self.N:.3g}, expected at most 1; use at least {math.ceil(self.beta_max)} steps "
                "(sampling.num_steps), or the predictor euler_maruyama without a corrector"
            )

    def discretize(
        self, x: Float[Array, "B ..."], t: Float[Array, "B"]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns f = sqrt(1 - beta_i) x - x and G = sqrt(beta_i), the Markov chain of DDPM."""
        beta = self.discrete_betas[self.time_index(t)]
        return expand(jnp.sqrt(1 - beta), x) * x - x, jnp.sqrt(beta)

    def step_alpha(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns alpha_i = 1 - beta_i of DDPM."""
        return 1 - self.discrete_betas[self.time_index(t)]


@dataclasses.dataclass(frozen=True)
class subVPSDE(_LinearBetaSDE):
    """Sub-VP SDE: the drift of VP, a variance below VP's, better likelihoods (Eq. 12); Euler-Maruyama steps."""

    def std(self, t: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns 1 - m(t)^2, not its root; expm1, because 1 - exp loses 1 % of it at t = 1e-5 in float32."""
        return -jnp.expm1(2 * self.log_mean_coeff(t))

    def sde(self, x: Float[Array, "B ..."], t: Float[Array, "B"]) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
        """Returns drift -1/2 beta x and diffusion sqrt(beta (1 - exp(-2 ∫ beta))) (Eq. 12)."""
        return self._drift(x, t), jnp.sqrt(self.beta(t) * -jnp.expm1(4 * self.log_mean_coeff(t)))


def _build_ve(config: ConfigDict) -> SDE:
    model = config.model
    return VESDE(sigma_min=model.sigma_min, sigma_max=model.sigma_max, N=model.num_scales)


def _build_vp(config: ConfigDict) -> SDE:
    model = config.model
    return VPSDE(beta_min=model.beta_min, beta_max=model.beta_max, N=model.num_scales)


def _build_subvp(config: ConfigDict) -> SDE:
    model = config.model
    return subVPSDE(beta_min=model.beta_min, beta_max=model.beta_max, N=model.num_scales)


SDES: dict[str, Callable[[ConfigDict], SDE]] = {"subvpsde": _build_subvp, "vesde": _build_ve, "vpsde": _build_vp}


def build_sde(config: ConfigDict) -> SDE:
    """Builds the SDE that `config.training.sde` names, with N = `config.model.num_scales`.

    Raises:
      UserError: if the name is unknown or a constant is out of range.
    """
    check(config, "training", "model")
    return SDES[config.training.sde.lower()](config)
