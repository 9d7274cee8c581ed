"""Reference networks of the 2021 code: their configurations, and the rule by which their parameters are made."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from configs import base
from configs.settings import image_shape
from models import create_model

GOLDEN = Path(__file__).parent / "golden"


def config_of(settings: Mapping[str, Any]) -> ConfigDict:
    """Returns the default configuration with dotted or nested settings of the 2021 code, where we still have them."""
    config = base.get_config()
    nested = {k: v for k, v in settings.items() if isinstance(v, Mapping)}
    dotted = {f"{room}.{key}": value for room, values in nested.items() for key, value in values.items()}
    dotted |= {key: value for key, value in settings.items() if "." in key}
    for name, value in dotted.items():
        room, key = name.split(".")
        if key in config[room]:
            config[room][key] = type(config[room][key])(value)
    return config


def model_and_shape(config: ConfigDict) -> tuple[nn.Module, tuple[int, int, int]]:
    """Returns the configured network and the shape (H, W, C) of its images."""
    return create_model(config), image_shape(config)


def _to_bfloat16(value: np.ndarray) -> np.ndarray:
    bits = value.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def reference_parameter(path: str, shape: tuple[int, ...], seed: int, fill: str = "f16") -> np.ndarray:
    """Returns the reference value of the parameter with an original path, rounded through float16 or bfloat16."""
    generator = np.random.RandomState((zlib.crc32(path.encode()) + seed) % 2**32)
    z, name = generator.standard_normal(shape), path.split("/")[-1]
    if name == "embedding":  # gamma | alpha | beta, or the first two
        value = 0.1 * z
        value[:, : 2 * (shape[1] // 3) if shape[1] % 3 == 0 else shape[1]] += 1
    elif name in ("scale", "gamma", "alpha"):
        value = 1 + 0.1 * z
    elif len(shape) >= 2:
        value = z / np.sqrt(np.prod(shape[:-1]))
    else:
        value = z if name == "W" else 0.1 * z
    return _to_bfloat16(value) if fill == "bf16" else value.astype(np.float16).astype(np.float32)


class ReferenceNetwork:
    """A shrunk network of the 2021 code: `arrays` holds x, labels, output, cotangent and gradients."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / "models" / f"{name}.npz") as file:
            self.arrays = {
                key: array.astype(np.float32) if array.dtype == np.float16 else array for key, array in file.items()
            }
        self.fill = str(self.arrays.get("fill", "f16"))

    @property
    def config(self) -> ConfigDict:
        """Configuration of the network."""
        settings = json.loads(str(self.arrays["config"]))
        settings["model"].pop("num_classes", None)  # of NCSN: its noise levels, which we know by num_scales
        return config_of(settings)

    def parameter(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the value of the parameter with an original path."""
        return reference_parameter(path, shape, int(self.arrays["seed"]), self.fill)

    def gradient_norms(self) -> dict[str, float]:
        """Returns the norm of the gradient of each parameter, by original path."""
        return dict(zip(self.arrays["grad_norm_paths"].tolist(), self.arrays["grad_norms"].tolist(), strict=True))


class ReferenceLayers:
    """The building blocks of the 2021 code: inputs and outputs of each case, and the rule of its parameters."""

    def __init__(self) -> None:
        with np.load(GOLDEN / "layers_modules.npz") as file:
            self.arrays = {
                key: array.astype(np.float32) if array.dtype == np.float16 else array for key, array in file.items()
            }
        self.seeds: dict[str, tuple[int, str]] = json.loads(str(self.arrays.pop("seeds")))

    def __getitem__(self, key: str) -> np.ndarray:
        """Returns an array by "<case>/<name>"."""
        return self.arrays[key]

    def cases(self) -> set[str]:
        """Returns the names of all cases."""
        return {key.rpartition("/")[0] for key in self.arrays}

    def inputs(self, case: str) -> list[Any]:
        """Returns what the layer of a case is called with: its image, or list of images, and a second argument."""
        names = [name for name in ("x0", "x1") if f"{case}/{name}" in self.arrays]
        x = [self[f"{case}/{name}"] for name in names] if names else self[f"{case}/x"]
        return [x, self[f"{case}/arg1"]] if f"{case}/arg1" in self.arrays else [x]

    def parameter(self, case: str, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the value of a parameter of a case, by its original path."""
        return reference_parameter(path, shape, *self.seeds[case])
