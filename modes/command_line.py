"""The command line of main.py: check its flags, set up the process for a mode, and end it on an error."""

from __future__ import annotations

import dataclasses
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from configs.settings import flatten
from errors import UserError
from parallel import distributed
from storage import files as storage
from workdir import folder as workdirs
from workdir import logs
from workdir.locks import LockedError

FLAGS = flags.FLAGS
EXIT_FAILED, EXIT_BAD_FLAG = 1, 2
EXIT_INTERRUPTED, EXIT_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what shells report for these signals
PATHS = ("workdir", "eval_folder", "output", "images", "checkpoint")  # flags that are paths
PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id", "start_seconds")  # of shared modes


@dataclasses.dataclass(frozen=True)
class Mode:
    """A value of --mode.

    `run` is called with `config` and `workdir` if it uses them, its flags by name, and `files`, the positional
    arguments, if it takes some. It returns False if it failed and has printed why.
    """

    run: Callable[..., Any]
    flags: tuple[str, ...] = ()  # besides --config and --workdir
    needed: tuple[str, ...] = ()  # flags that must be given
    ignored: tuple[str, ...] = ()  # flags accepted but ignored
    config: bool | str = True  # whether --config must be given; "optional": it may be
    workdir: str = "trained"  # requirement on --workdir: "trained", "writable", "unmade" (created by the mode), "none"
    files: str = ""  # positional arguments, such as "A.json B.json"; empty: none
    shared: bool = False  # whether several processes can run it together
    preemptible: bool = False  # whether it saves its state on SIGTERM


