"""Stochastic differential equations in closed form: forward kernels, priors, discretizations and time reversal.

A new SDE is one subclass of `SDE` with the primitives; samplers, likelihood and losses then work unchanged. What
differs between SDEs is a method here and nowhere else a question of type. Equation numbers are those of Song et al.
2021 (arXiv 2011.13456).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

import checks
from configs.settings import check
from errors import UserError
from parallel import rng

State = Float[Array, "B ..."]  # one array for each example: noisy state, score, drift
Scalars = Float[Array, "B"]  # one number for each example: time, coefficient, standard deviation
Images = Float[Array, "B H W C"]  # in the range of the network
ScoreFn = Callable[[State, Scalars], State]  # score(x, t) = grad_x log p_t(x)

LABEL_OF_T = 999.0  # time label of t = T of continuously trained VP and sub-VP networks: that of DDPM's last level
# Fraction of a time step by which t may lie below a grid point through rounding and still count as that point:
# a few units in the last place of float32 at N = 2000.
_INDEX_SLACK = 2.0**-12


def expand(coef: Scalars, x: State) -> State:
    """Reshape a coefficient for each example, [B], to broadcast against `x`, [B, ...]."""
    return jnp.expand_dims(coef, tuple(range(1, x.ndim)))


class SDE(abc.ABC):
    """Forward process dx = f(x, t) dt + g(t) dw on t in [0, T], with the kernel N(mean_coeff(t) x0, std(t)^2 I).

    A subclass is a frozen dataclass with the fields `N` and `sampling_eps` and the abstract methods. The other methods
    are defaults for any SDE; a subclass replaces what its literature defines otherwise. `num_steps` is the number of
    steps of a discretization; None: N, that of training.
    """

    N: int  # noise levels of discrete training, and steps of the discretization unless an algorithm has its own
    sampling_eps: float  # time at which sampling stops
    T: ClassVar[float] = 1.0  # time at which the data are forgotten
    # The Markov chain (SMLD, DDPM) that the SDE is the limit of: it can be trained on and sampled from as such.
    has_chain: ClassVar[bool] = False
    # Whether a network that was trained on the levels of the chain can be evaluated between them.
    interpolates_levels: ClassVar[bool] = True

    @abc.abstractmethod
    def mean_coeff(self, t: Scalars) -> Scalars:
        """Return m(t), where x(t) has mean m(t) x0."""

    @abc.abstractmethod
    def std(self, t: Scalars) -> Scalars:
        """Return the standard deviation of x(t) given x0."""

    @abc.abstractmethod
    def sde(self, x: State, t: Scalars) -> tuple[State, Scalars]:
        """Return drift f(x, t), of the shape of `x`, and diffusion g(t), [B] (Eq. 5)."""

    # --- kernel, prior, time reversal ---------------------------------------------------------------------------------

    def marginal_prob(self, x: State, t: Scalars) -> tuple[State, Scalars]:
        """Return the mean, of the shape of `x`, and the std, [B], of x(t) given x(0) = `x` (Appendix B)."""
        return expand(self.mean_coeff(t), x) * x, self.std(t)

    @property
    def prior_std(self) -> float | Float[Array, ""]:
        """Standard deviation of the prior; by default that of the kernel at T."""
        return self.std(jnp.asarray([self.T]))[0]

    def prior_sampling(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> State:
        """Draw from the prior N(0, prior_std^2 I); `key` is one key or one for each example."""
        return self.prior_std * rng.normal(key, shape)

    def prior_logp(self, z: State) -> Scalars:
        """Return the log-density of the prior at `z`, in nats, summed over each example's values."""
        num_dims = math.prod(z.shape[1:])
        normalizer = 0.5 * math.log(2 * math.pi) + jnp.log(self.prior_std)
        return -num_dims * normalizer - jnp.sum((z / self.prior_std) ** 2, axis=tuple(range(1, z.ndim))) / 2

    def reverse(self, score_fn: ScoreFn, probability_flow: bool = False, num_steps: int | None = None) -> ReverseSDE:
        """Return the reverse-time SDE (Eq. 6), or the probability-flow ODE (Eq. 13)."""
        return ReverseSDE(self, score_fn, probability_flow, num_steps or self.N)

    # --- discretization -----------------------------------------------------------------------------------------------

    def sampling_times(self, num_steps: int | None = None) -> Float[np.ndarray, "N"]:
        """Return the times of a sampler's steps, evenly from T down to `sampling_eps`, in float64."""
        return np.linspace(self.T, self.sampling_eps, num_steps or self.N)

    def time_index(self, t: Scalars, num_steps: int | None = None) -> Int[Array, "B"]:
        """Return the index i of the discretization, 0 .. num_steps - 1: t (num_steps - 1) / T, truncated.

        A grid point keeps its index when rounding has put it a little below: the same index on every backend.
        """
        return jnp.floor(t * ((num_steps or self.N) - 1) / self.T + _INDEX_SLACK).astype(jnp.int32)

    def discretize(self, x: State, t: Scalars, num_steps: int | None = None) -> tuple[State, Scalars]:
        """Return f and G of the step x' = x + f + G z that ends at t; by default Euler-Maruyama, step T / num_steps."""
        drift, diffusion = self.sde(x, t)
        step = self.T / (num_steps or self.N)
        return drift * step, diffusion * math.sqrt(step)

    def step_alpha(self, t: Scalars, num_steps: int | None = None) -> Scalars:
        """Return alpha_i of the step that ends at t: the fraction of the signal's power that survives it.

        The correctors scale their step size with it (Appendix G). By default (m(t) / m(t - T / num_steps))^2, which
        agrees with DDPM's 1 - beta_i to second order and is 1 for an SDE without drift.
        """
        before = jnp.maximum(t - self.T / (num_steps or self.N), 0.0)
        return (self.mean_coeff(t) / self.mean_coeff(before)) ** 2

    def ancestral_step(self, x: State, t: Scalars, score: State, num_steps: int | None = None) -> tuple[State, Scalars]:
        """Return mean and std of p(x_{i-1} | x_i) in the Markov chain, of an SDE that `has_chain`."""
        raise NotImplementedError(f"{type(self).__name__} is the limit of no Markov chain")

    def check_steps(self, num_steps: int | None = None, *, ancestral: bool = False) -> None:
        """Check that the process can be discretized in `num_steps` steps, and `ancestral_step` taken along them.

        Raises:
          UserError: if not.
        """
        if ancestral and not self.has_chain:
            raise UserError(
                f"sampling.predictor='ancestral_sampling' needs the Markov chain of SMLD or DDPM (training.sde 'vesde' "
                f"or 'vpsde'); {type(self).__name__} has none: use 'reverse_diffusion' or 'euler_maruyama'"
            )

    # --- what networks trained for the SDE see and return -------------------------------------------------------------

    def time_label(self, t: Scalars, *, continuous: bool) -> Array:
        """Return the label of the noise level at t that networks are conditioned on: by default 999 t / T.

        `continuous`: the network was trained in continuous time, not on the levels of the chain.
        """
        return t * (LABEL_OF_T / self.T)

    def score_scale(self, t: Scalars, *, continuous: bool) -> Scalars:
        """Return the score's factor on the network's output; by default that predicts the noise: -1 / std(t)."""
        return -1 / self.std(t)

    def discrete_kernel(self, x: State, labels: Int[Array, "B"]) -> tuple[State, Scalars, Scalars]:
        """Return the mean and std of the chain's x_i given x_0 = `x`, at the levels with these time labels, and c.

        With x_i = mean + std z, c times the output of a network trained at the levels estimates -z.
        """
        raise NotImplementedError(f"{type(self).__name__} is the limit of no Markov chain")

    def _check_fields(self) -> None:
        if self.N < 1:
            raise UserError(f"N={self.N} steps: expected at least 1; set model.num_scales or sampling.num_steps")
        checks.inner_time("sampling_eps", self.sampling_eps, self.T)


