"""Runs an experiment: one function for each mode of main.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

import datasets
import report
from classifier import training as classifier_training
from classifier.experiment import FOLDER
from configs.settings import check
from experiment import smoke, startup
from experiment.build import Experiment, build_experiment, describe
from metrics import inception
from models.factory import require_score_network
from modes import encode as encoding
from modes import memory as footprint
from modes import prepare as preparing
from modes import sample as sample_run
from modes import stats as data_stats
from modes.compare_samplers import compare
from modes.doctor.doctor import examine
from modes.evaluate import evaluate as eval_loop
from modes.importing import export_checkpoint, import_checkpoint
from modes.restore import restore as restoring
from training import loop as train_loop
from workdir import folder as workdirs
from workdir import locks

__all__ = [
    "build_experiment",
    "compare_reports",
    "compare_samplers",
    "convert_weights",
    "doctor",
    "encode",
    "evaluate",
    "export_checkpoint",
    "import_checkpoint",
    "memory",
    "prepare",
    "restore",
    "sample",
    "stats",
    "train",
    "train_classifier",
]


def _checked(config: ConfigDict) -> ConfigDict:
    """Check every setting, and shrink the experiment if `training.smoke` asks for it."""
    check(config)
    return smoke.shrink(config) if config.training.smoke else config


def doctor(config: ConfigDict | None = None) -> bool:
    """Prints what is installed, present or missing and how to get it, and runs a self-test of some ten seconds.

    Args:
      config: experiment configuration whose settings and data set are looked at, too; None: none.

    Returns:
      Whether nothing is broken; what is missing and can be done without does not count.
    """
    return examine(smoke.shrink(config) if config is not None and config.training.smoke else config)


def prepare(config: ConfigDict) -> None:
    """Prepares the configured data set, once: training and evaluation then start at once and need no TensorFlow.

    A data set of TFDS is downloaded and written as ArrayRecord files, in a process of its own; pictures are decoded
    into the cache, up to data.cache_gib. What is prepared already is left as it is.

    Args:
      config: experiment configuration; only `config.data` counts.

    Raises:
      UserError: if a setting is wrong, or the data cannot be had.
      UserError: if files or TensorFlow are missing.
    """
    preparing.prepare_data(_checked(config))


def memory(config: ConfigDict) -> None:
    """Prints what training and evaluation will hold in the memory of each device; compiles them, and runs nothing.

    Args:
      config: experiment configuration.

    Raises:
      UserError: if a setting is wrong, or JAX does not tell the memory on this backend.
    """
    config = _checked(config)
    require_score_network(config)
    train_loop.check_schedule(config)
    footprint.print_memory(config)


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains a network, resuming from the newest checkpoint of the workdir if there is one.

    Writes checkpoints, sample grids, the loss curve and config.json in the workdir.

    Args:
      config: experiment configuration.
      workdir: folder of the run; made if need be.

    Raises:
      UserError: if a setting is wrong, or does not go with the step to resume from.
      WorkdirError: if the workdir cannot be written, holds another experiment, or another run trains there.
      CheckpointError: if the workdir has checkpoints, but all are damaged, or one cannot be written.
    """
    config = _checked(config)
    require_score_network(config)
    train_loop.check_schedule(config)
    experiment = build_experiment(config)
    workdirs.check_writable(workdir)
    workdirs.check_same_experiment(workdir, config)
    with locks.hold(workdir):
        startup.mark("build")
        source = datasets.build_source(config, "train")
        startup.mark("data")
        trainer = train_loop.build_trainer(experiment, workdir)
        describe(experiment)
        state = train_loop.train(trainer, source, workdir)
    logging.info("trained %d steps; checkpoints and samples are in %s", int(state.step), workdir)


