"""A process among those of a run: how they meet, report errors to each other, and end together.

Everything goes through the coordination service of `jax.distributed`, which process 0 hosts: a table of small strings
that all processes share, and heartbeats. It needs no device: a process that waits here blocks no collective.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from absl import logging
from jax._src import distributed as jax_distributed  # the table of strings has no public name; Orbax does the same

from errors import UserError
from parallel.cluster import Place, check_address

START_SECONDS = 300  # that processes wait for each other at the start
HEARTBEAT_SECONDS = 30  # after which a silent process counts as dead
STOP_SECONDS = 10  # that a process with an error waits for the others to hear of it
END_SECONDS = 60  # that processes wait for each other at the end
POLL_SECONDS = 1.0
SLICE_SECONDS = 5.0  # of a wait for another process
EXIT_FAILED = 1
_STOPPED, _HEARD, _ENDED = "score_sde/stopped", "score_sde/heard/", "score_sde/ended/"


def _connect(place: Place, seconds: float) -> None:
    """Wait until process 0 listens."""
    assert place.coordinator_address is not None
    deadline = time.monotonic() + seconds
    while True:
        try:
            address = check_address(place.coordinator_address)
            socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.1)).close()
            return
        except OSError as error:  # a host name may become known later, too
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"process {place.process_id} of {place.num_processes} could not reach process 0 at "
                f"{place.coordinator_address} within {seconds:g} s ({reason}): start process 0 on that machine, and "
                "check that the port is free there and no firewall closes it"
            )
        time.sleep(min(POLL_SECONDS, max(deadline - time.monotonic(), 0.1)))


def _initialize(place: Place | None, seconds: float) -> None:
    """Start `jax.distributed`, which ends the process from C++ if the others do not come in time."""
    limits: dict[str, Any] = {
        "initialization_timeout": int(seconds),
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": END_SECONDS,
    }
    logging.info("%s: waiting up to %g s for the others", place or "a worker of a pod of TPUs", seconds)
    if place is None:
        jax.distributed.initialize(**limits)
        return
    if place.process_id and place.coordinator_address:
        _connect(place, seconds)
    jax.distributed.initialize(
        place.coordinator_address,
        place.num_processes,
        place.process_id,
        # An empty list, unlike None, is all devices under every detection method.
        None if "JAX_LOCAL_DEVICE_IDS" in os.environ else list(place.local_device_ids),
        cluster_detection_method=place.detection,
        **limits,
    )


class Membership:
    """This process among the others, from their meeting to their end.

    Args:
      place: which process this is; None: a worker of a pod of TPUs, which JAX knows.
      start_seconds: that processes wait for each other at the start.
      preemptible: SIGTERM is for `distributed.preemption`, not for the operating system.

    Raises:
      UserError: if process 0 cannot be reached in time.
    """

    def __init__(self, place: Place | None, *, start_seconds: float, preemptible: bool):
        jax.config.update("jax_enable_preemption_service", preemptible)
        _initialize(place, start_seconds)
        self.index, self.count = jax.process_index(), jax.process_count()
        self._stopping, self._ended = threading.Lock(), threading.Event()
        self._watch = threading.Thread(target=self._watch_for_errors, name="watch", daemon=True)
        self._watch.start()
        atexit.register(self.end)

    @property
    def _client(self) -> jax_distributed._jax.DistributedRuntimeClient:
        client = jax_distributed.global_state.client
        assert client is not None
        return client

    def publish(self, key: str, value: str) -> None:
        """Publish a string to every process; a key is used once."""
        self._client.key_value_set(f"score_sde/{key}", value)

    def wait_for(self, key: str) -> str:
        """Wait until a process has published a string, and return it; end with the run if a process dies."""
        while True:
            try:  # in slices, between which Ctrl-C comes through
                return str(self._client.blocking_key_value_get(f"score_sde/{key}", int(1000 * SLICE_SECONDS)))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def _first_error(self) -> tuple[int, str] | None:
        """Return the process that stopped first, and why; None if none has."""
        try:
            process, message = json.loads(self._client.key_value_try_get(_STOPPED))
        except jax.errors.JaxRuntimeError:  # there is none, or the service has gone, which JAX acts on itself
            return None
        return process, message

    def _watch_for_errors(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            if (error := self._first_error()) and self._stopping.acquire(blocking=False):
                logging.error("process %d stopped, and with it all others: %s", *error)
                self._leave(EXIT_FAILED)

    def stop(self, message: str, code: int = EXIT_FAILED) -> NoReturn:
        """End this process and, within seconds, all others with the message, wherever they wait."""
        if not self._stopping.acquire(blocking=False):
            time.sleep(2 * STOP_SECONDS)  # the other thread ends the process
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
            self._client.key_value_set(_STOPPED, json.dumps([self.index, message]))
        self._leave(code)

    def first_error(self, seconds: float) -> tuple[int, str] | None:
        """Return the process that stopped first, and why, waiting for it to say so; None if none does."""
        deadline = time.monotonic() + seconds
        while not (error := self._first_error()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)
        return error

    def _leave(self, code: int) -> NoReturn:
        """End this process; process 0 only when all others have heard why, since they end with it."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_HEARD}{self.index}", "")
            deadline = time.monotonic() + STOP_SECONDS
            while self.index == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get(_HEARD)) >= self.count:
                    break
                time.sleep(POLL_SECONDS / 4)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # the way out of Python would wait for those that are gone

    def end(self) -> None:
        """Wait for the others and leave the run; called when Python ends."""
        if self._ended.is_set():
            return
        self._client.key_value_set(f"{_ENDED}{self.index}", "")
        while len(self._client.key_value_dir_get(_ENDED)) < self.count:  # process 0 may have much to write, alone
            time.sleep(POLL_SECONDS / 4)
        self._ended.set()
        self._watch.join()
        jax.distributed.shutdown()
