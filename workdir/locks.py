"""Locks on folders: one run at a time writes in a workdir, and one in a folder of results."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging
from filelock import FileLock, Timeout

from parallel import distributed
from storage import files
from workdir.folder import WorkdirError

FILE = ".lock"
SECONDS = 0.2  # that a holder may take to remove the file and give up the lock
# Errors of file systems without locks, such as some in user space, or Lustre without its option flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockedError(WorkdirError):
    """Another run writes in the folder."""


def _describe_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has the lock, but has not written yet
        return "another process"


@contextlib.contextmanager
def hold(folder: str | Path, flag: str = "--workdir") -> Iterator[None]:
    """Hold the lock of a folder while the body runs.

    The system releases the lock when the process ends, however it ends; the content of the file is only for messages.
    Removes unfinished files of killed runs, and a new folder that the body leaves empty. Process 0 locks for all.

    Args:
      folder: made if needed.
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
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=SECONDS)
    except Timeout:
        raise LockedError(
            f"{flag}={folder} is in use by {_describe_holder(path)}; wait until that run ends, or stop it, or choose "
            f"another {flag}"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logging.warning("%s does not support locks: make sure that no other run writes there", folder)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        content = json.dumps(holder).encode()
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            path.write_bytes(content)
        with contextlib.suppress(OSError):
            files.remove_leftovers(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.read_bytes() == content:  # the folder may have been replaced by that of another run
                path.unlink()  # before the release: afterwards the file may be that of the next run
        lock.release()
        if not was_there:
            with contextlib.suppress(OSError):
                folder.rmdir()
