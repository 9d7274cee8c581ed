"""Predictor-corrector and probability-flow samplers, and the score they follow (Song et al. 2021, Section 4).

A step is (key, x, t) -> (x, x_mean); `build_sampler` binds steps to their settings and loops over them inside one
program. `compose_score` makes the score: of a network, of classes (classifier-free), guided (by a classifier), clipped.
Equation and algorithm numbers are those of arXiv 2011.13456.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from configs.settings import check
from errors import UserError
from models.factory import num_classes_of
from parallel import distributed, rng
from sde_lib import SDE, ReverseSDE, Scalars, ScoreFn, State, expand
from solvers import SOLVERS
from solvers.interface import TRANSFORM_STREAM, Sampler, StepResult, StepTransform, prepare, unchanged

# (key, x, t, reverse SDE) -> (x, x_mean); a corrector is of the same type
Predictor = Callable[[PRNGKeyArray, State, Scalars, ReverseSDE], StepResult]
ClassLabels = Int[Array, "B"]

# --- predictors ------------------------------------------------------------------------------------------------------


def _add_noise(key: PRNGKeyArray, x_mean: State, std: Scalars) -> StepResult:
    return x_mean + expand(std, x_mean) * rng.normal(key, x_mean.shape), x_mean


def euler_maruyama(key: PRNGKeyArray, x: State, t: Scalars, reverse_sde: ReverseSDE) -> StepResult:
    """Take a step -T/N of Euler-Maruyama along the reverse SDE, or of Euler along the probability-flow ODE."""
    step = reverse_sde.T / reverse_sde.N
    drift, diffusion = reverse_sde.sde(x, t)
    x_mean = x - drift * step
    return (x_mean, x_mean) if reverse_sde.probability_flow else _add_noise(key, x_mean, diffusion * math.sqrt(step))


def reverse_diffusion(key: PRNGKeyArray, x: State, t: Scalars, reverse_sde: ReverseSDE) -> StepResult:
    """Reverse a step of the SDE's own discretization: x' = x - f + G^2 score + G z (Appendix E)."""
    f, G = reverse_sde.discretize(x, t)
    x_mean = x - f
    return (x_mean, x_mean) if reverse_sde.probability_flow else _add_noise(key, x_mean, G)


def ancestral_sampling(key: PRNGKeyArray, x: State, t: Scalars, reverse_sde: ReverseSDE) -> StepResult:
    """Take an ancestral step of the Markov chain of SMLD (VE) or DDPM (VP)."""
    score = reverse_sde.score_fn(x, t)
    return _add_noise(key, *reverse_sde.forward.ancestral_step(x, t, score, reverse_sde.N))


def no_step(key: PRNGKeyArray, x: State, t: Scalars, reverse_sde: ReverseSDE) -> StepResult:
    """Leave the state as it is, noise included: with this predictor, `noise_removal` has no effect."""
    return x, x


PREDICTORS: dict[str, Predictor] = {
    "ancestral_sampling": ancestral_sampling,
    "euler_maruyama": euler_maruyama,
    "none": no_step,
    "reverse_diffusion": reverse_diffusion,
}

# --- correctors ------------------------------------------------------------------------------------------------------


def _norms(x: State, langevin_norm: str) -> Scalars:
    """Return each example's Euclidean norm, or for "batch" its mean over the global batch in every place."""
    norms = jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))))
    return norms if langevin_norm == "sample" else jnp.full_like(norms, distributed.mean(jnp.mean(norms)))


def _langevin_update(x: State, score: State, z: State, step: Scalars) -> StepResult:
    x_mean = x + expand(step, x) * score
    return x_mean + expand(jnp.sqrt(2 * step), x) * z, x_mean


def langevin(
    key: PRNGKeyArray, x: State, t: Scalars, reverse_sde: ReverseSDE, *, snr: float, langevin_norm: str
) -> StepResult:
    """Take a step of Langevin dynamics with step size 2 alpha (snr |z| / |score|)^2 (Algorithms 4 and 5).

    alpha is `SDE.step_alpha`: 1 for VE, 1 - beta_i for VP. The 2021 code failed on sub-VP, which has no alpha_i of its
    own; here (m(t) / m(t - T/N))^2 takes its place, to which VP's agrees to second order in 1/N.
    """
    score, z = reverse_sde.score_fn(x, t), rng.normal(key, x.shape)
    ratio = snr * _norms(z, langevin_norm) / _norms(score, langevin_norm)
    return _langevin_update(x, score, z, 2 * reverse_sde.forward.step_alpha(t, reverse_sde.N) * ratio**2)