@dataclasses.dataclass(frozen=True)
class ReverseSDE:
    """Time reversal of `forward`: drift f - g^2 score, or the ODE with drift f - 1/2 g^2 score and no diffusion."""

    forward: SDE
    score_fn: ScoreFn
    probability_flow: bool
    N: int  # steps of the discretization

    @property
    def T(self) -> float:
        """Time from which it runs backwards."""
        return self.forward.T

    def sde(self, x: State, t: Scalars) -> tuple[State, Scalars]:
        """Return drift and diffusion, for dt < 0 (Eqs. 6 and 13)."""
        return self._reverse(*self.forward.sde(x, t), x, t)

    def discretize(self, x: State, t: Scalars) -> tuple[State, Scalars]:
        """Return f and G of the reverse-diffusion step x' = x - f + G z (Appendix E)."""
        return self._reverse(*self.forward.discretize(x, t, self.N), x, t)

    def _reverse(self, drift: State, diffusion: Scalars, x: State, t: Scalars) -> tuple[State, Scalars]:
        factor = 0.5 if self.probability_flow else 1.0
        reverse_drift = drift - expand(factor * diffusion**2, x) * self.score_fn(x, t)
        return reverse_drift, jnp.zeros_like(diffusion) if self.probability_flow else diffusion


@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
    """Variance-exploding SDE: noise of std sigma_min (sigma_max / sigma_min)^t, no drift (Eq. 9)."""

    has_chain = True
    interpolates_levels = False  # a discretely trained network knows only the index of a level

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
        return jnp.asarray(self._sigmas(self.N))

    def _sigmas(self, num_steps: int) -> np.ndarray:
        return np.exp(np.linspace(np.log(self.sigma_min), np.log(self.sigma_max), num_steps))

    def mean_coeff(self, t: Scalars) -> Scalars:
        """Return 1: the mean stays at x0."""
        return jnp.ones_like(t)

    def std(self, t: Scalars) -> Scalars:
        """Return sigma(t), without the -sigma(0)^2 of the exact kernel, as the original does."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x: State, t: Scalars) -> tuple[State, Scalars]:
        """Return drift 0 and diffusion sigma(t) sqrt(2 ln(sigma_max / sigma_min)) (Eq. 9)."""
        return jnp.zeros_like(x), self.std(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def noise_added(self, t: Scalars, num_steps: int | None = None) -> tuple[Scalars, Scalars]:
        """Return the std that SMLD's step to the level at t adds, sqrt(sigma_i^2 - sigma_{i-1}^2), and sigma_{i-1}.

        sigma_{-1} is 0. The difference is taken in float64, because neighbouring levels are close.
        """
        sigmas = self._sigmas(num_steps or self.N)
        lower = np.concatenate([[0.0], sigmas[:-1]])
        index = self.time_index(t, num_steps)
        return jnp.asarray(np.sqrt(sigmas**2 - lower**2))[index], jnp.asarray(lower)[index]

    def discretize(self, x: State, t: Scalars, num_steps: int | None = None) -> tuple[State, Scalars]:
        """Return f = 0 and G = sqrt(sigma_i^2 - sigma_{i-1}^2), the Markov chain of SMLD."""
        return jnp.zeros_like(x), self.noise_added(t, num_steps)[0]

    def ancestral_step(self, x: State, t: Scalars, score: State, num_steps: int | None = None) -> tuple[State, Scalars]:
        """Return mean and std of p(x_{i-1} | x_i) in the chain of SMLD, the std of the posterior (Appendix F)."""
        added, lower = self.noise_added(t, num_steps)
        return x + expand(added**2, x) * score, lower * added / jnp.hypot(lower, added)

    def time_label(self, t: Scalars, *, continuous: bool) -> Array:
        """Return sigma, or for a discretely trained network the index of the level, counted down from sigma_max."""
        return self.std(t) if continuous else jnp.round((self.T - t) * (self.N - 1)).astype(jnp.int32)

    def score_scale(self, t: Scalars, *, continuous: bool) -> Scalars:
        """Return 1: the network itself divides by sigma."""
        return jnp.ones_like(t)

    def discrete_kernel(self, x: State, labels: Int[Array, "B"]) -> tuple[State, Scalars, Scalars]:
        """Return x, sigma and c = sigma of SMLD's levels, whose labels count down from sigma_max."""
        sigma = self.discrete_sigmas[::-1][labels]
        return x, sigma, sigma


