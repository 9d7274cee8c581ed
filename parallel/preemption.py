"""SIGTERM, which schedulers send before they take a machine away, and Ctrl-C: save first, then end."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

_calls = itertools.count()  # JAX's service counts calls for as long as the process lives
ON_INTERRUPT = b"Ctrl-C: saving after the current steps; press it again to stop at once without saving\n"


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], int]]:
    """Notice SIGTERM and Ctrl-C (SIGINT) in the body.

    Yield a function that returns the signal after which to save the state and end now, or 0. A second Ctrl-C raises
    KeyboardInterrupt at once. A process that ignores SIGINT, as one in the background of a script, still does.

    With several processes the scheduler may signal only some of them: JAX's preemption service then makes all of them
    stop after the same step, if they ask as often.
    """
    received: list[int] = []
    is_alone = jax.process_count() == 1

    def notice(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, ON_INTERRUPT)
            if not is_alone:
                os.kill(os.getpid(), signal.SIGTERM)  # for JAX's service, which knows no other signal

    def asked() -> int:
        if not is_alone and not multihost_utils.reached_preemption_sync_point(next(_calls)):
            return 0
        return received[0] if received else 0 if is_alone else signal.SIGTERM

    noticed = [signal.SIGTERM] * is_alone + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)
    previous = {number: signal.signal(number, notice) for number in noticed}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
