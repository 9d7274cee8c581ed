"""The digits that ship inside scikit-learn: real images without a download."""

from __future__ import annotations

import numpy as np

from sources.base import ArraySource

NUM_DIGITS_TRAIN = 1500  # of the 1,797 digits; the other 297 are the test split


def load_digits(split: str) -> ArraySource:
    """Load the 8x8 grey handwritten digits of scikit-learn, 17 levels (0 to 16); `split` is "train" or "test".

    The split never changes: a permutation by a frozen generator, 1,500 images to train on and 297 to test.
    """
    from sklearn.datasets import load_digits as load_from_sklearn  # slow to import, and only this source needs it

    pixels, classes = load_from_sklearn(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(pixels))  # RandomState's stream never changes between versions
    chosen = order[:NUM_DIGITS_TRAIN] if split == "train" else order[NUM_DIGITS_TRAIN:]
    levels = pixels.reshape(-1, 8, 8, 1).astype(np.uint8)
    return ArraySource(levels[chosen], classes[chosen].astype(np.int64), num_levels=17, num_classes=10)
