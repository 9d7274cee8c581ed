"""The training loop: compiled steps, and what happens between them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from absl import logging
from ml_collections import ConfigDict

import datasets
from errors import UserError
from experiment import drawing, startup
from experiment.build import Experiment, SamplingProgram, build_loss_program, build_train_program
from losses import TrainState
from models.factory import num_classes_of
from parallel import distributed
from report import plots
from solvers.ode import SolverError
from storage import files
from training import divergence
from training.divergence import LossAtTime, LossWatch, NotFiniteError
from workdir import folder as workdirs
from workdir.checkpoints import Checkpoints
from workdir.progress import TrainingProgress

FREQUENCIES = ("log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption")
SIGTERM_EXIT_CODE = 143  # 128 + 15: what shells and schedulers report for a job that SIGTERM ended


def num_steps(config: ConfigDict, group: str = "training") -> int:
    """Returns the steps of the whole training: `n_iters`, rounded down to whole compiled calls."""
    return config[group].n_iters // config[group].n_jitted_steps * config[group].n_jitted_steps


def check_schedule(config: ConfigDict, group: str = "training") -> None:
    """Checks that everything that happens between compiled calls falls between them.

    Args:
      config: experiment configuration.
      group: of its settings that has the schedule: "training" for the score's, or "classifier".

    Raises:
      UserError: naming the frequency that `n_jitted_steps` does not divide, or the batch size.
    """
    settings, steps = config[group], config[group].n_jitted_steps
    for name in FREQUENCIES:
        freq = settings[name]
        if freq % steps:
            raise UserError(
                f"{group}.{name}={freq} is not a multiple of {group}.n_jitted_steps={steps}, the steps of one "
                f"compiled call; the nearest that is: {max(round(freq / steps), 1) * steps}"
            )
    if num_steps(config, group) == 0:
        raise UserError(f"{group}.n_iters={settings.n_iters} is less than {group}.n_jitted_steps={steps}")
    distributed.check_batch_size(f"{group}.batch_size", settings.batch_size)
    _check_microbatches(f"{group}.microbatches", settings.microbatches, settings.batch_size)


def _check_microbatches(name: str, microbatches: int, batch_size: int) -> None:
    """Checks that the microbatches divide a device's part of a batch.

    Raises:
      UserError: naming the setting `name` and the nearest values that work.
    """
    images = batch_size // distributed.device_count()
    if microbatches < 1 or images % microbatches:
        divisors = [count for count in range(1, images + 1) if images % count == 0]
        around = [*[d for d in divisors if d < microbatches][-1:], *[d for d in divisors if d > microbatches][:1]]
        raise UserError(
            f"{name}={microbatches} does not divide the {images} images of a batch on each device; the nearest that "
            f"does: {' or '.join(map(str, around))}"
        )


def check_first_step(config: ConfigDict, step: int, group: str = "training") -> None:
    """Checks that a training that goes on from `step` comes by the steps at which something is due.

    Raises:
      UserError: naming a value of `n_jitted_steps` with which it would.
    """
    steps = config[group].n_jitted_steps
    if step % steps:
        raise UserError(
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

    @property
    def loss_at_time(self) -> LossAtTime:
        """Loss of each image at a time of its own, to explain a training that diverges."""
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
        return num_classes_of(self.experiment.config) > 0

    @property
    def loss_at_time(self) -> LossAtTime:
        """Denoising loss of each image at a time of its own."""
        return divergence.denoising_loss_at_time(self.experiment)

    def test_values(self, state: TrainState, step: int) -> dict[str, float]:
        """Measures the loss of the averaged parameters on one batch of test images, which rotates with the step."""
        size = self.experiment.config.training.batch_size
        indices = np.arange(step, step + size) % len(self.test)
        return {"eval_loss": float(self.eval_loss(state.params_ema, self.test.images(indices), indices).mean())}

    def after_snapshot(self, state: TrainState, step: int, progress: TrainingProgress) -> None:
        """Draws samples if so configured, with the averaged parameters.

        Writes samples/iter_<step>/sample.png and sample.npz. Training goes on without those that
        cannot be drawn or written.
        """
        if not self.experiment.config.training.snapshot_sampling:
            return
        try:
            levels, nfe = self.draw_samples(state.params_ema, np.arange(_grid_size(self.experiment.config)))
        except SolverError as error:
            logging.warning("no samples of step %d: %s", step, error)
            return
        if not distributed.is_main_process():
            return
        folder = self.workdir / "samples" / f"iter_{step}"
        levels = levels[: self.experiment.config.training.snapshot_num_samples]
        labels, num_levels = self.draw_samples.labels, self.experiment.config.data.num_levels
        grid = drawing.picture(levels, labels, num_levels, limit=len(levels))
        try:
            files.write_atomically(folder / "sample.npz", lambda file: np.savez(file, samples=levels, nfe=nfe))
            plots.save_png(folder / "sample.png", grid)
        except OSError as error:
            logging.warning("no samples of step %d: %s", step, files.explain(error))
        progress.record_image(step, "samples", grid)


def build_trainer(experiment: Experiment, workdir: str | Path) -> ScoreTrainer:
    """Builds the programs of a training run; that of the steps begins to compile, the others do at their first call."""
    return ScoreTrainer(
        experiment=experiment,
        workdir=Path(workdir),
        test=datasets.build_source(experiment.config, "test"),
        train_steps=build_train_program(experiment),
        eval_loss=build_loss_program(experiment),
        draw_samples=SamplingProgram(experiment, _grid_size(experiment.config), purpose="grid"),
    )


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What happens between compiled calls.

    Attributes:
      trainer: the compiled programs.
      checkpoints: where states are saved.
      progress: what is shown and recorded.
      presence: of the workdir.
      watch: the losses of the steps so far.
    """

    trainer: Trainer
    checkpoints: Checkpoints
    progress: TrainingProgress
    presence: workdirs.Presence
    watch: LossWatch

    def save(self, state: TrainState, step: int) -> None:
        """Saves a replicated state, but for one that has diverged: it must not become the newest checkpoint.

        Raises:
          NotFiniteError: if it, or a step before it, is not finite.
          WorkdirError: if the workdir is gone.
        """
        self.watch.look()
        if not self.watch.has_moved:
            logging.warning("step %d is not saved: every step since the last saved one was skipped", step)
            return
        on_host = distributed.unreplicate(state)
        if not divergence.is_finite(on_host):
            raise NotFiniteError(f"the state became infinite or nan at step {step}, though no loss did", step, step)
        self.presence.require()
        self.checkpoints.save(on_host)
        self.watch.mark_saved()

    def read(self, batches: Iterator[Any], state: TrainState, step: int) -> Any:
        """Returns the next batch; if the data fail, the state is saved first."""
        try:
            return next(batches)
        except Exception:
            self.watch.look()
            # Several processes would have to save together, and the others know of nothing.
            if self.watch.has_moved and distributed.is_alone():
                self.save(state, step)
                self.checkpoints.wait()
                logging.warning("the data fail: step %d is saved; the same command resumes from it", step)
            raise

    def after_call(self, state: TrainState, step: int, *, is_last: bool, stop: bool) -> None:
        """Records, tests, saves and draws what is due after a call that ended with `step`.

        Raises:
          SystemExit: with code 143 if it is to stop, once the state is saved.
        """
        settings = self.trainer.experiment.config[self.trainer.group]
        due = {name: step % settings[name] == 0 for name in FREQUENCIES}
        values: dict[str, float] = {}
        if due["log_freq"] or is_last:
            values = self.watch.take()
            self.progress.show(step, values.get("loss", math.nan))
        if due["eval_freq"]:
            with self.progress.pause():
                values |= self.trainer.test_values(state, step)
        if values:
            self.presence.require()
            self.progress.record(step, **values)
        if stop or is_last or due["snapshot_freq"] or due["snapshot_freq_for_preemption"]:
            self.save(state, step)
        if stop:
            self.checkpoints.wait()
            logging.warning("SIGTERM: step %d is saved; the same command resumes from it", step)
            raise SystemExit(SIGTERM_EXIT_CODE)
        if due["snapshot_freq"]:
            with self.progress.pause():
                self.trainer.after_snapshot(state, step, self.progress)

    def run(self, state: TrainState, source: datasets.Source) -> TrainState:
        """Trains from `state`, on the host, to the last step, whose state it returns, on the host.

        Raises:
          DivergedError: if the loss is no longer a number.
          WorkdirError: if the workdir is gone.
          SystemExit: with code 143 after SIGTERM, once the state is saved.
        """
        trainer, config = self.trainer, self.trainer.experiment.config
        settings, step, last = config[trainer.group], int(state.step), num_steps(config, trainer.group)
        state = distributed.replicate(state)
        startup.mark("init")
        batches = datasets.training_batches(
            source,
            seed=config.seed,
            first_step=step,
            batch_size=settings.batch_size,
            steps_per_call=settings.n_jitted_steps,
            with_labels=trainer.takes_labels,
        )
        preemption = None
        with contextlib.ExitStack() as stack:
            try:
                while step < last:
                    batch = self.read(batches, state, step)
                    state, metrics = trainer.train_steps(state, batch)
                    step += settings.n_jitted_steps
                    self.watch.add(step, metrics)
                    # Before the first call is compiled and done there is nothing to save: SIGTERM then ends at once.
                    if preemption is None:
                        startup.finish(metrics, settings.n_jitted_steps)
                        preemption = stack.enter_context(distributed.Preemption())
                    self.after_call(state, step, is_last=step == last, stop=preemption.requested())
            except NotFiniteError as error:
                on_host = distributed.unreplicate(state)
                raise divergence.explain(error, trainer, source, on_host, self.checkpoints) from None
            self.checkpoints.wait()
        return distributed.unreplicate(state)