def annealed_langevin(key: PRNGKeyArray, x: State, t: Scalars, reverse_sde: ReverseSDE, *, snr: float) -> StepResult:
    """Take a step of annealed Langevin dynamics, whose step size is 2 alpha (snr std(t))^2; alpha as in `langevin`."""
    score, z = reverse_sde.score_fn(x, t), rng.normal(key, x.shape)
    sde = reverse_sde.forward
    return _langevin_update(x, score, z, 2 * sde.step_alpha(t, reverse_sde.N) * (snr * sde.std(t)) ** 2)


CORRECTORS = ("ald", "langevin", "none")


def _build_corrector(settings: ConfigDict) -> Predictor:
    if settings.corrector == "langevin":
        return functools.partial(langevin, snr=settings.snr, langevin_norm=settings.langevin_norm)
    return functools.partial(annealed_langevin, snr=settings.snr) if settings.corrector == "ald" else no_step


# --- predictor-corrector ---------------------------------------------------------------------------------------------


def sample_pc(
    key: PRNGKeyArray,
    score_fn: ScoreFn,
    x_init: State | None = None,
    transform: StepTransform | None = None,
    *,
    sde: SDE,
    shape: tuple[int, ...],
    times: Float[np.ndarray, "N"],
    predictor: Predictor,
    corrector: Predictor,
    num_corrections: int,
    corrector_first: bool,
    probability_flow: bool,
    noise_removal: bool,
) -> tuple[State, Int[Array, ""]]:
    """Run corrector and predictor in turn along `times`, from T down, whose number N is that of the discretization.

    With `corrector_first` the state is corrected at each time before it is taken to the next, as the 2021 code does.
    Algorithm 1 starts with the predictor, and corrects at the time where that arrived: the same but for the correction
    at t = T, where samples of the prior need none.
    """
    key, x = prepare(key, x_init, sde, shape)
    num_steps, grid = len(times), jnp.asarray(times)
    reverse_sde = sde.reverse(score_fn, probability_flow, num_steps)
    transform = transform or unchanged
    key_transform = rng.fold_in(key, TRANSFORM_STREAM)

    def update(i: Int[Array, ""], state: StepResult) -> StepResult:
        x, t = state[0], jnp.full(shape[:1], grid[i])
        draw_key = lambda j: rng.fold_in(key, i * (num_corrections + 1) + j)  # noqa: E731 - of the step's j-th draw
        correct = lambda j, x: corrector(draw_key(j), x, t, reverse_sde)[0]  # noqa: E731
        num_here = num_corrections if corrector_first else jnp.where(i > 0, num_corrections, 0)
        x = jax.lax.fori_loop(0, num_here, correct, x)
        x, _ = transform(rng.fold_in(key_transform, 2 * i), x, x, t)
        x, x_mean = predictor(draw_key(num_corrections), x, t, reverse_sde)
        return transform(rng.fold_in(key_transform, 2 * i + 1), x, x_mean, t)

    x, x_mean = jax.lax.fori_loop(0, num_steps, update, (x, x))
    num_predictions = 0 if predictor is no_step else num_steps
    nfe = num_predictions + num_corrections * (num_steps if corrector_first else num_steps - 1)
    return x_mean if noise_removal else x, jnp.asarray(nfe, jnp.int32)


def _build_pc(config: ConfigDict, sde: SDE, shape: tuple[int, ...]) -> Sampler:
    settings = config.sampling
    num_steps = settings.num_steps or config.model.num_scales
    if settings.predictor == settings.corrector == "none":
        raise UserError("sampling.predictor and sampling.corrector are both 'none': nothing would move; set one")
    is_ancestral = settings.predictor == "ancestral_sampling"
    if is_ancestral or settings.predictor == "reverse_diffusion" or settings.corrector != "none":
        sde.check_steps(num_steps, ancestral=is_ancestral)
    if is_ancestral and settings.probability_flow:
        raise UserError(
            "sampling.predictor='ancestral_sampling' is a random chain and has no probability flow; set "
            "sampling.probability_flow=False, or use 'reverse_diffusion' or 'euler_maruyama'"
        )
    return functools.partial(
        sample_pc,
        sde=sde,
        shape=shape,
        times=sde.sampling_times(num_steps),
        predictor=PREDICTORS[settings.predictor],
        corrector=_build_corrector(settings),
        num_corrections=0 if settings.corrector == "none" else settings.n_steps_each,
        corrector_first=settings.pc_order == "corrector_first",
        probability_flow=settings.probability_flow,
        noise_removal=settings.noise_removal,
    )


