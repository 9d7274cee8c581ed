"""Work that goes on beside the main thread: compiling, above all, in which XLA needs no Python."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from absl import logging

Result = TypeVar("Result")

_threads: list[threading.Thread] = []  # of this process


class Background(Generic[Result]):
    """Calls a function in a thread of its own, for which Python waits when it ends; but see `leave`.

    Args:
      fn: is called once, at once.
      name: of the thread.
    """

    def __init__(self, fn: Callable[[], Result], name: str):
        self._fn = fn
        self._results: list[Result] = []
        self._error: BaseException | None = None
        # No daemon: Python would end under the feet of XLA, which dies of that with a segmentation fault.
        self._thread = threading.Thread(target=self._run, name=name)
        _threads.append(self._thread)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._fn())
        except BaseException as error:  # it is the caller's, who is told in `result`
            self._error = error

    def result(self) -> Result:
        """Waits for the function and returns what it returned, or raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]


def leave(code: int) -> None:
    """Ends the process at once if it would wait for work whose result nobody wants any more; otherwise does nothing.

    To be called last, when everything else is closed.
    """
    if any(thread.is_alive() for thread in _threads):
        logging.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
