"""The fraction of samples that an independent classifier assigns to the class they were drawn for.

  python -m benchmarks.class_agreement --config configs/vp/digits_ddpmpp_continuous.py --samples FOLDER/samples.npz

The classifier is a support vector machine with a Gaussian kernel (scikit-learn), fitted to the clean training images:
another kind of model than the network that guides, and never shown noise. Its accuracy on the clean test images is
printed first, as the upper limit for samples. Intervals are Wilson's, at 95 %.
"""

from __future__ import annotations

import numpy as np
import scipy.stats
from absl import flags
from jaxtyping import Bool, UInt8

import datasets
from benchmarks import measure as measuring
from errors import UserError
from modes.evaluate.real_features import every_image
from storage.files import read_npz


def describe(name: str, is_right: Bool[np.ndarray, "N"]) -> str:
    """Return a line: the fraction, its interval, and the counts."""
    right, total = int(is_right.sum()), len(is_right)
    low, high = scipy.stats.binomtest(right, total).proportion_ci(method="wilson")  # not empty at 0 and 1
    return f"{name:<12} {right / total:7.1%}   [{low:6.1%}, {high:6.1%}]   {right} of {total}"


def main() -> None:
    """Fit the classifier and print the table."""
    from sklearn.svm import SVC

    arrays = read_npz(flags.FLAGS.samples)
    if "labels" not in arrays:
        raise UserError(
            f"{flags.FLAGS.samples} has no labels; draw it with --mode sample --config.sampling.labels=0..9"
        )
    labels = arrays["labels"]
    train, test = (datasets.build_source(flags.FLAGS.config, split) for split in ("train", "test"))

    def flat(levels: UInt8[np.ndarray, "N H W C"]) -> np.ndarray:
        return levels.reshape(len(levels), -1) / (train.num_levels - 1)

    classifier = SVC(C=flags.FLAGS.c).fit(flat(every_image(train)), train.labels(np.arange(len(train))))
    is_right = classifier.predict(flat(arrays["samples"])) == labels
    print(describe("test images", classifier.predict(flat(every_image(test))) == test.labels(np.arange(len(test)))))
    print(describe("samples", is_right))
    for label in np.unique(labels):
        print(describe(f"  class {label}", is_right[labels == label]))


if __name__ == "__main__":
    measuring.define_flags("are those of the samples")
    flags.DEFINE_string("samples", None, "samples.npz of --mode sample with labels.", required=True)
    flags.DEFINE_float("c", 10.0, "Penalty of the support vector machine for wrong sides.", lower_bound=0.0)
    measuring.main(main)
