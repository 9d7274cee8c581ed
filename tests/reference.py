"""Reference networks of the 2021 code: their configurations, and the rule by which their parameters are made."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import base

GOLDEN = Path(__file__).parent / "golden"


def config_of(settings: Mapping[str, Any]) -> ConfigDict:
    """Returns the default configuration with dotted or nested settings of the 2021 code, where we still have them."""
    config = base.get_config()
    nested = {k: v for k, v in settings.items() if isinstance(v, Mapping)}
    dotted = {f"{room}.{key}": value for room, values in nested.items() for key, value in values.items()}
    dotted |= {key: value for key, value in settings.items() if key not in nested}
    for name, value in dotted.items():
        room, key = name.split(".")
        if key in config[room]:
            config[room][key] = type(config[room][key])(value)
    return config


def reference_parameter(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Returns the reference value of the parameter with an original path."""
    generator = np.random.RandomState((zlib.crc32(path.encode()) + seed) % 2**32)
    z, name = generator.standard_normal(shape), path.split("/")[-1]
    if name in ("scale", "gamma", "alpha"):
        value = 1 + 0.1 * z
    elif len(shape) >= 2:
        value = z / np.sqrt(np.prod(shape[:-1]))
    else:
        value = z if name == "W" else 0.1 * z
    return value.astype(np.float16).astype(np.float32)


class ReferenceNetwork:
    """A shrunk network of the 2021 code: `arrays` holds x, labels, output, cotangent and gradients."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / "models" / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.config = config_of(json.loads(str(self.arrays["config"])))

    def parameter(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the value of the parameter with an original path."""
        return reference_parameter(path, shape, int(self.arrays["seed"]))

    def gradient_norms(self) -> dict[str, float]:
        """Returns the norm of the gradient of each parameter, by original path."""
        return dict(zip(self.arrays["grad_norm_paths"].tolist(), self.arrays["grad_norms"].tolist(), strict=True))
