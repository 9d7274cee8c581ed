"""Predictor-corrector and probability-flow samplers (Song et al. 2021, Algorithms 1 to 5 and Section 4).

A step is (key, x, t) -> (x, x_mean); `build_sampler` binds steps to their settings and loops over them inside one
program. Equation numbers are those of arXiv 2011.13456.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from configs.settings import check
from errors import UserError
from parallel import distributed, rng
from sde_lib import SDE, VESDE, VPSDE, ReverseSDE, ScoreFn, expand
from solvers import SOLVERS
from solvers.interface import TRANSFORM_STREAM, Sampler, StepResult, StepTransform, prepare, unchanged

__all__ = [
    "CORRECTORS",
    "METHODS",
    "PREDICTORS",
    "Sampler",
    "StepResult",
    "StepTransform",
    "build_sampler",
    "clip_prediction",
    "data_range",
]


Predictor = Callable[[PRNGKeyArray, Array, Array, ReverseSDE], StepResult]
Corrector = Callable[[PRNGKeyArray, Array, Array, ReverseSDE], StepResult]


# ----------------------------------------------------------------------------------------------- predictors


def _add_noise(key: PRNGKeyArray, x_mean: Float[Array, "B ..."], std: Float[Array, "B"]) -> StepResult:
    return x_mean + expand(std, x_mean) * rng.normal(key, x_mean.shape), x_mean


def euler_maruyama(
    key: PRNGKeyArray, x: Float[Array, "B ..."], t: Float[Array, "B"], reverse_sde: ReverseSDE
) -> StepResult:
    """Takes a step -T/N of Euler-Maruyama along the reverse SDE, or of Euler along the probability-flow ODE."""
    step = reverse_sde.T / reverse_sde.N
    drift, diffusion = reverse_sde.sde(x, t)
    x_mean = x - drift * step
    return (x_mean, x_mean) if reverse_sde.probability_flow else _add_noise(key, x_mean, diffusion * math.sqrt(step))


def reverse_diffusion(
    key: PRNGKeyArray, x: Float[Array, "B ..."], t: Float[Array, "B"], reverse_sde: ReverseSDE
) -> StepResult:
    """Reverses a step of the SDE's own discretization: x' = x - f + G^2 score + G z (Appendix E)."""
    f, G = reverse_sde.discretize(x, t)
    x_mean = x - f
    return (x_mean, x_mean) if reverse_sde.probability_flow else _add_noise(key, x_mean, G)


def _ancestral_ve(
    sde: VESDE, x: Float[Array, "B ..."], t: Float[Array, "B"], score: Float[Array, "B ..."]
) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
    """Returns mean and std of p(x_{i-1} | x_i) in the chain of SMLD (Appendix F)."""
    added, lower = sde.noise_added(t)
    return x + expand(added**2, x) * score, lower * added / jnp.hypot(lower, added)


def _ancestral_vp(
    sde: VPSDE, x: Float[Array, "B ..."], t: Float[Array, "B"], score: Float[Array, "B ..."]
) -> tuple[Float[Array, "B ..."], Float[Array, "B"]]:
    """Returns mean and std of p(x_{i-1} | x_i) in the chain of DDPM, with variance beta_i (Eq. 4)."""
    beta = sde.discrete_betas[sde.time_index(t)]
    return (x + expand(beta, x) * score) / expand(jnp.sqrt(1 - beta), x), jnp.sqrt(beta)


def ancestral_sampling(
    key: PRNGKeyArray, x: Float[Array, "B ..."], t: Float[Array, "B"], reverse_sde: ReverseSDE
) -> StepResult:
    """Takes an ancestral step of the Markov chain of SMLD (VE) or DDPM (VP)."""
    sde, score = reverse_sde.forward, reverse_sde.score_fn(x, t)
    if isinstance(sde, VESDE):
        return _add_noise(key, *_ancestral_ve(sde, x, t, score))
    assert isinstance(sde, VPSDE)  # build_sampler has refused every other
    return _add_noise(key, *_ancestral_vp(sde, x, t, score))


def no_step(key: PRNGKeyArray, x: Float[Array, "B ..."], t: Float[Array, "B"], reverse_sde: ReverseSDE) -> StepResult:
    """Leaves the state as it is, noise included: with this predictor, `noise_removal` has no effect."""
    del key, t, reverse_sde
    return x, x


PREDICTORS: dict[str, Predictor] = {
    "ancestral_sampling": ancestral_sampling,
    "euler_maruyama": euler_maruyama,
    "none": no_step,
    "reverse_diffusion": reverse_diffusion,
}


# ----------------------------------------------------------------------------------------------- correctors


def _norms(x: Float[Array, "B ..."], langevin_norm: str) -> Float[Array, "B"]:
    """Returns each example's Euclidean norm, or for "batch" its mean over the global batch in every place."""
    norms = jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))))
    return norms if langevin_norm == "sample" else jnp.full_like(norms, distributed.mean(jnp.mean(norms)))


