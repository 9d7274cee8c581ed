"""A classifier of noisy images, taken from its folder to guide samples to their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
from absl import logging
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from classifier.experiment import (
    FOLDER,
    NETWORK,
    NORMALIZATION_FILE,
    Normalization,
    build_classifier_experiment,
    classifier_config,
)
from classifier.gradient import condition_on_class
from configs import settings
from errors import UserError
from experiment.build import Experiment, Guide
from losses import TrainState
from models.wideresnet import CIFAR10_MEAN, CIFAR10_STD, make_classifier_grad_fn, make_logit_fn
from parallel import distributed
from sde_lib import SDE, ScoreFn
from workdir import folder as workdirs
from workdir.checkpoints import CheckpointError, Checkpoints

# What the config.json of a classifier must state, and which of that are counts.
NEEDED = ("model.num_classes", "model.blocks_per_group", "model.channel_multiplier", "data.dataset")
COUNTS = (*NEEDED[:3], "classifier.snapshot_freq")
SIZES = ("blocks_per_group", "channel_multiplier")  # of the network, in `config.model` of the classifier's folder


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier of the images that an SDE makes noisy.

    Attributes:
      model: the network.
      params: averaged parameters, numpy arrays on the host.
      normalization: of its images.
      sde: forward SDE.
      num_classes: that it tells apart.
      scale: factor on its gradient; 1 is Bayes' rule.
    """

    model: nn.Module
    params: Any
    normalization: Normalization
    sde: SDE
    num_classes: int
    scale: float

    def guided(self, params: Any, score_fn: ScoreFn, labels: Int[Array, "B"]) -> ScoreFn:
        """Returns the score of the images of a class: score_fn + scale * grad log p_t(label | x).

        Args:
          params: of the classifier.
          score_fn: of the images of any class.
          labels: classes of the examples.
        """
        logit_fn = make_logit_fn(self.model, params, mean=self.normalization.mean, std=self.normalization.std)
        return condition_on_class(score_fn, make_classifier_grad_fn(logit_fn), self.sde, labels, scale=self.scale)

    def guide(self) -> Guide:
        """Returns the plug for `SamplingProgram`, with the parameters on the devices."""
        return Guide(apply=self.guided, params=distributed.replicate(self.params), num_classes=self.num_classes)


def all_params(params: Any, classifier: Classifier | None) -> Any:
    """Returns the parameters that samples depend on: the score network's and, if there is one, the classifier's."""
    return params if classifier is None else (params, classifier.params)


def check_guidance(config: ConfigDict) -> None:
    """Checks the settings of guidance by a classifier; no file is read.

    Raises:
      UserError: if there are no labels to guide to, or a classifier is named and not used.
    """
    if config.sampling.classifier_scale and not config.sampling.labels:
        raise UserError(
            f"sampling.classifier_scale={config.sampling.classifier_scale} guides towards labels, but sampling.labels "
            "is empty; set the labels, such as 0..9, or sampling.classifier_scale=0"
        )
    if config.sampling.classifier and not config.sampling.classifier_scale:
        raise UserError(
            f"sampling.classifier={config.sampling.classifier!r} is not used, since sampling.classifier_scale=0; set "
            "the scale, 1 for Bayes' rule, or sampling.classifier=''"
        )


def load_classifier(experiment: Experiment, workdir: Path) -> Classifier | None:
    """Loads the classifier that the configuration asks for; None if it asks for none.

    Args:
      experiment: of the score network.
      workdir: of it; its sub-folder "classifier" is taken if `sampling.classifier` is empty.

    Raises:
      UserError: if a setting is wrong, or the classifier is of other data or another SDE.
      UserError: if the folder holds no classifier.
      CheckpointError: if it holds no checkpoint that can be read.
    """
    check_guidance(experiment.config)
    if not experiment.config.sampling.classifier_scale:
        return None
    folder = Path(experiment.config.sampling.classifier or workdir / FOLDER)
    stored = _read_config(folder)
    _check_same_images(folder, stored, experiment)
    config = classifier_config(experiment.config, stored["model.num_classes"]).unlock()
    config.model.update({size: stored[f"model.{size}"] for size in SIZES})
    normalization = _normalization(folder, stored)
    of_classifier = build_classifier_experiment(config.lock(), normalization)
    state = _restore(folder, of_classifier, stored.get("classifier.snapshot_freq", 1))
    logging.info(
        "guided with scale %g by the classifier of step %d in %s",
        *(config.sampling.classifier_scale, int(state.step), folder),
    )
    return Classifier(
        model=of_classifier.model,
        params=state.params_ema,
        normalization=normalization,
        sde=experiment.sde,
        num_classes=stored["model.num_classes"],
        scale=experiment.config.sampling.classifier_scale,
    )


@distributed.on_main
def _read_config(folder: Path) -> dict[str, Any]:
    """Reads the flat configuration of a classifier's folder."""
    path = folder / workdirs.CONFIG_FILE
    way_out = (
        "run --mode train_classifier with this configuration and --workdir, or set sampling.classifier to the folder "
        "of a classifier"
    )
    if not path.exists():
        raise UserError(f"{folder} holds no classifier; {way_out}")
    stored = workdirs.read_config(path)
    if stored.get("model.name") != NETWORK:
        raise UserError(f"{folder} holds a score network, {stored.get('model.name')!r}, no classifier; {way_out}")
    if missing := [key for key in NEEDED if key not in stored]:
        raise UserError(f"{path} does not state {missing[0]}; {way_out}")
    if wrong := [key for key in COUNTS if type(stored.get(key, 1)) is not int or stored.get(key, 1) < 1]:
        raise UserError(f"{path} has {wrong[0]}={stored[wrong[0]]!r}; expected a whole number, 1 or more; {way_out}")
    return stored


def _check_same_images(folder: Path, stored: Mapping[str, Any], experiment: Experiment) -> None:
    """Checks that a classifier knows the images of a score network, at its noise levels.

    Raises:
      WorkdirError: naming what differs.
    """
    constants = {f"model.{field.name}" for field in dataclasses.fields(experiment.sde)}  # type: ignore[arg-type]
    given = settings.affecting(experiment.config, "noise")
    given = {key: value for key, value in given.items() if key in constants or not key.startswith("model.")}
    way_out = (
        "train one with --mode train_classifier and this configuration, or set sampling.classifier to the folder of "
        "one that fits"
    )
    workdirs.check_same(stored, given, f"the classifier in {folder} is of another experiment", way_out)


def _normalization(folder: Path, stored: Mapping[str, Any]) -> Normalization:
    """Reads the normalization, or takes that of the 2021 code, whose checkpoints do not have it."""
    path = folder / NORMALIZATION_FILE
    if distributed.once(path.exists):
        return Normalization.read(path)
    if stored["data.dataset"] == "CIFAR10" and not stored.get("data.centered"):
        return Normalization(CIFAR10_MEAN, CIFAR10_STD)
    raise UserError(
        f"{path} does not exist, and without it only a classifier of CIFAR-10 in [0, 1] that --mode import brought is "
        "known; run --mode train_classifier again"
    )


def _restore(folder: Path, experiment: Experiment, snapshot_freq: int) -> TrainState:
    """Restores the newest state of a classifier's folder."""
    with Checkpoints(
        folder, snapshot_freq=snapshot_freq, template=experiment.state_template(), read_only=True
    ) as checkpoints:
        state = checkpoints.restore_newest()
    if state is None:
        raise CheckpointError(f"{folder} holds no checkpoint; let --mode train_classifier train until one is written")
    return state
