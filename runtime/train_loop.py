"""The training loop: compiled steps, and what happens between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from absl import logging
from jaxtyping import Array
from ml_collections import ConfigDict

import datasets
import distributed
import files
import plots
from checkpoints import Checkpoints
from losses import TrainState
from models.factory import told_classes
from runtime import drawing
from runtime import workdir as workdirs
from runtime.experiment import Experiment, SamplingProgram, build_loss_program, build_train_program
from runtime.progress import TrainingProgress

FREQUENCIES = ("log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption")
SIGTERM_EXIT_CODE = 143  # 128 + 15: what shells and schedulers report for a job that SIGTERM ended


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def num_steps(config: ConfigDict, group: str = "training") -> int:
    """Returns the steps of the whole training: `n_iters`, rounded down to whole compiled calls."""
    return config[group].n_iters // config[group].n_jitted_steps * config[group].n_jitted_steps


def check_schedule(config: ConfigDict, group: str = "training") -> None:
    """Checks that everything that happens between compiled calls falls between them.

    Args:
      config: experiment configuration.
      group: of its settings that has the schedule: "training" for the score's, or "classifier".

    Raises:
      ValueError: naming the frequency that `n_jitted_steps` does not divide, or the batch size.
    """
    settings, steps = config[group], config[group].n_jitted_steps
    for name in FREQUENCIES:
        freq = settings[name]
        if freq % steps:
            raise ValueError(
                f"{group}.{name}={freq} is not a multiple of {group}.n_jitted_steps={steps}, the steps of one "
                f"compiled call; the nearest that is: {max(round(freq / steps), 1) * steps}"
            )
    if num_steps(config, group) == 0:
        raise ValueError(f"{group}.n_iters={settings.n_iters} is less than {group}.n_jitted_steps={steps}")
    distributed.check_batch_size(f"{group}.batch_size", settings.batch_size)
    _check_microbatches(f"{group}.microbatches", settings.microbatches, settings.batch_size)


def _check_microbatches(name: str, microbatches: int, batch_size: int) -> None:
    """Checks that the microbatches divide a device's part of a batch.

    Raises:
      ValueError: naming the setting `name` and the nearest values that work.
    """
    images = batch_size // distributed.device_count()
    if microbatches < 1 or images % microbatches:
        divisors = [count for count in range(1, images + 1) if images % count == 0]
        around = [*[d for d in divisors if d < microbatches][-1:], *[d for d in divisors if d > microbatches][:1]]
        raise ValueError(
            f"{name}={microbatches} does not divide the {images} images of a batch on each device; the nearest that "
            f"does: {' or '.join(map(str, around))}"
        )


def check_first_step(config: ConfigDict, step: int, group: str = "training") -> None:
    """Checks that a training that goes on from `step` comes by the steps at which something is due.

    Raises:
      ValueError: naming a value of `n_jitted_steps` with which it would.
    """
    steps = config[group].n_jitted_steps
    if step % steps:
        raise ValueError(
            f"step {step} of the newest checkpoint is not a multiple of {group}.n_jitted_steps={steps}, so that no "
            f"snapshot would ever be due; set {group}.n_jitted_steps={math.gcd(step, steps)}"
        )


def _grid_size(config: ConfigDict) -> int:
    """Returns the samples of a snapshot's grid, rounded up so that the devices divide them."""
    return distributed.round_up(config.training.snapshot_num_samples)


class Trainer(Protocol):
    """What the loop trains: the score network, or a classifier of noisy images."""

    group: ClassVar[str]  # of the configuration: has the schedule
    rate: ClassVar[str]  # setting of the learning rate

    @property
    def experiment(self) -> Experiment:
        """What is trained."""
        ...

    @property
    def train_steps(self) -> Callable[..., Any]:
        """(state, batches) -> (state, metrics), compiled."""
        ...

    @property
    def takes_labels(self) -> bool:
        """Whether a batch of `train_steps` is (levels, class labels), not levels alone."""
        ...

    def test_values(self, state: TrainState, step: int) -> dict[str, float]:
        """Measures "eval_loss", and what else there is, on a batch of test images."""
        ...

    def after_snapshot(self, state: TrainState, step: int, progress: TrainingProgress) -> None:
        """Does what is due at a kept checkpoint."""
        ...


@dataclasses.dataclass(frozen=True)
class ScoreTrainer:
    """The compiled programs of a run that trains a score network, and where it writes.

    Attributes:
      experiment: what is trained.
      workdir: of the run.
      test: the images that the eval loss is measured on.
      train_steps: (state, batches) -> (state, metrics).
      eval_loss: (params, levels, indices) -> losses.
      draw_samples: (params, indices) -> (levels, nfe).
    """

    group: ClassVar[str] = "training"
    rate: ClassVar[str] = "optim.lr"

    experiment: Experiment
    workdir: Path
    test: datasets.Source
    train_steps: Callable[..., Any]
    eval_loss: Callable[..., np.ndarray]
    draw_samples: SamplingProgram

    @property
    def takes_labels(self) -> bool:
        """Whether the network is told classes."""
        return told_classes(self.experiment.config) > 0

    def test_values(self, state: TrainState, step: int) -> dict[str, float]:
        """Measures the loss of the averaged parameters on one batch of test images, which rotates with the step."""
        size = self.experiment.config.training.batch_size
        indices = np.arange(step, step + size) % len(self.test)
        return {"eval_loss": float(self.eval_loss(state.params_ema, self.test.images(indices), indices).mean())}

    def after_snapshot(self, state: TrainState, step: int, progress: TrainingProgress) -> None:
        """Draws samples if so configured, with the averaged parameters.

        Writes samples/iter_<step>/sample.png and sample.npz.
        """
        if not self.experiment.config.training.snapshot_sampling:
            return
        levels, nfe = self.draw_samples(state.params_ema, np.arange(_grid_size(self.experiment.config)))
        if not distributed.is_main_process():
            return
        folder = self.workdir / "samples" / f"iter_{step}"
        levels = levels[: self.experiment.config.training.snapshot_num_samples]
        files.write_atomically(folder / "sample.npz", lambda file: np.savez(file, samples=levels, nfe=nfe))
        labels, num_levels = self.draw_samples.labels, self.experiment.config.data.num_levels
        grid = drawing.picture(levels, labels, num_levels, limit=len(levels))
        plots.save_png(folder / "sample.png", grid)
        progress.record_image(step, "samples", grid)


