"""The mode "prepare": the configured data set, downloaded and decoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

import datasets
from sources import tfds_build
from sources.base import ArraySource, Selection, Source
from sources.tfrecord import TfrecordSource


def place(source: Source) -> str:
    """Says where the images of a source are read from."""
    if isinstance(source, Selection):
        return place(source.source)
    if isinstance(source, TfrecordSource):
        return f"read from {source.path}"
    if not isinstance(source, ArraySource):
        return "decoded whenever they are read, since they are more than data.cache_gib"
    if isinstance(source.levels, np.memmap) and source.levels.filename:
        return f"mapped from {Path(source.levels.filename)}"
    return "in memory"


def prepare_data(config: ConfigDict) -> None:
    """Prepares both splits of the configured data set, and says how many images there are, and where.

    Raises:
      UserError: if a setting is wrong, or the data cannot be had.
      UserError: if files or TensorFlow are missing.
    """
    if name := datasets.tfds_name(config):
        tfds_build.prepare(name, config.data.path)
    for split in ("train", "test"):
        source = datasets.build_source(config, split)
        height, width, channels = datasets.image_shape(config)
        logging.info(
            "%s: %s images of %dx%d pixels, %d channel(s), %d levels, %s; %s; %s",
            *(split, f"{len(source):,}", height, width, channels, source.num_levels),
            f"{source.num_classes} classes" if source.num_classes else "no labels",
            *(source.preparation, place(source)),
        )
