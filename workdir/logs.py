"""The log: short on the console, complete in stdout.txt of the workdir."""

from __future__ import annotations

import contextlib
import logging as standard_logging
import os
import sys
import traceback
from pathlib import Path

from absl import logging

from parallel import distributed
from storage.files import explain

FILE = "stdout.txt"


class _LogFile(standard_logging.FileHandler):
    """The log file; reports the first line it cannot write and drops the rest, which the console shows anyway."""

    _failed = False

    def handleError(self, record: standard_logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            error.filename = error.filename or self.baseFilename
            print(f"the log: {explain(error)}; until then it is here only", file=sys.stderr)

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # the last lines cannot be written
            self.stream = None


def _is_worth_showing(record: standard_logging.LogRecord) -> bool:
    """Drop what libraries report of their inner steps (Orbax: dozens of lines for a checkpoint)."""
    return record.levelno >= standard_logging.WARNING or "site-packages" not in record.pathname


def _is_worth_the_console(record: standard_logging.LogRecord) -> bool:
    """Drop the tracebacks of libraries, too: their errors end in a sentence of ours.

    asyncio logs those of tasks nobody awaits: TensorStore's, for arrays after the first that failed.
    """
    is_of_library = "site-packages" in record.pathname or record.name == "asyncio"
    return _is_worth_showing(record) and not (record.exc_info and is_of_library)


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Report errors that nobody can catch, except TensorStore's callbacks into a closed event loop.

    Those follow from the first error of a checkpoint, which is reported.
    """
    if isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed":
        return
    sys.__unraisablehook__(unraisable)


def set_up_console() -> None:
    """Shorten the log on the console; call it before JAX looks for devices, which it reports at length."""
    logging.set_verbosity(logging.INFO)
    console = logging.get_absl_handler()
    console.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    console.addFilter(_is_worth_the_console)
    sys.unraisablehook = _report_unraisable


def set_up_process() -> None:
    """Let all processes but the first log only errors; call it once the processes have met."""
    if not distributed.is_main_process():
        logging.set_verbosity(logging.ERROR)


def set_up_file(workdir: Path) -> None:
    """Also log to stdout.txt in the workdir; only process 0 does."""
    if not distributed.is_main_process():
        return
    handler = _LogFile(workdir / FILE)
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(_is_worth_showing)
    logging.get_absl_logger().addHandler(handler)


def record_traceback(workdir: Path, error: BaseException) -> None:
    """Append the traceback of an error to stdout.txt, if the workdir has one."""
    with contextlib.suppress(OSError), (workdir / FILE).open("r+") as file:
        file.seek(0, os.SEEK_END)
        traceback.print_exception(error, file=file)
