"""Arrays by their content: a hash of them, and .npz files that are whole or refused."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np


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
      ValueError: if the file is damaged or no .npz; the checksum of every array is verified.
      FileNotFoundError: if there is none.
    """
    try:
        # Opened here, since numpy leaves a file open that turns out to be damaged.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("one array, no .npz")
            return dict(stored)
    except (EOFError, ValueError, AttributeError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}") from error
