"""Feature extractors by name: what turns images into the features and class scores that metrics compare.

Metrics of different extractors cannot be compared, hence key and hash. docs/extractors.md says what each network is
and how to get its weights.
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
    """Turns images into features and class scores."""

    @property
    def key(self) -> str:
        """Which of KEYS it is."""
        ...

    @property
    def name(self) -> str:
        """What it is, in words, for the report."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of its parameters, in hex."""
        ...

    @property
    def accuracy(self) -> float | None:
        """Share of held-out images that it classifies rightly; None if it is not known."""
        ...

    @property
    def num_features(self) -> int:
        """D."""
        ...

    @property
    def resize(self) -> str:
        """Rule by which images are resized, in words; "none" if they are not."""
        ...

    def __call__(
        self, levels: UInt8[np.ndarray, "N H W C"]
    ) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]:
        """Returns (features, logits) of any number of images given as levels, float64."""
        ...


def resolve_extractor(name: str, *, channels: int, weights: str = "") -> str:
    """Returns the key of the extractor that a name stands for.

    "auto" is, for colour images, the Inception network if its weights are there, otherwise EfficientNet-Lite0 if its
    package is, otherwise the classifier; for any other images, which those networks were not trained on, the
    classifier.

    Args:
      name: "auto" or one of KEYS.
      channels: of the images.
      weights: file of the Inception network's weights; empty: where --mode convert_weights puts them.

    Raises:
      UserError: if the name is unknown, or the network takes no images of so many channels.
    """
    checks.one_of("eval.extractor", name, (AUTO, *KEYS))
    if name not in (AUTO, "classifier"):
        check_channels(name, channels)
    if name != AUTO:
        return name
    if channels != RGB:
        return "classifier"
    if weights or inception.weights_path().exists():  # a file that was named must be there: building says so
        return "inception"
    return "efficientnet_lite0" if efficientnet.is_installed() else "classifier"


def build_extractor(key: str, *, num_levels: int, weights: str = "") -> Extractor:
    """Builds an extractor whose weights are fixed.

    Args:
      key: of it; see `resolve_extractor`.
      num_levels: of the images: 0 is black and the last level white.
      weights: "inception": file of its weights; "tfgan": folder or URL of a SavedModel; empty: the usual ones.

    Raises:
      UserError: if the key has no fixed weights, or the weights are damaged or another network's.
      UserError: if weights are missing; it says how to get them.
    """
    if key == "classifier":
        raise UserError("the extractor 'classifier' has no fixed weights; build_feature_extractor trains it on data")
    checks.one_of("eval.extractor", key, KEYS)
    if key == "efficientnet_lite0":
        return efficientnet.build_efficientnet(num_levels=num_levels)
    if key == "tfgan":
        return tfgan.build_tfgan(num_levels=num_levels, weights=weights)
    return inception.build_inception(num_levels=num_levels, weights=weights)
