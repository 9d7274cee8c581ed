"""Where tensorflow-datasets keeps data, and opening what is prepared there."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError
from storage import guards

# What TFDS raises if data are not there, or not in files that can be read by index.
NOT_PREPARED = (AssertionError, KeyError, ValueError, NotImplementedError, FileNotFoundError)
OTHER_FORMAT = ("File format is already set", "does not match the file formats")  # TFDS of files of another kind

OWN_CLASSES = "tensorflow_datasets."


def data_folder(path: str = "") -> Path:
    """Returns the folder where TFDS keeps data: the given one, $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return Path(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


class NotPreparedError(UserError):
    """A data set that is not there yet."""


def not_prepared(name: str, path: str = "") -> NotPreparedError:
    """Returns the error that says how to prepare a data set; the arguments are those of `open_builder`."""
    return NotPreparedError(
        f"data set {name!r} is not prepared as ArrayRecord files in {data_folder(path)}; prepare it once, where "
        "TensorFlow is installed: python main.py --config CONFIG --mode prepare"
        + (f" --config.data.path={path}" if path else "")
    )


def _other_format(name: str, folder: Path) -> UserError:
    return UserError(
        f"data set {name!r} is prepared in {folder}, but not as ArrayRecord files, so that it cannot be read by index; "
        "prepare it in another folder: --mode prepare --config.data.path=FOLDER"
    )


def _class_names(stored: Any) -> Iterator[object]:
    """Yields the names of classes in a features.json, as TFDS writes it now and as it did before 2021."""
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
    """Checks that the features of a data set are TFDS's own: it would import any module that their file names.

    Raises:
      UserError: naming the file and the class.
    """
    for path in sorted(folder.rglob("features.json")):
        for name in _class_names(guards.read_json(path)):
            if not str(name).startswith(OWN_CLASSES):
                raise UserError(
                    f"{path} names the class {name!r}, which would be imported; only those of tensorflow-datasets are: "
                    "prepare the data set anew with these"
                )


def open_builder(name: str, path: str = "") -> Any:
    """Opens a data set of TFDS that is prepared.

    Args:
      name: of it, such as "cifar10" or "imagenette/320px"; TFDS need not know it if it is prepared.
      path: TFDS data folder; empty: the usual one (see `data_folder`).

    Returns:
      The builder of TFDS, with `info` and `as_data_source`.

    Raises:
      UserError: if there is no such data set, or no such configuration or version of it.
      UserError: if it is not prepared.
    """
    import tensorflow_datasets as tfds  # lazily: half a second, and the embedded data need none of it

    folder = data_folder(path)
    _check_features(folder / re.split("[/:]", name)[0])
    try:
        builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
        prepared = bool(builder.info.splits)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(
            re.split("[/:]", name)[0], tfds.list_builders(with_community_datasets=False), 1
        )
        raise UserError(
            f"tensorflow-datasets {tfds.__version__} has no data set {name!r}, and {folder} has none of that name; "
            f"{f'did you mean {near[0]}? ' if near else ''}See https://www.tensorflow.org/datasets/catalog/overview"
        ) from error
    except NOT_PREPARED as error:
        if any(text in str(error) for text in OTHER_FORMAT):
            raise _other_format(name, folder) from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"tensorflow-datasets cannot open {name!r} of {folder}: {reason}") from error
    if not prepared:
        raise not_prepared(name, path)
    return builder
