"""Data sets that tensorflow-datasets has prepared as ArrayRecord files; they are read without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sources import resize
from sources.base import AS_STORED


def unchanged(image: np.ndarray) -> np.ndarray:
    """Returns an image that needs no preparation."""
    return image


@dataclass(frozen=True)
class TfdsSource:
    """One split of a prepared data set.

    Attributes:
      records: of TFDS, with random access to lists of indices.
      num_classes: of the labels; 0 if there are none.
      prepare: makes an image of the size that the network expects from a stored one, levels from levels.
      num_levels: that a value can take.
      preparation: what `prepare` does, in words.
      fingerprint: name, version and split, and what `prepare` does.
    """

    records: Any
    num_classes: int
    prepare: Callable[[np.ndarray], np.ndarray] = unchanged
    num_levels: int = 256
    preparation: str = AS_STORED
    fingerprint: str = ""

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.records)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C]."""
        return np.stack([self.prepare(record["image"]) for record in self.records.__getitems__(indices.tolist())])

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n].

        Raises:
          ValueError: if the images carry none.
        """
        if not self.num_classes:
            raise ValueError("the images of this data set carry no labels")
        return np.array([record["label"] for record in self.records.__getitems__(indices.tolist())])


def load_tfds(name: str, split: str, path: str = "") -> TfdsSource:
    """Opens a data set that tensorflow-datasets has prepared.

    Args:
      name: of the TFDS builder, such as "cifar10".
      split: of that builder, such as "train".
      path: TFDS data folder; empty: $TFDS_DATA_DIR, or ~/tensorflow_datasets.

    Raises:
      FileNotFoundError: if the data are not prepared there as ArrayRecord files.
    """
    import tensorflow_datasets as tfds  # lazily: half a second, and the embedded data need none of it

    folder = path or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    # download=False: without it TFDS retries a machine that has no network for minutes.
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(folder), file_format="array_record")
        records = builder.as_data_source(split=split)
    except (AssertionError, KeyError, ValueError, NotImplementedError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"data set {name!r} is not prepared as ArrayRecord files in {folder}; prepare it once, where TensorFlow "
            f"is installed: tfds build {name} --file_format=array_record --data_dir={folder}"
        ) from error
    features = builder.info.features
    num_classes = features["label"].num_classes if "label" in features else 0
    return TfdsSource(records, num_classes, fingerprint=f"{builder.info.full_name} {split}")


def _prepared(source: TfdsSource, prepare: Callable[[np.ndarray], np.ndarray], rule: str) -> TfdsSource:
    return replace(source, prepare=prepare, preparation=rule, fingerprint=f"{source.fingerprint} {rule}")


def _test_is_validation(split: str) -> str:
    """Returns the TFDS split that the 2021 code evaluated on."""
    return "validation" if split == "test" else split


def load_celeba(split: str, image_size: int, path: str = "") -> TfdsSource:
    """Opens CelebA, cropped to the face and resized.

    Args:
      split: "train", or "test" for the validation split, which the 2021 code evaluated on.
      image_size: height and width to resize to, in pixels.
      path: as for `load_tfds`.

    Raises:
      FileNotFoundError: if the data are not prepared.
    """
    source = load_tfds("celeb_a", _test_is_validation(split), path)
    prepare = lambda image: resize.nearest_level(resize.celeba(image, image_size))  # noqa: E731
    return _prepared(source, prepare, f"central {resize.CELEBA_CROP} pixels, antialiased bilinear to {image_size}")


def load_lsun(category: str, split: str, image_size: int, path: str = "") -> TfdsSource:
    """Opens one scene of LSUN, made square and resized.

    Args:
      category: scene, such as "bedroom" or "church_outdoor".
      split: "train", or "test" for the validation split, which has 300 images of each scene.
      image_size: height and width to resize to, in pixels; 128 has a recipe of its own.
      path: as for `load_tfds`.

    Raises:
      ValueError: if there is no such scene.
      FileNotFoundError: if the data are not prepared.
    """
    import tensorflow_datasets as tfds  # lazily, see `load_tfds`

    known = sorted(tfds.builder_cls("lsun").builder_configs)
    if category not in known:
        raise ValueError(f"data.category={category!r} is no scene of LSUN; set it to one of {', '.join(known)}")
    source = load_tfds(f"lsun/{category}", _test_is_validation(split), path)
    recipe = resize.lsun_128 if image_size == 128 else resize.lsun
    rule = "smaller side antialiased bilinear, then central" if image_size == 128 else "central square, then bicubic"
    prepare = lambda image: resize.nearest_level(recipe(image, image_size))  # noqa: E731
    return _prepared(source, prepare, f"{rule}, to {image_size}")
