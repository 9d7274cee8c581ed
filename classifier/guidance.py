"""Guidance of samples to classes by a classifier of noisy images (Song et al. 2021, Appendix I.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
from absl import logging
from flax import struct
from jaxtyping import Array, Int

from classifier.experiment import (
    FOLDER,
    NETWORK,
    NORMALIZATION_FILE,
    Normalization,
    build_classifier_experiment,
    classifier_config,
)
from configs import settings
from errors import UserError
from experiment.build import Experiment
from models.wideresnet import CIFAR10_MEAN, CIFAR10_STD, make_classifier_grad_fn, make_logit_fn
from parallel import distributed
from sde_lib import SDE, Scalars, ScoreFn, State, expand
from storage.files import local_path
from workdir import compatibility
from workdir import folder as workdirs
from workdir.checkpoints import CheckpointError, Checkpoints

# What the config.json of a classifier must state, and which of that are counts.
NEEDED = ("model.num_classes", "model.blocks_per_group", "model.channel_multiplier", "data.dataset")
COUNTS = (*NEEDED[:3], "classifier.snapshot_freq")
SIZES = ("blocks_per_group", "channel_multiplier")  # of the network, in `config.model` of the classifier's folder


def condition_on_class(
    score_fn: ScoreFn,
    classifier_grad_fn: Callable[[State, Scalars, Int[Array, "B"]], State],
    sde: SDE,
    labels: Int[Array, "B"],
    *,
    scale: float = 1.0,
) -> ScoreFn:
    """Return the score of p_t(x | label) = the score of p_t(x) + grad log p_t(label | x) (Song et al. 2021, Eq. 14).

    The classifier knows images plus noise. Under an SDE whose mean shrinks by m(t), x / m is such an image, with noise
    of std / m; the 2021 code gave it x and std, which is the same for VE only.

    Args:
      score_fn: unconditional score.
      classifier_grad_fn: (x, sigma, labels) -> grad_x log p(label | x), x in the network's range with noise of sigma.
      sde: forward SDE.
      labels: class of each example.
      scale: factor on the classifier's gradient; 1 is Bayes' rule.
    """

    def conditional(x: State, t: Scalars) -> State:
        m = sde.mean_coeff(t)
        gradient = classifier_grad_fn(x / expand(m, x), sde.std(t) / m, labels) / expand(m, x)
        return score_fn(x, t) + scale * gradient

    return conditional


@struct.dataclass
class Classifier:
    """A trained classifier of the images that an SDE makes noisy; a `sampling.Guide`.

    Attributes:
      params: averaged parameters, arrays.
      model: the network.
      normalization: of its images.
      sde: forward SDE.
      num_classes: labels are 0 to num_classes - 1.
      scale: factor on its gradient; 1 is Bayes' rule.
    """

    params: Any
    model: nn.Module = struct.field(pytree_node=False)
    normalization: Normalization = struct.field(pytree_node=False)
    sde: SDE = struct.field(pytree_node=False)
    num_classes: int = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)

    def guide(self, score_fn: ScoreFn, labels: Int[Array, "B"]) -> ScoreFn:
        """Return the score of images of these labels: score_fn + scale * grad log p_t(label | x)."""
        logit_fn = make_logit_fn(self.model, self.params, mean=self.normalization.mean, std=self.normalization.std)
        return condition_on_class(score_fn, make_classifier_grad_fn(logit_fn), self.sde, labels, scale=self.scale)


def all_params(params: Any, classifier: Classifier | None) -> Any:
    """Return the parameters that samples depend on: the score network's and, if there is one, the classifier's."""
    return params if classifier is None else (params, classifier.params)


def load_classifier(experiment: Experiment, workdir: Path) -> Classifier | None:
    """Load the classifier that the configuration asks for; None if it asks for none.

    Args:
      experiment: of the score network.
      workdir: of the score network; its sub-folder "classifier" is used if `sampling.classifier` is empty.

    Raises:
      UserError: if a setting is wrong, the classifier is of other data or another SDE, or the folder holds none.
      CheckpointError: if it holds no checkpoint that can be read.
    """
    sampling = experiment.config.sampling
    if sampling.classifier_scale and not sampling.labels:
        raise UserError(
            f"sampling.classifier_scale={sampling.classifier_scale} guides towards labels, but sampling.labels "
            "is empty; set the labels, such as 0..9, or sampling.classifier_scale=0"
        )
    if sampling.classifier and not sampling.classifier_scale:
        raise UserError(
            f"sampling.classifier={sampling.classifier!r} is not used, since sampling.classifier_scale=0; set "
            "the scale, 1 for Bayes' rule, or sampling.classifier=''"
        )
    if not sampling.classifier_scale:
        return None
    folder = local_path(sampling.classifier or workdir / FOLDER, "sampling.classifier")
    stored = _read_config(folder)
    _check_same_images(folder, stored, experiment)
    config = classifier_config(experiment.config, stored["model.num_classes"]).unlock()
    config.model.update({size: stored[f"model.{size}"] for size in SIZES})
    normalization = _normalization(folder, stored)
    of_classifier = build_classifier_experiment(config.lock(), normalization)
    template, snapshot_freq = of_classifier.state_template(), stored.get("classifier.snapshot_freq", 1)
    with Checkpoints(folder, snapshot_freq=snapshot_freq, template=template, read_only=True) as checkpoints:
        state = checkpoints.restore_newest()
    if state is None:
        raise CheckpointError(f"{folder} holds no checkpoint; let --mode train_classifier train until one is written")
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
        scale=sampling.classifier_scale,
    )


@distributed.on_main
def _read_config(folder: Path) -> dict[str, Any]:
    """Read the flat configuration of a classifier's folder."""
    path = folder / workdirs.CONFIG_FILE
    fix = (
        "run --mode train_classifier with this configuration and --workdir, or set sampling.classifier to the folder "
        "of a classifier"
    )
    if not path.exists():
        raise UserError(f"{folder} holds no classifier; {fix}")
    stored = workdirs.read_config(path)
    if stored.get("model.name") != NETWORK:
        raise UserError(f"{folder} holds a score network, {stored.get('model.name')!r}, no classifier; {fix}")
    if missing := [key for key in NEEDED if key not in stored]:
        raise UserError(f"{path} does not state {missing[0]}; {fix}")
    if wrong := [key for key in COUNTS if type(stored.get(key, 1)) is not int or stored.get(key, 1) < 1]:
        raise UserError(f"{path} has {wrong[0]}={stored[wrong[0]]!r}; expected a whole number, 1 or more; {fix}")
    return stored


