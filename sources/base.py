"""What a source of images can do, and the simplest one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from errors import UserError
from storage.files import content_hash

AS_STORED = "as stored"


class Source(Protocol):
    """Random access to the images of one split."""

    @property
    def num_levels(self) -> int:
        """Levels that a value can take."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes of the labels; 0 if the images carry none."""
        ...

    @property
    def preparation(self) -> str:
        """What was done to the images as they are stored, for reports."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that changes when the images or what is done to them does; cheap to get."""
        ...

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C]."""
        ...

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n].

        Raises:
          UserError: if the images carry none.
        """
        ...


@dataclass(frozen=True)
class ArraySource:
    """The images of an array, in memory or mapped to it.

    Attributes:
      levels: uint8[N, H, W, C].
      classes: of the images, int64[N]; not read if there are none.
      num_levels: that a value can take.
      num_classes: 0 if the images carry no labels.
      preparation: what was done to the images.
      content: SHA-256 of what the images come from, if it is known; empty: that of the array itself.
    """

    levels: np.ndarray
    classes: np.ndarray
    num_levels: int
    num_classes: int
    preparation: str = AS_STORED
    content: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Text that changes when the images do."""
        return self.content or content_hash(self.levels)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.levels)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C]."""
        return np.asarray(self.levels[indices])

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n]."""
        return self.classes[indices]


@dataclass(frozen=True)
class Selection:
    """Some images of another source, in an order of their own.

    Attributes:
      source: that has them.
      rows: their indices there.
    """

    source: Source
    rows: Int64[np.ndarray, "n"]

    @property
    def num_levels(self) -> int:
        """Levels that a value can take."""
        return self.source.num_levels

    @property
    def num_classes(self) -> int:
        """Classes of the labels; 0 if the images carry none."""
        return self.source.num_classes

    @property
    def preparation(self) -> str:
        """What was done to the images."""
        return self.source.preparation

    @functools.cached_property
    def fingerprint(self) -> str:
        """Text that changes when the images do."""
        return content_hash(self.source.fingerprint, self.rows)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.rows)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C]."""
        return self.source.images(self.rows[indices])

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n]."""
        return self.source.labels(self.rows[indices])


def held_out(digests: np.ndarray, share: float, path: object = "the data set") -> np.ndarray:
    """Chooses the images of the test split where none was made, bool[N].

    The images whose digests are smallest: a choice that is random, yet the same on every machine and whatever the order
    and the names of the files, and that puts copies of an image into one split.

    Args:
      digests: SHA-256 of the content of each image, in hex.
      share: of the images, at least one.
      path: of them, for messages.

    Raises:
      UserError: if there are not two different images.
    """
    ordered = np.sort(digests)
    if not len(ordered) or ordered[0] == ordered[-1]:
        raise UserError(
            f"{path} has {len(ordered)} image(s) that differ in nothing and cannot be split; give two different ones"
        )
    last = ordered[max(int(np.ceil(share * len(ordered))), 1) - 1]
    chosen = digests <= last
    return chosen if not chosen.all() else digests < last
