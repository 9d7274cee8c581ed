"""The log: short on the console, whole in the workdir."""

from __future__ import annotations

import logging as standard_logging
from pathlib import Path

from absl import logging

import distributed

FILE = "stdout.txt"


def _is_worth_showing(record: standard_logging.LogRecord) -> bool:
    """Drops what libraries report of their inner steps (Orbax: dozens of lines for a checkpoint)."""
    return record.levelno >= standard_logging.WARNING or "site-packages" not in record.pathname


def set_up_console() -> None:
    """Makes the log on the console short; to be called before JAX looks for devices, which it reports at length."""
    logging.set_verbosity(logging.INFO)
    console = logging.get_absl_handler()
    console.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    console.addFilter(_is_worth_showing)


def set_up_process() -> None:
    """Makes all processes but the first log errors alone; to be called when the processes have met."""
    if not distributed.is_main_process():
        logging.set_verbosity(logging.ERROR)


def set_up_file(workdir: Path) -> None:
    """Logs to stdout.txt in the workdir, too; process 0 alone does."""
    if not distributed.is_main_process():
        return
    handler = standard_logging.FileHandler(workdir / FILE)
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(_is_worth_showing)
    logging.get_absl_logger().addHandler(handler)
