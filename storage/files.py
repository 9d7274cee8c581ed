"""Files that appear whole and are read whole or refused, and hashes of their content."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from errors import UserError
from storage import guards

CACHE = "~/.cache/score_sde"  # $SCORE_SDE_CACHE replaces it
# What a user can do about what the system refuses.
_WAYS_OUT = {
    errno.ENOSPC: "free some room there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EROFS: "have it mounted for writing, or choose another folder",
    errno.EACCES: "see who owns it and who may use it, or choose another folder",
    errno.EPERM: "see who owns it and who may use it, or choose another folder",
    errno.EIO: "have the disk, or the connection to it, examined",
    errno.ESTALE: "see that the network file system is mounted",
    errno.ENOENT: "see whether it was moved or removed",
}


def cache_folder(name: str) -> Path:
    """Returns a folder for what can be made again, such as prepared images; it may not exist yet."""
    return Path(os.environ.get("SCORE_SDE_CACHE") or os.path.expanduser(CACHE)) / name


def disk_of(path: str | Path) -> Path:
    """Returns where the disk is mounted that a path lies on, whether or not there is such a file."""
    place = Path(path).absolute()
    while place != place.parent and not os.path.ismount(place):
        place = place.parent
    return place


def explain(error: OSError) -> str:
    """Says in one sentence what the system refused, on which disk, and what to do about it.

    An error that some function of ours raised with a sentence of its own keeps that.
    """
    if error.errno is None:
        return str(error)
    told = error.strerror or os.strerror(error.errno)
    if isinstance(error.filename, str | bytes | os.PathLike):
        path = os.fsdecode(error.filename)
        told = f"{path} (on the disk {disk_of(path)}): {told}"
    way_out = _WAYS_OUT.get(error.errno, "see to that")
    return f"{told}; {way_out}, then give the same command again: it goes on from what is complete"


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Lets errors of the system name the file; those of a file that is open already do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):  # such as somebody else's
        return True
    return True


def remove_leftovers(folder: str | Path) -> None:
    """Removes, in a folder and all in it, what killed processes of this host left of files under temporary names."""
    host = socket.gethostname()
    for path in Path(folder).rglob(f".*.{glob.escape(host)}-*.*"):
        process = path.name.rpartition(f".{host}-")[2].partition(".")[0]
        if not _is_running(process):
            path.unlink(missing_ok=True)


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file under a temporary name and renames it: it appears whole, or the old one stays.

    Args:
      path: of the file; its folder is made if need be.
      write: called with the open binary file.

    Raises:
      OSError: naming the file, if it cannot be written.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}.{socket.gethostname()}-{os.getpid()}."
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's own mode hides the file from everyone else
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # a folder that has vanished took the file along
                os.unlink(temporary)
            raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file of this content atomically."""
    write_atomically(path, lambda file: file.write(content))


def write_json(path: str | Path, value: Any) -> None:
    """Writes strict JSON atomically; NaN and infinity are refused, since other readers refuse them."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


class Appender:
    """A file that grows, such as the loss curve, and that training can do without.

    What cannot be written, since the disk is full, is told once, kept in memory, and written when there is room again.

    Args:
      path: of the file; its folder is made if need be.
    """

    def __init__(self, path: str | Path):
        self._path, self._pending, self._told = Path(path), b"", False
        with naming(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)

    def append(self, content: bytes) -> None:
        """Adds to the end of the file, and before that what could not be added so far."""
        self._pending += content
        try:
            with naming(self._path):
                while self._pending:
                    # The disk may take a part, which must not be written twice.
                    self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._told:
                logging.warning("%s; until then the run goes on without", explain(error))
            self._told = True
        else:
            self._told = False

    def close(self) -> None:
        """Closes the file, after a last try to write what is missing."""
        self.append(b"")
        self._file.close()


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
      UserError: if the file is damaged or no .npz, or asks for more memory than is sensible (see `guards`); the
        checksum of every array is verified.
      UserError: if there is none.
    """
    try:
        with guards.open_zip(path) as archive:
            guards.check_total(archive.infolist())
            return {name: guards.read_array_entry(archive, name) for name in guards.array_names(archive)}
    except ValueError as error:
        raise UserError(f"{path} is damaged or not an .npz file: {error}") from error
