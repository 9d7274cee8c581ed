"""The extractor "inception"."""

from __future__ import annotations

from pathlib import Path

from files import cache_folder

WEIGHTS = "inception_2015.npz"  # in the cache's folder of weights


def weights_path(weights: str = "") -> Path:
    """Returns where the weights are looked for: the file that is named, or where --mode convert_weights puts it."""
    return Path(weights) if weights else cache_folder("weights") / WEIGHTS
