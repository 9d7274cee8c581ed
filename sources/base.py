"""What a data set must provide, and the simplest one: an array."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from errors import UserError
from storage.files import content_hash

AS_STORED = "as stored"
HASHED_IMAGES = 256  # read at a time


class Source(abc.ABC):
    """Random access to the images of one split. A new data set is a subclass with `__len__` and `images`.

    Override the other members where their defaults do not hold, and add a line to `datasets.SOURCES`.
    """

    num_levels: int = 256  # levels of a pixel value
    num_classes: int = 0  # classes of the labels; 0: the images have no labels
    preparation: str = AS_STORED  # what was done to the stored images, for reports

    @functools.cached_property
    def fingerprint(self) -> str:
        """Text that changes when the images change. The default reads all of them: override it if that is slow."""
        blocks = (
            np.arange(start, min(start + HASHED_IMAGES, len(self))) for start in range(0, len(self), HASHED_IMAGES)
        )
        return content_hash(*(content_hash(self.images(block)) for block in blocks))

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def images(self, indices: np.ndarray) -> np.ndarray:
        """Read images, uint8[n, H, W, C] with values 0 .. num_levels - 1. Several threads may call it."""

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Read class labels, int64[n]."""
        raise UserError("the images of this data set carry no labels")


@dataclass(frozen=True)
class ArraySource(Source):
    """The images of an array, in memory or memory-mapped."""

    levels: np.ndarray  # uint8[N, H, W, C]
    classes: np.ndarray  # labels of the images, int64[N]
    num_levels: int = 256
    num_classes: int = 0
    preparation: str = AS_STORED
    content: str = ""  # SHA-256 of what the images come from; empty: hash the array itself

    @functools.cached_property
    def fingerprint(self) -> str:
        return self.content or content_hash(self.levels)

    def __len__(self) -> int:
        return len(self.levels)

    def images(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self.levels[indices])

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self.classes[indices]


class Selection(Source):
    """Some images of another source, in their own order."""

    def __init__(self, source: Source, rows: Int64[np.ndarray, "n"]):
        self.source, self.rows = source, rows
        self.num_levels, self.num_classes, self.preparation = source.num_levels, source.num_classes, source.preparation

    @functools.cached_property
    def fingerprint(self) -> str:
        return content_hash(self.source.fingerprint, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self.source.images(self.rows[indices])

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self.source.labels(self.rows[indices])


def held_out(digests: np.ndarray, fraction: float, path: object = "the data set") -> np.ndarray:
    """Choose the test images of a data set without a test split, bool[N].

    The images with the smallest hashes: a random choice, yet the same on every machine whatever the order and names of
    the files, and one that puts copies of an image into one split.

    Args:
      digests: SHA-256 of the content of each image, in hex.
      fraction: of the images, at least one.
      path: where the images are, for messages.
    """
    ordered = np.sort(digests)
    if not len(ordered) or ordered[0] == ordered[-1]:
        raise UserError(f"{path} has {len(ordered)} image(s), all the same, which cannot be split; add a different one")
    last = ordered[max(int(np.ceil(fraction * len(ordered))), 1) - 1]
    chosen = digests <= last
    return chosen if not chosen.all() else digests < last
