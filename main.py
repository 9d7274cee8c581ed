"""Train score-based generative models of images, sample from them and evaluate them.

python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode train --workdir runs/digits
python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode eval --workdir runs/digits
python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode sample --workdir runs/digits
python main.py --config configs/ve/cifar10_ncsnpp.py --mode import --checkpoint checkpoint_26 --workdir runs/cifar10

--config.group.key=value changes one setting. The README says what each mode does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

import run_lib
from experiment import startup
from modes import command_line
from modes.command_line import Mode
from parallel.membership import START_SECONDS
from workdir import logs

# The parameters of a mode's function are its flags, by the same names.
MODES = {
    "doctor": Mode(run_lib.doctor, config="optional", workdir="none"),
    "prepare": Mode(run_lib.prepare, workdir="none"),
    "memory": Mode(run_lib.memory, workdir="none"),
    # Scripts for the 2021 code always pass --eval_folder.
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

FLAGS = flags.FLAGS
flags.DEFINE_enum("mode", None, list(MODES), "What to do.")
config_flags.DEFINE_config_file("config", None, "Python file whose get_config() returns the experiment.")
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, logs, reports.")
flags.DEFINE_string("eval_folder", "eval", "eval: folder of the evaluation, inside the workdir.")
flags.DEFINE_string("output", "", "Folder of the results, inside the workdir; convert_weights, stats: file to write.")
flags.DEFINE_integer("snapshot", 0, "Number of the checkpoint; 0: the newest.")
flags.DEFINE_integer(
    "num_images", 0, "0: 64 of sample, 16 of encode, eval.num_samples of compare_samplers, all or 8 of restore."
)
flags.DEFINE_bool("png", False, "sample: also write each sample as a PNG.")
flags.DEFINE_string("samplers", "", "compare_samplers: METHOD[:STEPS][:KEY=VALUE...], separated by commas.")
flags.DEFINE_string("images", "", "encode: .npz file of images, such as samples.npz; empty: the test split.")
flags.DEFINE_string("split", "train", "stats: part of the data, train or test.")
flags.DEFINE_bool("keep_features", False, "stats: also keep the features of every image in the file.")
flags.DEFINE_string("checkpoint", None, "import, export, convert_weights: file of another program.")
flags.DEFINE_bool("dry_run", False, "import: print where every tensor would go, and write nothing.")
flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where no scheduler started them: docs/pods.md."
)
flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator_address.")
flags.DEFINE_integer("process_id", None, "Index of this process, from 0, with --coordinator_address.")
flags.DEFINE_float("start_seconds", START_SECONDS, "How long processes wait for each other at the start.", 1.0)


def main(argv: Sequence[str]) -> int:
    """Run the mode; return the exit code."""
    startup.begin(startup.process_start())
    startup.mark("imports")
    logs.set_up_console()
    startup.set_up()  # before JAX looks for devices
    try:
        arguments = command_line.prepare(MODES, argv[1:])
        succeeded = MODES[FLAGS.mode].run(**arguments) is not False
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        command_line.fail(error)
    return 0 if succeeded else command_line.EXIT_FAILED


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