@dataclasses.dataclass(frozen=True)
class _LinearBetaSDE(SDE):
    """What VP and sub-VP have in common: beta(t) linear from beta_min to beta_max, and the drift -1/2 beta(t) x."""

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

    def beta(self, t: Scalars) -> Scalars:
        """Return the rate beta at t, per unit of time."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_mean_coeff(self, t: Scalars) -> Scalars:
        """Return log m(t) = -1/2 ∫ beta = -1/4 t^2 (beta_max - beta_min) - 1/2 t beta_min (Appendix C)."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def mean_coeff(self, t: Scalars) -> Scalars:
        """Return exp(-1/2 ∫ beta)."""
        return jnp.exp(self.log_mean_coeff(t))

    def _drift(self, x: State, t: Scalars) -> State:
        return expand(-0.5 * self.beta(t), x) * x


@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBetaSDE):
    """Variance-preserving SDE: dx = -1/2 beta x dt + sqrt(beta) dw (Eq. 11); discretized as DDPM."""

    has_chain = True

    def std(self, t: Scalars) -> Scalars:
        """Return sqrt(1 - m(t)^2); expm1, because 1 - exp loses 1 % of it at t = 1e-5 in float32."""
        return jnp.sqrt(-jnp.expm1(2 * self.log_mean_coeff(t)))

    def sde(self, x: State, t: Scalars) -> tuple[State, Scalars]:
        """Return drift -1/2 beta x and diffusion sqrt(beta) (Eq. 11)."""
        return self._drift(x, t), jnp.sqrt(self.beta(t))

    @property
    def discrete_betas(self) -> Float[Array, "N"]:
        """beta_i of DDPM: linear from beta_min / N to beta_max / N."""
        return jnp.asarray(self._betas(self.N))

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

    def _betas(self, num_steps: int) -> np.ndarray:
        self.check_steps(num_steps)
        return np.linspace(self.beta_min / num_steps, self.beta_max / num_steps, num_steps)

    def _alpha_bars(self) -> np.ndarray:
        return np.cumprod(1 - self._betas(self.N))

    def _beta_of_step(self, t: Scalars, num_steps: int | None) -> Scalars:
        return jnp.asarray(self._betas(num_steps or self.N))[self.time_index(t, num_steps)]

    def check_steps(self, num_steps: int | None = None, *, ancestral: bool = False) -> None:
        """Check that no beta_i exceeds 1, beyond which DDPM's chain is not defined; for ancestral steps that none is 1.

        Raises:
          UserError: if one does.
        """
        N = num_steps or self.N
        if self.beta_max > N:
            raise UserError(
                f"the discretization of VPSDE (DDPM) in N={N} steps has beta_i up to beta_max / N = "
                f"{self.beta_max / N:.3g}, expected at most 1; use at least {math.ceil(self.beta_max)} steps "
                "(sampling.num_steps), or the predictor euler_maruyama without a corrector"
            )
        if ancestral and self.beta_max == N:
            raise UserError(
                f"sampling.predictor='ancestral_sampling' divides by sqrt(1 - beta_i), which is 0 in the first of "
                f"N={N} steps; use more steps (sampling.num_steps)"
            )

    def discretize(self, x: State, t: Scalars, num_steps: int | None = None) -> tuple[State, Scalars]:
        """Return f = sqrt(1 - beta_i) x - x and G = sqrt(beta_i), the Markov chain of DDPM."""
        beta = self._beta_of_step(t, num_steps)
        return expand(jnp.sqrt(1 - beta), x) * x - x, jnp.sqrt(beta)

    def step_alpha(self, t: Scalars, num_steps: int | None = None) -> Scalars:
        """Return alpha_i = 1 - beta_i of DDPM."""
        return 1 - self._beta_of_step(t, num_steps)

    def ancestral_step(self, x: State, t: Scalars, score: State, num_steps: int | None = None) -> tuple[State, Scalars]:
        """Return mean and std of p(x_{i-1} | x_i) in the chain of DDPM, with variance beta_i (Eq. 4)."""
        beta = self._beta_of_step(t, num_steps)
        return (x + expand(beta, x) * score) / expand(jnp.sqrt(1 - beta), x), jnp.sqrt(beta)

    def time_label(self, t: Scalars, *, continuous: bool) -> Array:
        """Return 999 t, or for a discretely trained network t (N - 1).

        That is no integer between DDPM's levels, though training used integers: as the original samples.
        """
        return super().time_label(t, continuous=True) if continuous else t * (self.N - 1)

    def score_scale(self, t: Scalars, *, continuous: bool) -> Scalars:
        """Return -1 / std(t), or for a discretely trained network -1 / sqrt(1 - alpha_bar_i), i truncated."""
        return -1 / (self.std(t) if continuous else self.sqrt_1m_alphas_cumprod[self.time_index(t)])

    def discrete_kernel(self, x: State, labels: Int[Array, "B"]) -> tuple[State, Scalars, Scalars]:
        """Return sqrt(alpha_bar_i) x, sqrt(1 - alpha_bar_i) and c = -1: the network of DDPM predicts the noise."""
        alpha_bar = self.alphas_cumprod[labels]
        return expand(jnp.sqrt(alpha_bar), x) * x, jnp.sqrt(1.0 - alpha_bar), jnp.full_like(alpha_bar, -1.0)


