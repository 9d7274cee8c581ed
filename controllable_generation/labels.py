"""Samples of classes that the network was trained with: their labels, and guidance without a classifier."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from configs.settings import check
from errors import UserError
from models.factory import num_classes_of
from sde_lib import SDE, ScoreFn, expand

PART = re.compile(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?")  # a label, or the first and the last of several


# --- which labels ----------------------------------------------------------------------------------------------------


def parse_labels(text: str, num_classes: int) -> tuple[int, ...]:
    """Parses a list of labels: "3", "0..9" (both ends included), "0,2,5", "0..3,7"; empty: none.

    Args:
      text: of `sampling.labels`.
      num_classes: labels go from 0 to num_classes - 1.

    Raises:
      UserError: if the text is another, or a label out of range or there twice.
    """
    labels: list[int] = []
    for part in text.split(",") if text else ():
        match = PART.fullmatch(part)
        if not match:
            raise UserError(f"sampling.labels={text!r}: {part!r} is no label; expected such as 3, 0..9 or 0,2,5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"sampling.labels={text!r}: {part!r} goes down; write {last}..{first}")
        if last >= num_classes:
            raise UserError(
                f"sampling.labels={text!r}: there is no label {last}; the {num_classes} classes are 0 to "
                f"{num_classes - 1}"
            )
        labels += range(first, last + 1)
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"sampling.labels={text!r}: label {twice[0]} is there twice; leave one out")
    return tuple(labels)


def build_labels(config: ConfigDict, *, guide_classes: int = 0) -> tuple[int, ...]:
    """Returns the labels that samples are to have in turn, as `config.sampling.labels` says; none if it is empty.

    Args:
      config: read here: `sampling.labels`, and which classes the network is told.
      guide_classes: classes that something besides the network guides to, such as a classifier; 0: nothing does.

    Raises:
      UserError: if labels are asked for that nothing knows, or the list is malformed.
    """
    text = config.sampling.labels
    known = [classes for classes in (num_classes_of(config), guide_classes) if classes]
    if text and not known:
        raise UserError(
            f"sampling.labels={text!r}, but the network was trained without labels (model.num_classes=0) and no "
            "classifier guides it; set sampling.labels='', or train a classifier (--mode train_classifier) and set "
            "sampling.classifier_scale, or train a network with model.num_classes"
        )
    return parse_labels(text, min(known, default=0))


def labels_of_samples(labels: Sequence[int], indices: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Returns the label of each sample, int32: sample i has number i mod K of the K labels, whatever else is drawn."""
    return np.asarray(labels, np.int32)[indices % len(labels)]


def rows_of_labels(num_images: int, num_labels: int, limit: int) -> Int[np.ndarray, "R C"]:
    """Returns the numbers of the samples that a picture with a row for each label shows.

    Only whole columns, so that every label is shown as often, unless there are fewer samples than labels.

    Args:
      num_images: samples that there are.
      num_labels: K; sample i has label number i mod K.
      limit: samples that are shown at the most.
    """
    num_shown = min(num_images, limit)
    rows, columns = min(num_labels, num_shown), max(1, num_shown // num_labels)
    return np.arange(rows)[:, None] + num_labels * np.arange(columns)[None, :]


# --- classifier-free guidance ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (Ho and Salimans 2022): s(x) + w (s(x | label) - s(x)), s(x) that of "no label".

    w = 1 is the conditional score; larger ones, samples that are more typical of the class and less diverse. (Ho and
    Salimans write 1 + w for w.) Outside an interval of noise levels sigma = std / mean_coeff, low < sigma <= high, the
    conditional score stands alone: Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample
    and Distribution Quality in Diffusion Models". Both scores come from one call of the network, at every time.

    Attributes:
      sde: forward SDE, which says what sigma is.
      no_label: label that stands for none.
      scale: w.
      interval: (low, high) in sigma.
    """

    sde: SDE
    no_label: int
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network, for an example, in one of the score."""
        return 1 if self.scale == 1 else 2

    def applies(self, t: Float[Array, "B"]) -> Bool[Array, "B"]:
        """Says at which times there is guidance."""
        sigma = self.sde.std(t) / self.sde.mean_coeff(t)
        return (self.interval[0] < sigma) & (sigma <= self.interval[1])

    def guide(self, score_of: Callable[[Int[Array, "N"]], ScoreFn], labels: Int[Array, "B"]) -> ScoreFn:
        """Returns the guided score.

        Args:
          score_of: labels of a batch -> its score function.
          labels: of the examples.
        """
        if self.evaluations == 1:
            return score_of(labels)
        of_both = score_of(jnp.concatenate([labels, jnp.full_like(labels, self.no_label)]))

        def guided(x: Float[Array, "B ..."], t: Float[Array, "B"]) -> Float[Array, "B ..."]:
            conditional, free = jnp.split(of_both(jnp.concatenate([x, x]), jnp.concatenate([t, t])), 2)
            return jnp.where(expand(self.applies(t), x), free + self.scale * (conditional - free), conditional)

        return guided


def build_classifier_free(config: ConfigDict, sde: SDE, labels: Sequence[int]) -> ClassifierFree | None:
    """Builds the guidance that `config.sampling` describes; None if the network is told no classes or none is wanted.

    Args:
      config: read here: `sampling.guidance_scale`, `sampling.guidance_interval`, and which classes the network is told.
      sde: forward SDE.
      labels: that samples are to have, see `build_labels`.

    Raises:
      UserError: if a setting is out of range, or there is nothing to guide or to guide to.
    """
    check(config, "sampling")
    settings, num_classes = config.sampling, num_classes_of(config)
    low, high = settings.guidance_interval
    if num_classes and labels:
        return ClassifierFree(sde, num_classes, settings.guidance_scale, (low, high or math.inf))
    if settings.guidance_scale != 1:
        reason = "sampling.labels is empty" if num_classes else "the network is told no classes (model.num_classes=0)"
        raise UserError(
            f"sampling.guidance_scale={settings.guidance_scale} guides towards labels, but {reason}; set the labels, "
            "such as 0..9, of a network that was trained with them, or sampling.guidance_scale=1.0"
        )
    return None
