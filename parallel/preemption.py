"""SIGTERM: what schedulers send before they take a machine away."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

_calls = itertools.count()  # JAX's service counts calls for as long as the process lives


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Notice SIGTERM in the body; yield a function that returns whether to save the state and end now.

    With several processes the scheduler may signal only some of them: JAX's preemption service then makes all of them
    stop after the same step, if they ask as often.
    """
    if jax.process_count() > 1:
        yield lambda: bool(multihost_utils.reached_preemption_sync_point(next(_calls)))
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
