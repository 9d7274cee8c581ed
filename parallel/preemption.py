"""SIGTERM: what schedulers send before they take a machine away."""

from __future__ import annotations

import itertools
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Notices SIGTERM, so that the state can be saved before the process ends.

    With several processes the scheduler may signal only some of them: then JAX's preemption service makes all of them
    stop after the same step.
    """

    _calls = itertools.count()  # the service knows one number that grows by one, for as long as the process lives

    def __init__(self) -> None:
        self._signalled = False
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        """Starts to listen."""
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restores the previous handler."""
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, signum: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self) -> bool:
        """Says whether the run should save and end now; every process, asking as often, gets the same answers."""
        if jax.process_count() == 1:
            return self._signalled
        return bool(multihost_utils.reached_preemption_sync_point(next(self._calls)))
