"""A classifier of noisy images as an experiment of its own, whose folder is a workdir like that of a score network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

import datasets
import losses
from classifier.loss import make_classifier_loss
from errors import UserError
from experiment.build import Experiment, build_experiment
from parallel import distributed
from storage import files, untrusted

FOLDER = "classifier"  # inside the workdir of the score network
NETWORK = "wideresnet_noise_conditional"
NORMALIZATION_FILE = "normalization.json"
CHUNK = 1000  # images measured at once


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel of the training images, in the score network's range."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def measure(cls, source: datasets.Source, scaler: datasets.Scaler) -> Normalization:
        """Measure every image of a split, in float64; levels stand for the middle of their values.

        Raises:
          UserError: if a channel is the same everywhere.
        """
        total, squares, count = np.zeros(()), np.zeros(()), 0
        for start in range(0, len(source), CHUNK):
            levels = source.images(np.arange(start, min(start + CHUNK, len(source))))
            x = np.asarray(scaler.middle(jnp.asarray(levels)), np.float64).reshape(-1, levels.shape[-1])
            total, squares, count = total + x.sum(axis=0), squares + np.square(x).sum(axis=0), count + len(x)
        mean = total / count
        variance = squares / count - np.square(mean)
        if np.min(variance) < 1e-12:  # what rounding leaves of 0
            raise UserError("a channel of the training images has one value only, so that there is nothing to learn")
        return cls(tuple(mean.tolist()), tuple(np.sqrt(variance).tolist()))

    @classmethod
    def of_folder(cls, folder: Path, source: datasets.Source, scaler: datasets.Scaler) -> Normalization:
        """Read what an earlier run has measured, or measure and write it."""
        path = folder / NORMALIZATION_FILE
        if distributed.once(path.exists):
            return cls.read(path)
        measured = cls.measure(source, scaler)
        distributed.once(lambda: files.write_json(path, dataclasses.asdict(measured)))
        return measured

    @classmethod
    def read(cls, path: Path) -> Normalization:
        """Read a file that `of_folder` has written."""
        try:
            return untrusted.build(
                cls, untrusted.parse_json(distributed.once(lambda: path.read_text(errors="replace")))
            )
        except UserError as error:
            raise UserError(f"{path} is damaged ({error}); remove it and run --mode train_classifier again") from error


def classifier_config(config: ConfigDict, num_classes: int) -> ConfigDict:
    """Return the configuration of the classifier of a score network's experiment: the same data and SDE."""
    settings, of_classifier = config.classifier, ConfigDict(config.to_dict())
    of_classifier.model.update(
        name=NETWORK,
        blocks_per_group=settings.blocks_per_group,
        channel_multiplier=settings.channel_multiplier,
        num_classes=num_classes,
        ema_rate=settings.ema_rate,
    )
    return of_classifier.lock()


def build_classifier_experiment(config: ConfigDict, normalization: Normalization) -> Experiment:
    """Build the experiment of a classifier from what `classifier_config` returned."""
    experiment, settings = build_experiment(config), config.classifier
    return dataclasses.replace(
        experiment,
        group="classifier",
        loss_fn=make_classifier_loss(experiment.sde, experiment.model, mean=normalization.mean, std=normalization.std),
        optimizer=losses.make_optimizer(
            lr=settings.lr,
            beta1=config.optim.beta1,
            eps=config.optim.eps,
            weight_decay=settings.weight_decay,
            warmup=settings.warmup,
            grad_clip=config.optim.grad_clip,
        ),
    )


def count_classes(dataset: str, train: datasets.Source, test: datasets.Source) -> int:
    """Return the number of classes of `data.dataset`.

    Raises:
      UserError: if the images carry no labels, or those of the two splits do not go together.
    """
    name = f"data.dataset={dataset!r}"
    if not train.num_classes or not test.num_classes:
        hint = "; give train.npz and test.npz an array 'labels'" if dataset == "npz" else ""
        raise UserError(f"{name} has no labels, which a classifier is trained on{hint}")
    if train.num_classes == 1:
        raise UserError(f"{name} has one class only, so that there is nothing to tell apart")
    if test.num_classes > train.num_classes:
        raise UserError(
            f"{name} has {train.num_classes} classes to train on, but {test.num_classes} to test on; label both splits "
            "by the same classes"
        )
    logging.info("%d classes, %d images to train on, %d to test on", train.num_classes, len(train), len(test))
    return train.num_classes