def langevin(
    key: PRNGKeyArray,
    x: Float[Array, "B ..."],
    t: Float[Array, "B"],
    reverse_sde: ReverseSDE,
    *,
    snr: float,
    langevin_norm: str,
) -> StepResult:
    """Takes a step of Langevin dynamics with step size 2 alpha (snr |z| / |score|)^2 (Algorithms 4 and 5).

    alpha is `SDE.step_alpha`: 1 for VE, 1 - beta_i for VP. The 2021 code failed on sub-VP, which has no alpha_i of its
    own; here (m(t) / m(t - T/N))^2 takes its place, to which VP's agrees to second order in 1/N.
    """
    score, z = reverse_sde.score_fn(x, t), rng.normal(key, x.shape)
    ratio = snr * _norms(z, langevin_norm) / _norms(score, langevin_norm)
    return _langevin_update(x, score, z, 2 * reverse_sde.forward.step_alpha(t) * ratio**2)


def annealed_langevin(
    key: PRNGKeyArray, x: Float[Array, "B ..."], t: Float[Array, "B"], reverse_sde: ReverseSDE, *, snr: float
) -> StepResult:
    """Takes a step of annealed Langevin dynamics, whose step size is 2 alpha (snr std(t))^2; alpha as in `langevin`."""
    score, z = reverse_sde.score_fn(x, t), rng.normal(key, x.shape)
    sde = reverse_sde.forward
    return _langevin_update(x, score, z, 2 * sde.step_alpha(t) * (snr * sde.std(t)) ** 2)


def _langevin_update(
    x: Float[Array, "B ..."], score: Float[Array, "B ..."], z: Float[Array, "B ..."], step: Float[Array, "B"]
) -> StepResult:
    x_mean = x + expand(step, x) * score
    return x_mean + expand(jnp.sqrt(2 * step), x) * z, x_mean


def _build_corrector(settings: ConfigDict) -> Corrector:
    if settings.corrector == "langevin":
        return functools.partial(langevin, snr=settings.snr, langevin_norm=settings.langevin_norm)
    return functools.partial(annealed_langevin, snr=settings.snr) if settings.corrector == "ald" else no_step


CORRECTORS = ("ald", "langevin", "none")


# ------------------------------------------------------------------------------------------------- samplers


def _sample_pc(
    key: PRNGKeyArray,
    score_fn: ScoreFn,
    x_init: Float[Array, "B ..."] | None = None,
    transform: StepTransform | None = None,
    *,
    sde: SDE,
    shape: tuple[int, ...],
    predictor: Predictor,
    corrector: Corrector,
    num_corrections: int,
    corrector_first: bool,
    probability_flow: bool,
    noise_removal: bool,
) -> tuple[Float[Array, "B ..."], Int[Array, ""]]:
    """Runs corrector and predictor in turn along the N times linspace(T, eps, N).

    With `corrector_first` the state is corrected at each time before it is taken to the next, as the 2021 code does.
    Algorithm 1 starts with the predictor, and corrects at the time where that arrived: the same but for the correction
    at t = T, where samples of the prior need none.
    """
    key, x = prepare(key, x_init, sde, shape)
    times = sde.sampling_times()
    reverse_sde = sde.reverse(score_fn, probability_flow)
    transform = transform or unchanged
    key_transform = rng.fold_in(key, TRANSFORM_STREAM)

    def update(i: Int[Array, ""], state: StepResult) -> StepResult:
        x, t = state[0], jnp.full(shape[:1], times[i])
        draw_key = lambda j: rng.fold_in(key, i * (num_corrections + 1) + j)  # noqa: E731 - of the step's j-th draw
        correct = lambda j, x: corrector(draw_key(j), x, t, reverse_sde)[0]  # noqa: E731
        num_here = num_corrections if corrector_first else jnp.where(i > 0, num_corrections, 0)
        x = jax.lax.fori_loop(0, num_here, correct, x)
        x, _ = transform(rng.fold_in(key_transform, 2 * i), x, x, t)
        x, x_mean = predictor(draw_key(num_corrections), x, t, reverse_sde)
        return transform(rng.fold_in(key_transform, 2 * i + 1), x, x_mean, t)

    x, x_mean = jax.lax.fori_loop(0, sde.N, update, (x, x))
    num_predictions = 0 if predictor is no_step else sde.N
    nfe = num_predictions + num_corrections * (sde.N if corrector_first else sde.N - 1)
    return x_mean if noise_removal else x, jnp.asarray(nfe, jnp.int32)


# ------------------------------------------------------------------------------------------------- builders


