"""Trains score-based generative models of images, draws from them and evaluates them.

python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode train --workdir runs/digits
python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode eval --workdir runs/digits
python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode sample --workdir runs/digits
python main.py --config configs/ve/cifar10_ncsnpp.py --mode import --checkpoint checkpoint_26 --workdir runs/cifar10
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import app

import run_lib
from errors import UserError
from experiment import startup
from modes import command_line
from modes.command_line import FLAGS, Mode
from parallel import distributed
from storage.files import explain
from workdir import folder as workdirs
from workdir import logs
from workdir.locks import LockedError

# Told in one sentence; anything else is a bug and ends with its traceback.
USER_ERRORS = (UserError, OSError)
EXIT_FAILED = 1

# Every value of --mode. The keywords of a function of run_lib are the flags of the same names.
MODES = {
    "doctor": Mode(run_lib.doctor, config="optional", workdir="none"),
    "prepare": Mode(run_lib.prepare, workdir="none"),
    "memory": Mode(run_lib.memory, workdir="none"),
    # Scripts of the 2021 code always give --eval_folder.
    "train": Mode(run_lib.train, ignored=("eval_folder",), workdir="writable", shared=True, preemptible=True),
    "train_classifier": Mode(run_lib.train_classifier, workdir="writable", shared=True, preemptible=True),
    "eval": Mode(run_lib.evaluate, flags=("eval_folder",), shared=True),
    "sample": Mode(run_lib.sample, flags=("output", "snapshot", "num_images", "png"), shared=True),
    "compare": Mode(run_lib.compare_reports, config=False, workdir="none", files="A.json B.json ..."),
    "compare_samplers": Mode(
        run_lib.compare_samplers, flags=("output", "samplers", "snapshot", "num_images"), shared=True
    ),
    "encode": Mode(run_lib.encode, flags=("output", "snapshot", "num_images", "images"), shared=True),
    "restore": Mode(run_lib.restore, flags=("output", "snapshot", "num_images"), shared=True),
    "stats": Mode(run_lib.stats, flags=("output", "split", "keep_features"), workdir="none", shared=True),
    "import": Mode(
        run_lib.import_checkpoint, flags=("checkpoint", "dry_run"), needed=("checkpoint",), workdir="unmade"
    ),
    "export": Mode(run_lib.export_checkpoint, flags=("checkpoint",), needed=("checkpoint",)),
    "convert_weights": Mode(
        run_lib.convert_weights, flags=("checkpoint", "output"), needed=("checkpoint",), config=False, workdir="none"
    ),
}
command_line.define_flags(MODES)


def prepare(files: Sequence[str]) -> None:
    """Checks the flags, joins the other processes, checks the workdir that a mode needs, and starts its log file."""
    mode = MODES[FLAGS.mode]
    command_line.check_process_flags(FLAGS.mode, MODES)
    command_line.check_flags(FLAGS.mode, mode, files)
    if mode.shared:
        command_line.join_processes(mode)
        logs.set_up_process()
    if mode.workdir in ("none", "unmade"):
        return
    check = workdirs.check_trained if mode.workdir == "trained" else workdirs.check_writable
    check(FLAGS.workdir)
    logs.set_up_file(Path(FLAGS.workdir))


def run(files: Sequence[str]) -> None:
    """Runs the mode with its flags; a mode that returns False has said why it failed."""
    mode = MODES[FLAGS.mode]
    settings = {name: FLAGS[name].value for name in mode.flags}
    if mode.config and FLAGS["config"].value is not None:
        settings["config"] = FLAGS.config.lock()
    if mode.workdir != "none":
        settings["workdir"] = Path(FLAGS.workdir)
    if mode.files:
        settings["files"] = files
    if mode.run(**settings) is False:
        sys.exit(EXIT_FAILED)


def fail(error: BaseException) -> NoReturn:
    """Ends the program, and all other processes of the run, with the error in one sentence.

    Its traceback goes to stdout.txt, if there is one; and to the console if it is nothing that a user can mend.
    """
    message = explain(error) if isinstance(error, OSError) else str(error)
    if not isinstance(error, USER_ERRORS):
        if not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        message = ": ".join(filter(None, (type(error).__name__, message)))
    print(f"score_sde: {message}", file=sys.stderr)
    # A run that is refused since another one works there has no business in that one's log.
    if FLAGS.workdir and distributed.is_main_process() and not isinstance(error, LockedError):
        with contextlib.suppress(OSError), (Path(FLAGS.workdir) / logs.FILE).open("r+") as file:
            file.seek(0, os.SEEK_END)
            traceback.print_exception(error, file=file)
    distributed.stop(message, EXIT_FAILED)


def main(argv: Sequence[str]) -> None:
    """Runs the chosen mode."""
    startup.begin(startup.process_start())
    startup.mark("imports")
    logs.set_up_console()
    startup.set_up()
    try:
        prepare(argv[1:])
        run(argv[1:])
    except USER_ERRORS as error:
        fail(distributed.explain(error))
    except (Exception, KeyboardInterrupt) as error:
        if distributed.is_alone():
            raise
        fail(distributed.explain(error))


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
