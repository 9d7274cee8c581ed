"""What the training loop trains: a network with its compiled steps, its tests and its snapshots."""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, PRNGKeyArray

import datasets
from experiment import drawing
from experiment.build import Experiment, SamplingProgram, build_loss_program
from losses import TrainState
from parallel import distributed, rng
from report import plots
from sde_lib import expand
from solvers.ode import SolverError
from storage import files
from workdir.progress import TrainingProgress


class Trainer(abc.ABC):
    """The score network, or a classifier of noisy images, and its `build_train_program`."""

    rate = "optim.lr"  # setting of the learning rate

    def __init__(self, experiment: Experiment, train_steps: Callable[..., Any]):
        self.experiment, self.train_steps = experiment, train_steps

    @abc.abstractmethod
    def loss_at_time(
        self, key: PRNGKeyArray, params: Any, x: Float[Array, "B H W C"], labels: Int[Array, "B"], t: Float[Array, "B"]
    ) -> Float[Array, "B"]:
        """Return the loss of each image at its time, to explain a training that diverges."""

    @abc.abstractmethod
    def test_values(self, state: TrainState, step: int) -> dict[str, float]:
        """Measure "eval_loss", and what else there is, on a batch of test images, which rotates with the step."""

    def after_snapshot(self, state: TrainState, step: int, progress: TrainingProgress) -> None:
        """Do what is due at a kept checkpoint: nothing, for a network that draws no samples."""
        return


class ScoreTrainer(Trainer):
    """A run that trains a score network, with the loss of test images and samples at snapshots."""

    def __init__(
        self, experiment: Experiment, train_steps: Callable[..., Any], workdir: str | Path, test: datasets.Source
    ):
        super().__init__(experiment, train_steps)
        self.workdir, self.test = Path(workdir), test
        self.num_samples = experiment.config.training.snapshot_num_samples
        self.eval_loss = build_loss_program(experiment)
        self.draw_samples = SamplingProgram(experiment, distributed.round_up(self.num_samples), purpose="grid")

    def loss_at_time(
        self, key: PRNGKeyArray, params: Any, x: Float[Array, "B H W C"], labels: Int[Array, "B"], t: Float[Array, "B"]
    ) -> Float[Array, "B"]:
        """Return ‖std s + z‖² / D of each image: about 1 for an uninformed network, whatever the objective."""
        experiment = self.experiment
        score_fn = experiment.score_fn(params, smooth=True, class_labels=labels if experiment.num_classes else None)
        z = rng.normal(key, x.shape)
        mean, std = experiment.sde.marginal_prob(x, t)
        std = expand(std, x)
        return jnp.square(std * score_fn(mean + std * z, t) + z).mean(axis=(1, 2, 3))

    def test_values(self, state: TrainState, step: int) -> dict[str, float]:
        """Measure the loss of the averaged parameters."""
        indices = np.arange(step, step + self.experiment.schedule.batch_size) % len(self.test)
        return {"eval_loss": float(self.eval_loss(state.params_ema, self.test.images(indices), indices).mean())}

    def after_snapshot(self, state: TrainState, step: int, progress: TrainingProgress) -> None:
        """Draw samples with the averaged parameters, if so configured: samples/iter_<step>/sample.png and sample.npz.

        Training continues without those that cannot be drawn or written.
        """
        if not self.experiment.config.training.snapshot_sampling:
            return
        program = self.draw_samples
        try:
            levels, nfe = program(state.params_ema, np.arange(program.batch_size))
        except SolverError as error:
            logging.warning("no samples of step %d: %s", step, error)
            return
        if not distributed.is_main_process():
            return
        folder, levels = self.workdir / "samples" / f"iter_{step}", levels[: self.num_samples]
        grid = drawing.picture(levels, program.labels, self.experiment.scaler.num_levels, limit=len(levels))
        try:
            files.write_atomically(folder / "sample.npz", lambda file: np.savez(file, samples=levels, nfe=nfe))
            plots.save_png(folder / "sample.png", grid)
        except OSError as error:
            logging.warning("no samples of step %d: %s", step, files.explain(error))
        progress.record_image(step, "samples", grid)
