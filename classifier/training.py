"""The mode "train_classifier": a classifier of the images that the SDE of a score network makes noisy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from absl import logging
from jaxtyping import Float
from ml_collections import ConfigDict

import datasets
from classifier import accuracy as classifier_accuracy
from classifier.accuracy import Measure
from classifier.experiment import FOLDER, Normalization, build_classifier_experiment, classifier_config, count_classes
from classifier.loss import make_loss_at_time
from experiment.build import Experiment, build_train_program, describe
from losses import TrainState
from parallel import distributed
from training import loop as train_loop
from training.divergence import LossAtTime
from workdir import folder as workdirs
from workdir.folder import WorkdirError
from workdir.progress import TrainingProgress

NUM_LOGGED = 6  # noise levels of which the log gives the accuracy


@dataclasses.dataclass(frozen=True)
class ClassifierTrainer:
    """The compiled programs of a run that trains a classifier; see `train_loop.Trainer`.

    Attributes:
      experiment: of the classifier.
      num_test_images: of the test split.
      train_steps: (state, (levels, labels)) -> (state, metrics).
      measure: (params, indices of test images, times) -> (cross-entropies, which are classified correctly).
      loss_at_time: cross-entropy of each image at a time of its own, in nats.
    """

    group: ClassVar[str] = "classifier"
    rate: ClassVar[str] = "classifier.lr"
    takes_labels: ClassVar[bool] = True

    experiment: Experiment
    num_test_images: int
    train_steps: Callable[..., Any]
    measure: Measure
    loss_at_time: LossAtTime

    def test_values(self, state: TrainState, step: int) -> dict[str, float]:
        """Measure the averaged parameters on a batch of test images, which rotates with the step, at spread times."""
        size = self.experiment.config.classifier.batch_size
        indices = np.arange(step, step + size) % self.num_test_images
        times: Float[np.ndarray, "B"] = classifier_accuracy.spread_times(self.experiment, size)
        cross_entropy, is_correct = self.measure(state.params_ema, indices, times)
        return {"eval_loss": float(cross_entropy.mean()), "eval_accuracy": float(is_correct.mean())}

    def after_snapshot(self, state: TrainState, step: int, progress: TrainingProgress) -> None:
        """A classifier draws no samples."""


def train_classifier(config: ConfigDict, workdir: Path, train: datasets.Source, test: datasets.Source) -> None:
    """Train the classifier of a score network in its workdir, or resume that, and measure it at each noise level.

    Args:
      config: experiment configuration of the score network, whose settings of the classifier have been checked.
      workdir: of the score network.
      train: training split.
      test: test split.

    Raises:
      UserError: if a setting is wrong or the data have no labels.
      WorkdirError: if the folder cannot be written or holds another classifier.
      CheckpointError: if there are checkpoints, but all are damaged.
    """
    config = classifier_config(config, count_classes(config, train, test))
    folder = workdir / FOLDER
    try:
        workdirs.check_same_experiment(folder, config, "classifier")
    except WorkdirError as error:
        raise WorkdirError(f"{error}, or remove {folder} to train another classifier") from error
    workdirs.check_writable(folder)
    normalization = Normalization.of_folder(folder, train, datasets.build_scaler(config))
    experiment = build_classifier_experiment(config, normalization)
    describe(experiment)
    measure = classifier_accuracy.build_measure(experiment, normalization, test)
    loss_at_time = make_loss_at_time(experiment.sde, experiment.model, mean=normalization.mean, std=normalization.std)
    steps = build_train_program(experiment, "classifier")
    trainer = ClassifierTrainer(experiment, len(test), steps, measure, loss_at_time)
    state = train_loop.train(trainer, train, folder)
    rows = classifier_accuracy.measure_levels(experiment, measure, state, test)
    if distributed.is_main_process():
        facts = {"step": int(state.step), "dataset": config.data.dataset, "num_images": len(test)}
        facts |= {"num_classes": config.model.num_classes, "sde": config.training.sde, "seed": config.seed}
        classifier_accuracy.write_report(folder, rows, facts)
    chosen = rows[:: -(-len(rows) // NUM_LOGGED)]
    listed = ", ".join(f"{100 * row['accuracy']:.0f} % at {row['sigma']:.2g}" for row in chosen)
    logging.info("trained %d steps; test images classified correctly by noise level: %s", int(state.step), listed)
    logging.info("classifier: %s", folder)