# --- every sampler ---------------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[ConfigDict, SDE, tuple[int, ...]], Sampler]] = {"pc": _build_pc, **SOLVERS}


def build_sampler(config: ConfigDict, sde: SDE, shape: tuple[int, ...]) -> Sampler:
    """Build the sampler that `config.sampling` describes.

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
    if not config.sampling.clip:
        return sampler
    bounds = data_range(centered=config.data.centered)

    def sample(
        key: PRNGKeyArray, score_fn: ScoreFn, x_init: State | None = None, transform: StepTransform | None = None
    ) -> tuple[State, Int[Array, ""]]:
        return sampler(key, clip_prediction(score_fn, sde, bounds), x_init, transform)

    return sample


# --- the score that a sampler follows --------------------------------------------------------------------------------

ScoreOfClasses = Callable[[ClassLabels | None], ScoreFn]  # labels of a batch, None for any class -> its score
ClassifierFree = Callable[[ScoreOfClasses, ClassLabels], ScoreFn]


class Guide(Protocol):
    """What guides samples to their labels besides the network, such as a `classifier.Classifier`.

    A pytree: its parameters are an argument of a compiled program, not constants in it.
    """

    @property
    def num_classes(self) -> int:
        """Classes that it knows, labels 0 .. num_classes - 1."""
        ...

    def guide(self, score_fn: ScoreFn, labels: ClassLabels) -> ScoreFn:
        """Return the score of images of these labels."""
        ...


def compose_score(
    score_of: ScoreOfClasses,
    labels: ClassLabels | None = None,
    *,
    classifier_free: ClassifierFree | None = None,
    guide: Callable[[ScoreFn, ClassLabels], ScoreFn] | None = None,
    clip: Callable[[ScoreFn], ScoreFn] | None = None,
) -> ScoreFn:
    """Return the score that a sampler follows: the network's, of classes, guided, with clipped predictions.

    Args:
      score_of: the network's score given class labels, or None: `models.score.get_score_fn` with all but these.
      labels: of the examples of a batch; None: the score of images of any class.
      classifier_free: `classifier_free_score` with all but (score_of, labels); None: the network knows no classes.
      guide: (score, labels) -> score, such as `Guide.guide`; None: nothing guides besides the network.
      clip: `clip_prediction` with all but the score; None where predictions are not clipped, or by the sampler, as one
        of `build_sampler` does with `sampling.clip`.
    """
    score_fn = score_of(None) if labels is None or not classifier_free else classifier_free(score_of, labels)
    if labels is not None and guide:
        score_fn = guide(score_fn, labels)
    return clip(score_fn) if clip else score_fn


def classifier_free_score(
    score_of: ScoreOfClasses,
    labels: ClassLabels,
    *,
    sde: SDE,
    no_label: int,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
) -> ScoreFn:
    """Return the score with classifier-free guidance (Ho and Salimans 2022): s(x) + w (s(x | label) - s(x)).

    s(x) is that of "no label". w = 1 is the conditional score; larger ones, samples that are more typical of the class
    and less diverse. (Ho and Salimans write 1 + w for w.) Outside an interval of noise levels sigma = std / mean_coeff,
    low < sigma <= high, the conditional score stands alone: Kynkäänniemi et al. 2024, "Applying Guidance in a Limited
    Interval Improves Sample and Distribution Quality in Diffusion Models". Unless w = 1, each evaluation is two of the
    network, in one call of it, at every time.

    Args:
      score_of: labels of a batch -> its score.
      labels: of the examples.
      sde: forward SDE, whose sigma it is.
      no_label: label that stands for none.
      scale: w.
      interval: (low, high) in sigma.
    """
    if scale == 1:
        return score_of(labels)
    of_both = score_of(jnp.concatenate([labels, jnp.full_like(labels, no_label)]))

    def guided(x: State, t: Scalars) -> State:
        conditional, free = jnp.split(of_both(jnp.concatenate([x, x]), jnp.concatenate([t, t])), 2)
        sigma = sde.std(t) / sde.mean_coeff(t)
        is_guided = (interval[0] < sigma) & (sigma <= interval[1])
        return jnp.where(expand(is_guided, x), free + scale * (conditional - free), conditional)

    return guided


def clip_prediction(score_fn: ScoreFn, sde: SDE, bounds: tuple[float, float]) -> ScoreFn:
    """Return the score whose prediction of the data, E[x0 | x], is clipped; as given where nothing is clipped.

    As the code of DDPM (Ho et al. 2020) draws. Where the noise is strong, a small error of the score is a large one of
    the prediction (Tweedie's formula divides by mean_coeff), and the samples of a network that is not yet trained well
    drift to black or white; the paper's samplers do not clip.

    Args:
      score_fn: score(x, t).
      sde: forward SDE.
      bounds: lowest and highest value of the data.
    """

    def clipped(x: State, t: Scalars) -> State:
        m, variance, score = expand(sde.mean_coeff(t), x), expand(jnp.square(sde.std(t)), x), score_fn(x, t)
        x0 = (x + variance * score) / m
        return score + m / variance * (jnp.clip(x0, *bounds) - x0)

    return clipped


def data_range(*, centered: bool) -> tuple[float, float]:
    """Return the lowest and the highest value of an image in the network's range."""
    return (-1.0 if centered else 0.0), 1.0


# --- labels of samples -----------------------------------------------------------------------------------------------

_LABELS = re.compile(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?")  # a label, or the first and the last of several


def parse_labels(text: str, num_classes: int) -> tuple[int, ...]:
    """Parse a list of labels: "3", "0..9" (both ends included), "0,2,5", "0..3,7"; empty: none.

    Args:
      text: of `sampling.labels`.
      num_classes: labels go from 0 to num_classes - 1.

    Raises:
      UserError: if the text is another, or a label out of range or there twice.
    """
    labels: list[int] = []
    for part in text.split(",") if text else ():
        match = _LABELS.fullmatch(part)
        if not match:
            raise UserError(f"sampling.labels={text!r}: {part!r} is no label; expected such as 3, 0..9 or 0,2,5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"sampling.labels={text!r}: {part!r} goes down; write {last}..{first}")
        if last >= num_classes:
            raise UserError(
                f"sampling.labels={text!r}: there is no label {last}; the {num_classes} classes are 0 to "
                f"{num_classes - 1}"
            )
        labels += range(first, last + 1)
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"sampling.labels={text!r}: label {twice[0]} is there twice; leave one out")
    return tuple(labels)


def build_labels(config: ConfigDict, *, guide_classes: int = 0) -> tuple[int, ...]:
    """Return the labels that samples are to have in turn, as `config.sampling.labels` says; none if it is empty.

    Args:
      config: read here: `sampling.labels`, `model.num_classes`.
      guide_classes: classes that something besides the network guides to, such as a classifier; 0: nothing does.

    Raises:
      UserError: if labels are asked for that nothing knows, or the list is malformed.
    """
    text, num_classes = config.sampling.labels, num_classes_of(config.model.name, config.model.num_classes)
    known = [classes for classes in (num_classes, guide_classes) if classes]
    if text and not known:
        raise UserError(
            f"sampling.labels={text!r}, but the network was trained without labels (model.num_classes=0) and no "
            "classifier guides it; set sampling.labels='', or train a classifier (--mode train_classifier) and set "
            "sampling.classifier_scale, or train a network with model.num_classes"
        )
    return parse_labels(text, min(known, default=0))


def labels_of_samples(labels: Sequence[int], indices: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Return the label of each sample, int32: sample i has number i mod K of the K labels, whatever else is drawn."""
    return np.asarray(labels, np.int32)[indices % len(labels)]


def build_classifier_free(config: ConfigDict, sde: SDE, labels: Sequence[int]) -> ClassifierFree | None:
    """Build the guidance that `config.sampling` describes; None if the network has no classes or samples no labels.

    Args:
      config: read here: `sampling.guidance_scale`, `sampling.guidance_interval`, `model.num_classes`.
      sde: forward SDE.
      labels: that samples are to have, see `build_labels`.

    Raises:
      UserError: if a setting is out of range, or there is nothing to guide or to guide to.
    """
    check(config, "sampling")
    settings, num_classes = config.sampling, num_classes_of(config.model.name, config.model.num_classes)
    low, high = settings.guidance_interval
    if num_classes and labels:
        return functools.partial(
            classifier_free_score,
            sde=sde,
            no_label=num_classes,
            scale=settings.guidance_scale,
            interval=(low, high or math.inf),
        )
    if settings.guidance_scale != 1:
        reason = (
            "sampling.labels is empty" if num_classes else "the network is not class-conditional (model.num_classes=0)"
        )
        raise UserError(
            f"sampling.guidance_scale={settings.guidance_scale} guides towards labels, but {reason}; set the labels, "
            "such as 0..9, of a network that was trained with them, or sampling.guidance_scale=1.0"
        )
    return None
