"""Data sets that tensorflow-datasets (TFDS) has prepared as ArrayRecord files, read without TensorFlow.

Any of them by name, the ones of the 2021 code with its preparation, and decoded images kept in the cache: reading an
image from there takes 1 µs, decoding it 0.4 ms.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from errors import UserError
from sources import cache, resize
from sources.base import AS_STORED, ArraySource, Selection, Source, held_out
from sources.folder import Rules
from sources.pictures import decode_picture, fit_picture, to_levels
from storage import untrusted
from storage.files import content_hash, local_path

PREFIX = "tfds:"  # of `data.dataset`, before the TFDS name
TEST_SPLITS = ("test", "validation")  # in order of preference
MODES: dict[int | None, str] = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by the number of channels
IMAGES, LABELS = "images.npy", "labels.npy"  # files of a cached split
VERSION = "1"  # part of the cache's keys: increase it when what is cached changes
# Errors of TFDS when data are missing, or not in files that can be read by index.
NOT_PREPARED = (AssertionError, KeyError, ValueError, NotImplementedError, FileNotFoundError)
OTHER_FORMAT = ("File format is already set", "does not match the file formats")
OWN_CLASSES = "tensorflow_datasets."


# --- opening a data set ----------------------------------------------------------------------------------------------


class NotPreparedError(UserError):
    """A data set that is not prepared yet."""


def data_folder(path: str = "") -> Path:
    """Return the TFDS data folder: `path`, $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return local_path(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "data.path or TFDS_DATA_DIR")


def _not_prepared(name: str, path: str) -> NotPreparedError:
    return NotPreparedError(
        f"data set {name!r} is not prepared as ArrayRecord files in {data_folder(path)}; prepare it once, where "
        "TensorFlow is installed: python main.py --config CONFIG --mode prepare"
        + (f" --config.data.path={path}" if path else "")
    )


def _class_names(stored: Any) -> Iterator[object]:
    """Yield the class names in a features.json, in TFDS's formats of today and of before 2021."""
    if isinstance(stored, list):
        for each in stored:
            yield from _class_names(each)
    if not isinstance(stored, dict):
        return
    keys = {"pythonClassName", "python_class_name"} | ({"type"} if "content" in stored else set())
    for key, value in stored.items():
        if key in keys:
            yield value
        else:
            yield from _class_names(value)


def _check_features(folder: Path) -> None:
    """Allow only TFDS's own feature classes: TFDS would import any module that features.json names."""
    for path in sorted(folder.rglob("features.json")):
        for name in _class_names(untrusted.read_json(path)):
            if not str(name).startswith(OWN_CLASSES):
                raise UserError(
                    f"{path} names the class {name!r}, which would be imported; only those of tensorflow-datasets are "
                    "allowed: prepare the data set again with these"
                )


def open_builder(name: str, path: str = "") -> Any:
    """Open a prepared data set and return its TFDS builder, with `info` and `as_data_source`.

    Args:
      name: TFDS name, such as "cifar10" or "imagenette/320px"; TFDS need not know it if it is prepared.
      path: TFDS data folder; empty: see `data_folder`.

    Raises:
      NotPreparedError: if it is not prepared.
      UserError: if there is no such data set, configuration or version.
    """
    import tensorflow_datasets as tfds  # lazily: half a second, and the embedded data need none of it

    folder, base_name = data_folder(path), re.split("[/:]", name)[0]
    _check_features(folder / base_name)
    try:
        builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
        prepared = bool(builder.info.splits)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(base_name, tfds.list_builders(with_community_datasets=False), 1)
        raise UserError(
            f"tensorflow-datasets {tfds.__version__} has no data set {name!r}, and {folder} has none of that name; "
            f"{f'did you mean {near[0]}? ' if near else ''}See https://www.tensorflow.org/datasets/catalog/overview"
        ) from error
    except NOT_PREPARED as error:
        if any(text in str(error) for text in OTHER_FORMAT):
            raise UserError(
                f"data set {name!r} is prepared in {folder}, but not as ArrayRecord files, so it cannot be read by "
                "index; prepare it in another folder: --mode prepare --config.data.path=FOLDER"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"tensorflow-datasets cannot open {name!r} of {folder}: {reason}") from error
    if not prepared:
        raise _not_prepared(name, path)
    return builder


# --- one split -------------------------------------------------------------------------------------------------------


def unchanged(image: Any) -> Any:
    """Return an image that needs no decoding or preparation."""
    return image


