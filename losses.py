"""Training objectives, the optimizer, and the train step.

A loss is `(key, params, x, train) -> float[B]`, one value for each image; the step averages it over the global batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from configs.settings import check
from errors import UserError
from models import cpu
from models.factory import num_classes_of
from models.score import get_model_fn, get_score_fn
from parallel import distributed, rng
from sde_lib import SDE, Images, Scalars, expand
from solvers import noise_levels

# --- times of training ------------------------------------------------------------------------------------------------

TRAINING_EPS = 1e-5  # smallest time that training sees, for every SDE, as in the 2021 code
# Pieces of the importance density. A power of two, so that a uniform float32 splits into piece and place exactly.
NUM_PIECES = 4096

# (key, B) -> times and weights, such that the mean of weight * f(t) is that of f over [eps, T] for every f.
DrawTimes = Callable[[PRNGKeyArray, int], tuple[Scalars, Scalars]]


def make_uniform_times(sde: SDE, *, eps: float = TRAINING_EPS) -> DrawTimes:
    """Return what draws times uniformly from [eps, T], with weights 1."""

    def draw(key: PRNGKeyArray, num_examples: int) -> tuple[Scalars, Scalars]:
        t = rng.uniform(key, (num_examples,), minval=eps, maxval=sde.T)
        return t, jnp.ones_like(t)

    return draw


def make_importance_times(sde: SDE, *, eps: float = TRAINING_EPS, num_pieces: int = NUM_PIECES) -> DrawTimes:
    """Return what draws times from p(t) ∝ g(t)² / std(t)² on [eps, T], with weights 1 / (p(t) (T - eps)).

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

    def draw(key: PRNGKeyArray, num_examples: int) -> tuple[Scalars, Scalars]:
        place = num_pieces * rng.uniform(key, (num_examples,))
        piece = place.astype(jnp.int32)
        width = jnp.asarray(widths)[piece]
        return jnp.asarray(starts)[piece] + (place - piece) * width, width * (num_pieces / (sde.T - eps))

    return draw


# --- objectives -------------------------------------------------------------------------------------------------------

Params = Any
ClassLabels = Int[Array, "B"] | None  # of the images of a batch; None: no labels


class LossFn(Protocol):
    """Loss of each image of a batch."""

    def __call__(
        self, key: PRNGKeyArray, params: Params, x: Images, *, train: bool, class_labels: ClassLabels = None
    ) -> Scalars:
        """Return the loss of each image.

        Args:
          key: one key, or one for each image when `train` is not set.
          params: of the network.
          x: images in the network's range.
          train: apply dropout, to features and to labels.
          class_labels: of the images, for a class-conditional network; None: no labels.
        """
        ...


def _reduce(squares: Images, reduce_mean: bool) -> Scalars:
    """Average over an image, or take half the sum, as the 2021 code does for its published numbers."""
    return squares.mean(axis=(1, 2, 3)) if reduce_mean else 0.5 * squares.sum(axis=(1, 2, 3))


# --- in continuous time ----------------------------------------------------------------------------------------------

# Score at one time of each image: x -> score(x, t).
ScoreAtT = Callable[[Images], Images]
# (key, score, mean and std of x_t) -> what each pixel adds to the loss with the weighting std².
Objective = Callable[[PRNGKeyArray, ScoreAtT, Images, Float[Array, "B 1 1 1"]], Images]


def _denoising(key: PRNGKeyArray, score_fn: ScoreAtT, mean: Images, std: Float[Array, "B 1 1 1"]) -> Images:
    """Denoising score matching (Vincent 2011): (std s + z)²."""
    z = rng.normal(key, mean.shape)
    return jnp.square(score_fn(mean + std * z) * std + z)


def _score_and_slice(
    key: PRNGKeyArray, score_fn: ScoreAtT, mean: Images, std: Float[Array, "B 1 1 1"]
) -> tuple[Images, Images, Images]:
    """Return s, a direction v of independent signs, and Jᵀ v, J the Jacobian of s, at a noisy image.

    In reverse mode, the only one that convolutions have on a CPU; from one evaluation of the network, so that s and J
    are of the same dropout mask.
    """
    key_z, key_v = rng.split(key)
    v = rng.rademacher(key_v, mean.shape)
    score, vjp = jax.vjp(score_fn, mean + std * rng.normal(key_z, mean.shape))
    return score, v, vjp(v)[0]


def _sliced(key: PRNGKeyArray, score_fn: ScoreAtT, mean: Images, std: Float[Array, "B 1 1 1"]) -> Images:
    """Sliced score matching: std² (2 vᵀJv + (vᵀs)²), over the pixels."""
    score, v, pullback = _score_and_slice(key, score_fn, mean, std)
    along = v * score
    return jnp.square(std) * (2 * v * pullback + along * along.sum(axis=(1, 2, 3), keepdims=True))


