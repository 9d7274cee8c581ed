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

from files import content_hash
from sources import resize
from sources.base import AS_STORED

# What TFDS raises if data are not there, or not in files that can be read by index.
NOT_PREPARED = (AssertionError, KeyError, ValueError, NotImplementedError, FileNotFoundError)
OTHER_FORMAT = ("File format is already set", "does not match the file formats")  # TFDS of files of another kind


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
          ValueError: naming the first that cannot be prepared.
        """
        stored = self.stored(indices, self.image)
        return np.stack(list(self.pool.map(self._prepared, indices.tolist(), stored)))

    def _prepared(self, index: int, image: Any) -> np.ndarray:
        try:
            return self.prepare(self.decode(image))
        except ValueError as error:
            raise ValueError(
                f"image {index} of {self.fingerprint or 'the data set'} cannot be used: {error}"
            ) from error

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n].

        Raises:
          ValueError: if the images carry none.
        """
        if not self.num_classes:
            raise ValueError("the images of this data set carry no labels")
        return np.array(self.stored(indices, self.label))


# --- opening ---------------------------------------------------------------------------------------------------------


def data_folder(path: str = "") -> Path:
    """Returns the folder where TFDS keeps data: the given one, $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return Path(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def not_prepared(name: str, path: str = "") -> FileNotFoundError:
    """Returns the error that says how to prepare a data set; the arguments are those of `open_builder`."""
    return FileNotFoundError(
        f"data set {name!r} is not prepared as ArrayRecord files in {data_folder(path)}; prepare it once, where "
        "TensorFlow is installed: python main.py --config CONFIG --mode prepare"
        + (f" --config.data.path={path}" if path else "")
    )


def _other_format(name: str, folder: Path) -> ValueError:
    return ValueError(
        f"data set {name!r} is prepared in {folder}, but not as ArrayRecord files, so that it cannot be read by index; "
        "prepare it in another folder: --mode prepare --config.data.path=FOLDER"
    )


def open_builder(name: str, path: str = "") -> Any:
    """Opens a data set of TFDS that is prepared.

    Args:
      name: of it, such as "cifar10" or "imagenette/320px"; TFDS need not know it if it is prepared.
      path: TFDS data folder; empty: the usual one (see `data_folder`).

    Returns:
      The builder of TFDS, with `info` and `as_data_source`.

    Raises:
      ValueError: if there is no such data set, or no such configuration or version of it.
      FileNotFoundError: if it is not prepared.
    """
    import tensorflow_datasets as tfds  # lazily: half a second, and the embedded data need none of it

    folder = data_folder(path)
    try:
        builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
        prepared = bool(builder.info.splits)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"tensorflow-datasets {tfds.__version__} has no data set {name!r}, and {folder} has none of that name; "
            "see https://www.tensorflow.org/datasets/catalog/overview for those that it has"
        ) from error
    except NOT_PREPARED as error:
        if any(text in str(error) for text in OTHER_FORMAT):
            raise _other_format(name, folder) from error
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"tensorflow-datasets cannot open {name!r} of {folder}: {reason}") from error
    if not prepared:
        raise not_prepared(name, path)
    return builder


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
      ValueError: if it is not one image that a record holds.
      FileNotFoundError: if the split is not prepared as ArrayRecord files.
    """
    import tensorflow_datasets as tfds  # lazily, see `open_builder`

    features = builder.info.features
    images, labels = find_feature(features, "Image"), find_feature(features, "ClassLabel")
    if len(images) != 1:
        raise ValueError(
            f"the records of {name!r} hold {len(images)} images ({', '.join(images) or ', '.join(sorted(features))}); "
            "expected one: prepare a data set of one's own with the one to learn, or use data.dataset='folder'"
        )
    try:
        records = builder.as_data_source(split=split, decoders={images[0]: tfds.decode.SkipDecoding()})
        size = builder.info.splits[split]
    except NOT_PREPARED as error:
        raise not_prepared(name, path) from error
    num_classes = features[labels[0]].num_classes if len(labels) == 1 else 0
    return TfdsSource(
        records,
        num_classes,
        fingerprint=f"{builder.info.full_name} {split} ({size.num_examples:,} images, {int(size.num_bytes):,} bytes)",
        decode=features[images[0]].decode_example_np,
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
      FileNotFoundError: if the data are not prepared there as ArrayRecord files.
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
      FileNotFoundError: if the data are not prepared.
    """
    source = load_tfds("celeb_a", _test_is_validation(split), path)
    prepare = lambda image: resize.nearest_level(resize.celeba(image, image_size))  # noqa: E731
    return with_rule(source, prepare, f"central {resize.CELEBA_CROP} pixels, antialiased bilinear to {image_size}")


def scene_name(category: str) -> str:
    """Returns the name that TFDS has for one scene of LSUN.

    Raises:
      ValueError: if there is no such scene.
    """
    import tensorflow_datasets as tfds  # lazily, see `open_builder`

    known = sorted(tfds.builder_cls("lsun").builder_configs)
    if category not in known:
        raise ValueError(f"data.category={category!r} is no scene of LSUN; set it to one of {', '.join(known)}")
    return f"lsun/{category}"


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
    source = load_tfds(scene_name(category), _test_is_validation(split), path)
    recipe = resize.lsun_128 if image_size == 128 else resize.lsun
    rule = "smaller side antialiased bilinear, then central" if image_size == 128 else "central square, then bicubic"
    prepare = lambda image: resize.nearest_level(recipe(image, image_size))  # noqa: E731
    return with_rule(source, prepare, f"{rule}, to {image_size}")