@dataclass(frozen=True)
class TfdsSource(Source):
    """One split of a prepared data set."""

    records: Any  # of TFDS, with random access to lists of indices
    num_classes: int = 0
    prepare: Callable[[Any], np.ndarray] = unchanged  # makes an image for the network from a stored one
    num_levels: int = 256
    preparation: str = AS_STORED
    fingerprint: str = ""  # name, version, split and its size, and what `prepare` does
    decode: Callable[[Any], Any] = unchanged  # makes a stored image from a record's field
    image: str = "image"  # name of the image in a record
    label: str = "label"  # name of the class in a record
    stamp: str = ""  # text that changes when the files of the split change; empty: do not cache

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self.records)

    def stored(self, indices: np.ndarray, name: str) -> list[Any]:
        """Read one field of records as it is stored; an image is still encoded."""
        return [record[name] for record in self.records.__getitems__(indices.tolist())]

    def images(self, indices: np.ndarray) -> np.ndarray:
        def prepare(index: int, image: Any) -> np.ndarray:
            try:
                return self.prepare(self.decode(image))
            except UserError as error:
                name = self.fingerprint or "the data set"
                raise UserError(f"image {index} of {name} cannot be used: {error}") from error

        return np.stack(list(self._pool.map(prepare, indices.tolist(), self.stored(indices, self.image))))

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return np.array(self.stored(indices, self.label)) if self.num_classes else super().labels(indices)


def with_rule(source: TfdsSource, prepare: Callable[[Any], np.ndarray], rule: str) -> TfdsSource:
    """Return a source whose images are prepared by a rule, also given in words."""
    return replace(source, prepare=prepare, preparation=rule, fingerprint=f"{source.fingerprint} {rule}")


def decode_stored(data: bytes, channels: int | None) -> np.ndarray:
    """Decode an 8-bit image with Pillow, uint8[H, W, C]; `channels` is C if TFDS states it.

    TFDS would use OpenCV where that is installed, whose JPEGs differ by a level here and there.
    """

    def convert(image: Image.Image) -> np.ndarray:
        mode = MODES.get(channels, image.mode)
        return np.asarray(image if image.mode == mode else image.convert(mode))

    levels = untrusted.read_picture(data, convert)
    return levels.reshape(*levels.shape[:2], -1)


def _stamp(folder: Path, split: str) -> str:
    """Hash the names, sizes and modification times of the files of a split."""
    status = [(path.name, path.stat()) for path in sorted(folder.glob(f"*-{split}.*"))]
    return content_hash(str(folder), *(f"{name} {each.st_size} {each.st_mtime_ns}" for name, each in status))


def open_split(builder: Any, split: str, name: str, path: str = "") -> TfdsSource:
    """Open one split as it is stored; `split` is its TFDS name, `name` and `path` are for messages."""
    import tensorflow_datasets as tfds  # lazily, see `open_builder`

    def find(kind: type) -> list[str]:
        return sorted(name for name, feature in features.items() if type(feature) is kind)

    features = builder.info.features
    images, labels = find(tfds.features.Image), find(tfds.features.ClassLabel)
    if len(images) != 1:
        raise UserError(
            f"the records of {name!r} hold {len(images)} images ({', '.join(images) or ', '.join(sorted(features))}); "
            "expected one: prepare your own data set with the image to learn, or use data.dataset='folder'"
        )
    try:
        records = builder.as_data_source(split=split, decoders={images[0]: tfds.decode.SkipDecoding()})
        size = builder.info.splits[split]
    except NOT_PREPARED as error:
        raise _not_prepared(name, path) from error
    num_classes = features[labels[0]].num_classes if len(labels) == 1 else 0
    if num_classes and len(records) and records.__getitems__([0])[0][labels[0]] < 0:
        num_classes = 0  # how TFDS marks a test split whose labels are secret
    return TfdsSource(
        records,
        num_classes,
        fingerprint=f"{builder.info.full_name} {split} ({size.num_examples:,} images, {int(size.num_bytes):,} bytes)",
        decode=functools.partial(decode_stored, channels=features[images[0]].shape[-1]),
        image=images[0],
        label=labels[0] if num_classes else "",
        stamp=_stamp(Path(builder.data_path), split),
    )


# --- cache -----------------------------------------------------------------------------------------------------------


def keep(source: TfdsSource, shape: tuple[int, int, int], cache_gib: float) -> Source:
    """Return the images of a source memory-mapped from the cache; fill the cache first if needed.

    A source larger than `cache_gib` GiB, or whose images do not have `shape` (H, W, C), is returned as it is.
    """
    if not source.stamp or not cache.fits(len(source), shape, cache_gib):
        return source
    if source.images(np.array([0])).shape[1:] != shape:
        return source

    def fill(folder: Path) -> None:
        read = lambda start, stop: source.images(np.arange(start, stop))  # noqa: E731
        cache.write_images(folder / IMAGES, len(source), shape, read)
        labels = source.labels(np.arange(len(source))) if source.num_classes else np.zeros(len(source))
        np.save(folder / LABELS, labels.astype(np.int64))

    folder = cache.prepared_folder(content_hash(f"tfds {VERSION}", source.fingerprint, source.stamp), fill)
    levels, labels = cache.map_images(folder / IMAGES), np.load(folder / LABELS, allow_pickle=False)
    return ArraySource(
        levels, labels, source.num_levels, source.num_classes, source.preparation, content=source.fingerprint
    )


# --- any data set by name --------------------------------------------------------------------------------------------


