"""A data set of your own pictures: a folder or a .zip file of pictures of any size and kind.

The pictures are decoded once and kept in the cache as one memory-mapped array; if that would be too large, they are
decoded whenever they are read. docs/data.md states the policy.
"""

from __future__ import annotations

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int64

from errors import UserError
from sources import cache, listing
from sources.base import AS_STORED, ArraySource, Selection, Source, held_out
from sources.listing import PictureFiles
from sources.pictures import NUM_NAMED, Fit, decode_picture, fit_picture, named, to_levels
from storage import files, untrusted

NUM_CLASSES_NAMED = 20
IMAGES, RECORD = "images.npy", "record.json"  # files of a prepared data set
VERSION = "1"  # part of the cache's keys: increase it when the preparation of pictures changes


@dataclass(frozen=True)
class Rules:
    """How the pictures of a data set are prepared."""

    fit: Fit  # the shape they are brought to, and how
    num_levels: int  # of the result
    strict: bool = False  # refuse a data set with an unusable picture instead of leaving the picture out
    test_share: float = 0.1  # fraction of the pictures to test on, if no folders are splits
    cache_gib: float = 16.0  # the largest size of prepared images to keep, in GiB


def read_levels(pictures: PictureFiles, name: str, rules: Rules) -> tuple[np.ndarray, str]:
    """Read one picture: its levels, uint8[H, W, C], and the SHA-256 of its file."""
    data = pictures.read(name)
    values = fit_picture(decode_picture(data, name, keep_alpha=rules.fit.keeps_alpha), rules.fit)
    return to_levels(values, rules.num_levels), hashlib.sha256(data).hexdigest()


# --- preparing -------------------------------------------------------------------------------------------------------


@dataclass
class _Record:
    """What was found of the pictures of a data set; kept in `RECORD`."""

    digests: list[str]  # SHA-256 of the content of each file, empty for an unusable one
    problems: dict[str, str]  # {name of an unusable picture: why}

    def write(self, folder: Path) -> None:
        files.write_json(folder / RECORD, {"digests": self.digests, "problems": dict(sorted(self.problems.items()))})


def _read_record(folder: Path, num_pictures: int) -> _Record:
    stored = untrusted.read_json(folder / RECORD)
    record = _Record(stored.get("digests"), stored.get("problems"))
    if not isinstance(record.digests, list) or len(record.digests) != num_pictures or type(record.problems) is not dict:
        raise UserError(f"{folder / RECORD} is damaged; delete that folder and start again: it is then rebuilt")
    return record


def _fill(folder: Path, pictures: PictureFiles, rules: Rules, keep: bool) -> None:
    """Decode every picture; write the levels, if they are to be kept, and a record of what was found.

    An unusable picture has a row of zeros in the array, which nobody reads.
    """
    names, shape, record = pictures.names, rules.fit.shape, _Record([""] * len(pictures.names), {})

    def read(index: int) -> np.ndarray:
        try:
            levels, record.digests[index] = read_levels(pictures, names[index], rules)
        except UserError as error:
            record.problems[names[index]] = str(error)
            return np.zeros(shape, np.uint8)
        return levels

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes several pictures at a time
        read_batch = lambda start, stop: np.stack(list(pool.map(read, range(start, stop))))  # noqa: E731
        cache.write_images(folder / IMAGES if keep else None, len(names), shape, read_batch)
    record.write(folder)


def _retry(folder: Path, pictures: PictureFiles, rules: Rules, record: _Record) -> _Record:
    """Decode again what could not be used before, and store what can be used now.

    The key of the cache tells what the pictures should hold; a damaged copy, or a file that may not be read for a
    while, has the same key.
    """
    tried, index_of = _Record(list(record.digests), {}), {name: i for i, name in enumerate(pictures.names)}
    stored = np.load(folder / IMAGES, mmap_mode="r+", allow_pickle=False) if (folder / IMAGES).exists() else None
    for name in record.problems:
        index = index_of[name]
        try:
            levels, tried.digests[index] = read_levels(pictures, name, rules)
        except UserError as error:
            tried.problems[name] = str(error)
            continue
        if stored is not None:
            stored[index] = levels
    if tried != record:
        if stored is not None:
            stored.flush()
        tried.write(folder)
    return tried


