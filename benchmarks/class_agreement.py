"""Whether samples of a class are of that class, in the eyes of a classifier that had no part in drawing them.

  python benchmarks/class_agreement.py --config configs/vp/digits_ddpmpp_continuous.py --samples FOLDER/samples.npz

The classifier is a support vector machine with a Gaussian kernel (scikit-learn), fitted to the clean training images:
another kind of model than the network that guides, and one that has never seen noise. What it gets right of the clean
test images is printed first; more than that cannot be asked of samples. Intervals are Wilson's, at 95 %.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from absl import app, flags
from jaxtyping import Bool, UInt8
from ml_collections import config_flags

import datasets
from modes.evaluate.real_features import every_image
from storage.files import read_npz

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Experiment whose data set the samples are of.")
flags.DEFINE_string("samples", None, "samples.npz of --mode sample with labels.")
flags.DEFINE_float("c", 10.0, "Penalty of the support vector machine for images on the wrong side.", lower_bound=0.0)
flags.mark_flags_as_required(["config", "samples"])

QUANTILE = 1.96  # of the normal distribution, for intervals of 95 %


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns Wilson's interval of 95 % for a probability; unlike the standard error it is not empty at 0 and 1."""
    share, z2 = successes / trials, QUANTILE**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = QUANTILE * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return middle - half, middle + half


def describe(name: str, is_right: Bool[np.ndarray, "N"]) -> str:
    """Returns a line: the share, its interval, and the counts."""
    right, total = int(is_right.sum()), len(is_right)
    low, high = wilson_interval(right, total)
    return f"{name:<12} {right / total:7.1%}   [{low:6.1%}, {high:6.1%}]   {right} of {total}"


def _flat(levels: UInt8[np.ndarray, "N H W C"], num_levels: int) -> np.ndarray:
    return levels.reshape(len(levels), -1) / (num_levels - 1)


def read_samples(path: str) -> tuple[UInt8[np.ndarray, "N H W C"], np.ndarray]:
    """Reads samples and their labels."""
    arrays = read_npz(path)
    if "labels" not in arrays:
        raise ValueError(f"{path} has no labels; draw it with --mode sample --config.sampling.labels=0..9 or the like")
    return arrays["samples"], arrays["labels"]


def main(argv: Sequence[str]) -> None:
    """Fits the classifier and prints the table."""
    from sklearn.svm import SVC

    levels, labels = read_samples(FLAGS.samples)
    train, test = (datasets.build_source(FLAGS.config, split) for split in ("train", "test"))
    classifier = SVC(C=FLAGS.c).fit(_flat(every_image(train), train.num_levels), train.labels(np.arange(len(train))))
    right_of_test = classifier.predict(_flat(every_image(test), train.num_levels)) == test.labels(np.arange(len(test)))
    is_right = classifier.predict(_flat(levels, train.num_levels)) == labels
    print(describe("test images", right_of_test))
    print(describe("samples", is_right))
    for label in np.unique(labels):
        print(describe(f"  class {label}", is_right[labels == label]))


if __name__ == "__main__":
    app.run(main)