def build_trainer(experiment: Experiment, workdir: str | Path) -> ScoreTrainer:
    """Builds the programs of a training run; each compiles at its first call."""
    return ScoreTrainer(
        experiment=experiment,
        workdir=Path(workdir),
        test=datasets.build_source(experiment.config, "test"),
        train_steps=build_train_program(experiment),
        eval_loss=build_loss_program(experiment),
        draw_samples=SamplingProgram(experiment, _grid_size(experiment.config), purpose="grid"),
    )


def _mean_loss(pending: list[Array], step: int, rate: str) -> float:
    loss = float(np.mean([np.asarray(losses.addressable_data(0)) for losses in pending]))
    if not np.isfinite(loss):
        raise DivergedError(
            f"the loss became {loss} before step {step}; the checkpoints before it are kept: lower {rate} or set "
            "optim.grad_clip, and resume in the same workdir"
        )
    return loss


def train_loop(
    trainer: Trainer,
    state: TrainState,
    source: datasets.Source,
    *,
    checkpoints: Checkpoints,
    progress: TrainingProgress,
) -> TrainState:
    """Trains from `state` to the last step.

    Args:
      trainer: the compiled programs.
      state: numpy arrays on the host.
      source: training split.
      checkpoints: where states are saved.
      progress: what is shown and recorded.

    Returns:
      The last state, numpy arrays on the host.

    Raises:
      DivergedError: if the loss is no longer a number.
      SystemExit: with code 143 after SIGTERM, once the state is saved.
    """
    config = trainer.experiment.config
    settings, step, last = config[trainer.group], int(state.step), num_steps(config, trainer.group)
    state, pending = distributed.replicate(state), []
    batches = datasets.training_batches(
        source,
        seed=config.seed,
        first_step=step,
        batch_size=settings.batch_size,
        steps_per_call=settings.n_jitted_steps,
        with_labels=trainer.takes_labels,
    )
    with distributed.Preemption() as preemption:
        while step < last:
            state, metrics = trainer.train_steps(state, next(batches))
            step += settings.n_jitted_steps
            pending.append(metrics["loss"])
            due = {name: step % settings[name] == 0 for name in FREQUENCIES}
            values = {}
            if due["log_freq"] or step == last:
                values["loss"], pending = _mean_loss(pending, step, trainer.rate), []
                progress.show(step, values["loss"])
            if due["eval_freq"]:
                with progress.pause():
                    values |= trainer.test_values(state, step)
            if values:
                progress.record(step, **values)
            stop = preemption.requested(step)
            if stop or step == last or due["snapshot_freq"] or due["snapshot_freq_for_preemption"]:
                # A state that has diverged must not become the newest checkpoint.
                _mean_loss([metrics["loss"]], step, trainer.rate)
                checkpoints.save(distributed.unreplicate(state))
            if stop:
                checkpoints.wait()
                logging.warning("SIGTERM: step %d is saved; the same command resumes from it", step)
                raise SystemExit(SIGTERM_EXIT_CODE)
            if due["snapshot_freq"]:
                with progress.pause():
                    trainer.after_snapshot(state, step, progress)
    checkpoints.wait()
    return distributed.unreplicate(state)


def train(trainer: Trainer, source: datasets.Source, workdir: str | Path) -> TrainState:
    """Trains in a workdir, from its newest checkpoint if there is one; returns the last state, on the host.

    Args:
      trainer: what is trained.
      source: training split.
      workdir: checked to be writable and of this experiment.

    Raises:
      ValueError: if the newest checkpoint does not go with the schedule.
      CheckpointError: if the workdir has checkpoints, but all are damaged.
      DivergedError: if the loss is no longer a number.
      SystemExit: with code 143 after SIGTERM, once the state is saved.
    """
    experiment, group = trainer.experiment, trainer.group
    settings = experiment.config[group]
    with Checkpoints(
        workdir, snapshot_freq=settings.snapshot_freq, template=experiment.state_template()
    ) as checkpoints:
        state = checkpoints.restore_newest() or experiment.init_state()
        check_first_step(experiment.config, int(state.step), group)
        if distributed.is_main_process():
            workdirs.record_config(workdir, experiment.config)
        steps = num_steps(experiment.config, group)
        with TrainingProgress(
            workdir, first_step=int(state.step), num_steps=steps, batch_size=settings.batch_size
        ) as progress:
            return train_loop(trainer, state, source, checkpoints=checkpoints, progress=progress)
