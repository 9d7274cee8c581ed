"""Feature extractors by name: they turn images into the features and logits that metrics compare.

Metrics of different extractors are not comparable, hence key and hash. docs/extractors.md describes each network and
how to get its weights.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8

import checks
from errors import UserError
from metrics import efficientnet, inception, tfgan
from metrics.images import RGB, check_channels

AUTO = "auto"
KEYS = ("inception", "tfgan", "efficientnet_lite0", "classifier")


class Extractor(Protocol):
    """Turns images into features and logits.

    Attributes:
      key: one of KEYS.
      name: what it is, in words, for the report.
      hash: SHA-256 of its parameters, in hex.
      accuracy: fraction of held-out images that it classifies correctly; None if unknown.
      num_features: D, the dimension of the features.
      resize: how images are resized, in words; "none" if they are not.
    """

    @property
    def key(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str: ...

    @property
    def accuracy(self) -> float | None: ...

    @property
    def num_features(self) -> int: ...

    @property
    def resize(self) -> str: ...

    def __call__(
        self, levels: UInt8[np.ndarray, "N H W C"]
    ) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]:
        """Return (features, logits) of any number of images given as levels, float64."""
        ...


def resolve_extractor(name: str, *, channels: int, weights: str = "") -> str:
    """Return the key of the extractor that a name stands for.

    "auto" is, for RGB images, the Inception network if its weights are there, otherwise EfficientNet-Lite0 if its
    package is installed, otherwise the classifier; for other images, on which those networks were not trained, the
    classifier.

    Args:
      name: "auto" or one of KEYS.
      channels: of the images.
      weights: file of the Inception network's weights; empty: where --mode convert_weights puts them.
    """
    checks.one_of("eval.extractor", name, (AUTO, *KEYS))
    if name not in (AUTO, "classifier"):
        check_channels(name, channels)
    if name != AUTO:
        return name
    if channels != RGB:
        return "classifier"
    if weights or inception.weights_path().exists():  # building reports a named file that is missing
        return "inception"
    return "efficientnet_lite0" if efficientnet.is_installed() else "classifier"


def build_extractor(key: str, *, num_levels: int, weights: str = "") -> Extractor:
    """Build an extractor whose weights are fixed.

    Args:
      key: see `resolve_extractor`.
      num_levels: of the images: level 0 is black and the last one white.
      weights: "inception": file of its weights; "tfgan": folder or URL of a SavedModel; empty: the defaults.
    """
    if key == "classifier":
        raise UserError("the extractor 'classifier' has no fixed weights; build_feature_extractor trains it on data")
    checks.one_of("eval.extractor", key, KEYS)
    if key == "efficientnet_lite0":
        return efficientnet.build_efficientnet(num_levels=num_levels)
    if key == "tfgan":
        return tfgan.build_tfgan(num_levels=num_levels, weights=weights)
    return inception.build_inception(num_levels=num_levels, weights=weights)
