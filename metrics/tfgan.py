"""The extractor "tfgan": features by tensorflow_gan with a TF-Hub SavedModel, as in the 2021 code.

TensorFlow is imported when such an extractor is built, in the same process.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, UInt8

from checks import require_tensorflow
from errors import UserError
from metrics.images import RGB, apply_in_batches, as_rgb, check_photographs
from storage.files import content_hash, local_path

TFHUB_URL = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
BATCH_SIZE = 64
PROBE_SIDE = 299  # pixels of the image that probes the outputs of a SavedModel
RESIZE = "by the SavedModel"
OUTPUTS = ("pool_3", "logits")  # features and class scores


@functools.cache
def _import_tfgan() -> tuple[Any, Any]:
    """Return TensorFlow and tensorflow_gan's evaluation, which alone does not import on TensorFlow >= 2.16.

    Its package subclasses estimators, which TensorFlow no longer has; so empty packages replace the two levels above
    tensorflow_gan.python.eval, the only part needed here. That and TensorFlow Hub need Keras 2.
    """
    folder = require_tensorflow("tensorflow_gan", "the extractor 'tfgan'")
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name, path in (("tensorflow_gan", folder), ("tensorflow_gan.python", folder / "python")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
    tensorflow = importlib.import_module("tensorflow")
    for device in tensorflow.config.list_physical_devices("GPU"):
        tensorflow.config.experimental.set_memory_growth(device, True)  # leave memory for JAX
    return tensorflow, importlib.import_module("tensorflow_gan.python.eval")


def _find_model(handle: str) -> Path:
    """Return the folder of a SavedModel; TensorFlow Hub downloads a URL that it has not cached."""
    _import_tfgan()
    if "://" in handle and not handle.startswith("file:"):
        try:
            return Path(importlib.import_module("tensorflow_hub").resolve(handle))
        except OSError as error:
            raise UserError(
                f"TensorFlow Hub cannot get {handle}: {error}; download it where there is a network, and give its "
                "unpacked folder as the weights of the extractor 'tfgan'"
            ) from error
    handle = str(local_path(handle, "eval.weights"))
    if not (Path(handle) / "saved_model.pb").exists():
        raise UserError(f"{handle} is not a SavedModel: it has no saved_model.pb; the extractor 'tfgan' needs one")
    return Path(handle)


def _folder_hash(folder: Path) -> str:
    """Return the SHA-256 of the names and the content of the files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [(str(path.relative_to(folder)), np.frombuffer(path.read_bytes(), np.uint8)) for path in files]
    return content_hash(*(part for pair in parts for part in pair))


@dataclasses.dataclass(frozen=True)
class TfganExtractor:
    """Features by tensorflow_gan and a SavedModel (see `extractors.Extractor`)."""

    name: str
    hash: str
    num_features: int
    num_levels: int  # of the images; level 0 is black, the last one white
    run: Callable[[np.ndarray], tuple[Any, Any]]  # maps images in [-1, 1] to (features, logits)

    key: ClassVar[str] = "tfgan"
    resize: ClassVar[str] = RESIZE
    accuracy: ClassVar[float | None] = None  # None: not measured here

    def __call__(
        self, levels: UInt8[np.ndarray, "N H W C"]
    ) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]:
        check_photographs(self.key, levels, self.num_levels)
        middle = np.float32((self.num_levels - 1) / 2)
        apply = lambda batch: self.run((as_rgb(batch).astype(np.float32) - middle) / middle)  # noqa: E731
        return apply_in_batches(apply, levels, BATCH_SIZE)


def _load(folder: Path) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Load a SavedModel and return the function by which tensorflow_gan applies it."""
    tensorflow, tfgan = _import_tfgan()
    model = importlib.import_module("tensorflow_hub").load(str(folder))

    def run(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        outputs = tfgan.run_classifier_fn(tensorflow.constant(x), model)
        missing = [name for name in OUTPUTS if name not in outputs] if isinstance(outputs, Mapping) else OUTPUTS
        if missing:
            raise UserError(f"the SavedModel {folder} has no output {missing[0]}; the extractor 'tfgan' needs it")
        features, logits = (np.asarray(outputs[name]).reshape(len(x), -1) for name in OUTPUTS)
        return features, logits

    return run


def build_tfgan(*, num_levels: int, weights: str = "") -> TfganExtractor:
    """Build the extractor; this imports TensorFlow.

    Args:
      num_levels: of the images.
      weights: folder or URL of a SavedModel that maps images in [-1, 1] to "pool_3" and "logits"; empty: TF-GAN's own,
        which TensorFlow Hub downloads unless it is cached.
    """
    handle = weights or TFHUB_URL
    folder = _find_model(handle)
    run = _load(folder)
    features, _ = run(np.zeros((1, PROBE_SIDE, PROBE_SIDE, RGB), np.float32))
    return TfganExtractor(
        name=f"tensorflow_gan with {handle}",
        hash=_folder_hash(folder),
        num_features=features.shape[1],
        num_levels=num_levels,
        run=run,
    )
