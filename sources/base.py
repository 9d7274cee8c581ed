"""What a source of images can do, and the simplest one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


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

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C]."""
        ...

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n].

        Raises:
          ValueError: if the images carry none.
        """
        ...


@dataclass(frozen=True)
class ArraySource:
    """A split that fits in memory."""

    levels: np.ndarray
    classes: np.ndarray
    num_levels: int
    num_classes: int

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.levels)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C]."""
        return self.levels[indices]

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n]."""
        return self.classes[indices]
