"""Progress of a training run: a progress bar or log lines, TensorBoard, and the loss curve on disk."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from absl import logging
from tqdm import tqdm

from parallel import distributed
from report.plots import LOSSES_FILE, read_record
from storage.files import Appender, write_bytes

Item = TypeVar("Item")


def _step_of(line: str) -> float:
    """Return the step of a line of losses.jsonl; infinite if the line is damaged."""
    record = read_record(line)
    return math.inf if record is None else record["step"]


class TrainingProgress:
    """Records and shows the progress of training from `first_step` to `num_steps`, on process 0."""

    def __init__(self, workdir: str | Path, *, first_step: int, num_steps: int, batch_size: int):
        self._active = distributed.is_main_process()
        self._num_steps, self._batch_size = num_steps, batch_size
        self._step, self._since = first_step, time.monotonic()
        if not self._active:
            return
        from workdir.event_file import EventFile  # lazily: tensorboardX imports torch where that is installed

        self._path = Path(workdir) / LOSSES_FILE
        self._forget_after(first_step)
        self._file = Appender(self._path)
        self._board = EventFile(Path(workdir) / "tensorboard", first_step=first_step + 1)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not terminal, smoothing=0.05)

    def __enter__(self) -> TrainingProgress:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and the progress bar."""
        if self._active:
            self._bar.close()
            self._file.close()
            self._board.close()

    def _forget_after(self, step: int) -> None:
        """Drop what a killed run recorded after the state that this one resumes from."""
        if not self._path.exists():
            return
        lines = self._path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
        write_bytes(self._path, "".join(kept).encode())

    def show(self, step: int, loss: float) -> None:
        """Show the progress at `step` with the mean loss since the last call."""
        if not self._active:
            return
        now = time.monotonic()
        rate = (step - self._step) / max(now - self._since, 1e-9)
        self._step, self._since = step, now
        images = rate * self._batch_size
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {images:,.0f} images/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        left = tqdm.format_interval((self._num_steps - step) / rate)
        logging.info("step %d/%d: loss %.4f, %.0f images/s, %s left", step, self._num_steps, loss, images, left)

    def record(self, step: int, **values: float) -> None:
        """Add named values at `step` to losses.jsonl and to TensorBoard."""
        if not self._active:
            return
        self._file.append((json.dumps({"step": step, **values}) + "\n").encode())
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def record_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Add an image, uint8[H, W, C], to TensorBoard."""
        if self._active:
            self._board.add_image(name, image, step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time spent inside from the images per second."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start


def track(items: Sequence[Item], name: str, units: str = "batches") -> Iterator[Item]:
    """Yield the items under a progress bar on a terminal; log their number, counted in `units`."""
    show = distributed.is_main_process()
    terminal = show and sys.stderr.isatty()
    start = time.monotonic()
    yield from tqdm(items, desc=name, unit=f" {units}", disable=not terminal, leave=False)
    if show:
        logging.info("%s: %d %s in %.1f s", name, len(items), units, time.monotonic() - start)
