"""Prepared images in the cache: folders that appear whole, and arrays that are mapped to memory, not loaded."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import logging

from errors import UserError
from storage import files

GIB = 2**30
RESERVE = 2**28  # bytes of the disk that are left free
BATCH_BYTES = 2**27  # of images that are in memory at a time
LOG_SECONDS = 10.0  # between two lines of the log


def prepared_folder(key: str, build: Callable[[Path], None]) -> Path:
    """Returns the folder of the cache with this key; it is built if it is not there.

    Args:
      key: SHA-256 of all that its content depends on.
      build: called with an empty folder to fill; the folder gets its name when it returns, so that nobody ever sees
        half of one. Of two processes that build the same, the first one counts.
    """
    cache = files.cache_folder("data")
    folder = cache / key[:32]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".building-"))
    try:
        build(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def remembered(name: str, compute: Callable[[], str]) -> str:
    """Returns a text of the cache, computing and storing it if it is not there.

    Args:
      name: SHA-256 of what the text depends on.
      compute: returns it.
    """
    path = files.cache_folder("data") / "known" / name[:32]
    if not path.exists():
        files.write_bytes(path, compute().encode())
    return path.read_text()


def is_kept(num_images: int, shape: tuple[int, int, int], limit_gib: float) -> bool:
    """Says whether images are few and small enough to be kept prepared: uint8[num_images, *shape] in limit_gib GiB."""
    return num_images * math.prod(shape) <= limit_gib * GIB


def check_room(num_bytes: int) -> None:
    """Checks that the disk of the cache has room.

    Raises:
      UserError: if it has not.
    """
    folder = files.cache_folder("data")
    free = shutil.disk_usage(folder).free
    if num_bytes + RESERVE > free:
        raise UserError(
            f"the prepared images need {num_bytes / GIB:.2f} GiB, but {folder} has only {free / GIB:.2f} GiB free; set "
            "$SCORE_SDE_CACHE to a folder on a larger disk, or data.cache_gib=0 to decode images whenever they are read"
        )


def write_images(
    path: Path | None,
    num_images: int,
    shape: tuple[int, int, int],
    read: Callable[[int, int], np.ndarray],
) -> None:
    """Reads all images, a batch at a time, and writes an .npy file of them.

    Args:
      path: of the file; None: they are only read, to see which can be.
      num_images: N.
      shape: (H, W, C).
      read: (start, stop) -> uint8[stop - start, H, W, C].

    Raises:
      UserError: if the disk has no room for them.
    """
    batch = max(1, min(BATCH_BYTES // math.prod(shape), 1024))
    if path:
        check_room(num_images * math.prod(shape))
    stored = np.lib.format.open_memmap(path, "w+", np.uint8, (num_images, *shape)) if path else None
    told = time.monotonic()
    for start in range(0, num_images, batch):
        stop = min(start + batch, num_images)
        levels = read(start, stop)
        if stored is not None:
            stored[start:stop] = levels
        if time.monotonic() - told > LOG_SECONDS:
            told = time.monotonic()
            logging.info("prepared %s of %s images", f"{stop:,}", f"{num_images:,}")
    if stored is not None:
        stored.flush()


def map_images(path: Path) -> np.ndarray:
    """Maps an .npy file of images to memory; what is read of it is shared by all processes and may be dropped."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
