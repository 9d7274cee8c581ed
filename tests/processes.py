"""Several processes of one run on this machine, which find each other on a free port of the loopback."""

import contextlib
import json
import os
import socket
import time

import forks
import tiny

# Runs main.py; a process that is gone is noticed sooner than in a real run.
WITH_HEARTBEAT = """
import runpy, sys
from parallel import membership
membership.HEARTBEAT_SECONDS = int(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path("main.py", run_name="__main__")
"""
HEARTBEAT_SECONDS = 5


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """The processes of one command, each with its log in a file of the folder."""

    def __init__(
        self,
        arguments,
        folder,
        *,
        count=2,
        devices=2,
        flags=True,
        environ=lambda i: {},
        own=lambda i: [],
        started=2,
    ):
        self.port = free_port()
        self.logs = [folder / f"process_{self.port}_{i}.txt" for i in range(started)]
        arguments = [arguments[0], "-c", WITH_HEARTBEAT, str(HEARTBEAT_SECONDS), *arguments[1:]]
        self.running = []
        for i, log in enumerate(self.logs):
            given = ["--coordinator_address", f"127.0.0.1:{self.port}", "--num_processes", str(count)]
            command = [*arguments, *given, "--process_id", str(i)] if flags else arguments
            env = tiny.environment(devices) | {"JAX_COORDINATOR_PORT": str(self.port)} | environ(i)
            with log.open("w") as file:
                self.running.append(forks.start([*command, *own(i)], cwd=tiny.ROOT, env=env, stdout=file, stderr=file))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def kill(self, i, sign):
        os.kill(self.running[i].pid, sign)

    def codes(self, timeout=240):
        """Waits for all and returns their exit codes."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.running]

    def text(self, i):
        return self.logs[i].read_text()

    def wait_for(self, condition, timeout=120):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, [self.text(i)[-2000:] for i in range(len(self.logs))]
            assert all(process.poll() is None for process in self.running), [self.text(i)[-2000:] for i in (0, 1)]
            time.sleep(0.1)


def run(arguments, folder, **kwargs):
    """Runs the processes to their end, which must be a good one."""
    with Processes(arguments, folder, **kwargs) as processes:
        codes = processes.codes()
        assert codes == [0] * len(codes), [processes.text(i)[-3000:] for i in range(len(codes))]
        return processes


def recorded(workdir):
    """The records of losses.jsonl that are there."""
    path = workdir / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
