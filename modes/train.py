"""The modes "train" and "train_classifier"."""

from __future__ import annotations

from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

import datasets
from classifier import training as classifier_training
from classifier.experiment import FOLDER
from experiment import smoke, startup
from experiment.build import build_experiment, build_train_program, describe
from models.factory import require_score_network
from training import loop
from training.trainer import ScoreTrainer
from workdir import compatibility, locks
from workdir import folder as workdirs


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Train a score network, or resume from the newest checkpoint of the workdir.

    Writes checkpoints, sample grids, the loss curve and config.json into the workdir, which is created if missing.

    Raises:
      UserError: if a setting is wrong, or does not fit the step to resume from.
      WorkdirError: if the workdir cannot be written, holds another experiment, or another run trains there.
      CheckpointError: if all checkpoints of the workdir are damaged, or one cannot be written.
      DivergedError: if the loss becomes infinite or NaN.
    """
    config = smoke.resolve(config)
    require_score_network(config.model.name)
    loop.check_schedule("training", config.training)
    experiment = build_experiment(config)
    workdirs.check_writable(workdir)
    compatibility.check_same_experiment(workdir, config)
    with locks.hold(workdir):
        startup.mark("build")
        source = datasets.build_source(config, "train")
        startup.mark("data")
        test = datasets.build_source(config, "test")
        trainer = ScoreTrainer(experiment, build_train_program(experiment), workdir, test)
        describe(experiment)
        state = loop.train(trainer, source, workdir)
    logging.info("trained %d steps; checkpoints and samples are in %s", int(state.step), workdir)


def train_classifier(config: ConfigDict, workdir: str | Path) -> None:
    """Train, or resume, a classifier of the experiment's noisy images for guidance, and measure its accuracy.

    Writes into the sub-folder "classifier" of the workdir: checkpoints, config.json, the loss curve and the accuracy
    at each noise level. Needs no trained score network, but takes its configuration.

    Raises:
      UserError: if a setting is wrong or does not fit the step to resume from, or the data have no labels.
      WorkdirError: if the workdir cannot be written, or it or its classifier belongs to another experiment.
      CheckpointError: if all checkpoints of the classifier are damaged.
    """
    config = smoke.resolve(config)
    loop.check_schedule("classifier", config.classifier)
    compatibility.check_same_experiment(workdir, config)
    with locks.hold(Path(workdir) / FOLDER):
        sources = (datasets.build_source(config, split) for split in ("train", "test"))
        classifier_training.train_classifier(config, Path(workdir), *sources)
