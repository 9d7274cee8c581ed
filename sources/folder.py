"""A data set of a user's own pictures: a folder or a .zip file of any sizes and kinds.

The pictures are decoded once and kept in the cache as one array, which is mapped to memory; where that would be too
large they are decoded whenever they are read. The policy is written down in docs/data.md.
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
from sources.base import ArraySource, Selection, Source, held_out
from sources.listing import PictureFiles
from sources.pictures import Fit, decode_picture, fit_picture, to_levels
from storage import files, guards

NUM_NAMED = 5  # pictures that a message names
NUM_CLASSES_NAMED = 20
IMAGES, RECORD = "images.npy", "record.json"  # files of a prepared data set
VERSION = "1"  # of what is done to pictures; another one prepares them anew


@dataclass(frozen=True)
class Rules:
    """What is done to the pictures of a data set.

    Attributes:
      fit: the shape they are brought to, and how.
      num_levels: of the result.
      strict: refuse a data set with a picture that cannot be used, instead of leaving the picture out.
      test_share: of the pictures, where no folders are splits.
      cache_gib: the largest size of prepared images that are kept, in GiB.
    """

    fit: Fit
    num_levels: int
    strict: bool = False
    test_share: float = 0.1
    cache_gib: float = 16.0


def read_levels(pictures: PictureFiles, name: str, rules: Rules) -> tuple[np.ndarray, str]:
    """Reads one picture: its levels, uint8[H, W, C], and the SHA-256 of its file.

    Raises:
      UserError: saying why it cannot be used.
    """
    data = pictures.read(name)
    values = fit_picture(decode_picture(data, name, keep_alpha=rules.fit.keeps_alpha), rules.fit)
    return to_levels(values, rules.num_levels), hashlib.sha256(data).hexdigest()


# --- preparing -------------------------------------------------------------------------------------------------------


def _prepare(folder: Path, pictures: PictureFiles, rules: Rules, keep: bool) -> None:
    """Decodes every picture; fills the folder with the levels, if they are to be kept, and a record of what was found.

    A picture that cannot be used has a row of zeros in the array, which nobody reads.
    """
    names, shape = pictures.names, rules.fit.shape
    digests, problems = [""] * len(names), {}

    def read(index: int) -> np.ndarray:
        try:
            levels, digests[index] = read_levels(pictures, names[index], rules)
        except UserError as error:
            problems[names[index]] = str(error)
            return np.zeros(shape, np.uint8)
        return levels

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes several pictures at a time
        read_batch = lambda start, stop: np.stack(list(pool.map(read, range(start, stop))))  # noqa: E731
        cache.write_images(folder / IMAGES if keep else None, len(names), shape, read_batch)
    record = {"digests": digests, "problems": dict(sorted(problems.items()))}
    files.write_json(folder / RECORD, record)


def _list(path: Path) -> PictureFiles:
    if not path.exists():
        raise UserError(f"data.path={str(path)!r} does not exist; set it to a folder or .zip file of pictures")
    pictures = listing.list_folder(path) if path.is_dir() else listing.list_zip(path)
    if not pictures.names:
        ends = ", ".join(listing.SUFFIXES)
        raise UserError(
            f"data.path={str(path)!r} has no picture ({pictures.others} files of other kinds); expected {ends}"
        )
    return pictures


@dataclass(frozen=True)
class Prepared:
    """The pictures of a folder or .zip file, decoded.

    Attributes:
      pictures: the files.
      rules: what was done to them.
      key: SHA-256 of names, contents and rules.
      folder: of the cache.
      digests: SHA-256 of the content of each file, empty for one that cannot be used.
      problems: {name of a picture that cannot be used: why}.
    """

    pictures: PictureFiles
    rules: Rules
    key: str
    folder: Path
    digests: np.ndarray
    problems: dict[str, str]

    @functools.cached_property
    def splits(self) -> dict[str, str]:
        """Folders of the splits (see `listing.find_splits`)."""
        return listing.find_splits(self.pictures.names)

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if there are none."""
        return listing.find_classes(self.pictures.names, self.splits)

    @functools.cached_property
    def source(self) -> Source:
        """All pictures, those included that cannot be used."""
        labels = listing.classes_of(self.pictures.names, self.splits, self.classes)
        if not (self.folder / IMAGES).exists():
            return PictureSource(self.pictures, self.rules, labels, len(self.classes), self.key)
        levels = cache.map_images(self.folder / IMAGES)
        rule = self.rules.fit.rule
        return ArraySource(levels, labels, self.rules.num_levels, len(self.classes), preparation=rule, content=self.key)

    def rows(self, split: str) -> Int64[np.ndarray, "n"]:
        """Returns the places in `source` of the pictures of a split that can be used.

        Raises:
          UserError: if there are none.
        """
        folder = self.splits.get(split, self.splits["train"])
        inside = np.array([name.startswith(folder) for name in self.pictures.names])
        rows = np.flatnonzero((self.digests != "") & inside)
        if "test" not in self.splits and len(rows):
            chosen = held_out(self.digests[rows], self.rules.test_share, self.pictures.path)
            rows = rows[chosen if split == "test" else ~chosen]
        if not len(rows):
            raise UserError(
                f"data.path={str(self.pictures.path)!r} has no picture for the {split} split that can be used"
                + (f": {_named(self.problems)}" if self.problems else "")
            )
        return rows