@dataclasses.dataclass(frozen=True)
class subVPSDE(_LinearBetaSDE):
    """Sub-VP SDE: the drift of VP, a variance below VP's, better likelihoods (Eq. 12); Euler-Maruyama steps."""

    def std(self, t: Scalars) -> Scalars:
        """Return 1 - m(t)^2, not its root; expm1, because 1 - exp loses 1 % of it at t = 1e-5 in float32."""
        return -jnp.expm1(2 * self.log_mean_coeff(t))

    def sde(self, x: State, t: Scalars) -> tuple[State, Scalars]:
        """Return drift -1/2 beta x and diffusion sqrt(beta (1 - exp(-2 ∫ beta))) (Eq. 12)."""
        return self._drift(x, t), jnp.sqrt(self.beta(t) * -jnp.expm1(4 * self.log_mean_coeff(t)))


SDES: dict[str, Callable[[ConfigDict], SDE]] = {
    "subvpsde": lambda model: subVPSDE(beta_min=model.beta_min, beta_max=model.beta_max, N=model.num_scales),
    "vesde": lambda model: VESDE(sigma_min=model.sigma_min, sigma_max=model.sigma_max, N=model.num_scales),
    "vpsde": lambda model: VPSDE(beta_min=model.beta_min, beta_max=model.beta_max, N=model.num_scales),
}


def build_sde(config: ConfigDict) -> SDE:
    """Build the SDE that `config.training.sde` names, with N = `config.model.num_scales`.

    Raises:
      UserError: if the name is unknown or a constant is out of range.
    """
    check(config, "training", "model")
    return SDES[config.training.sde.lower()](config.model)
