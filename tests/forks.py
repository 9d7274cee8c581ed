"""Start Python programs by forking a process that has imported the project: 0.1 s of processor time instead of 3.

A program runs as under `python`: it is the main module, with its own arguments, environment and standard streams, and
Python ends as always. No backend of JAX has started in the process that forks.
"""

import atexit
import functools
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection

IMPORTED = ("run_lib", "modes.command_line", "experiment.startup", "absl.app", "ml_collections.config_flags")
IMPORTED += ("sklearn.datasets", "diffrax", "tensorboardX")  # which runs import when they need them
ENVIRON = dict(os.environ)  # before any test changes it
MAY_CHANGE = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COORDINATOR_PORT",
)  # read late, by the project itself


class Process:
    """A program that was started, as subprocess.Popen shows it."""

    def __init__(self, server, arguments, *, cwd, env, stdout, stderr):
        streams = stdout.fileno(), stderr.fileno()
        paths = [f"/proc/{os.getpid()}/fd/{stream}" for stream in streams]
        self._server, self.returncode = server, None
        self.pid = server.start(arguments=list(map(str, arguments[1:])), folder=str(cwd), environ=env, streams=paths)

    def poll(self):
        self.returncode = self._server.code(self.pid, 0)
        return self.returncode

    def wait(self, timeout=None):
        self.returncode = self._server.code(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class _Server:
    """The process that forks, as those that ask it see it."""

    def __init__(self, environ):
        self._codes = {}
        self._connection, other = Pipe()
        with other:
            command = [sys.executable, __file__, str(other.fileno())]
            self._process = subprocess.Popen(command, env=environ, pass_fds=[other.fileno()])
        atexit.register(self._end)

    def _end(self):
        self._connection.close()  # upon which it ends
        self._process.wait()

    def start(self, **request):
        self._connection.send(request)
        while not isinstance(event := self._receive(), int):
            pass
        return event

    def _receive(self):
        event = self._connection.recv()
        if isinstance(event, tuple):
            self._codes[event[0]] = event[1]
        return event

    def code(self, process, timeout):
        """Return the exit code of a process, or None if it has not ended within so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while process not in self._codes:
            if not self._connection.poll(None if deadline is None else max(deadline - time.monotonic(), 0)):
                return None
            self._receive()
        return self._codes[process]


@functools.cache
def _server(python_path):
    return _Server(ENVIRON | {"PYTHONPATH": python_path})


def can_start(arguments, env):
    """Return whether a command can be started here: it is Python, and what was imported would not change by `env`."""
    settings = lambda environ: {  # noqa: E731
        key: value for key, value in environ.items() if key.startswith(("JAX_", "PYTHON")) and key not in MAY_CHANGE
    }
    return arguments[0] == sys.executable and settings(env) == settings(ENVIRON | {"PYTHONPATH": env["PYTHONPATH"]})


def start(arguments, **options):
    """Start a command, with the keywords of subprocess.Popen that `Process` takes."""
    return Process(_server(options["env"]["PYTHONPATH"]), arguments, **options)


# --- the process that forks ------------------------------------------------------------------------------------------


def _serve(connection):
    """Fork for each request and return it in the child; return None when nobody is left to ask."""
    running = set()
    while True:
        if connection.poll(0.02):
            try:
                request = connection.recv()
            except EOFError:
                return None
            reading, writing = os.pipe()
            process = os.fork()
            if process == 0:
                return request | {"opened": writing}
            running.add(process)
            os.close(writing)
            os.read(reading, 1)  # returns when the child has opened its streams, which the other side may then close
            os.close(reading)
            connection.send(process)
        for process in list(running):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                running.remove(process)
                connection.send((process, os.waitstatus_to_exitcode(status)))


def _become(arguments, folder, environ, streams, opened):
    """Run a program in this process; close `opened` when the streams are open."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    files = os.open(os.devnull, os.O_RDONLY), *(os.open(path, os.O_WRONLY | os.O_APPEND) for path in streams)
    os.close(opened)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    if arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    asking = Connection(int(sys.argv[1]))
    for name in IMPORTED:
        importlib.import_module(name)
    asked = _serve(asking)
    if asked:
        asking.close()
        _become(**asked)