def _check_same_images(folder: Path, stored: Mapping[str, Any], experiment: Experiment) -> None:
    """Check that a classifier was trained on the images of a score network, at its noise levels."""
    constants = {f"model.{field.name}" for field in dataclasses.fields(experiment.sde)}  # type: ignore[arg-type]
    given = settings.affecting(experiment.config, "noise")
    given = {key: value for key, value in given.items() if key in constants or not key.startswith("model.")}
    way_out = (
        "train one with --mode train_classifier and this configuration, or set sampling.classifier to the folder of "
        "one that fits"
    )
    compatibility.check_same(stored, given, f"the classifier in {folder} is of another experiment", way_out)


def _normalization(folder: Path, stored: Mapping[str, Any]) -> Normalization:
    """Read the normalization, or take that of the 2021 code, whose checkpoints do not have it."""
    path = folder / NORMALIZATION_FILE
    if distributed.once(path.exists):
        return Normalization.read(path)
    if stored["data.dataset"] == "CIFAR10" and not stored.get("data.centered"):
        return Normalization(CIFAR10_MEAN, CIFAR10_STD)
    raise UserError(
        f"{path} does not exist, and without it only a classifier of CIFAR-10 in [0, 1] that --mode import brought is "
        "known; run --mode train_classifier again"
    )
