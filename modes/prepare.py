"""The mode "prepare": download and decode the configured data set once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

import datasets
from configs.settings import image_shape
from experiment import smoke
from sources import tfds_build
from sources.base import ArraySource, Selection, Source
from sources.tfrecord import TfrecordSource


def _place(source: Source) -> str:
    if isinstance(source, Selection):
        return _place(source.source)
    if isinstance(source, TfrecordSource):
        return f"read from {source.path}"
    if not isinstance(source, ArraySource):
        return "decoded at every read: they exceed data.cache_gib"
    if isinstance(source.levels, np.memmap) and source.levels.filename:
        return f"mapped from {Path(source.levels.filename)}"
    return "in memory"


def prepare(config: ConfigDict) -> None:
    """Prepare the configured data set once, so that training and evaluation start at once and need no TensorFlow.

    Downloads a TFDS data set and writes it as ArrayRecord files, in a process of its own. Decodes pictures into the
    cache, up to data.cache_gib. Skips what is already prepared.

    Raises:
      UserError: if a setting is wrong, or files, the network or TensorFlow are missing.
    """
    config = smoke.resolve(config)
    if name := datasets.tfds_name(config.data.dataset, config.data.category):
        tfds_build.prepare(name, config.data.path)
    for split in ("train", "test"):
        source = datasets.build_source(config, split)
        height, width, channels = image_shape(config)
        logging.info(
            "%s: %s images of %dx%d pixels, %d channel(s), %d levels, %s; %s; %s",
            *(split, f"{len(source):,}", height, width, channels, source.num_levels),
            f"{source.num_classes} classes" if source.num_classes else "no labels",
            *(source.preparation, _place(source)),
        )
