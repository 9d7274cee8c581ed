"""The log: short on the console, whole in the workdir."""

from __future__ import annotations

import logging as standard_logging
import sys
from pathlib import Path

from absl import logging

from parallel import distributed
from storage.files import explain

FILE = "stdout.txt"


class _LogFile(standard_logging.FileHandler):
    """The log in the workdir; what it cannot write is told once and left out, since the console shows the log, too."""

    _failed = False

    def handleError(self, record: standard_logging.LogRecord) -> None:
        """Tells the first error."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            error.filename = error.filename or self.baseFilename
            print(f"the log: {explain(error)}; until then it is here only", file=sys.stderr)

    def close(self) -> None:
        """Closes the file, whether or not the last lines can be written."""
        try:
            super().close()
        except OSError:
            self.stream = None


def _is_worth_showing(record: standard_logging.LogRecord) -> bool:
    """Drops what libraries report of their inner steps (Orbax: dozens of lines for a checkpoint)."""
    return record.levelno >= standard_logging.WARNING or "site-packages" not in record.pathname


def _is_worth_the_console(record: standard_logging.LogRecord) -> bool:
    """Drops the tracebacks of libraries, too: what they fail of ends in a sentence of ours.

    asyncio tells those of tasks whose errors nobody asked for: TensorStore's, of arrays after the first that failed.
    """
    is_of_library = "site-packages" in record.pathname or record.name == "asyncio"
    return _is_worth_showing(record) and not (record.exc_info and is_of_library)


def _tell_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Reports errors that nobody can catch, but for those of TensorStore's callbacks into a loop that is closed.

    They follow from the first error of a checkpoint, which is told.
    """
    if isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed":
        return
    sys.__unraisablehook__(unraisable)


def set_up_console() -> None:
    """Makes the log on the console short; to be called before JAX looks for devices, which it reports at length."""
    logging.set_verbosity(logging.INFO)
    console = logging.get_absl_handler()
    console.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    console.addFilter(_is_worth_the_console)
    sys.unraisablehook = _tell_unraisable


def set_up_process() -> None:
    """Makes all processes but the first log errors alone; to be called when the processes have met."""
    if not distributed.is_main_process():
        logging.set_verbosity(logging.ERROR)


def set_up_file(workdir: Path) -> None:
    """Logs to stdout.txt in the workdir, too; process 0 alone does."""
    if not distributed.is_main_process():
        return
    handler = _LogFile(workdir / FILE)
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(_is_worth_showing)
    logging.get_absl_logger().addHandler(handler)
