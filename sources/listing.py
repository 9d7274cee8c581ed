"""The pictures of a folder or a .zip file: their names, their content, and how splits and classes are recognised.

Names are paths inside the folder or file, with "/" between folders.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from errors import UserError
from sources.pictures import SUFFIXES, is_picture
from storage import untrusted

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # in order of preference
TAR_MARK = 257  # offset of the mark of a .tar file
UNREADABLE, PARTLY = "unreadable", " of what can be read"  # in the place of a file's digest; at the end of that of all


@dataclass(frozen=True)
class PictureFiles(abc.ABC):
    """The pictures of a folder or file, by name."""

    path: Path  # of the folder or file
    names: tuple[str, ...]  # of the pictures, sorted
    others: tuple[str, ...]  # files that are no pictures, neither by their name nor by their content
    fingerprint: str  # SHA-256 of what is known without reading: names, sizes, and modification times or checksums

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Read the content of a picture; several threads may call it."""

    @abc.abstractmethod
    def content(self) -> str:
        """Return the SHA-256 of names and contents, ending in `PARTLY` if a file cannot be read."""


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _start_of_file(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(untrusted.START)


def _start_of_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        return file.read(untrusted.START)


def _is_picture(name: str, read_start: Callable[[], bytes]) -> bool:
    if name.lower().endswith(SUFFIXES):
        return True
    try:
        return is_picture(read_start())
    except untrusted.ZIP_ERRORS:  # OSErrors among them
        return False


class FolderPictures(PictureFiles):
    """The pictures of a folder and its subfolders."""

    def read(self, name: str) -> bytes:
        try:
            return untrusted.read_content(self.path / name)
        except OSError as error:
            raise UserError(f"it cannot be read: {error.strerror}") from error

    def content(self) -> str:
        contents = [self._content_of(name) for name in self.names]
        digest = _digest([f"{name} {content}" for name, content in zip(self.names, contents, strict=True)])
        return digest + PARTLY * (UNREADABLE in contents)

    def _content_of(self, name: str) -> str:
        try:
            return hashlib.sha256(self.read(name)).hexdigest()
        except UserError:
            return UNREADABLE


def _walk(folder: str, inside: str = "", above: tuple[str, ...] = ()) -> Iterator[tuple[str, os.DirEntry]]:
    """Yield (name, entry) of the files of a folder and its subfolders.

    Links are followed, but not to a folder that holds the link: they would lead in a circle.
    """
    here = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                if os.path.realpath(entry.path) not in here:
                    yield from _walk(entry.path, f"{inside}{entry.name}/", here)
            elif entry.is_file():
                yield f"{inside}{entry.name}", entry


def list_folder(folder: Path) -> FolderPictures:
    """List the pictures of a folder and its subfolders, without hidden ones."""
    found: dict[str, str] = {}
    others = []
    for name, entry in _walk(str(folder)):
        if not _is_picture(name, functools.partial(_start_of_file, entry.path)):
            others.append(name)
            continue
        status = entry.stat()
        found[name] = f"{name} {status.st_size} {status.st_mtime_ns}"
    names = tuple(sorted(found))
    fingerprint = _digest([str(folder.resolve()), *(found[name] for name in names)])
    return FolderPictures(folder, names, tuple(sorted(others)), fingerprint)


@dataclass(frozen=True)
class ZipPictures(PictureFiles):
    """The pictures of a .zip file, whose checksums identify the contents without reading them."""

    archives: threading.local  # one open file per thread: with a single one threads would wait for each other
    entries: Mapping[str, str]  # {name of a picture: name of its entry}

    def read(self, name: str) -> bytes:
        try:
            if not hasattr(self.archives, "file"):
                self.archives.file = untrusted.open_zip(self.path)
            return untrusted.read_picture_entry(self.archives.file, self.entries[name])
        except UserError as error:
            raise UserError(f"it cannot be read: {error}") from error

    def content(self) -> str:
        return self.fingerprint


def list_zip(path: Path) -> ZipPictures:
    """List the pictures of a .zip file, without hidden ones. Nothing is unpacked."""
    try:
        with untrusted.open_zip(path) as archive:
            listed = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
            # Some programs for Windows write its separator, against the format's definition.
            separator = "/" if any("/" in name for name in listed) else "\\"
            entries = {name.replace(separator, "/"): entry for name, entry in listed.items()}
            entries = {
                name: entry for name, entry in entries.items() if name and not _is_hidden(name) and name[-1] != "/"
            }
            starts = {name: functools.partial(_start_of_entry, archive, entry) for name, entry in entries.items()}
            names = tuple(sorted(name for name, start in starts.items() if _is_picture(name, start)))
    except UserError as error:
        raise UserError(f"data.path={str(path)!r} {_kind_of(path)}: {error}") from error
    fingerprint = _digest([f"{name} {entries[name].file_size} {entries[name].CRC:08x}" for name in names])
    others = tuple(sorted(set(entries) - set(names)))
    originals = {name: entries[name].filename for name in names}
    return ZipPictures(path, names, others, fingerprint, threading.local(), originals)


def _kind_of(path: Path) -> str:
    """Return in words what a file is that cannot be read as a .zip file."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if is_picture(file.read(untrusted.START)):
            return "is a single picture; expected a folder or .zip file of pictures"
        file.seek(TAR_MARK)
        if file.read(5) == b"ustar":
            return "is a .tar file; unpack it, or pack its files as .zip"
    return "is damaged or no .zip file"


def root(names: Sequence[str]) -> str:
    """Return the innermost folder that holds all names, with "/" at the end; empty if there is none.

    A folder named like a split is not entered.
    """
    if not names:
        return ""
    # Folders that the first and the last name have in common are common to all.
    parts = [name.split("/") for name in names]
    found = ""
    for first, last in zip(min(parts)[:-1], max(parts)[:-1], strict=False):
        if first != last or first.lower() in TRAIN_NAMES + TEST_NAMES:
            break
        found += f"{first}/"
    return found


def find_splits(names: Sequence[str]) -> dict[str, str]:
    """Return the folders of the splits, {"train": folder, "test": folder} or only "train", with "/" at their ends.

    If all pictures are in folders named like splits, these are the splits; otherwise all pictures are "train".
    """
    start = root(names)
    tops = {name.removeprefix(start).partition("/")[:2] for name in names}
    folders = {top.lower(): f"{start}{top}/" for top, slash in tops if slash}
    is_split = all(slash and top.lower() in TRAIN_NAMES + TEST_NAMES for top, slash in tops)
    train = next((folders[name] for name in TRAIN_NAMES if name in folders), None)
    test = next((folders[name] for name in TEST_NAMES if name in folders), None)
    if not is_split or train is None:
        return {"train": start}
    return {"train": train} | ({"test": test} if test is not None else {})


def find_classes(names: Sequence[str], splits: dict[str, str]) -> tuple[str, ...]:
    """Return the classes: the sorted names of the folders in the splits; empty unless every picture is in one.

    Names that are all numbers are sorted as numbers, others as text.

    A single folder is not a class.
    """
    rests = [name[len(folder) :] for folder in splits.values() for name in names if name.startswith(folder)]
    tops = {rest.partition("/")[:2] for rest in rests}
    if not all(slash for _, slash in tops):
        return ()
    names_of_classes = [top for top, _ in tops]
    are_numbers = all(name.isascii() and name.isdigit() for name in names_of_classes)
    classes = tuple(sorted(names_of_classes, key=(lambda name: (int(name), name)) if are_numbers else None))
    return classes if len(classes) > 1 else ()


def classes_of(names: Sequence[str], splits: dict[str, str], classes: Sequence[str]) -> Int64[np.ndarray, "n"]:
    """Return the class indices of pictures; 0 without classes and outside of the splits."""
    numbers = {f"{folder}{name}": number for folder in splits.values() for number, name in enumerate(classes)}
    depth = splits["train"].count("/") + 1  # of the class folders; the splits are siblings
    class_folders = ["/".join(name.split("/")[:depth]) for name in names]
    return np.array([numbers.get(folder, 0) for folder in class_folders], np.int64)
