"""The training loop: compiled steps, and what happens between them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

import datasets
from errors import UserError
from experiment import startup
from losses import TrainState
from parallel import distributed
from training import divergence
from training.divergence import LossWatch, NotFiniteError
from training.trainer import Trainer
from workdir import folder as workdirs
from workdir.checkpoints import Checkpoints
from workdir.progress import TrainingProgress

FREQUENCIES = ("log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption")
SIGNALLED = 128  # plus the signal: the exit code that shells and schedulers report for a job that it ended


def check_schedule(group: str, schedule: Mapping[str, Any]) -> None:
    """Check that everything that happens between compiled calls falls between them.

    `schedule` has the settings of a training by name, `group` is where they are from; see `Experiment.schedule`.
    """
    steps, batch_size = schedule["n_jitted_steps"], schedule["batch_size"]
    for name in FREQUENCIES:
        freq = schedule[name]
        if freq % steps:
            raise UserError(
                f"{group}.{name}={freq} is not a multiple of {group}.n_jitted_steps={steps}, the steps of one "
                f"compiled call; the nearest that is: {max(round(freq / steps), 1) * steps}"
            )
    if schedule["n_iters"] < steps:
        raise UserError(f"{group}.n_iters={schedule['n_iters']} is less than {group}.n_jitted_steps={steps}")
    distributed.check_batch_size(f"{group}.batch_size", batch_size)
    _check_microbatches(f"{group}.microbatches", schedule["microbatches"], batch_size)


def _check_microbatches(name: str, microbatches: int, batch_size: int) -> None:
    """Check that the microbatches divide a device's part of a batch."""
    images = batch_size // distributed.device_count()
    if microbatches < 1 or images % microbatches:
        divisors = [count for count in range(1, images + 1) if images % count == 0]
        around = [*[d for d in divisors if d < microbatches][-1:], *[d for d in divisors if d > microbatches][:1]]
        raise UserError(
            f"{name}={microbatches} does not divide the {images} images of a batch on each device; the nearest that "
            f"does: {' or '.join(map(str, around))}"
        )


def check_first_step(step: int, n_jitted_steps: int, group: str = "training") -> None:
    """Check that resuming at `step` still hits every log, eval and checkpoint step."""
    if step % n_jitted_steps:
        raise UserError(
            f"step {step} of the newest checkpoint is not a multiple of {group}.n_jitted_steps={n_jitted_steps}, so "
            f"that no snapshot would ever be due; set {group}.n_jitted_steps={math.gcd(step, n_jitted_steps)}"
        )


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What happens between compiled calls."""

    trainer: Trainer
    checkpoints: Checkpoints
    progress: TrainingProgress
    presence: workdirs.Presence
    watch: LossWatch

    def save(self, state: TrainState, step: int, *, is_last: bool = False) -> None:
        """Save a replicated state, unless it has diverged: it must not become the newest checkpoint."""
        self.watch.look()
        if not self.watch.has_moved:
            logging.warning("step %d is not saved: every step since the last saved one was skipped", step)
            return
        on_host = distributed.unreplicate(state)
        if not divergence.is_finite(on_host):
            raise NotFiniteError(f"the state became infinite or nan at step {step}, though no loss did", step, step)
        self.presence.require()
        self.checkpoints.save(on_host, is_last=is_last)
        self.watch.mark_saved()

    def read(self, batches: Iterator[Any], state: TrainState, step: int) -> Any:
        """Return the next batch; if the data fail, save the state first."""
        try:
            return next(batches)
        except Exception:
            self.watch.look()
            # Several processes would have to save together, and the others know nothing of the failure.
            if self.watch.has_moved and distributed.is_alone():
                self.save(state, step)
                self.checkpoints.wait()
                logging.warning("the data fail: step %d is saved; the same command resumes from it", step)
            raise

    def after_call(self, state: TrainState, step: int, *, is_last: bool, stop: int) -> None:
        """Record, test, save and draw what is due after a call that ended with `step`; end after the signal `stop`."""
        due = {name: step % self.trainer.experiment.schedule[name] == 0 for name in FREQUENCIES}
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
            self.save(state, step, is_last=is_last)
        if stop:
            self.checkpoints.wait()
            name = signal.Signals(stop).name
            logging.warning("%s: step %d is saved; the same command resumes from it", name, step)
            raise SystemExit(SIGNALLED + stop)
        if due["snapshot_freq"] or is_last:
            with self.progress.pause():
                self.trainer.after_snapshot(state, step, self.progress)

    def run(self, state: TrainState, source: datasets.Source) -> TrainState:
        """Train from `state`, on the host, to the last step; return its state, on the host."""
        trainer, experiment = self.trainer, self.trainer.experiment
        settings, step, last = experiment.schedule, int(state.step), experiment.num_steps
        state = distributed.replicate(state)
        startup.mark("init")
        batches = datasets.training_batches(
            source,
            seed=experiment.config.seed,
            first_step=step,
            batch_size=settings.batch_size,
            steps_per_call=settings.n_jitted_steps,
            with_labels=experiment.takes_labels,
        )
        stop_requested = None
        with contextlib.ExitStack() as stack:
            try:
                while step < last:
                    batch = self.read(batches, state, step)
                    state, metrics = trainer.train_steps(state, batch)
                    step += settings.n_jitted_steps
                    self.watch.add(step, metrics)
                    # Before the first call is compiled and done there is nothing to save: a signal then ends at once.
                    if stop_requested is None:
                        startup.finish(metrics, settings.n_jitted_steps)
                        stop_requested = stack.enter_context(distributed.preemption())
                    self.after_call(state, step, is_last=step == last, stop=stop_requested())
            except NotFiniteError as error:
                on_host = distributed.unreplicate(state)
                raise divergence.explain(error, trainer, source, on_host, self.checkpoints) from None
            self.checkpoints.wait()
        return distributed.unreplicate(state)


def train(trainer: Trainer, source: datasets.Source, workdir: str | Path) -> TrainState:
    """Train in a workdir, from its newest checkpoint if there is one; return the last state, on the host.

    Args:
      trainer: what is trained.
      source: training split.
      workdir: checked to be writable and of this experiment.

    Raises:
      UserError: if the newest checkpoint does not go with the schedule.
      CheckpointError: if the workdir has checkpoints, but all are damaged.
      DivergedError: if the loss is no longer a number.
      SystemExit: with code 143 after SIGTERM and 130 after Ctrl-C, once the state is saved.
    """
    experiment, settings = trainer.experiment, trainer.experiment.schedule
    template = experiment.state_template()
    with Checkpoints(workdir, snapshot_freq=settings.snapshot_freq, template=template) as checkpoints:
        presence = workdirs.Presence(workdir)
        state = checkpoints.restore_newest() or experiment.init_state()
        step = int(state.step)
        check_first_step(step, settings.n_jitted_steps, experiment.group)
        workdirs.record_config(workdir, experiment.config)
        with TrainingProgress(
            workdir, first_step=step, num_steps=experiment.num_steps, batch_size=settings.batch_size
        ) as progress:
            watch = LossWatch(skips=experiment.skips_nonfinite)
            return _Loop(trainer, checkpoints, progress, presence, watch).run(state, source)
