"""Decoded images of TFDS data sets, kept in the cache: reading them takes 1 µs where decoding takes 0.4 ms."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sources import cache
from sources.base import ArraySource, Source
from sources.tfds import TfdsSource
from storage.files import content_hash

IMAGES, LABELS = "images.npy", "labels.npy"  # files of a prepared split
VERSION = "1"  # of what is kept; another one prepares the images anew


def _fill(folder: Path, source: TfdsSource, shape: tuple[int, int, int]) -> None:
    read = lambda start, stop: source.images(np.arange(start, stop))  # noqa: E731
    cache.write_images(folder / IMAGES, len(source), shape, read)
    everything = np.arange(len(source))
    labels = source.labels(everything) if source.num_classes else np.zeros(len(source))
    np.save(folder / LABELS, labels.astype(np.int64))


def keep(source: TfdsSource, shape: tuple[int, int, int], cache_gib: float) -> Source:
    """Returns the images of a source mapped to memory from the cache, which is filled if need be.

    Args:
      source: of a prepared split.
      shape: (H, W, C) that its images must have; if they have another, it is returned as it is.
      cache_gib: the largest size of prepared images that are kept, in GiB; a larger source is returned as it is.

    Raises:
      UserError: if an image cannot be prepared, or the disk has no room.
    """
    if not source.stamp or not cache.is_kept(len(source), shape, cache_gib):
        return source
    if source.images(np.array([0])).shape[1:] != shape:
        return source
    key = content_hash(f"tfds {VERSION}", source.fingerprint, source.stamp)
    folder = cache.prepared_folder(key, lambda folder: _fill(folder, source, shape))
    levels, labels = cache.map_images(folder / IMAGES), np.load(folder / LABELS, allow_pickle=False)
    return ArraySource(
        levels, labels, source.num_levels, source.num_classes, source.preparation, content=source.fingerprint
    )