def choose_splits(known: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Choose the TFDS splits for training and test; the same one twice if part of it is to be held out."""
    train = "train" if "train" in known else next(iter(known)) if len(known) == 1 else ""
    if not train:
        raise UserError(f"{name!r} has no split 'train', but {', '.join(sorted(known))}: which to train on is unknown")
    return train, next((each for each in TEST_SPLITS if each in known and each != train), train)


def _fitted(source: TfdsSource, rules: Rules) -> TfdsSource:
    """Return a source whose images are brought to the configured shape and levels."""

    def prepare(data: bytes) -> np.ndarray:
        picture = decode_picture(data, "", keep_alpha=rules.fit.keeps_alpha)
        return to_levels(fit_picture(picture, rules.fit), rules.num_levels)

    rule = rules.fit.rule + ("" if rules.num_levels == 256 else f", {rules.num_levels} levels")
    return replace(with_rule(source, prepare, rule), decode=unchanged, num_levels=rules.num_levels)


def _digests(source: TfdsSource) -> np.ndarray:
    """Return the SHA-256 of each image as it is stored, in hex; computed once."""

    def compute() -> str:
        batches = np.array_split(np.arange(len(source)), max(len(source) // 1024, 1))
        stored = (image for batch in batches for image in source.stored(batch, source.image))
        return "\n".join(hashlib.sha256(image).hexdigest() for image in stored)

    return np.array(cache.remembered(content_hash("tfds digests", source.stamp), compute).split("\n"))


def load_any(name: str, split: str, path: str, rules: Rules) -> Source:
    """Open one split of any image data set that TFDS has prepared.

    The splits are TFDS's "train" and "test", or "validation" without a "test". With neither, part of the training
    split is held out by the content of its images.

    Args:
      name: TFDS name, such as "oxford_flowers102" or "imagenette/320px".
      split: "train" or "test".
      path: TFDS data folder; empty: see `data_folder`.
      rules: how images of another size or type are prepared.
    """
    builder = open_builder(name, path)
    train, test = choose_splits(builder.info.splits, name)
    stored = open_split(builder, test if split == "test" else train, name, path)
    feature = builder.info.features[stored.image]
    if feature.np_dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"the images of {name!r} have values of type {np.dtype(feature.np_dtype)}; expected 8 or 16 bits"
        )
    is_ready = tuple(feature.shape) == rules.fit.shape and feature.np_dtype == np.uint8 and rules.num_levels == 256
    kept = keep(stored if is_ready else _fitted(stored, rules), rules.fit.shape, rules.cache_gib)
    if split == "train":
        logging.info(
            "%s: trains on its split %r, tests on %s, %s",
            builder.info.full_name,
            train,
            repr(test) if test != train else f"data.test_share={rules.test_share:g} of the same, held out",
            f"{stored.num_classes} classes ({stored.label})" if stored.num_classes else "no labels",
        )
    if test != train:
        return kept
    chosen = held_out(_digests(stored), rules.test_share, name)
    return Selection(kept, np.flatnonzero(chosen if split == "test" else ~chosen))


# --- the data sets of the 2021 code ----------------------------------------------------------------------------------


def load_tfds(name: str, split: str, path: str = "") -> TfdsSource:
    """Open a prepared data set as it is stored; `split` is its TFDS name."""
    return open_split(open_builder(name, path), split, name, path)


def _original_split(split: str) -> str:
    """Return the TFDS split that the 2021 code used: it evaluated CelebA and LSUN on "validation"."""
    return "validation" if split == "test" else split


def load_celeba(split: str, image_size: int, path: str = "") -> TfdsSource:
    """Open CelebA, cropped to the face and resized to `image_size` pixels; "test" is the validation split."""
    source = load_tfds("celeb_a", _original_split(split), path)
    prepare = lambda image: resize.nearest_level(resize.celeba(image, image_size))  # noqa: E731
    return with_rule(source, prepare, f"central {resize.CELEBA_CROP} pixels, antialiased bilinear to {image_size}")


def scene_name(category: str) -> str:
    """Return the TFDS name of one scene of LSUN, such as "bedroom"."""
    import tensorflow_datasets as tfds  # lazily, see `open_builder`

    known = sorted(tfds.builder_cls("lsun").builder_configs)
    if category not in known:
        raise UserError(f"data.category={category!r} is no scene of LSUN; set it to one of {', '.join(known)}")
    return f"lsun/{category}"


def load_lsun(category: str, split: str, image_size: int, path: str = "") -> TfdsSource:
    """Open one scene of LSUN, square and resized to `image_size` pixels (128 differs from the others).

    "test" is the validation split, which has 300 images of each scene.
    """
    source = load_tfds(scene_name(category), _original_split(split), path)
    recipe = resize.lsun_128 if image_size == 128 else resize.lsun
    rule = "smaller side antialiased bilinear, then central" if image_size == 128 else "central square, then bicubic"
    prepare = lambda image: resize.nearest_level(recipe(image, image_size))  # noqa: E731
    return with_rule(source, prepare, f"{rule}, to {image_size}")