def _check_pairing(settings: ConfigDict, sde: SDE) -> None:
    """Refuses pairings that are not defined, with the reason."""
    predictor, corrector = settings.predictor, settings.corrector
    if predictor == corrector == "none":
        raise UserError("sampling.predictor and sampling.corrector are both 'none': nothing would move; set one")
    if predictor == "ancestral_sampling":
        if not isinstance(sde, VESDE | VPSDE):
            raise UserError(
                f"sampling.predictor='ancestral_sampling' needs the Markov chain of SMLD or DDPM (training.sde 'vesde' "
                f"or 'vpsde'); {type(sde).__name__} has none: use 'reverse_diffusion' or 'euler_maruyama'"
            )
        if isinstance(sde, VPSDE) and sde.beta_max == sde.N:
            raise UserError(
                f"sampling.predictor='ancestral_sampling' divides by sqrt(1 - beta_i), which is 0 in the first of "
                f"N={sde.N} steps; use more steps (sampling.num_steps)"
            )
        if settings.probability_flow:
            raise UserError(
                "sampling.predictor='ancestral_sampling' is a random chain and has no probability flow; set "
                "sampling.probability_flow=False, or use 'reverse_diffusion' or 'euler_maruyama'"
            )
    if predictor in ("ancestral_sampling", "reverse_diffusion") or corrector != "none":
        sde.check_steps()


def _build_pc(config: ConfigDict, sde: SDE, shape: tuple[int, ...]) -> Sampler:
    settings = config.sampling
    sde = sde.with_steps(settings.num_steps or config.model.num_scales)
    _check_pairing(settings, sde)
    return functools.partial(
        _sample_pc,
        sde=sde,
        shape=shape,
        predictor=PREDICTORS[settings.predictor],
        corrector=_build_corrector(settings),
        num_corrections=0 if settings.corrector == "none" else settings.n_steps_each,
        corrector_first=settings.pc_order == "corrector_first",
        probability_flow=settings.probability_flow,
        noise_removal=settings.noise_removal,
    )


METHODS: dict[str, Callable[[ConfigDict, SDE, tuple[int, ...]], Sampler]] = {"pc": _build_pc, **SOLVERS}


def data_range(config: ConfigDict) -> tuple[float, float]:
    """Returns the lowest and the highest value of an image in the network's range."""
    return (-1.0 if config.data.centered else 0.0), 1.0


def clip_prediction(score_fn: ScoreFn, sde: SDE, bounds: tuple[float, float]) -> ScoreFn:
    """Returns the score whose prediction of the data, E[x0 | x], is clipped; as given where nothing is clipped.

    As the code of DDPM (Ho et al. 2020) draws. Where the noise is strong, a small error of the score is a large one of
    the prediction (Tweedie's formula divides by mean_coeff), and the samples of a network that is not yet trained well
    drift to black or white; the paper's samplers do not clip.

    Args:
      score_fn: score(x, t).
      sde: forward SDE.
      bounds: lowest and highest value of the data.
    """

    def clipped(x: Float[Array, "B ..."], t: Float[Array, "B"]) -> Float[Array, "B ..."]:
        m, variance, score = expand(sde.mean_coeff(t), x), expand(jnp.square(sde.std(t)), x), score_fn(x, t)
        x0 = (x + variance * score) / m
        return score + m / variance * (jnp.clip(x0, *bounds) - x0)

    return clipped


def _with_clipping(sampler: Sampler, sde: SDE, bounds: tuple[float, float]) -> Sampler:
    def sample(
        key: PRNGKeyArray,
        score_fn: ScoreFn,
        x_init: Float[Array, "B ..."] | None = None,
        transform: StepTransform | None = None,
    ) -> tuple[Float[Array, "B ..."], Int[Array, ""]]:
        return sampler(key, clip_prediction(score_fn, sde, bounds), x_init, transform)

    return sample


def build_sampler(config: ConfigDict, sde: SDE, shape: tuple[int, ...]) -> Sampler:
    """Builds the sampler that `config.sampling` describes.

    "pc" discretizes `sde` in `sampling.num_steps` steps (0: `model.num_scales`), runs corrector then predictor at each
    time and, with `noise_removal`, returns the last predictor's mean. "ode" integrates the probability-flow ODE with
    steps of its own choice, whatever `num_steps` is, and with `noise_removal` ends on one denoising step; a sample is
    NaN if its integration failed (`ode.require_solved`). Both run under `jax.jit` and inside `distributed.pmap`. With
    `clip` the score's predictions of the data are clipped to the range of images (`clip_prediction`).

    Args:
      config: read here: `sampling`, `model.num_scales`, `data.centered`.
      sde: forward SDE.
      shape: shape of a batch of samples, (B, H, W, C); B counts the examples of one device.

    Raises:
      UserError: if a name is unknown, a number out of range, or the pairing is not defined; the message says why.
    """
    check(config, "sampling")
    if len(shape) < 2 or min(shape) < 1:
        raise UserError(f"shape={shape}: expected a batch axis and at least one more, none of them empty")
    sampler = METHODS[config.sampling.method](config, sde, tuple(shape))
    return _with_clipping(sampler, sde, data_range(config)) if config.sampling.clip else sampler
