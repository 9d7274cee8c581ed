"""Results on disk: a killed run resumes from them; results of different settings are never mixed."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

import datasets
from configs import settings
from errors import UserError
from parallel import distributed
from report import DataInfo
from storage import files, untrusted
from workdir import compatibility

SETTINGS_FILE = "settings.json"
FACTS = "facts"  # key of settings.json under which the results are described; no setting


def describe_data(name: str, train: datasets.Source, test: datasets.Source) -> DataInfo:
    """Describe the images of a data set for a report."""
    digest = files.content_hash(train.fingerprint, test.fingerprint)
    return DataInfo(name, len(train), len(test), train.num_levels, digest)


def read(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of an .npz file on all processes; None if it is not there or damaged."""

    def on_main() -> dict[str, np.ndarray] | None:
        if not path.exists():
            return None
        try:
            return files.read_npz(path)
        except UserError as error:
            logging.warning("%s; computing it again", error)
            return None

    return distributed.once_arrays(on_main)


def write(path: Path, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Write an .npz file, whole or not at all, on process 0; return its arrays."""
    distributed.once(lambda: files.write_atomically(path, lambda file: np.savez(file, **arrays)))
    return {name: np.asarray(array) for name, array in arrays.items()}


def cached(
    path: Path,
    compute: Callable[[], dict[str, Any]],
    *,
    is_enough: Callable[[dict[str, np.ndarray]], bool] = lambda stored: True,
) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file; compute and write them if it is not there, or not enough."""
    stored = read(path)
    return stored if stored is not None and is_enough(stored) else write(path, compute())


@distributed.on_main
def open_folder(
    folder: Path,
    config: ConfigDict,
    kinds: Sequence[str],
    params: Any,
    *,
    flag: str,
    contents: Mapping[str, str] | None = None,
) -> None:
    """Make a folder of results, or check that what it holds was made with the same settings and parameters.

    Args:
      folder: of the results; its settings.json holds what they depend on.
      config: experiment configuration.
      kinds: of results, see `settings.affecting`.
      params: of the network, numpy arrays.
      flag: of the command line that names the folder, for the message.
      contents: hashes of what else the results depend on, by name; one that settings.json lacks is added.

    Raises:
      WorkdirError: naming what differs.
    """
    given = settings.affecting(config, *kinds)
    given["params_crc32"] = functools.reduce(lambda crc, leaf: zlib.crc32(leaf, crc), jax.tree.leaves(params), 0)
    given |= {f"{name}_sha256": digest for name, digest in (contents or {}).items()}
    path = folder / SETTINGS_FILE
    stored = untrusted.read_json(path) if path.exists() else {}
    if path.exists():
        holder = f"{folder} holds results of other settings"
        compatibility.check_same({"params_crc32": None} | stored, given, holder, f"choose a new {flag}")
    if given.keys() - stored.keys():
        files.write_json(path, stored | given)


def record_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Describe the results in the settings.json of an opened folder, in place of an earlier description."""
    path = folder / SETTINGS_FILE
    files.write_json(path, untrusted.read_json(path) | {FACTS: facts})


def batches(source: datasets.Source, batch_size: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yield (round, indices int[batch_size], how many of them count); the last batch is filled up with image 0."""
    for start in range(0, len(source), batch_size):
        indices = np.arange(start, min(start + batch_size, len(source)))
        padded = np.concatenate([indices, np.zeros(batch_size - len(indices), indices.dtype)])
        yield start // batch_size, padded, len(indices)
