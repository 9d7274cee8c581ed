"""Features of the real images, with which those of samples are compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

import datasets
from files import content_hash
from metrics import classifier
from metrics.extractors import Extractor
from report import FeatureInfo, ReferenceInfo


def every_image(source: datasets.Source) -> UInt8[np.ndarray, "N H W C"]:
    """Returns all images of a split."""
    return source.images(np.arange(len(source)))


@dataclasses.dataclass(frozen=True)
class RealFeatures:
    """Features of the real images, computed once for a sweep.

    Attributes:
      extractor: what computes them.
      train: features of the training split.
      test: (features, logits) of the test split.
    """

    extractor: Extractor
    train: Float[np.ndarray, "N D"]
    test: tuple[Float[np.ndarray, "M D"], Float[np.ndarray, "M K"]]

    @classmethod
    def compute(cls, config: ConfigDict, train: datasets.Source, test: datasets.Source, workdir: Path) -> RealFeatures:
        """Builds the extractor, or reads it from the workdir, and applies it to both splits.

        Raises:
          ValueError: if the images have no labels.
        """
        if not train.num_classes:
            raise ValueError(
                f"data.dataset={config.data.dataset!r} has no labels to train a feature extractor on, so that samples "
                "cannot be measured; --mode eval does without if eval.enable_sampling=False"
            )
        train_levels, test_levels = every_image(train), every_image(test)
        extractor = classifier.build_feature_extractor(
            train_levels,
            train.labels(np.arange(len(train))),
            test_levels,
            test.labels(np.arange(len(test))),
            num_levels=train.num_levels,
            folder=workdir / "features",
            seed=config.seed,
        )
        return cls(extractor, extractor(train_levels)[0], extractor(test_levels))

    @property
    def feature_info(self) -> FeatureInfo:
        """Says in a report what computed the features."""
        of = self.extractor
        return FeatureInfo(of.name, of.hash, of.accuracy, of.key, of.resize)

    @property
    def reference_info(self) -> ReferenceInfo:
        """Says in a report what samples are compared with."""
        return ReferenceInfo("train", len(self.train), content_hash(self.train))