def train_classifier(config: ConfigDict, workdir: str | Path) -> None:
    """Trains a classifier of the experiment's noisy images, for guidance, and measures it; or resumes that.

    Writes in the sub-folder "classifier" of the workdir: checkpoints, config.json, the loss curve, and the accuracy at
    each noise level. The score network need not be trained yet.

    Args:
      config: experiment configuration of the score network.
      workdir: folder of its run; made if need be.

    Raises:
      UserError: if a setting is wrong, the data have no labels, or the step to resume from does not go with a setting.
      WorkdirError: if the workdir cannot be written, or it or its classifier is of another experiment.
      CheckpointError: if the classifier has checkpoints, but all are damaged.
    """
    config = _checked(config)
    train_loop.check_schedule(config, "classifier")
    workdirs.check_same_experiment(workdir, config, "checkpoints")
    with locks.hold(Path(workdir) / FOLDER):
        train, test = (datasets.build_source(config, split) for split in ("train", "test"))
        classifier_training.train_classifier(config, Path(workdir), train, test)


def _open(config: ConfigDict, workdir: str | Path) -> Experiment:
    """Builds the experiment of a workdir that holds a training run of it."""
    config = _checked(config)
    require_score_network(config)
    experiment = build_experiment(config)
    workdirs.check_same_experiment(workdir, config, "checkpoints")
    describe(experiment)
    return experiment


def evaluate(config: ConfigDict, workdir: str | Path, eval_folder: str = "eval") -> None:
    """Evaluates the checkpoints eval.begin_ckpt .. eval.end_ckpt and writes the report.

    What an earlier, killed evaluation has written is used again.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      eval_folder: folder of the results, inside the workdir.

    Raises:
      UserError: if a setting is wrong.
      WorkdirError: if the workdir holds another experiment, or the folder results of other settings.
      CheckpointError: if a checkpoint is missing or damaged.
    """
    experiment = _open(config, workdir)
    eval_loop.check_evaluation(experiment.config)
    folder = Path(workdir) / eval_folder
    with locks.hold(folder, "--eval_folder"):
        eval_loop.evaluate_checkpoints(experiment, Path(workdir), folder)


def sample(
    config: ConfigDict,
    workdir: str | Path,
    output: str = "",
    *,
    snapshot: int = 0,
    num_images: int = 0,
    png: bool = False,
) -> Path:
    """Draws samples of a checkpoint with the configured sampler; no data set is needed.

    Writes samples.npz, samples.png and settings.json. What an earlier, killed run has drawn is used again.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      output: folder of the samples, inside the workdir; empty: "samples/ckpt_<number>_<method>_<steps>".
      snapshot: number of the checkpoint; 0: the newest.
      num_images: samples to draw; 0: 64, rounded up to as many of each of `sampling.labels`.
      png: write png/00000.png and so on, one sample each, too.

    Returns:
      The folder of the samples.

    Raises:
      UserError: if a setting is wrong.
      WorkdirError: if the workdir holds another experiment, or the folder samples of other settings.
      CheckpointError: if the checkpoint is missing or damaged.
    """
    return sample_run.write_samples(
        _open(config, workdir), Path(workdir), output=output, snapshot=snapshot, num_images=num_images, png=png
    )


def compare_reports(files: Sequence[str]) -> None:
    """Prints a table of the metrics of several evaluations, with the difference of two.

    Args:
      files: report_<k>.json of --mode eval, two or more.

    Raises:
      UserError: if a file is no report, or what a number depends on differs: extractor, reference, number of samples,
        rounding, data.
      UserError: if there is no such file.
    """
    print(report.compare_reports(files))


def compare_samplers(
    config: ConfigDict,
    workdir: str | Path,
    output: str = "",
    *,
    samplers: str = "",
    snapshot: int = 0,
    num_images: int = 0,
) -> Path:
    """Measures the samples of several samplers of one checkpoint: FD and KID against network evaluations and seconds.

    Writes samplers.json, samplers.md and samplers.png after each sampler; what a killed run has drawn is used again.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      output: folder of the results, inside the workdir; empty: "compare_ckpt_<number>".
      samplers: separated by commas, METHOD[:STEPS][:KEY=VALUE...] with keys of config.sampling, which says all that a
        sampler does not; empty: a list of common ones.
      snapshot: number of the checkpoint; 0: the newest.
      num_images: samples of each sampler; 0: eval.num_samples.

    Returns:
      The folder of the results.

    Raises:
      UserError: if a sampler or a setting is wrong.
      WorkdirError: if the workdir holds another experiment, or the folder samples of other settings.
      CheckpointError: if the checkpoint is missing or damaged.
    """
    return compare.compare(
        _open(config, workdir),
        Path(workdir),
        samplers=samplers,
        output=output,
        snapshot=snapshot,
        num_images=num_images,
    )


