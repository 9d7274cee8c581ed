"""Trains and evaluates score-based generative models of images.

python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode train --workdir runs/digits
python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode eval --workdir runs/digits
python main.py --config configs/ve/cifar10_ncsnpp.py --mode import --checkpoint checkpoint_26 --workdir runs/cifar10
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags
from ml_collections import config_flags

import run_lib
from checkpoints import CheckpointError
from ode import SolverError
from runtime import logs
from runtime import workdir as workdirs
from runtime.train_loop import DivergedError

# What a user can mend: told in one sentence. Anything else is our fault and ends with its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, workdirs.WorkdirError, CheckpointError, SolverError, DivergedError)
EXIT_FAILED = 1
EXIT_BAD_FLAG = 2
DEFAULT_CACHE = "~/.cache/score_sde/xla"  # $JAX_COMPILATION_CACHE_DIR replaces it
MIN_COMPILE_SECONDS = 0.5  # what compiles faster is not worth a file

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Experiment; --config.group.key=value changes one value.")
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, logs, reports.")
flags.DEFINE_enum(
    "mode",
    None,
    ["train", "eval", "import", "export"],
    "Train a network, evaluate its checkpoints, or exchange one with the 2021 code.",
)
flags.DEFINE_string("eval_folder", "eval", "Folder of the evaluation, inside the workdir.")
flags.DEFINE_string("checkpoint", None, "File of score_sde or score_sde_pytorch: to import, or to export to.")
flags.DEFINE_bool("dry_run", False, "Of an import: print where every tensor would go, and write nothing.")
flags.mark_flags_as_required(["config", "workdir", "mode"])


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


def set_up_jax() -> None:
    """Turns on the persistent compilation cache, so that a program is compiled once a machine and not once a run."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser(DEFAULT_CACHE)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def prepare(workdir: Path) -> None:
    """Checks the flags and the workdir that a mode needs, and starts its log file."""
    if FLAGS.mode in ("import", "export") and not FLAGS.checkpoint:
        raise ValueError(f"--mode {FLAGS.mode} needs --checkpoint FILE")
    if FLAGS.mode == "import":
        return  # makes its workdir when all has been checked
    if FLAGS.mode == "train":
        workdirs.check_writable(workdir)
    else:
        workdirs.check_trained(workdir)
    logs.set_up_file(workdir)


def run(workdir: Path) -> None:
    """Dispatches on --mode."""
    config = FLAGS.config.lock()
    if FLAGS.mode == "train":
        run_lib.train(config, workdir)
    elif FLAGS.mode == "eval":
        run_lib.evaluate(config, workdir, FLAGS.eval_folder)
    elif FLAGS.mode == "export":
        run_lib.export_checkpoint(config, workdir, FLAGS.checkpoint)
    elif not run_lib.import_checkpoint(config, FLAGS.checkpoint, workdir, dry_run=FLAGS.dry_run):
        sys.exit(EXIT_FAILED)


def fail(error: BaseException, workdir: Path) -> NoReturn:
    """Ends the program with the error in one sentence; its traceback goes to stdout.txt, if there is one."""
    print(f"score_sde: {error}", file=sys.stderr)
    if (workdir / logs.FILE).exists():
        with (workdir / logs.FILE).open("a") as file:
            traceback.print_exception(error, file=file)
    sys.exit(EXIT_FAILED)


def main(argv: Sequence[str]) -> None:
    """Runs the chosen mode."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; every setting is a flag, such as --workdir DIR")
    workdir = Path(FLAGS.workdir)
    logs.set_up_console()
    set_up_jax()
    try:
        prepare(workdir)
        run(workdir)
    except USER_ERRORS as error:
        fail(error, workdir)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
