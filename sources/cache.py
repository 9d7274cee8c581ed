"""Prepared images in the cache: folders that appear complete or not at all, and memory-mapped arrays."""

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
RESERVE = 2**28  # bytes of the disk to leave free
BATCH_BYTES = 2**27  # of images in memory at a time
LOG_SECONDS = 10.0  # between two log lines


def prepared_folder(key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of the cache with this key; build it if it is missing.

    Args:
      key: SHA-256 of everything its content depends on.
      build: fills an empty folder, which is renamed when this returns, so nobody sees a partial one. If two processes
        build the same folder, the first one to finish wins.
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


def remembered(name: str, compute: Callable[[], str], is_final: Callable[[str], bool] = bool) -> str:
    """Return a text of the cache, or compute it; `name` is the SHA-256 of what it depends on.

    It is stored if it is final: one that tells of a failure is not, and is computed again next time.
    """
    path = files.cache_folder("data") / "known" / name[:32]
    if path.exists():
        return path.read_text()
    text = compute()
    if is_final(text):
        files.write_bytes(path, text.encode())
    return text


def fits(num_images: int, shape: tuple[int, int, int], limit_gib: float) -> bool:
    """Return whether uint8[num_images, *shape] takes at most `limit_gib` GiB."""
    return num_images * math.prod(shape) <= limit_gib * GIB


def check_room(num_bytes: int) -> None:
    """Raise a UserError if the disk of the cache has no room."""
    folder = files.cache_folder("data")
    free = shutil.disk_usage(folder).free
    if num_bytes + RESERVE > free:
        raise UserError(
            f"the prepared images need {num_bytes / GIB:.2f} GiB, but {folder} has only {free / GIB:.2f} GiB free; set "
            "$SCORE_SDE_CACHE to a folder on a larger disk, or data.cache_gib=0 to decode images whenever they are read"
        )


def write_images(
    path: Path | None, num_images: int, shape: tuple[int, int, int], read: Callable[[int, int], np.ndarray]
) -> None:
    """Read all images in batches and write an .npy file of uint8[num_images, *shape]; without `path` only read them.

    `read` maps (start, stop) to uint8[stop - start, H, W, C].
    """
    batch = max(1, min(BATCH_BYTES // math.prod(shape), 1024))
    if path:
        check_room(num_images * math.prod(shape))
    stored = np.lib.format.open_memmap(path, "w+", np.uint8, (num_images, *shape)) if path else None
    logged = time.monotonic()
    for start in range(0, num_images, batch):
        stop = min(start + batch, num_images)
        levels = read(start, stop)
        if stored is not None:
            stored[start:stop] = levels
        if time.monotonic() - logged > LOG_SECONDS:
            logged = time.monotonic()
            logging.info("prepared %s of %s images", f"{stop:,}", f"{num_images:,}")
    if stored is not None:
        stored.flush()


def map_images(path: Path) -> np.ndarray:
    """Memory-map an .npy file of images; all processes share what is read of it."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