def encode(
    config: ConfigDict,
    workdir: str | Path,
    output: str = "",
    *,
    snapshot: int = 0,
    num_images: int = 0,
    images: str = "",
) -> None:
    """Encodes images through the probability-flow ODE, decodes them again, and what lies between and around them.

    Writes latents.npz, three pictures and encode.json, the summary, once everything is computed; results of the same
    settings are replaced.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      output: folder of the results, inside the workdir; empty: "encode".
      snapshot: number of the checkpoint; 0: the newest.
      num_images: images, the first ones of the test split or of the file; 0: 16.
      images: .npz file of levels, uint8[N, H, W, C] by the name "samples" or "images"; empty: the test split.

    Raises:
      UserError: if a setting is wrong, or there are not so many images of the right kind.
      UserError: if the file of images is missing.
      WorkdirError: if the workdir holds another experiment, or the folder results of other settings.
      CheckpointError: if the checkpoint is missing or damaged.
      SolverError: if an integration failed.
    """
    encoding.encode_images(
        _open(config, workdir),
        Path(workdir),
        workdirs.output_folder(Path(workdir), output or "encode"),
        snapshot=snapshot,
        num_images=num_images or encoding.NUM_IMAGES,
        images=Path(images) if images else None,
    )


def restore(
    config: ConfigDict, workdir: str | Path, output: str = "", *, snapshot: int = 0, num_images: int = 0
) -> Path:
    """Restores images from what `config.restore` measures of them: in-painting, super-resolution and the like.

    Writes a folder for each image, with its measurement, its restorations, their mean and standard deviation, and a
    summary of all, restore.md and restore.json. What an earlier, killed run has drawn is used again; files that cannot
    be read are named and left out.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      output: folder of the results, inside the workdir; empty: "restore/ckpt_<number>_<operator>_<method>".
      snapshot: number of the checkpoint; 0: the newest.
      num_images: images, at the most; 0: all of restore.images, or 8 of the test split.

    Returns:
      The folder of the results.

    Raises:
      UserError: if a setting is wrong, or there is no image that can be used.
      UserError: if a file of the settings is missing.
      WorkdirError: if the workdir holds another experiment, or the folder results of other settings or images.
      CheckpointError: if the checkpoint is missing or damaged.
      SolverError: if a restoration diverged.
    """
    return restoring.restore_images(
        _open(config, workdir), Path(workdir), output=output, snapshot=snapshot, num_images=num_images
    )


def convert_weights(checkpoint: str | Path, output: str | Path = "") -> None:
    """Makes the weights file of the extractor "inception" of a public one; see docs/extractors.md.

    Args:
      checkpoint: pt_inception-2015-12-05-6726825d.pth, or TensorFlow's frozen graph or SavedModel of that network.
      output: file to write; empty: where the extractor looks.

    Raises:
      UserError: if there is no such file.
      UserError: if it does not hold the weights of that network.
    """
    inception.convert_weights(checkpoint, output)


def stats(config: ConfigDict, output: str = "", *, split: str = "train", keep_features: bool = False) -> Path:
    """Measures a split of the data: statistics of its features, to compare samples with, and of its pixels.

    Writes an .npz file, which eval.reference reads, and a .json file beside it with all numbers and the settings that
    follow from them. No network needs to be trained.

    Args:
      config: experiment configuration; reads data, eval.extractor, eval.weights and, for "classifier", seed.
      output: the .npz file; empty: in the folder "stats" of the cache, named after data, split and extractor.
      split: "train" or "test".
      keep_features: keep the features of every image, so that KID, precision and the like can be measured, too.

    Returns:
      The .npz file.

    Raises:
      UserError: if a setting is wrong, or the file holds other statistics.
      UserError: if data or weights are missing.
      WorkdirError: if the folder of the file cannot be written.
    """
    config = _checked(config)
    return data_stats.write_stats(config, split=split, output=output, keep_features=keep_features)
