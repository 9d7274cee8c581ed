"""Steps whose loss or gradient is not finite: found, explained, and counted where they are skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array

import datasets
from errors import UserError
from experiment.build import Experiment
from losses import TRAINING_EPS, TrainState
from parallel import rng
from solvers import noise_levels
from training.trainer import Trainer
from workdir.checkpoints import CheckpointError, Checkpoints

MAX_SKIPPED_IN_A_ROW = 100  # more of them are no accident
NUM_LEVELS = 10  # noise levels of an explanation
NUM_IMAGES = 64  # images of the step that it is made with, at the most
MAX_NAMED = 10  # skipped steps that a line of the log names


class DivergedError(UserError):
    """The loss is no longer a number."""


class NotFiniteError(DivergedError):
    """A step went wrong, not explained yet.

    Attributes:
      step: the first that did, counted from 1.
      looked_at: the last step that was checked.
    """

    def __init__(self, message: str, step: int, looked_at: int):
        super().__init__(message)
        self.step, self.looked_at = step, looked_at


def is_finite(tree: Any) -> bool:
    """Return whether every number of a tree of arrays on the host, such as a state, is finite."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


class LossWatch:
    """The losses and gradient norms of steps, which stay on the devices until `look`.

    Args:
      skips: steps that go wrong are skipped, and only counted here.

    Attributes:
      has_moved: whether a step since `mark_saved` was not skipped; if not, there is nothing to save.
    """

    def __init__(self, *, skips: bool):
        self._skips, self._in_a_row, self.has_moved = skips, 0, False
        self._pending: list[tuple[int, Mapping[str, Array]]] = []
        self._losses: list[np.ndarray] = []
        self._skipped: list[int] = []

    def add(self, last_step: int, metrics: Mapping[str, Array]) -> None:
        """Add the metrics of one compiled call, [devices, steps], whose last step is given."""
        self._pending.append((last_step, metrics))

    def look(self) -> None:
        """Wait for pending metrics and check them.

        Raises:
          NotFiniteError: if a step went wrong and is not skipped, or too many were.
        """
        pending, self._pending = self._pending, []
        for last_step, metrics in pending:
            losses, norms = (np.asarray(metrics[name].addressable_data(0)).ravel() for name in ("loss", "grad_norm"))
            self._losses.append(losses)
            steps = range(last_step - len(losses) + 1, last_step + 1)
            for step, loss, norm in zip(steps, losses, norms, strict=True):
                self._check(step, float(loss), float(norm), looked_at=pending[-1][0])

    def _check(self, step: int, loss: float, norm: float, looked_at: int) -> None:
        if np.isfinite(loss) and np.isfinite(norm):
            self._in_a_row, self.has_moved = 0, True
            return
        what = f"the loss became {loss}" if not np.isfinite(loss) else f"the gradient's norm became {norm}"
        what += f" at step {step} (gradient norm {norm:.3g}, loss {loss:.3g})"
        if not self._skips:
            raise NotFiniteError(what, step, looked_at)
        self._skipped.append(step)
        self._in_a_row += 1
        if self._in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise NotFiniteError(f"{what}, the {self._in_a_row}th in a row that was skipped", step, looked_at)

    def mark_saved(self) -> None:
        """Note that the present state is saved."""
        self.has_moved = False

    def take(self) -> dict[str, float]:
        """Return the mean of the finite "loss"es since the last call, if any, and how many were "skipped", if any."""
        self.look()
        losses, self._losses = np.concatenate([np.zeros(0, np.float32), *self._losses]), []
        skipped, self._skipped = self._skipped, []
        finite = losses[np.isfinite(losses)]
        values = {"loss": float(np.mean(finite))} if len(finite) else {}
        if skipped:
            named = ", ".join(map(str, skipped[:MAX_NAMED])) + (", ..." if len(skipped) > MAX_NAMED else "")
            logging.warning("skipped %d step(s), whose loss or gradient is not finite: %s", len(skipped), named)
            values["skipped"] = len(skipped)
        return values


def losses_by_level(trainer: Trainer, source: datasets.Source, params: Any, step: int) -> list[tuple[float, float]]:
    """Measure the images of a step, counted from 1, at noise levels spread evenly in log(sigma) over those of training.

    Returns:
      Pairs of sigma = std / mean_coeff, in units of the network's range, and the mean loss.
    """
    experiment = trainer.experiment
    seed, batch_size = experiment.config.seed, experiment.schedule.batch_size
    indices = datasets.training_indices(seed, step - 1, batch_size, len(source))[:NUM_IMAGES]
    has_labels = source.num_classes > 0
    labels = source.labels(indices).astype(np.int32) if has_labels else np.zeros(len(indices), np.int32)
    sde = experiment.sde
    first, last = noise_levels.noise_levels(sde, np.array([TRAINING_EPS, sde.T])).log_snr
    times = noise_levels.time_of_log_snr(sde, np.linspace(first, last, NUM_LEVELS))
    prepare = experiment.preparation(train=False)
    key_data, key_loss = rng.split(jax.random.fold_in(experiment.keys["eval"], step))

    @jax.jit
    def measure(params: Any, levels: Array, labels: Array, times: Array) -> Array:
        x = prepare(key_data, levels)
        at_time = lambda t: trainer.loss_at_time(key_loss, params, x, labels, jnp.full(len(x), t)).mean()  # noqa: E731
        return jax.lax.map(at_time, times)

    measured = measure(params, source.images(indices), labels, jnp.asarray(times, jnp.float32))
    return list(zip(noise_levels.noise_levels(sde, times).sigma.tolist(), np.asarray(measured).tolist(), strict=True))


def _good_state(checkpoints: Checkpoints, experiment: Experiment) -> tuple[TrainState, str]:
    """Return the last good state, and where it is."""
    try:
        checkpoints.wait()
        state = checkpoints.restore_newest()
    except CheckpointError as error:
        logging.warning("%s", error)
        state = None
    if state is None:
        return experiment.init_state(), "there is no checkpoint yet, and the losses are those of the first parameters"
    return state, f"the last good checkpoint is {checkpoints.restored_from} (step {int(state.step)})"


def explain(
    error: NotFiniteError, trainer: Trainer, source: datasets.Source, state: TrainState, checkpoints: Checkpoints
) -> DivergedError:
    """Return where a training went wrong, at which noise levels, and what to do; `state` is the present one."""
    good, place = _good_state(checkpoints, trainer.experiment)
    measured = losses_by_level(trainer, source, good.params, error.step)
    by_level = ", ".join(f"{sigma:.2g}: {loss:.3g}" for sigma, loss in measured)
    seen = f"{error.step - 1} was the last good step, {error.looked_at} the last that was taken"
    skip = "" if trainer.experiment.skips_nonfinite else ", or set training.on_nan='skip'"
    return DivergedError(
        f"{error}; step {seen}; the parameters are {'still' if is_finite(state.params) else 'not'} finite; {place}; "
        f"its loss of the images of step {error.step} by noise level sigma: {by_level}; the checkpoints before it are "
        f"kept: lower {trainer.rate} or set optim.grad_clip{skip}, and resume in the same workdir"
    )