def _sliced_vr(key: PRNGKeyArray, score_fn: ScoreAtT, mean: Images, std: Float[Array, "B 1 1 1"]) -> Images:
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

    def loss(key: PRNGKeyArray, params: Params, x: Images, *, train: bool, class_labels: ClassLabels = None) -> Scalars:
        key_t, key_x, key_dropout = rng.split(key, 3)
        score_fn = get_score_fn(
            sde, model, params, train=train, continuous=continuous, dropout_key=key_dropout, class_labels=class_labels
        )
        t, weight = draw_times(key_t, x.shape[0])
        mean, std = sde.marginal_prob(x, t)
        values = of_pixels(key_x, lambda noisy: score_fn(noisy, t), mean, expand(std, x))
        if likelihood_weighting:
            weight *= jnp.square(sde.sde(jnp.zeros_like(x), t)[1] / std)
        return weight * _reduce(values, reduce_mean)

    return loss


# --- at discrete noise levels ----------------------------------------------------------------------------------------


def make_discrete_loss(sde: SDE, model: nn.Module, *, reduce_mean: bool) -> LossFn:
    """Denoising score matching at the N noise levels of the SDE's Markov chain: SMLD for VE, DDPM for VP.

    SMLD: Song et al. 2021, Eq. 1 with weights sigma_i²; the network returns the score. DDPM: ‖network(x_i, i) - z‖² (Ho
    et al. 2020, Eq. 14).
    """

    def loss(key: PRNGKeyArray, params: Params, x: Images, *, train: bool, class_labels: ClassLabels = None) -> Scalars:
        key_labels, key_z, key_dropout = rng.split(key, 3)
        labels = rng.randint(key_labels, x.shape[0], sde.N)
        mean, std, factor = sde.discrete_kernel(x, labels)
        z = rng.normal(key_z, x.shape)
        model_fn = get_model_fn(model, params, train=train, dropout_key=key_dropout, class_labels=class_labels)
        return _reduce(jnp.square(model_fn(mean + expand(std, x) * z, labels) * expand(factor, x) + z), reduce_mean)

    return loss


# --- labels ----------------------------------------------------------------------------------------------------------


def with_label_dropout(loss_fn: LossFn, *, no_label: int, probability: float) -> LossFn:
    """Return the loss whose labels are, in training, each replaced by "no label" with a probability.

    So one network learns the conditional and the unconditional score (Ho and Salimans 2022, "Classifier-Free Diffusion
    Guidance"). Whether an example keeps its label depends on its own key alone.

    Args:
      loss_fn: of images with labels.
      no_label: label that stands for none.
      probability: that a label is replaced.
    """

    def loss(key: PRNGKeyArray, params: Params, x: Images, *, train: bool, class_labels: ClassLabels = None) -> Scalars:
        if class_labels is None or not train:
            return loss_fn(key, params, x, train=train, class_labels=class_labels)
        key_drop, key_loss = rng.split(key)
        is_dropped = rng.bernoulli(key_drop, probability, class_labels.shape)
        kept = jnp.where(is_dropped, no_label, class_labels)
        return loss_fn(key_loss, params, x, train=True, class_labels=kept)

    return loss


# --- the builder -----------------------------------------------------------------------------------------------------


def build_loss(config: ConfigDict, sde: SDE, model: nn.Module) -> LossFn:
    """Build the training objective that `config.training` names, with labels if the network is class-conditional.

    Raises:
      UserError: if the objective is unknown, times are importance-sampled for weights that they do not fit, a discrete
        objective is asked for with an SDE that has none or with a setting of the continuous ones, or labels would be
        left out never or always.
    """
    training, num_classes = config.training, num_classes_of(config.model.name, config.model.num_classes)
    check(config, "training")
    if training.importance_sampling and training.continuous and not training.likelihood_weighting:
        raise UserError(
            "training.importance_sampling=True needs training.likelihood_weighting=True: its times are drawn for the "
            "weights g(t)^2; with the weights std(t)^2 set training.importance_sampling=False"
        )
    if training.continuous:
        loss_fn = make_continuous_loss(
            sde,
            model,
            reduce_mean=training.reduce_mean,
            likelihood_weighting=training.likelihood_weighting,
            objective=training.objective,
            draw_times=make_importance_times(sde) if training.importance_sampling else make_uniform_times(sde),
        )
    else:
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
                raise UserError(f"training.{name} needs training.continuous=True: {reason}")
        if not sde.has_chain:
            raise UserError(
                f"training.continuous=False is defined for training.sde 'vesde' (SMLD) and 'vpsde' (DDPM), "
                f"not for {training.sde!r}; set training.continuous=True"
            )
        loss_fn = make_discrete_loss(sde, model, reduce_mean=training.reduce_mean)
    if not num_classes:
        return loss_fn
    if not 0 < training.label_dropout < 1:
        raise UserError(
            f"training.label_dropout={training.label_dropout}: expected a probability between 0 and 1, such as 0.1, "
            "since the network is class-conditional: from images without their label it learns the score of any class, "
            "which guidance, bits/dim and the test loss need"
        )
    return with_label_dropout(loss_fn, no_label=num_classes, probability=training.label_dropout)


