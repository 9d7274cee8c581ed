"""The files that TensorBoard reads.

tensorboardX makes the records. Its own writer hands them to a thread; once that thread has died of a full disk, the
next record waits for ever. Here they are appended without a thread; what does not fit is written when there is room.
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

PREFIX = "events.out.tfevents."


class EventFile:
    """The scalars and images of one run of the program.

    Args:
      folder: that TensorBoard reads, with the files of earlier runs.
      first_step: TensorBoard drops what earlier runs recorded from this step on.
    """

    def __init__(self, folder: str | Path, *, first_step: int):
        folder = Path(folder)
        # TensorBoard reads files in the order of their names: stay behind earlier ones even if the clock went back.
        stamps = [path.name.removeprefix(PREFIX).partition(".")[0] for path in folder.glob(f"{PREFIX}*")]
        stamp = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal())])
        self._file = Appender(folder / f"{PREFIX}{stamp}.{socket.gethostname()}.{os.getpid()}")
        self._wall_time = 0.0
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        # TensorBoard takes the order of wall times for that of the records.
        self._wall_time = event.wall_time = max(time.time(), self._wall_time)
        record = event.SerializeToString()
        parts = (struct.pack("<Q", len(record)), record)  # as TFRecord files hold them, each with its checksum
        self._file.append(b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Record a value at a step."""
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def add_image(self, name: str, image: UInt8[np.ndarray, "H W C"], step: int) -> None:
        """Record an image at a step."""
        self._write(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