def train(trainer: Trainer, source: datasets.Source, workdir: str | Path) -> TrainState:
    """Trains in a workdir, from its newest checkpoint if there is one; returns the last state, on the host.

    Args:
      trainer: what is trained.
      source: training split.
      workdir: checked to be writable and of this experiment.

    Raises:
      UserError: if the newest checkpoint does not go with the schedule.
      CheckpointError: if the workdir has checkpoints, but all are damaged.
      DivergedError: if the loss is no longer a number.
      SystemExit: with code 143 after SIGTERM, once the state is saved.
    """
    experiment, group = trainer.experiment, trainer.group
    settings = experiment.config[group]
    with Checkpoints(
        workdir, snapshot_freq=settings.snapshot_freq, template=experiment.state_template()
    ) as checkpoints:
        presence = workdirs.Presence(workdir)
        state = checkpoints.restore_newest() or experiment.init_state()
        check_first_step(experiment.config, int(state.step), group)
        workdirs.record_config(workdir, experiment.config)
        steps = num_steps(experiment.config, group)
        with TrainingProgress(
            workdir, first_step=int(state.step), num_steps=steps, batch_size=settings.batch_size
        ) as progress:
            watch = LossWatch(skips=experiment.config.training.on_nan == "skip")
            return _Loop(trainer, checkpoints, progress, presence, watch).run(state, source)
