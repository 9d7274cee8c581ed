"""Training of a classifier of the images that the SDE of a score network makes noisy; the mode "train_classifier"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

import datasets
from classifier import accuracy as classifier_accuracy
from classifier.accuracy import Measure
from classifier.experiment import FOLDER, Normalization, build_classifier_experiment, classifier_config, count_classes
from classifier.loss import classify_noisy
from experiment.build import Experiment, build_train_program, describe
from losses import TrainState
from models.wideresnet import make_logit_fn
from parallel import distributed
from training import loop as train_loop
from training.trainer import Trainer
from workdir import compatibility
from workdir import folder as workdirs
from workdir.folder import WorkdirError

NUM_LOGGED = 6  # noise levels of which the log gives the accuracy


class ClassifierTrainer(Trainer):
    """A run that trains a classifier, normalizes its images, and measures it on `num_test_images`."""

    rate = "classifier.lr"

    def __init__(
        self,
        experiment: Experiment,
        train_steps: Callable[..., Any],
        *,
        normalization: Normalization,
        measure: Measure,
        num_test_images: int,
    ):
        super().__init__(experiment, train_steps)
        self.normalization, self.measure, self.num_test_images = normalization, measure, num_test_images

    def loss_at_time(
        self, key: PRNGKeyArray, params: Any, x: Float[Array, "B H W C"], labels: Int[Array, "B"], t: Float[Array, "B"]
    ) -> Float[Array, "B"]:
        """Return the cross-entropy of each image at its time, in nats: log(num_classes) if uninformed."""
        of_images = self.normalization
        logit_fn = make_logit_fn(self.experiment.model, params, mean=of_images.mean, std=of_images.std)
        return classify_noisy(key, logit_fn, self.experiment.sde, x, labels, t)[0]

    def test_values(self, state: TrainState, step: int) -> dict[str, float]:
        """Measure the averaged parameters on a batch of test images, which rotates with the step, at spread times."""
        size = self.experiment.schedule.batch_size
        indices = np.arange(step, step + size) % self.num_test_images
        times = classifier_accuracy.spread_times(self.experiment.sde.T, size)
        cross_entropy, is_correct = self.measure(state.params_ema, indices, times)
        return {"eval_loss": float(cross_entropy.mean()), "eval_accuracy": float(is_correct.mean())}


def train_classifier(config: ConfigDict, workdir: Path, train: datasets.Source, test: datasets.Source) -> None:
    """Train the classifier of a score network in its workdir, or resume that, and measure it at each noise level.

    Args:
      config: experiment configuration of the score network, whose classifier settings are checked.
      workdir: of the score network.
      train: training split.
      test: test split.

    Raises:
      UserError: if a setting is wrong or the data have no labels.
      WorkdirError: if the folder cannot be written or holds another classifier.
      CheckpointError: if there are checkpoints, but all are damaged.
    """
    config = classifier_config(config, count_classes(config.data.dataset, train, test))
    folder = workdir / FOLDER
    try:
        compatibility.check_same_experiment(folder, config, "classifier")
    except WorkdirError as error:
        raise WorkdirError(f"{error}, or remove {folder} to train another classifier") from error
    workdirs.check_writable(folder)
    normalization = Normalization.of_folder(folder, train, datasets.build_scaler(config))
    experiment = build_classifier_experiment(config, normalization)
    describe(experiment)
    measure = classifier_accuracy.build_measure(experiment, normalization, test)
    trainer = ClassifierTrainer(
        experiment,
        build_train_program(experiment),
        normalization=normalization,
        measure=measure,
        num_test_images=len(test),
    )
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
