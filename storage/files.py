"""Atomic writes, checked reads of .npz files, content hashes, and explanations of system errors."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import socket
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from errors import UserError
from storage import untrusted

CACHE = "~/.cache/score_sde"  # $SCORE_SDE_CACHE replaces it
_PERMISSIONS = "check its owner and permissions, or choose another folder"
_MOUNT = "check that the network file system is mounted"
# Fixes of errors of the machine, by errno.
_FIXES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close files of other programs: the whole machine has too many open",
    errno.EROFS: "mount it for writing, or choose another folder",
    errno.EIO: "check the disk and the connection to it",
    **dict.fromkeys((errno.EACCES, errno.EPERM), _PERMISSIONS),
    **dict.fromkeys((errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT), _MOUNT),
}


def local_path(text: str | os.PathLike[str], name: str) -> Path:
    """Return the path that a flag or setting `name` means: "~" is the home folder, "file://" a path of this machine.

    Any other address is a UserError: locks, renaming and appending need a file system.
    """
    text = os.fspath(text)
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(.*)", text)
    if address:
        scheme, host, place = address[1].lower(), address[2], urllib.parse.unquote(address[3])
        if scheme != "file" or host not in ("", "localhost") or not place:
            raise UserError(
                f"{name}={text}: expected a path of this machine; mount what is stored elsewhere as a folder (such as "
                "gcsfuse for gs://, mountpoint-s3 for s3://), or copy it here"
            )
        text = place
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}={text}: {error}; write the path in full") from error


def cache_folder(name: str) -> Path:
    """Return a folder for files that can be recreated, such as prepared images; it may not exist yet."""
    return Path(os.environ.get("SCORE_SDE_CACHE") or os.path.expanduser(CACHE)) / name


def disk_of(path: str | Path) -> Path:
    """Return the mount point of the disk that holds a path, which need not exist."""
    place = Path(path).absolute()
    while place != place.parent and not os.path.ismount(place):
        place = place.parent
    return place


def is_of_machine(error: OSError) -> bool:
    """Return whether an error is the machine's (disk full, no permission, file system gone), not a bug of ours."""
    return error.errno in _FIXES


def explain(error: OSError) -> str:
    """Return in one sentence what the system refused, on which disk, and what to do about it."""
    if error.errno is None:
        return str(error)
    refused = error.strerror or os.strerror(error.errno)
    if isinstance(error.filename, str | bytes | os.PathLike):
        path = os.fsdecode(error.filename)
        refused = f"{path} (on the disk {disk_of(path)}): {refused}"
    fix = _FIXES.get(error.errno, "fix this")
    return f"{refused}; {fix}, then rerun the same command: it resumes from the completed work"


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file's name to system errors, which lack it if the file is already open."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def remove_leftovers(folder: str | Path) -> None:
    """Remove, in a folder and its sub-folders, the temporary files of killed processes of this host."""
    host = socket.gethostname()
    for path in Path(folder).rglob(f".*.{glob.escape(host)}-*.*"):
        process = path.name.rpartition(f".{host}-")[2].partition(".")[0]
        try:
            os.kill(int(process), 0)  # sends nothing
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, OSError):  # no number, or another user's process
            continue


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name and rename it: it appears complete, or the old one stays.

    `write` is called with the open binary file. The folder is created if missing. An OSError names the file.
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
            with contextlib.suppress(OSError):  # it is gone if its folder is
                os.unlink(temporary)
            raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file of this content atomically."""
    write_atomically(path, lambda file: file.write(content))


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON atomically, without NaN and infinity, which other readers reject."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


class Appender:
    """A growing file, such as the loss curve, that training can do without.

    While the disk is full it warns once, keeps new content in memory, and writes it when there is space again. The
    file's folder is created if missing.
    """

    def __init__(self, path: str | Path):
        self._path, self._pending, self._warned = Path(path), b"", False
        with naming(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)

    def append(self, content: bytes) -> None:
        """Append to the file, after content that could not be written so far."""
        self._pending += content
        try:
            with naming(self._path):
                while self._pending:
                    # A full disk may accept a part, which must not be written twice.
                    self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                logging.warning("%s; until then the run continues without", explain(error))
            self._warned = True
        else:
            self._warned = False

    def close(self) -> None:
        """Close the file, after a last attempt to write missing content."""
        self.append(b"")
        self._file.close()


def content_hash(*arrays: np.ndarray | str) -> str:
    """Return the SHA-256, in hex, of strings and of arrays with their shapes and types."""
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
    """Read all arrays of an .npz file within the limits of `untrusted` and verify their checksums."""
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file")
    try:
        with untrusted.open_zip(path) as archive:
            untrusted.check_total(archive.infolist())
            return {name: untrusted.read_array_entry(archive, name) for name in untrusted.array_names(archive)}
    except UserError as error:
        raise UserError(f"{path} is damaged or not an .npz file: {error}") from error