@dataclass(frozen=True)
class Prepared:
    """The decoded pictures of a folder or .zip file."""

    pictures: PictureFiles  # the files
    rules: Rules  # how they were prepared
    key: str  # SHA-256 of names, contents and rules
    folder: Path  # of the cache
    digests: np.ndarray  # SHA-256 of the content of each file, empty for an unusable one
    problems: dict[str, str]  # {name of an unusable picture: why}

    @functools.cached_property
    def splits(self) -> dict[str, str]:
        """Return the folders of the splits (see `listing.find_splits`)."""
        return listing.find_splits(self.pictures.names)

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes; empty if there are none."""
        return listing.find_classes(self.pictures.names, self.splits)

    @functools.cached_property
    def source(self) -> Source:
        """Return all pictures, unusable ones included."""
        labels = listing.classes_of(self.pictures.names, self.splits, self.classes)
        described = (self.rules.num_levels, len(self.classes), self.rules.fit.rule)
        if not (self.folder / IMAGES).exists():
            return PictureSource(self.pictures, self.rules, labels, self.key, *described)
        return ArraySource(cache.map_images(self.folder / IMAGES), labels, *described, content=self.key)

    def rows(self, split: str) -> Int64[np.ndarray, "n"]:
        """Return the places of the pictures of a split that are usable."""
        folder = self.splits.get(split, self.splits["train"])
        inside = np.array([name.startswith(folder) for name in self.pictures.names])
        rows = np.flatnonzero((self.digests != "") & inside)
        if "test" not in self.splits and len(rows):
            chosen = held_out(self.digests[rows], self.rules.test_share, self.pictures.path)
            rows = rows[chosen if split == "test" else ~chosen]
        if not len(rows):
            raise UserError(
                f"data.path={str(self.pictures.path)!r} has no picture for the {split} split that can be used"
                + (f": {named(self.problems)}" if self.problems else "")
            )
        return rows


def prepare(path: Path, rules: Rules) -> Prepared:
    """Decode the pictures of a folder or .zip file, or find them decoded in the cache."""
    if not path.exists():
        raise UserError(f"data.path={str(path)!r} does not exist; set it to a folder or .zip file of pictures")
    pictures: PictureFiles = listing.list_folder(path) if path.is_dir() else listing.list_zip(path)
    if not pictures.names:
        ends = ", ".join(listing.SUFFIXES)
        raise UserError(
            f"data.path={str(path)!r} has no picture ({len(pictures.others)} files of other kinds); expected {ends}"
        )
    known = files.content_hash("content", pictures.fingerprint)
    content = cache.remembered(known, pictures.content, lambda text: listing.PARTLY not in text)
    keep = cache.fits(len(pictures.names), rules.fit.shape, rules.cache_gib)
    key = files.content_hash(f"pictures {VERSION} {rules.fit} {rules.num_levels} {keep}", content)
    folder = cache.prepared_folder(key, lambda folder: _fill(folder, pictures, rules, keep))
    record = _read_record(folder, len(pictures.names))
    if record.problems:
        record = _retry(folder, pictures, rules, record)
    problems = record.problems
    if problems and rules.strict:
        raise UserError(
            f"{len(problems)} of {len(pictures.names)} pictures of data.path={str(path)!r} cannot be used: "
            f"{named(problems)}; fix or delete them, or set data.strict=False to leave them out"
        )
    return Prepared(pictures, rules, key, folder, np.array(record.digests, str), problems)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureSource(Source):
    """Pictures that are decoded whenever they are read."""

    pictures: PictureFiles  # the files
    rules: Rules  # how they are prepared
    classes: Int64[np.ndarray, "N"]  # labels of the pictures
    key: str  # SHA-256 of names, contents and rules
    num_levels: int = 256
    num_classes: int = 0
    preparation: str = AS_STORED

    @property
    def fingerprint(self) -> str:
        return self.key

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self.pictures.names)

    def images(self, indices: np.ndarray) -> np.ndarray:
        return np.stack(list(self._pool.map(self._read, indices.tolist())))

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self.classes[indices]

    def _read(self, index: int) -> np.ndarray:
        name = self.pictures.names[index]
        try:
            return read_levels(self.pictures, name, self.rules)[0]
        except UserError as error:
            raise UserError(
                f"{name} of data.path={str(self.pictures.path)!r} could be read when the run began: {error}"
            ) from error


def _log_contents(prepared: Prepared, train: Int64[np.ndarray, "n"], test: Int64[np.ndarray, "m"]) -> None:
    """Log the size of the splits, the classes, what was left out, and images that are in both splits."""
    classes, rules = prepared.classes, prepared.rules
    logging.info(
        "%s: %s pictures to train on, %s to test (%s), %s",
        prepared.pictures.path,
        f"{len(train):,}",
        f"{len(test):,}",
        "from their own folder" if "test" in prepared.splits else f"held out by data.test_share={rules.test_share:g}",
        f"{len(classes)} classes: {', '.join(classes[:NUM_CLASSES_NAMED])}" if classes else "no classes",
    )
    if prepared.problems:
        left_out = named(prepared.problems)
        logging.warning("left out %d of %d pictures: %s", len(prepared.problems), len(prepared.digests), left_out)
    if others := prepared.pictures.others:
        listed = ", ".join(others[:NUM_NAMED]) + ", ..." * (len(others) > NUM_NAMED)
        logging.info("passed over %d files that are no pictures: %s", len(others), listed)
    in_both = int(np.isin(prepared.digests[test], prepared.digests[train]).sum())
    if in_both:
        logging.warning("%d pictures of the test split are in the training split, too", in_both)


def load_folder(path: str, split: str, rules: Rules) -> Source:
    """Open one split, "train" or "test", of the pictures of a folder or .zip file (`data.path`)."""
    if not path:
        raise UserError("data.path is empty; set --config.data.path to a folder or .zip file of pictures")
    prepared = prepare(files.local_path(path, "data.path"), rules)
    rows = prepared.rows(split)
    if split == "train":
        _log_contents(prepared, rows, prepared.rows("test"))
    return Selection(prepared.source, rows)
