"""Images in .npz and .npy files: your own data set, or samples that a network has drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import logging

from errors import UserError
from sources import cache
from sources.base import ArraySource, Selection, Source, held_out
from storage import untrusted
from storage.files import content_hash, local_path, read_npz

ARRAYS = ("samples", "images")  # names that the array of images may have
LABELS, NUM_CLASSES = "labels", "num_classes"


def _classes(arrays: dict[str, np.ndarray], path: str | Path, num_images: int) -> tuple[np.ndarray, int]:
    """Return the labels, zeros if the file has none, and the number of classes, 0 then."""
    if LABELS not in arrays:
        return np.zeros(num_images, np.int64), 0
    labels = arrays[LABELS]
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu" or (num_images and labels.min() < 0):
        raise UserError(
            f"{LABELS} of {path} are {labels.dtype} of shape {labels.shape}; expected whole numbers from 0, of shape "
            f"({num_images},), one for each image"
        )
    num_classes = int(arrays[NUM_CLASSES]) if NUM_CLASSES in arrays else int(labels.max(initial=0)) + 1
    if num_images and labels.max() >= num_classes:
        raise UserError(f"{LABELS} of {path} go up to {labels.max()}, but its {NUM_CLASSES} is {num_classes}")
    if num_images and labels.min() > 0:
        given = f"{LABELS} of {path} are {labels.min()} to {labels.max()}: {num_classes} classes"
        logging.warning("%s, of which 0 to %d have no image; labels count from 0", given, labels.min() - 1)
    return labels.astype(np.int64), num_classes


def _name_of_images(path: str | Path, names: list[str]) -> str:
    """Return which array of an .npz file holds the images."""
    name = next((name for name in ARRAYS if name in names), None)
    if name is None:
        raise UserError(f"{path} has {', '.join(sorted(names)) or 'nothing'}; expected an array 'samples' or 'images'")
    return name


def _check_levels(levels: np.ndarray, name: str, image_shape: tuple[int, int, int], num_levels: int) -> None:
    if levels.dtype != np.uint8 or levels.shape[1:] != image_shape:
        raise UserError(
            f"{name} are {levels.dtype} of shape {levels.shape}; expected levels, uint8, of shape "
            f"(N, {', '.join(map(str, image_shape))}), as the configuration's images"
        )
    if num_levels < 256 and levels.size and levels.max() >= num_levels:
        raise UserError(f"{name} have level {levels.max()}; expected levels below data.num_levels={num_levels}")


def load_npz(path: str | Path, image_shape: tuple[int, int, int], num_levels: int) -> ArraySource:
    """Load the images of an .npz file, with shape `image_shape` (H, W, C) and levels below `num_levels`.

    Its arrays: "images" or "samples", uint8[N, H, W, C]; optionally "labels", integers from 0, [N]; and "num_classes"
    if the largest label of all is not among them.
    """
    arrays = read_npz(path)
    name = _name_of_images(path, list(arrays))
    _check_levels(arrays[name], f"{name} of {path}", image_shape, num_levels)
    classes, num_classes = _classes(arrays, path, len(arrays[name]))
    return ArraySource(arrays[name], classes, num_levels, num_classes)


def _read_small(path: Path) -> tuple[str, dict[str, np.ndarray], str]:
    """Return which array of an .npz file holds the images, the other arrays, and the SHA-256 of its checksums."""
    try:
        with untrusted.open_zip(path) as archive:
            names = untrusted.array_names(archive)
            name = next((name for name in ARRAYS if name in names), "")
            entries = [each for each in archive.infolist() if each.filename in (f"{LABELS}.npy", f"{NUM_CLASSES}.npy")]
            untrusted.check_total(entries)
            key = content_hash(*(f"{each.filename} {each.file_size} {each.CRC}" for each in archive.infolist()))
            small = {each: untrusted.read_array_entry(archive, each) for each in names if each in (LABELS, NUM_CLASSES)}
    except UserError as error:
        raise UserError(f"{path} is damaged or not an .npz file: {error}") from error
    return name or _name_of_images(path, names), small, key


def _extract(path: Path, name: str, folder: Path) -> None:
    """Write the images of an .npz file as images.npy, which can be memory-mapped."""
    with untrusted.open_zip(path) as archive, open(folder / "images.npy", "wb") as file:
        cache.check_room(archive.getinfo(f"{name}.npy").file_size)
        chunks = untrusted.array_chunks(archive, name)
        while True:
            try:
                chunk = next(chunks, b"")
            except UserError as error:
                raise UserError(f"{path} is damaged: {error}; get it again") from error
            if not chunk:
                return
            file.write(chunk)


def _map_array(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            untrusted.check_array(file, path.stat().st_size)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path} is damaged or not an .npy file: {error}") from error


def map_file(path: Path, image_shape: tuple[int, int, int], num_levels: int) -> ArraySource:
    """Memory-map the images of an .npz or .npy file (see `load_npz`), for data sets larger than memory.

    The images of an .npz file are extracted into the cache. A .npy file has no labels.
    """
    if path.suffix.lower() == ".npy":
        levels = _map_array(path)
        status = path.stat()
        key = content_hash(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
        _check_levels(levels, f"images of {path}", image_shape, num_levels)
        return ArraySource(levels, np.zeros(len(levels), np.int64), num_levels, 0, content=key)
    name, arrays, key = _read_small(path)
    folder = cache.prepared_folder(content_hash(f"npz {name}", key), lambda folder: _extract(path, name, folder))
    levels = cache.map_images(folder / "images.npy")
    _check_levels(levels, f"{name} of {path}", image_shape, num_levels)
    classes, num_classes = _classes(arrays, path, len(levels))
    return ArraySource(levels, classes, num_levels, num_classes, content=key)


def _digests(source: ArraySource) -> np.ndarray:
    """Return the SHA-256 of each image, in hex."""
    compute = lambda: "\n".join(content_hash(image) for image in source.levels)  # noqa: E731
    return np.array(cache.remembered(content_hash("digests", source.fingerprint), compute).split("\n"))


def load_npz_split(
    path: str, split: str, image_shape: tuple[int, int, int], num_levels: int, test_share: float = 0.1
) -> Source:
    """Open one split of a folder with train and test .npz or .npy files (see `load_npz`), or of a single file.

    Args:
      path: of the folder, or of a single file, `data.path`.
      split: "train" or "test".
      image_shape: height, width and channels of the images.
      num_levels: above all their levels.
      test_share: fraction of the images of a single file to test on.
    """
    if not path:
        raise UserError("data.path is empty; set --config.data.path to the folder of train.npz and test.npz, or a file")
    place = local_path(path, "data.path")
    one_file = place.is_file() or (place.suffix.lower() in (".npz", ".npy") and not place.is_dir())
    candidates = [place] if one_file else [place / f"{split}{suffix}" for suffix in (".npz", ".npy")]
    file = next((each for each in candidates if each.is_file()), None)
    if file is None:
        raise UserError(
            f"{candidates[0]} does not exist; data.dataset='npz' reads train.npz and test.npz (or .npy) of data.path, "
            "or data.path itself if it is a file"
        )
    source = map_file(file, image_shape, num_levels)
    if not len(source):
        raise UserError(f"{file} has no images")
    if not one_file:
        return source
    chosen = held_out(_digests(source), test_share, file)
    return Selection(source, np.flatnonzero(chosen if split == "test" else ~chosen))
