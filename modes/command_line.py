"""The flags of main.py: what each means, which mode takes it, and how mistakes in them are told."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from configs.settings import flatten
from errors import UserError
from parallel import distributed
from parallel.membership import START_SECONDS

FLAGS = flags.FLAGS
EXIT_BAD_FLAG = 2
# Flags of modes that several processes can share.
OF_PROCESSES = ("coordinator_address", "num_processes", "process_id", "start_seconds")
# Flags that only some modes take.
OF_MODES = (
    "checkpoint",
    "dry_run",
    "eval_folder",
    "images",
    "keep_features",
    "num_images",
    "output",
    "png",
    "samplers",
    "snapshot",
    "split",
)


@dataclasses.dataclass(frozen=True)
class Mode:
    """A value of --mode.

    Attributes:
      run: what it does; called with `config` and `workdir` if it uses them, its flags by name, and `files`, the
        arguments that are no flags, if it takes some. False: it failed and has said why.
      flags: that it takes besides --config and --workdir.
      needed: those of them that must be given.
      ignored: that it takes and does nothing with.
      config: whether --config must be given; "optional": it may be.
      workdir: what --workdir must be: "trained", "writable", "unmade" (made by the mode itself), or "none", not given.
      files: what the arguments that are no flags stand for, such as "A.json B.json"; empty: there may be none.
      shared: whether several processes can run it together.
      preemptible: whether it saves its state on SIGTERM.
    """

    run: Callable[..., Any]
    flags: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    config: bool | str = True
    workdir: str = "trained"
    files: str = ""
    shared: bool = False
    preemptible: bool = False


def define_flags(modes: Mapping[str, Mode]) -> None:
    """Defines every flag; to be called once."""
    config_flags.DEFINE_config_file("config", None, "Experiment; --config.group.key=value changes one value.")
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, logs, reports.")
    flags.DEFINE_enum("mode", None, list(modes), "What to do; the README says what each does.")
    flags.DEFINE_string("eval_folder", "eval", "eval: folder of the evaluation, inside the workdir.")
    flags.DEFINE_string(
        "checkpoint", None, "import, export: file of score_sde or score_sde_pytorch. convert_weights: file or folder."
    )
    flags.DEFINE_bool("dry_run", False, "import: print where every tensor would go, and write nothing.")
    flags.DEFINE_string(
        "output",
        "",
        "Folder of the results, inside the workdir; named after what is in it if empty. convert_weights, stats: file.",
    )
    flags.DEFINE_integer("snapshot", 0, "Number of the checkpoint; 0: the newest.")
    flags.DEFINE_integer(
        "num_images",
        0,
        "sample: samples, 0: 64. compare_samplers: of each, 0: eval.num_samples. encode: test images, 0: 16. restore: "
        "images, 0: all of restore.images, or 8 of the test split.",
    )
    flags.DEFINE_string("images", "", "encode: .npz file of levels, such as samples.npz; empty: the test split.")
    flags.DEFINE_bool("png", False, "sample: write each sample as a PNG of its own, too.")
    flags.DEFINE_string("split", "train", "stats: part of the data, train or test.")
    flags.DEFINE_bool("keep_features", False, "stats: keep the features of every image in the file, too.")
    flags.DEFINE_string("samplers", "", "compare_samplers: METHOD[:STEPS][:KEY=VALUE...], separated by commas.")
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0; for processes that no scheduler started, docs/pods.md."
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the run, with --coordinator_address.")
    flags.DEFINE_integer("process_id", None, "Of this process, counted from 0, with --coordinator_address.")
    flags.DEFINE_float("start_seconds", START_SECONDS, "How long processes wait for each other at the start.", 1.0)
    flags.mark_flags_as_required(["mode"])


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a misspelt configuration key ends the program with the nearest right one."""
    try:
        return FLAGS(argv)
    except (AttributeError, KeyError, TypeError) as error:
        message = str(error.args[0] if error.args else error).replace("\n", " ")
    except flags.Error as error:
        message = str(error)
    print(f"{argv[0]}: {message}", file=sys.stderr)
    sys.exit(EXIT_BAD_FLAG)


def check_process_flags(name: str, modes: Mapping[str, Mode]) -> None:
    """Checks that flags of several processes are given only to a mode that they can share.

    Raises:
      UserError: naming the flag, and the modes that take it.
    """
    for flag in OF_PROCESSES:
        if FLAGS[flag].present and not modes[name].shared:
            shared = ", ".join(each for each, mode in modes.items() if mode.shared)
            raise UserError(f"--mode {name} runs in one process and does not take --{flag}; modes that do: {shared}")


def check_flags(name: str, mode: Mode, files: Sequence[str] = ()) -> None:
    """Checks that the flags, and the arguments that are none, go with the mode.

    Raises:
      UserError: naming a flag that the mode does not take, or one that it needs.
    """
    if files and not mode.files:
        raise UserError(f"unexpected argument {files[0]!r}; every setting is a flag, such as --workdir DIR")
    for flag, wanted, value in (("config", mode.config is True, "FILE"), ("workdir", mode.workdir != "none", "DIR")):
        if wanted and FLAGS[flag].value is None:
            raise UserError(f"--mode {name} needs --{flag} {value}")
    for flag in OF_MODES:
        if FLAGS[flag].present and flag not in mode.flags + mode.ignored:
            taken = ", ".join(f"--{each}" for each in mode.flags) or "none of its own"
            raise UserError(f"--mode {name} does not take --{flag}; its flags: {taken}")
    for flag in mode.needed:
        if not FLAGS[flag].value:
            raise UserError(f"--mode {name} needs --{flag} FILE")


def join_processes(mode: Mode) -> None:
    """Joins the other processes of the run, if there are any; to be called before JAX looks for devices.

    Raises:
      UserError: if a flag is wrong, process 0 cannot be reached, or a flag differs from that of process 0.
    """
    distributed.initialize(
        FLAGS.coordinator_address,
        FLAGS.num_processes,
        FLAGS.process_id,
        start_seconds=FLAGS.start_seconds,
        preemptible=mode.preemptible,
    )
    given = {f"--{name}": FLAGS[name].value for name in ("mode", "workdir", *mode.flags)}
    config = {f"--config.{key}": value for key, value in flatten(FLAGS.config).items()}
    distributed.require_same(given | config)
