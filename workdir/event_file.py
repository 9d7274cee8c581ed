"""The files that TensorBoard reads, written without a thread: one that fails on a full disk would stop the training.

tensorboardX makes the records; its own writer hands them to a thread through a queue of ten, and once that thread has
died of an error the next record waits for ever.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from storage.files import Appender

VERSION = "brain.Event:2"  # what TensorBoard expects in the first record of a file
PREFIX = "events.out.tfevents."


def _stamp(folder: Path) -> int:
    """Returns the seconds in a new file's name: later than those of every other, also if the clock went back.

    TensorBoard reads the files of a run in the order of their names.
    """
    stamps = [path.name.removeprefix(PREFIX).partition(".")[0] for path in folder.glob(f"{PREFIX}*")]
    return max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal())])


def _frame(record: bytes) -> bytes:
    """Returns a record as TFRecord files hold it: its length and content, each with its checksum."""
    length = struct.pack("<Q", len(record))
    return b"".join(
        [length, struct.pack("<I", masked_crc32c(length)), record, struct.pack("<I", masked_crc32c(record))]
    )


class EventFile:
    """The scalars and images of one run of the program.

    Args:
      folder: that TensorBoard reads, with the files of earlier runs.
      first_step: what earlier runs recorded from this step on is not to be shown.
    """

    def __init__(self, folder: str | Path, *, first_step: int):
        folder = Path(folder)
        self._file = Appender(folder / f"{PREFIX}{_stamp(folder)}.{socket.gethostname()}.{os.getpid()}")
        self._wall_time = 0.0
        self._write(Event(file_version=VERSION))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        # TensorBoard takes the order of wall times for that of the records.
        self._wall_time = event.wall_time = max(time.time(), self._wall_time)
        self._file.append(_frame(event.SerializeToString()))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Records a value at a step."""
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def add_image(self, name: str, image: UInt8[np.ndarray, "H W C"], step: int) -> None:
        """Records an image at a step."""
        self._write(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