def _named(problems: dict[str, str]) -> str:
    """Names the first problems and counts the others."""
    reasons = [f"{name}: {why}" for name, why in list(problems.items())[:NUM_NAMED]]
    more = f"; and {len(problems) - NUM_NAMED} more" if len(problems) > NUM_NAMED else ""
    return "; ".join(reasons) + more


def _read_record(folder: Path, num_pictures: int) -> tuple[np.ndarray, dict[str, str]]:
    """Returns the digests of the pictures in a folder of the cache, and what was wrong with some."""
    record = guards.read_json(folder / RECORD)
    digests, problems = record.get("digests"), record.get("problems")
    if not isinstance(digests, list) or len(digests) != num_pictures or not isinstance(problems, dict):
        raise UserError(f"{folder / RECORD} is damaged; delete that folder, which is made anew")
    return np.array(digests, str), problems


def prepare(path: Path, rules: Rules) -> Prepared:
    """Decodes the pictures of a folder or .zip file, or finds in the cache what was decoded before.

    Raises:
      UserError: if there is no picture, or one cannot be used and `strict` is set.
      UserError: if there is no such path.
    """
    pictures = _list(path)
    content = cache.remembered(pictures.fingerprint, pictures.content)
    keep = cache.is_kept(len(pictures.names), rules.fit.shape, rules.cache_gib)
    key = files.content_hash(f"pictures {VERSION} {rules.fit} {rules.num_levels} {keep}", content)
    folder = cache.prepared_folder(key, lambda folder: _prepare(folder, pictures, rules, keep))
    digests, problems = _read_record(folder, len(pictures.names))
    if problems and rules.strict:
        raise UserError(
            f"{len(problems)} of {len(pictures.names)} pictures of data.path={str(path)!r} cannot be used: "
            f"{_named(problems)}; mend or delete them, or set data.strict=False to leave them out"
        )
    return Prepared(pictures, rules, key, folder, digests, problems)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureSource:
    """Pictures that are decoded whenever they are read.

    Attributes:
      pictures: the files.
      rules: what is done to them.
      classes: of the pictures.
      num_classes: 0 if there are no labels.
      fingerprint: SHA-256 of names, contents and rules.
    """

    pictures: PictureFiles
    rules: Rules
    classes: Int64[np.ndarray, "N"]
    num_classes: int
    fingerprint: str

    @property
    def num_levels(self) -> int:
        """Levels that a value can take."""
        return self.rules.num_levels

    @property
    def preparation(self) -> str:
        """What is done to the pictures."""
        return self.rules.fit.rule

    @functools.cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that decode."""
        return ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        """Returns the number of pictures."""
        return len(self.pictures.names)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads pictures as levels, uint8[n, H, W, C].

        Raises:
          UserError: naming one that can no longer be read.
        """
        return np.stack(list(self.pool.map(self._read, indices.tolist())))

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n]."""
        return self.classes[indices]

    def _read(self, index: int) -> np.ndarray:
        name = self.pictures.names[index]
        try:
            return read_levels(self.pictures, name, self.rules)[0]
        except UserError as error:
            raise UserError(
                f"{name} of data.path={str(self.pictures.path)!r} could be read when the run began: {error}"
            ) from error


def _tell(prepared: Prepared, train: Int64[np.ndarray, "n"], test: Int64[np.ndarray, "m"]) -> None:
    """Logs what a data set is made of, what was left out, and images that both splits have, given by their places."""
    classes, share = prepared.classes, prepared.rules.test_share
    logging.info(
        "%s: %s pictures to train on, %s to test (%s), %s",
        prepared.pictures.path,
        f"{len(train):,}",
        f"{len(test):,}",
        "folders of their own" if "test" in prepared.splits else f"held out by data.test_share={share:g}",
        f"{len(classes)} classes: {', '.join(classes[:NUM_CLASSES_NAMED])}" if classes else "no classes",
    )
    if prepared.problems:
        named = _named(prepared.problems)
        logging.warning("left out %d of %d pictures: %s", len(prepared.problems), len(prepared.digests), named)
    shared = int(np.isin(prepared.digests[test], prepared.digests[train]).sum())
    if shared:
        logging.warning("%d pictures of the test split are in the training split, too", shared)


def load_folder(path: str, split: str, rules: Rules) -> Source:
    """Opens one split of the pictures of a folder or .zip file.

    Args:
      path: of the folder or file, `data.path`; "~" is the home folder.
      split: "train" or "test".
      rules: what is done to the pictures.

    Raises:
      UserError: if no path is given, or there is no picture that can be used, or one cannot and `rules.strict` is set.
      UserError: if there is no such path.
    """
    if not path:
        raise UserError("data.path is empty; set --config.data.path to a folder or .zip file of pictures")
    prepared = prepare(Path(os.path.expanduser(path)), rules)
    rows = prepared.rows(split)
    if split == "train":
        _tell(prepared, rows, prepared.rows("test"))
    return Selection(prepared.source, rows)