def _split_config(argv: Sequence[str]) -> tuple[list[str], str]:
    """Return the arguments without --config and its overrides, and the file of --config."""
    others, file, rest = [], "", list(argv)
    while rest:
        argument = rest.pop(0)
        match = re.fullmatch(r"--?(?:no)?config(\.[^=]+)?(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            others.append(argument)
            continue
        value = match[2]
        if value is None and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        if match[1] is None:
            file = value or ""
    return others, file.partition(":")[0]


def _text(error: BaseException) -> str:
    """Return the message of an error on one line, without the errors that ml_collections wraps around it."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    lines = str(error.args[0] if len(error.args) == 1 else error).splitlines()
    return ". ".join(line.strip() for line in lines if line.strip())


def _explain_config(error: Exception, file: str) -> str:
    """Return what is wrong in or with a config file that could not be loaded; empty if the file is not the cause."""
    if not file:
        return ""
    path = Path(file).resolve()
    if not path.is_file():
        return f"--config {file} is not a file"
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for cause in reversed(chain):
        if isinstance(cause, SyntaxError) and Path(cause.filename or "").resolve() == path:
            return f"--config {file}, line {cause.lineno}: {cause.msg}"
        frames = traceback.extract_tb(cause.__traceback__)
        if lines := [frame.lineno for frame in frames if Path(frame.filename).resolve() == path]:
            kind = "" if isinstance(cause, UserError) else f"{type(cause).__name__}: "
            return f"--config {file}, line {lines[-1]}: {kind}{_text(cause)}"
        if isinstance(cause, AttributeError) and cause.name == "get_config":
            return f"--config {file} defines no function get_config()"
    if isinstance(error, OSError):  # of a file that the config reads
        return f"--config {file} cannot be loaded: {_text(error).rpartition(file)[2].strip('. ')}"
    return str(error) if isinstance(error, UserError) else ""


def _parse(argv: Sequence[str], file: str) -> list[str]:
    arguments = FLAGS(argv)
    if FLAGS.mode is None:
        raise flags.Error("--mode is missing; --help lists the modes")
    config = FLAGS["config"].value
    if file and not isinstance(config, ConfigDict):
        getattr(config, "lock", None)  # of a file that could not be read: raises why
        raise UserError(f"--config {file}: get_config() returns {type(config).__name__}; expected a ConfigDict")
    return list(arguments)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse the command line; print one sentence and exit if that fails.

    --mode doctor runs with a configuration that cannot be loaded, too: the value of --config is then a UserError.
    """
    # Shells expand "~" only at the beginning of an argument.
    argv = [re.sub(r"^(--?config=)~(?=/)", lambda start: start[1] + str(Path.home()), each) for each in argv]
    others, file = _split_config(argv)
    try:
        try:
            return _parse(argv, file)
        finally:
            sys.stdout.flush()  # --help prints and exits
    except BrokenPipeError as error:
        fail(error)
    except Exception as error:
        message, code = _explain_config(error, file), EXIT_FAILED
        if not message and isinstance(error, AttributeError | KeyError | TypeError):  # of a misspelled --config.key
            message, code = f"unknown setting {_text(error)}", EXIT_BAD_FLAG
        elif not message and isinstance(error, flags.Error):
            message, code = str(error), EXIT_BAD_FLAG
        if not message:
            raise
    try:
        arguments = _parse(others, "")
        if FLAGS.mode == "doctor":
            FLAGS["config"].value = UserError(message)
            return arguments
    except flags.Error as error:
        message, code = str(error), EXIT_BAD_FLAG
    print(f"score_sde: {message}", file=sys.stderr)
    sys.exit(code)


def check_flags(name: str, modes: Mapping[str, Mode], files: Sequence[str] = ()) -> None:
    """Check that the flags and the positional arguments `files` fit the mode."""
    mode = modes[name]
    for flag in PROCESS_FLAGS:
        if FLAGS[flag].present and not mode.shared:
            shared = ", ".join(each for each, other in modes.items() if other.shared)
            raise UserError(f"--mode {name} runs in one process and does not take --{flag}; modes that do: {shared}")
    if files and not mode.files:
        raise UserError(f"unexpected argument {files[0]!r}; every setting is a flag, such as --workdir DIR")
    for flag, wanted, value in (("config", mode.config is True, "FILE"), ("workdir", mode.workdir != "none", "DIR")):
        if wanted and FLAGS[flag].value is None:
            raise UserError(f"--mode {name} needs --{flag} {value}")
    for flag in sorted({flag for other in modes.values() for flag in other.flags}):
        if FLAGS[flag].present and flag not in mode.flags + mode.ignored:
            taken = ", ".join(f"--{each}" for each in mode.flags) or "none of its own"
            raise UserError(f"--mode {name} does not take --{flag}; its flags: {taken}")
    for flag in mode.needed:
        if not FLAGS[flag].value:
            raise UserError(f"--mode {name} needs --{flag} FILE")


def prepare(modes: Mapping[str, Mode], files: Sequence[str]) -> dict[str, Any]:
    """Check flags, platform and workdir, join the other processes, start the log file; return the mode's arguments."""
    mode = modes[FLAGS.mode]
    check_flags(FLAGS.mode, modes, files)
    for flag in PATHS:
        if path := FLAGS[flag].value:
            FLAGS[flag].value = str(storage.local_path(path, f"--{flag}"))
    arguments = {flag: FLAGS[flag].value for flag in mode.flags}
    if mode.shared:
        place = (FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
        distributed.initialize(*place, start_seconds=FLAGS.start_seconds, preemptible=mode.preemptible)
        given = {f"--{name}": value for name, value in arguments.items()}
        given |= {"--mode": FLAGS.mode, "--workdir": FLAGS.workdir}
        config = {f"--config.{key}": value for key, value in flatten(FLAGS.config).items()}
        distributed.require_same(given | config)
        logs.set_up_process()
    if mode.config is True:
        distributed.check_platform()
    if mode.workdir in ("trained", "writable"):
        check = workdirs.check_trained if mode.workdir == "trained" else workdirs.check_writable
        check(FLAGS.workdir)
        logs.set_up_file(Path(FLAGS.workdir))
    if mode.config and FLAGS["config"].value is not None:
        arguments["config"] = FLAGS["config"].value
    if mode.workdir != "none":
        arguments["workdir"] = Path(FLAGS.workdir)
    if mode.files:
        arguments["files"] = [str(storage.local_path(file, "argument")) for file in files]
    return arguments


def fail(error: BaseException) -> NoReturn:
    """End the program, and all other processes of the run, because of an error.

    Errors the user can fix and Ctrl-C print one line. Anything else is a bug: print the traceback. The log file of the
    workdir gets the traceback of both.
    """
    error = distributed.explain(error)
    if isinstance(error, BrokenPipeError):
        poll = select.poll()
        poll.register(1, select.POLLOUT)
        if any(event & select.POLLERR for _, event in poll.poll(0)):  # the reader, such as `head`, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes standard output once more
            distributed.stop("standard output is closed", EXIT_PIPE)
    code, is_bug, sentence = EXIT_FAILED, False, str(error)
    if isinstance(error, KeyboardInterrupt):
        code, sentence = EXIT_INTERRUPTED, "interrupted by Ctrl-C"
    elif isinstance(error, OSError) and storage.is_of_machine(error):
        sentence = storage.explain(error)
    elif not isinstance(error, UserError):
        is_bug, sentence = True, f"{type(error).__name__}: {error}"
    if is_bug:
        traceback.print_exception(error)
    else:
        print(f"score_sde: {sentence}", file=sys.stderr)
    # A run refused because another one uses the workdir leaves that run's log alone.
    workdir = FLAGS["workdir"].value
    if workdir and distributed.is_main_process() and not isinstance(error, LockedError):
        logs.record_traceback(Path(workdir), error)
    distributed.stop(sentence, code)
