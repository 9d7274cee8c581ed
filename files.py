"""Files that appear whole and are read whole or refused, and hashes of their content."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import guards

CACHE = "~/.cache/score_sde"  # $SCORE_SDE_CACHE replaces it


def cache_folder(name: str) -> Path:
    """Returns a folder for what can be made again, such as prepared images; it may not exist yet."""
    return Path(os.environ.get("SCORE_SDE_CACHE") or os.path.expanduser(CACHE)) / name


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file under a temporary name and renames it: it appears whole, or the old one stays.

    Args:
      path: of the file; its folder is made if need be.
      write: called with the open binary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode hides the file from everyone else
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file of this content atomically."""
    write_atomically(path, lambda file: file.write(content))


def write_json(path: str | Path, value: Any) -> None:
    """Writes strict JSON atomically; NaN and infinity are refused, since other readers refuse them."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def content_hash(*arrays: np.ndarray | str) -> str:
    """Returns the SHA-256, in hex, of strings and of arrays with their shapes and types."""
    digest = hashlib.sha256()
    for array in arrays:
        if isinstance(array, str):
            digest.update(f"{len(array)}:{array}".encode())
            continue
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file.

    Raises:
      ValueError: if the file is damaged or no .npz, or asks for more memory than is sensible (see `guards`); the
        checksum of every array is verified.
      FileNotFoundError: if there is none.
    """
    try:
        with guards.open_zip(path) as archive:
            guards.check_total(archive.infolist())
            return {name: guards.read_array_entry(archive, name) for name in guards.array_names(archive)}
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}") from error
