"""Data sets that tensorflow-datasets has prepared as ArrayRecord files; they are read without TensorFlow.

Here are those that the 2021 code knew, prepared as it did; any others are in `tfds_any.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from errors import UserError
from sources import resize
from sources.base import AS_STORED
from sources.tfds_open import NOT_PREPARED, not_prepared, open_builder
from storage import guards
from storage.files import content_hash

MODES: dict[int | None, str] = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by the number of channels


def unchanged(image: Any) -> Any:
    """Returns an image that needs no decoding or preparation."""
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
      fingerprint: name, version, split and its size, and what `prepare` does.
      decode: makes a stored image of what a record holds.
      image: name of the image in a record.
      label: name of the class in a record.
      stamp: text that changes when the files of the split do; empty: nothing is kept in the cache.
    """

    records: Any
    num_classes: int
    prepare: Callable[[Any], np.ndarray] = unchanged
    num_levels: int = 256
    preparation: str = AS_STORED
    fingerprint: str = ""
    decode: Callable[[Any], Any] = unchanged
    image: str = "image"
    label: str = "label"
    stamp: str = ""

    @functools.cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that decode."""
        return ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.records)

    def stored(self, indices: np.ndarray, name: str) -> list[Any]:
        """Reads one feature of records as it is stored; an image encoded."""
        return [record[name] for record in self.records.__getitems__(indices.tolist())]

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C].

        Raises:
          UserError: naming the first that cannot be prepared.
        """
        stored = self.stored(indices, self.image)
        return np.stack(list(self.pool.map(self._prepared, indices.tolist(), stored)))

    def _prepared(self, index: int, image: Any) -> np.ndarray:
        try:
            return self.prepare(self.decode(image))
        except UserError as error:
            raise UserError(f"image {index} of {self.fingerprint or 'the data set'} cannot be used: {error}") from error

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n].

        Raises:
          UserError: if the images carry none.
        """
        if not self.num_classes:
            raise UserError("the images of this data set carry no labels")
        return np.array(self.stored(indices, self.label))


# --- opening ---------------------------------------------------------------------------------------------------------


def decode_stored(data: bytes, channels: int | None) -> np.ndarray:
    """Decodes an image of 8 bits, uint8[H, W, C], with Pillow.

    TFDS would take OpenCV where that is installed, whose JPEGs differ by a level here and there.

    Args:
      data: content of a file.
      channels: C, if TFDS states it.
    """

    def convert(image: Image.Image) -> np.ndarray:
        mode = MODES.get(channels, image.mode)
        return np.asarray(image if image.mode == mode else image.convert(mode))

    levels = guards.read_picture(data, convert)
    return levels.reshape(*levels.shape[:2], -1)


def find_feature(features: Any, kind: str) -> list[str]:
    """Returns the names of the features of this kind, a class of `tfds.features`, in their order."""
    import tensorflow_datasets as tfds  # lazily, see `open_builder`

    return sorted(name for name, feature in features.items() if type(feature) is getattr(tfds.features, kind))


def open_split(builder: Any, split: str, name: str, path: str = "") -> TfdsSource:
    """Opens one split as it is stored.

    Args:
      builder: of the data set.
      split: its name in TFDS.
      name: of the data set, for messages.
      path: TFDS data folder, for messages.

    Raises:
      UserError: if it is not one image that a record holds.
      UserError: if the split is not prepared as ArrayRecord files.
    """
    import tensorflow_datasets as tfds  # lazily, see `open_builder`

    features = builder.info.features
    images, labels = find_feature(features, "Image"), find_feature(features, "ClassLabel")
    if len(images) != 1:
        raise UserError(
            f"the records of {name!r} hold {len(images)} images ({', '.join(images) or ', '.join(sorted(features))}); "
            "expected one: prepare a data set of one's own with the one to learn, or use data.dataset='folder'"
        )
    try:
        records = builder.as_data_source(split=split, decoders={images[0]: tfds.decode.SkipDecoding()})
        size = builder.info.splits[split]
    except NOT_PREPARED as error:
        raise not_prepared(name, path) from error
    num_classes = features[labels[0]].num_classes if len(labels) == 1 else 0
    if num_classes and len(records) and records.__getitems__([0])[0][labels[0]] < 0:
        num_classes = 0  # TFDS's sign of a test split whose labels are secret
    return TfdsSource(
        records,
        num_classes,
        fingerprint=f"{builder.info.full_name} {split} ({size.num_examples:,} images, {int(size.num_bytes):,} bytes)",
        decode=functools.partial(decode_stored, channels=features[images[0]].shape[-1]),
        image=images[0],
        label=labels[0] if num_classes else "",
        stamp=_stamp(Path(builder.data_path), split),
    )


def _stamp(folder: Path, split: str) -> str:
    """Returns a hash of names, sizes and times of change of the files of a split."""
    status = [(path.name, path.stat()) for path in sorted(folder.glob(f"*-{split}.*"))]
    return content_hash(str(folder), *(f"{name} {each.st_size} {each.st_mtime_ns}" for name, each in status))


def load_tfds(name: str, split: str, path: str = "") -> TfdsSource:
    """Opens a data set that tensorflow-datasets has prepared, as it is stored.

    Args:
      name: of the TFDS builder, such as "cifar10".
      split: of that builder, such as "train".
      path: TFDS data folder; empty: $TFDS_DATA_DIR, or ~/tensorflow_datasets.

    Raises:
      UserError: if the data are not prepared there as ArrayRecord files.
    """
    return open_split(open_builder(name, path), split, name, path)


# --- the data sets of the 2021 code ----------------------------------------------------------------------------------


def with_rule(source: TfdsSource, prepare: Callable[[Any], np.ndarray], rule: str) -> TfdsSource:
    """Returns a source whose images are prepared, by a rule that words describe."""
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
      UserError: if the data are not prepared.
    """
    source = load_tfds("celeb_a", _test_is_validation(split), path)
    prepare = lambda image: resize.nearest_level(resize.celeba(image, image_size))  # noqa: E731
    return with_rule(source, prepare, f"central {resize.CELEBA_CROP} pixels, antialiased bilinear to {image_size}")


def scene_name(category: str) -> str:
    """Returns the name that TFDS has for one scene of LSUN.

    Raises:
      UserError: if there is no such scene.
    """
    import tensorflow_datasets as tfds  # lazily, see `open_builder`

    known = sorted(tfds.builder_cls("lsun").builder_configs)
    if category not in known:
        raise UserError(f"data.category={category!r} is no scene of LSUN; set it to one of {', '.join(known)}")
    return f"lsun/{category}"


def load_lsun(category: str, split: str, image_size: int, path: str = "") -> TfdsSource:
    """Opens one scene of LSUN, made square and resized.

    Args:
      category: scene, such as "bedroom" or "church_outdoor".
      split: "train", or "test" for the validation split, which has 300 images of each scene.
      image_size: height and width to resize to, in pixels; 128 has a recipe of its own.
      path: as for `load_tfds`.

    Raises:
      UserError: if there is no such scene.
      UserError: if the data are not prepared.
    """
    source = load_tfds(scene_name(category), _test_is_validation(split), path)
    recipe = resize.lsun_128 if image_size == 128 else resize.lsun
    rule = "smaller side antialiased bilinear, then central" if image_size == 128 else "central square, then bicubic"
    prepare = lambda image: resize.nearest_level(recipe(image, image_size))  # noqa: E731
    return with_rule(source, prepare, f"{rule}, to {image_size}")
