"""Locks on folders: one run at a time writes in a workdir, and one in a folder of results."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from parallel import distributed
from storage import files
from workdir.folder import WorkdirError

FILE = ".lock"
# What file systems answer that know no locks, such as some in user space, or Lustre without its option flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockedError(WorkdirError):
    """Another run writes in the folder."""


def _describe_holder(descriptor: int) -> str:
    """Says who holds the lock, by what it wrote in the file."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):  # it holds the lock, but has not written yet
        return "another process"


def _is_at(descriptor: int, path: Path) -> bool:
    """Says whether an open file is still the one at the path: its holder removes it when it is done."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _acquire(path: Path, flag: str) -> int:
    """Locks a file, made if need be; returns its descriptor, which holds the lock until it is closed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe_holder(descriptor)
            os.close(descriptor)
            raise LockedError(
                f"{flag}={path.parent} is in use by {holder}; wait until that run ends, or stop it, or choose another "
                f"{flag}"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            logging.warning("%s knows no locks: see that no other run writes there", path.parent)
            return descriptor
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _release(descriptor: int, path: Path) -> None:
    """Removes the file, unless somebody else has removed or replaced it, and gives up the lock."""
    with contextlib.suppress(OSError):
        if _is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)


@contextlib.contextmanager
def hold(folder: str | Path, flag: str = "--workdir") -> Iterator[None]:
    """Holds the lock of a folder while the body runs.

    The system gives the lock up when the process ends, however it ends; who holds it is in the file only to be told.
    What killed runs left of unfinished files is removed. One process of several locks for all. A folder that the body
    leaves empty is removed again if it was not there.

    Args:
      folder: made if need be.
      flag: of the command line that names it.

    Raises:
      LockedError: if another run holds it, at once; the message names its host and process.
      OSError: if the folder cannot be written.
    """
    if not distributed.is_main_process():
        yield
        return
    folder = Path(folder)
    path, was_there = folder / FILE, folder.exists()
    try:
        with files.naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise WorkdirError(f"{flag}={folder} cannot be a folder: a file is in its place; choose another") from error
    descriptor = _acquire(path, flag)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        with contextlib.suppress(OSError):
            files.remove_leftovers(folder)
        yield
    finally:
        _release(descriptor, path)
        if not was_there:
            with contextlib.suppress(OSError):
                folder.rmdir()
