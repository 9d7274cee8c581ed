"""Last words: a child process that tells why its parent has ended when the parent no longer can.

When a process of a run is gone, JAX ends the others from C++ with pages of text, and no Python of theirs runs again;
nor does it in one that was killed. The child sees its pipe close and prints the last message that it was given.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

WAIT_SECONDS = 5.0  # for the child to end
_CHILD = """
import sys
message = ""
for line in sys.stdin:
    message = line.strip()
if message:
    print(message, file=sys.stderr)
"""


class Farewell:
    """What is to be said if this process ends without calling `cancel`."""

    def __init__(self, message: str):
        # A session of its own: what a terminal or a scheduler sends to all processes must not end it first.
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        self.change(message)

    def change(self, message: str) -> None:
        """Says another sentence instead; one line."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed the child: nothing will be said
            self._child.stdin.write(message + "\n")
            self._child.stdin.flush()

    def cancel(self) -> None:
        """Says nothing."""
        assert self._child.stdin is not None
        self.change("")
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(WAIT_SECONDS)
