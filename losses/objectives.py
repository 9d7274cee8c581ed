"""Training objectives: what is minimized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

import checks
import rng
from losses.times import DrawTimes, make_importance_times, make_uniform_times
from models.factory import told_classes
from models.score import get_model_fn, get_score_fn
from sde_lib import SDE, VESDE, VPSDE, expand

Params = Any
ClassLabels = Int[Array, "B"] | None  # of the images of a batch; None: no labels


class LossFn(Protocol):
    """Loss of each image of a batch."""

    def __call__(
        self,
        key: PRNGKeyArray,
        params: Params,
        x: Float[Array, "B H W C"],
        *,
        train: bool,
        class_labels: ClassLabels = None,
    ) -> Float[Array, "B"]:
        """Returns the loss of each image.

        Args:
          key: one key, or one for each image when `train` is not set.
          params: of the network.
          x: images in the network's range.
          train: apply dropout, to features and to labels.
          class_labels: of the images, for a network that is told classes; None: no labels.
        """
        ...


def _reduce(squares: Float[Array, "B H W C"], reduce_mean: bool) -> Float[Array, "B"]:
    """Averages over an image, or takes half the sum, as the 2021 code does for its published numbers."""
    return squares.mean(axis=(1, 2, 3)) if reduce_mean else 0.5 * squares.sum(axis=(1, 2, 3))


# --- in continuous time ----------------------------------------------------------------------------------------------

# Score at one time of each image: x -> score(x, t).
ScoreAtT = Callable[[Float[Array, "B H W C"]], Float[Array, "B H W C"]]
# (key, score, mean and std of x_t) -> what each pixel adds to the loss with the weighting std².
Objective = Callable[
    [PRNGKeyArray, ScoreAtT, Float[Array, "B H W C"], Float[Array, "B 1 1 1"]], Float[Array, "B H W C"]
]


def _denoising(
    key: PRNGKeyArray, score_fn: ScoreAtT, mean: Float[Array, "B H W C"], std: Float[Array, "B 1 1 1"]
) -> Float[Array, "B H W C"]:
    """Denoising score matching (Vincent 2011): (std s + z)²."""
    z = rng.normal(key, mean.shape)
    return jnp.square(score_fn(mean + std * z) * std + z)


def _score_and_slice(
    key: PRNGKeyArray, score_fn: ScoreAtT, mean: Float[Array, "B H W C"], std: Float[Array, "B 1 1 1"]
) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"], Float[Array, "B H W C"]]:
    """Returns s, a direction v of independent signs, and Jᵀ v, J the Jacobian of s, at a noisy image.

    In reverse mode, the only one that convolutions have on a CPU; from one evaluation of the network, so that s and J
    are of the same dropout mask.
    """
    key_z, key_v = rng.split(key)
    v = rng.rademacher(key_v, mean.shape)
    score, vjp = jax.vjp(score_fn, mean + std * rng.normal(key_z, mean.shape))
    return score, v, vjp(v)[0]


def _sliced(
    key: PRNGKeyArray, score_fn: ScoreAtT, mean: Float[Array, "B H W C"], std: Float[Array, "B 1 1 1"]
) -> Float[Array, "B H W C"]:
    """Sliced score matching: std² (2 vᵀJv + (vᵀs)²), over the pixels."""
    score, v, pullback = _score_and_slice(key, score_fn, mean, std)
    along = v * score
    return jnp.square(std) * (2 * v * pullback + along * along.sum(axis=(1, 2, 3), keepdims=True))


def _sliced_vr(
    key: PRNGKeyArray, score_fn: ScoreAtT, mean: Float[Array, "B H W C"], std: Float[Array, "B 1 1 1"]
) -> Float[Array, "B H W C"]:
    """The same with ‖s‖², which is the mean of (vᵀs)² over v, in its place: std² (2 vᵀJv + ‖s‖²), over the pixels."""
    score, v, pullback = _score_and_slice(key, score_fn, mean, std)
    return jnp.square(std) * (2 * v * pullback + jnp.square(score))


OBJECTIVES: dict[str, Objective] = {"denoising": _denoising, "sliced": _sliced, "sliced_vr": _sliced_vr}


def make_continuous_loss(
    sde: SDE,
    model: nn.Module,
    *,
    reduce_mean: bool,
    likelihood_weighting: bool,
    objective: str = "denoising",
    draw_times: DrawTimes | None = None,
    continuous: bool = True,
) -> LossFn:
    """Score matching in continuous time, Song et al. 2021, Eq. 7 and, sliced, Appendix A.

    With t uniform on [eps, T], z standard normal, x_t = mean + std z and s the network's score at (x_t, t), the loss of
    an image of D pixel values is, up to the factor 1 / D or 1/2 of `reduce_mean`,

    * "denoising": ‖std s + z‖², the weighting λ(t) = std(t)²;
    * "sliced": std² (2 vᵀJv + (vᵀs)²), J the Jacobian of s in x and v of independent signs (Song, Garg, Shi and Ermon
      2019, "Sliced Score Matching");
    * "sliced_vr": std² (2 vᵀJv + ‖s‖²), their variant of less variance;

    and with `likelihood_weighting`, λ(t) = g(t)², each of these times g² / std² (Song, Durkan, Murray and Ermon 2021,
    "Maximum Likelihood Training of Score-Based Diffusion Models"). The mean of zᵀs over z is std times the trace of J,
    so the three have one minimizer, and in the mean the denoising loss is the sliced ones plus the mean of ‖z‖²: plus 1
    with `reduce_mean`, plus D / 2 without; with `likelihood_weighting` that times the mean of g² / std², which for t
    from eps to T is 2 (log_snr(eps) - log_snr(T)) / (T - eps) (log_snr as in `noise_levels`).

    Args:
      sde: forward SDE.
      model: score network; for the sliced objectives one that can be differentiated twice.
      reduce_mean: mean over the pixels; otherwise half their sum.
      likelihood_weighting: weight by g(t)² instead of std(t)².
      objective: one of `OBJECTIVES`.
      draw_times: t and its weight, see `losses.times`; by default uniform on [1e-5, T].
      continuous: label convention of the network, see `models.score`.
    """
    draw_times = draw_times or make_uniform_times(sde)
    of_pixels = OBJECTIVES[objective]

    def loss(
        key: PRNGKeyArray, params: Params, x: Float[Array, "B H W C"], *, train: bool, class_labels: ClassLabels = None
    ) -> Float[Array, "B"]:
        key_t, key_x, key_dropout = rng.split(key, 3)
        score_fn = get_score_fn(sde, model, params, {}, train, continuous, key_dropout, class_labels)
        t, weight = draw_times(key_t, x.shape[0])
        mean, std = sde.marginal_prob(x, t)
        values = of_pixels(key_x, lambda noisy: score_fn(noisy, t), mean, expand(std, x))
        if likelihood_weighting:
            weight *= jnp.square(sde.sde(jnp.zeros_like(x), t)[1] / std)
        return weight * _reduce(values, reduce_mean)

    return loss


# --- at discrete noise levels ----------------------------------------------------------------------------------------


def make_smld_loss(sde: VESDE, model: nn.Module, *, reduce_mean: bool) -> LossFn:
    """Denoising score matching at N discrete noise levels (SMLD), Song et al. 2021, Eq. 1 with weights sigma_i².

    The network is given the index of the level in the descending table of sigmas and returns the score itself.
    """

    def loss(
        key: PRNGKeyArray, params: Params, x: Float[Array, "B H W C"], *, train: bool, class_labels: ClassLabels = None
    ) -> Float[Array, "B"]:
        key_labels, key_z, key_dropout = rng.split(key, 3)
        labels = rng.randint(key_labels, x.shape[0], sde.N)
        sigma = expand(sde.discrete_sigmas[::-1][labels], x)
        z = rng.normal(key_z, x.shape)
        score = get_model_fn(model, params, {}, train, key_dropout, class_labels)(x + sigma * z, labels)
        return _reduce(jnp.square(score * sigma + z), reduce_mean)

    return loss


def make_ddpm_loss(sde: VPSDE, model: nn.Module, *, reduce_mean: bool) -> LossFn:
    """The simplified DDPM objective at N discrete times: ‖network(x_i, i) - z‖² (Ho et al. 2020, Eq. 14)."""

    def loss(
        key: PRNGKeyArray, params: Params, x: Float[Array, "B H W C"], *, train: bool, class_labels: ClassLabels = None
    ) -> Float[Array, "B"]:
        key_labels, key_z, key_dropout = rng.split(key, 3)
        labels = rng.randint(key_labels, x.shape[0], sde.N)
        alpha_bar = sde.alphas_cumprod[labels]
        z = rng.normal(key_z, x.shape)
        noisy = expand(jnp.sqrt(alpha_bar), x) * x + expand(jnp.sqrt(1.0 - alpha_bar), x) * z
        noise = get_model_fn(model, params, {}, train, key_dropout, class_labels)(noisy, labels)
        return _reduce(jnp.square(noise - z), reduce_mean)

    return loss


# --- labels ----------------------------------------------------------------------------------------------------------


def with_label_dropout(loss_fn: LossFn, *, no_label: int, probability: float) -> LossFn:
    """Returns the loss whose labels are, in training, each replaced by "no label" with a probability.

    So one network learns the conditional and the unconditional score (Ho and Salimans 2022, "Classifier-Free Diffusion
    Guidance"). Whether an example keeps its label depends on its own key alone.

    Args:
      loss_fn: of images with labels.
      no_label: label that stands for none.
      probability: that a label is replaced.
    """

    def loss(
        key: PRNGKeyArray, params: Params, x: Float[Array, "B H W C"], *, train: bool, class_labels: ClassLabels = None
    ) -> Float[Array, "B"]:
        if class_labels is None or not train:
            return loss_fn(key, params, x, train=train, class_labels=class_labels)
        key_drop, key_loss = rng.split(key)
        is_dropped = rng.bernoulli(key_drop, probability, class_labels.shape)
        kept = jnp.where(is_dropped, no_label, class_labels)
        return loss_fn(key_loss, params, x, train=True, class_labels=kept)

    return loss


# --- the builder -----------------------------------------------------------------------------------------------------


def _check_times_and_objective(training: ConfigDict) -> None:
    checks.one_of("training.objective", training.objective, OBJECTIVES)
    if not training.continuous:
        for name, chosen, reason in (
            ("likelihood_weighting=True", training.likelihood_weighting, "the discrete losses have fixed weights"),
            ("importance_sampling=True", training.importance_sampling, "the discrete losses draw a level, not a time"),
            (
                f"objective={training.objective!r}",
                training.objective != "denoising",
                "SMLD and DDPM are denoising by definition, which training.objective='denoising' keeps",
            ),
        ):
            if chosen:
                raise ValueError(f"training.{name} needs training.continuous=True: {reason}")
    if training.importance_sampling and not training.likelihood_weighting:
        raise ValueError(
            "training.importance_sampling=True needs training.likelihood_weighting=True: its times are drawn for the "
            "weights g(t)^2; with the weights std(t)^2 set training.importance_sampling=False"
        )


def build_loss(config: ConfigDict, sde: SDE, model: nn.Module) -> LossFn:
    """Builds the training objective that `config.training` names, with labels if the network is told classes.

    Raises:
      ValueError: if the objective is unknown, times are importance-sampled for weights that they do not fit, a discrete
        objective is asked for with an SDE that has none or with a setting of the continuous ones, or labels would be
        left out never or always.
    """
    loss_fn, num_classes = _build_objective(config, sde, model), told_classes(config)
    if not num_classes:
        return loss_fn
    probability = config.training.label_dropout
    if not 0 < probability < 1:
        raise ValueError(
            f"training.label_dropout={probability}: expected a probability between 0 and 1, such as 0.1, since the "
            "network is told classes: images without their label teach it the score of any class, which guidance, "
            "bits/dim and the test loss need"
        )
    return with_label_dropout(loss_fn, no_label=num_classes, probability=probability)


def _build_objective(config: ConfigDict, sde: SDE, model: nn.Module) -> LossFn:
    training = config.training
    _check_times_and_objective(training)
    if training.continuous:
        return make_continuous_loss(
            sde,
            model,
            reduce_mean=training.reduce_mean,
            likelihood_weighting=training.likelihood_weighting,
            objective=training.objective,
            draw_times=make_importance_times(sde) if training.importance_sampling else make_uniform_times(sde),
        )
    if isinstance(sde, VESDE):
        return make_smld_loss(sde, model, reduce_mean=training.reduce_mean)
    if isinstance(sde, VPSDE):
        return make_ddpm_loss(sde, model, reduce_mean=training.reduce_mean)
    raise ValueError(
        f"training.continuous=False is defined for training.sde 'vesde' (SMLD) and 'vpsde' (DDPM), "
        f"not for {training.sde!r}; set training.continuous=True"
    )
