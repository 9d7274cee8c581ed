"""A process among those of a run: how they meet, tell each other what went wrong, and end together.

Everything goes through the coordination service of `jax.distributed`, which process 0 hosts: a table of small strings
that all processes share, and heartbeats. It needs no device: who waits here holds up no collective.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from typing import NoReturn

import jax
from absl import logging
from jax._src import distributed as jax_distributed  # the table of strings has no public name; Orbax does the same

from errors import UserError
from parallel.cluster import Place
from parallel.farewell import Farewell

START_SECONDS = 300  # that processes wait for each other at the start
HEARTBEAT_SECONDS = 30  # after which a silent process counts as dead
STOP_SECONDS = 10  # that a process with an error waits for the others to hear of it
END_SECONDS = 60  # that processes wait for each other at the end
POLL_SECONDS = 1.0
SLICE_SECONDS = 5.0  # of a wait for another process
EXIT_FAILED = 1
_STOPPED, _HEARD, _ENDED = "score_sde/stopped", "score_sde/heard/", "score_sde/ended/"
_WAY_OUT = (
    "What was complete is kept: mend the cause and start all processes again with the same commands; training goes on "
    "from the newest checkpoint, an evaluation from what it has measured"
)


def _connect(place: Place, seconds: float) -> None:
    """Returns once process 0 listens.

    Raises:
      UserError: if it does not in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(place.host_and_port, timeout=max(deadline - time.monotonic(), 0.1)).close()
            return
        except OSError as error:  # a host name may become known later, too
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"process {place.process_id} of {place.num_processes} could not reach process 0 at "
                f"{place.coordinator_address} within {seconds:g} s ({reason}): start process 0 on that machine, and "
                "see that the port is free there and no firewall closes it"
            )
        time.sleep(min(POLL_SECONDS, max(deadline - time.monotonic(), 0.1)))


class Membership:
    """This process among the others, from their meeting to their end.

    Args:
      place: which process this is; None: a worker of a pod of TPUs, which JAX knows.
      start_seconds: that processes wait for each other at the start.
      preemptible: SIGTERM is for `distributed.Preemption`, not for the operating system.

    Raises:
      UserError: if process 0 cannot be reached in time.
    """

    def __init__(self, place: Place | None, *, start_seconds: float, preemptible: bool):
        name = f"process {place.process_id} of {place.num_processes}" if place else "this worker of a pod"
        self._farewell = Farewell(
            f"score_sde: {name} did not meet the others{f' at {place.coordinator_address}' if place else ''} within "
            f"{start_seconds:g} s; start all of them, each with its own id and all with the same number of processes"
        )
        try:
            self._start(place, start_seconds, preemptible)
        except BaseException:
            self._farewell.cancel()
            raise
        self.index, self.count = jax.process_index(), jax.process_count()
        self._farewell.change(
            f"score_sde: process {self.index} of {self.count} has ended in the middle of its work: it was killed, or "
            f"JAX ended it (as said above) since another process died or cannot be reached. {_WAY_OUT}"
        )
        self._stopping, self._ended = threading.Lock(), threading.Event()
        self._watch = threading.Thread(target=self._watch_for_errors, name="watch", daemon=True)
        self._watch.start()
        atexit.register(self.end)

    @staticmethod
    def _start(place: Place | None, start_seconds: float, preemptible: bool) -> None:
        jax.config.update("jax_enable_preemption_service", preemptible)
        start = functools.partial(
            jax.distributed.initialize,
            initialization_timeout=int(start_seconds),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
        if place is None:
            start()
            return
        if place.process_id:
            _connect(place, start_seconds)
        start(
            place.coordinator_address,
            place.num_processes,
            place.process_id,
            None if place.local_device_ids is None else list(place.local_device_ids),
            cluster_detection_method="deactivate",
        )

    @property
    def _client(self) -> jax_distributed._jax.DistributedRuntimeClient:
        client = jax_distributed.global_state.client
        assert client is not None
        return client

    # --- strings for all -------------------------------------------------------------------------------------------

    def publish(self, key: str, value: str) -> None:
        """Lets every process know a string; a key is used once."""
        self._client.key_value_set(f"score_sde/{key}", value)

    def wait_for(self, key: str) -> str:
        """Waits until a process has published a string, and returns it; ends with the run if one of them dies."""
        while True:
            try:  # in slices, between which Ctrl-C comes through
                return str(self._client.blocking_key_value_get(f"score_sde/{key}", int(1000 * SLICE_SECONDS)))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    # --- errors ----------------------------------------------------------------------------------------------------

    def _first_error(self) -> tuple[int, str] | None:
        """Returns the process that stopped first, and why; None if none has."""
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
        """Ends this process and lets all others end with the message, within seconds, wherever they wait."""
        if not self._stopping.acquire(blocking=False):
            time.sleep(2 * STOP_SECONDS)  # the other thread ends the process
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
            self._client.key_value_set(_STOPPED, json.dumps([self.index, message]))
        self._leave(code)

    def first_error(self, seconds: float) -> tuple[int, str] | None:
        """Returns the process that stopped first, and why, giving it some time to say so; None if none does."""
        deadline = time.monotonic() + seconds
        while not (error := self._first_error()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)
        return error

    def _leave(self, code: int) -> NoReturn:
        """Ends this process, process 0 only when all others have heard why: its end would end them without a word."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_HEARD}{self.index}", "")
            deadline = time.monotonic() + STOP_SECONDS
            while self.index == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get(_HEARD)) >= self.count:
                    break
                time.sleep(POLL_SECONDS / 4)
        self._farewell.cancel()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # the way out of Python would wait for those that are gone

    # --- end -------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Waits for the others and leaves the run; called when Python ends."""
        if self._ended.is_set():
            return
        self._client.key_value_set(f"{_ENDED}{self.index}", "")
        while len(self._client.key_value_dir_get(_ENDED)) < self.count:  # process 0 may have much to write, alone
            time.sleep(POLL_SECONDS / 4)
        self._ended.set()
        self._watch.join()
        self._farewell.change(
            f"score_sde: process {self.index} of {self.count} was done, but another was not within {END_SECONDS} s, "
            f"or has died. {_WAY_OUT}"
        )
        jax.distributed.shutdown()
        self._farewell.cancel()
