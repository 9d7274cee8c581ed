"""Any image data set of tensorflow-datasets by its name: its splits, its one image, and images of any size fitted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from absl import logging

from errors import UserError
from sources import cache, tfds
from sources.base import Selection, Source, held_out
from sources.folder import Rules
from sources.pictures import decode_picture, fit_picture, to_levels
from sources.tfds import TfdsSource
from sources.tfds_cache import keep
from sources.tfds_open import open_builder
from storage.files import content_hash

PREFIX = "tfds:"  # of `data.dataset`, before the name that TFDS has
TEST_SPLITS = ("test", "validation")  # the first one that is there is the test split


def choose_splits(known: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Chooses the TFDS splits to train on and to test on; the same one twice if a part of it is to be held out.

    Raises:
      UserError: if there are several splits and none is named "train".
    """
    train = "train" if "train" in known else next(iter(known)) if len(known) == 1 else ""
    if not train:
        raise UserError(f"{name!r} has no split 'train', but {', '.join(sorted(known))}: which to train on is unknown")
    return train, next((each for each in TEST_SPLITS if each in known and each != train), train)


def _is_as_expected(feature: Any, rules: Rules) -> bool:
    """Whether every image is stored as the network expects it."""
    return tuple(feature.shape) == rules.fit.shape and feature.np_dtype == np.uint8 and rules.num_levels == 256


def _fitted(source: TfdsSource, rules: Rules) -> TfdsSource:
    """Returns a source whose images are brought to the shape and the levels that are expected."""

    def prepare(data: bytes) -> np.ndarray:
        picture = decode_picture(data, "", keep_alpha=rules.fit.keeps_alpha)
        return to_levels(fit_picture(picture, rules.fit), rules.num_levels)

    rule = rules.fit.rule + ("" if rules.num_levels == 256 else f", {rules.num_levels} levels")
    fitted = tfds.with_rule(source, prepare, rule)
    return replace(fitted, decode=tfds.unchanged, num_levels=rules.num_levels)


def _digests(source: TfdsSource) -> np.ndarray:
    """Returns the SHA-256 of each image as it is stored, in hex; computed once."""

    def compute() -> str:
        batches = np.array_split(np.arange(len(source)), max(len(source) // 1024, 1))
        stored = (image for batch in batches for image in source.stored(batch, source.image))
        return "\n".join(hashlib.sha256(image).hexdigest() for image in stored)

    return np.array(cache.remembered(content_hash("tfds digests", source.stamp), compute).split("\n"))


def load_any(name: str, split: str, path: str, rules: Rules) -> Source:
    """Opens one split of any image data set that TFDS has prepared.

    The splits are TFDS's own "train" and "test"; where there is no "test", "validation"; where there is neither, a part
    of the training split is held out by the content of its images.

    Args:
      name: that TFDS has, such as "oxford_flowers102" or "imagenette/320px".
      split: "train" or "test".
      path: TFDS data folder; empty: the usual one.
      rules: what is done to images that are not yet as expected.

    Raises:
      UserError: if there is no such data set, its records do not hold one image of 8 or 16 bits, or one of these
        cannot be brought to the size.
      UserError: if it is not prepared.
    """
    builder = open_builder(name, path)
    train, test = choose_splits(builder.info.splits, name)
    stored = tfds.open_split(builder, test if split == "test" else train, name, path)
    feature = builder.info.features[stored.image]
    if feature.np_dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"the images of {name!r} have values of type {np.dtype(feature.np_dtype)}; expected 8 or 16 bits"
        )
    source = stored if _is_as_expected(feature, rules) else _fitted(stored, rules)
    kept = keep(source, rules.fit.shape, rules.cache_gib)
    if split == "train":
        logging.info(
            "%s: trains on its split %r, tests on %s, %s",
            builder.info.full_name,
            train,
            repr(test) if test != train else f"data.test_share={rules.test_share:g} of the same, held out",
            f"{stored.num_classes} classes ({stored.label})" if stored.num_classes else "no labels",
        )
    if test != train:
        return kept
    chosen = held_out(_digests(stored), rules.test_share, name)
    return Selection(kept, np.flatnonzero(chosen if split == "test" else ~chosen))