# --- the optimizer ----------------------------------------------------------------------------------------------------

SMALL = 4096  # values of an array
ADAM_BETA2 = 0.999  # the 2021 code left it at the default of its optimizer


def global_norm(tree: optax.Params) -> Float[Array, ""]:
    """Return the root of the sum of the squares of all values."""
    if not cpu.is_target():
        return optax.tree.norm(tree)
    # Small arrays, biases and scales by the hundred, as one: XLA for CPUs plans and loads a program for each sum.
    leaves = jax.tree.leaves(tree)
    small = [leaf.ravel() for leaf in leaves if leaf.size <= SMALL]
    arrays = [leaf for leaf in leaves if leaf.size > SMALL] + ([jnp.concatenate(small)] if small else [])
    return jnp.sqrt(sum((jnp.sum(array * array) for array in arrays), jnp.zeros(())))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients down to a global norm of `max_norm`: optax's, by one multiplication a value, which XLA fuses."""

    def update(
        grads: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        factor = max_norm / jnp.maximum(global_norm(grads), max_norm)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Scale gradients as optax.scale_by_adam does, up to rounding, with its state (Kingma & Ba 2015, Algorithm 1)."""

    def update(
        grads: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        # Stored one by one before they are used; otherwise the update reads the old moments, too, and XLA copies them.
        mu, nu = (jax.tree.map(cpu.store, moments) for moments in (mu, nu))
        count = optax.safe_increment(state.count)
        # As numbers for all parameters; otherwise XLA computes them for each again.
        factor1, factor2 = cpu.store([optax.tree.bias_correction(jnp.ones(()), decay, count) for decay in (b1, b2)])
        updates = jax.tree.map(lambda m, v: m * factor1 / (jnp.sqrt(v * factor2) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def make_optimizer(
    *, lr: float, beta1: float, eps: float, weight_decay: float, warmup: int, grad_clip: float
) -> optax.GradientTransformation:
    """Adam with linear warm-up from 0, clipping by the global norm and decoupled weight decay.

    Args:
      lr: learning rate after the warm-up.
      beta1: decay of the first moment; that of the second is 0.999.
      eps: added to the root of the second moment.
      weight_decay: fraction of a parameter, times the learning rate, taken from it at each step.
      warmup: steps of the warm-up; the first step has learning rate 0. 0: none.
      grad_clip: bound on the global norm of the gradient; negative: none.
    """
    # A schedule in either case: the optimizer's state, and so a checkpoint, has one structure for all settings.
    schedule = optax.linear_schedule(0.0, lr, warmup) if warmup > 0 else optax.constant_schedule(lr)
    learning_rate = lambda count: cpu.store(jnp.asarray(schedule(count)))  # noqa: E731 - once for all parameters
    return optax.chain(
        clip_by_global_norm(grad_clip) if grad_clip >= 0 else optax.identity(),
        scale_by_adam(beta1, ADAM_BETA2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Build the optimizer that `config.optim` describes.

    Raises:
      UserError: if the optimizer is unknown or a setting would silently train nothing.
    """
    check(config, "optim")
    optim = config.optim
    return make_optimizer(
        lr=optim.lr,
        beta1=optim.beta1,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        warmup=optim.warmup,
        grad_clip=optim.grad_clip,
    )


# --- the training step ------------------------------------------------------------------------------------------------

Batch = Array | tuple[Array, Array]  # levels, or levels and the labels of their classes


@flax.struct.dataclass
class TrainState:
    """All that training carries from one step to the next.

    Attributes:
      step: steps taken, int32.
      params: of the network.
      params_ema: their exponential moving average, which samples, likelihoods and metrics use.
      opt_state: of the optimizer.
    """

    step: Int[Array, ""]
    params: Params
    params_ema: Params
    opt_state: optax.OptState


# (key, state, batch) -> (state, metrics)
TrainStep = Callable[[PRNGKeyArray, TrainState, Batch], tuple[TrainState, Mapping[str, Array]]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step; the moving average starts as the parameters."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, params_ema=params, opt_state=optimizer.init(params))


def update_ema(params_ema: Params, params: Params, ema_rate: float) -> Params:
    """Return the exponential moving average after one more step: rate * average + (1 - rate) * params."""
    return jax.tree.map(lambda ema, p: ema_rate * ema + (1.0 - ema_rate) * p, params_ema, params)


# (params, batch) -> the mean loss of the batch and its gradient
Gradient = Callable[[Params, Batch], tuple[Array, Params]]


def accumulate(gradient: Gradient, num_parts: int) -> Gradient:
    """Return the same mean loss and gradient, computed of one part of the batch after the other.

    The activations of one part at a time are in memory. Each example draws what it draws in the whole batch, see
    `distributed.part_of_batch`, and the loss of a batch is the mean of that of its examples, none of which looks at
    another: so the result is that of the whole batch, up to the order of the sum.

    Args:
      gradient: of a batch.
      num_parts: of equal size; they must divide the batch.
    """

    def accumulated(params: Params, batch: Batch) -> tuple[Array, Params]:
        def add(total: tuple[Array, Params], part: tuple[Array, Batch]) -> tuple[tuple[Array, Params], None]:
            with distributed.part_of_batch(part[0], num_parts):
                return jax.tree.map(jnp.add, total, gradient(params, part[1])), None

        split = lambda array: array.reshape(num_parts, -1, *array.shape[1:])  # noqa: E731
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zero, (jnp.arange(num_parts), jax.tree.map(split, batch)))
        return jax.tree.map(lambda leaf: leaf / num_parts, total)

    return gradient if num_parts == 1 else accumulated


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_rate: float,
    prepare: Callable[[PRNGKeyArray, Array], Array] = lambda key, x: x,
    microbatches: int = 1,
) -> TrainStep:
    """Build one training step, for use inside a mapped function or outside one.

    Args:
      loss_fn: loss of each image.
      optimizer: see `make_optimizer`.
      ema_rate: decay of the moving average of the parameters.
      prepare: turns a batch of stored levels into the network's input.
      microbatches: parts of a device's batch that are computed one after the other; they must divide it.

    Returns:
      `(key, state, batch) -> (state, metrics)`. `key` is the same for the whole run: the noise of a step follows from
      (key, state.step). A batch is levels, or (levels, class labels). `metrics` has the mean `loss` and the `grad_norm`
      before clipping.
    """

    def train_step(key: PRNGKeyArray, state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Array]]:
        key_data, key_loss = jax.random.split(jax.random.fold_in(key, state.step))

        def mean_loss(params: Params, batch: Batch) -> Array:
            levels, given = (batch[0], {"class_labels": batch[1]}) if isinstance(batch, tuple) else (batch, {})
            return loss_fn(key_loss, params, prepare(key_data, levels), train=True, **given).mean()

        gradient = accumulate(jax.value_and_grad(mean_loss), microbatches)
        loss, grads = distributed.mean(gradient(state.params, batch))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # Stored before the average reads them; otherwise it reads the old ones, and XLA copies them for it.
        params = jax.tree.map(cpu.store, optax.apply_updates(state.params, updates))
        params_ema = update_ema(state.params_ema, params, ema_rate)
        metrics = {"loss": loss, "grad_norm": global_norm(grads)}
        return TrainState(state.step + 1, params, params_ema, opt_state), metrics

    return train_step


def make_train_steps(train_step: TrainStep) -> TrainStep:
    """Chain training steps over the leading axis of `batches` in one compiled loop; metrics gain that axis."""

    def train_steps(key: PRNGKeyArray, state: TrainState, batches: Batch) -> tuple[TrainState, Mapping[str, Array]]:
        # A mapped function's arguments and results have a device axis. Unless the state is stored without it, XLA for
        # CPUs fuses the change of shape into the update, which is then no longer in place, and copies all of the state.
        state = cpu.store(state)
        return cpu.store(jax.lax.scan(functools.partial(train_step, key), state, batches))

    return train_steps


def skip_nonfinite(train_step: TrainStep) -> TrainStep:
    """Return the step that keeps parameters, moving average and optimizer as they were if it went wrong.

    The step is counted, so that the next one sees other data; the optimizer does not count it, nor does its warm-up.
    Loss and gradient are means over all devices, which therefore decide alike, and none of them asks the host.

    Args:
      train_step: whose metrics have "loss" and "grad_norm".
    """

    def step(key: PRNGKeyArray, state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Array]]:
        after, metrics = train_step(key, state, batch)
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state)
        return kept.replace(step=after.step), metrics

    return step
