"""The mode "sample": write samples of a checkpoint; no data set is needed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

import checks
from classifier import guidance as classifier_guidance
from errors import UserError
from experiment import drawing
from experiment.build import SamplingProgram, open_experiment
from experiment.drawing import Samples
from parallel import distributed
from report import plots
from sampling import build_labels, labels_of_samples
from workdir import folder as workdirs
from workdir import locks, results

NUM_IMAGES = 64  # samples without --num_images; with labels rounded up to as many of each
ROUNDS = "rounds"  # sub-folder of the rounds that a restarted run, or one with more samples, reuses
SAMPLES_FILE = "samples.npz"
PNG_FOLDER = "png"

Labels = tuple[int, ...]  # assigned to the samples in turn; empty: none


def _default_output(config: ConfigDict, number: int) -> str:
    """Return such as "samples/ckpt_2_pc_250_labels_0..9_scale_2", or with a classifier's scale "..._classifier_2"."""
    settings = config.sampling
    name = f"samples/ckpt_{number}_{settings.method}"
    name += f"_{settings.num_steps}" if settings.num_steps else ""
    name += f"_labels_{settings.labels.replace(' ', '')}" if settings.labels else ""
    name += f"_scale_{settings.guidance_scale:g}" if settings.guidance_scale != 1 else ""
    return name + (f"_classifier_{settings.classifier_scale:g}" if settings.classifier_scale else "")


def _default_number(labels: Labels) -> int:
    return math.ceil(NUM_IMAGES / len(labels)) * len(labels) if labels else NUM_IMAGES


def sample(
    config: ConfigDict,
    workdir: str | Path,
    output: str = "",
    *,
    snapshot: int = 0,
    num_images: int = 0,
    png: bool = False,
) -> Path:
    """Draw samples of a checkpoint with the configured sampler; no data set is needed.

    Writes samples.npz, samples.png and settings.json. Reuses the samples of an earlier, interrupted run.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      output: folder of the samples, inside the workdir; empty: "samples/ckpt_<number>_<method>_<steps>".
      snapshot: number of the checkpoint; 0: the newest.
      num_images: samples to draw; 0: 64, rounded up to as many of each of `sampling.labels`.
      png: also write png/00000.png and so on, one sample each.

    Returns:
      The folder of the samples.

    Raises:
      UserError: if a setting is wrong, or no network knows the labels.
      WorkdirError: if the workdir holds another experiment, or the folder samples of other settings.
      CheckpointError: if the checkpoint is missing or damaged.
    """
    experiment, workdir = open_experiment(config, workdir), Path(workdir)
    config = experiment.config
    checks.not_negative("--num_images", num_images)
    if png and config.data.num_channels > plots.MAX_PNG_CHANNELS:
        raise UserError(f"--png with data.num_channels={config.data.num_channels}: a PNG holds 1 to 4; drop the flag")
    classifier = classifier_guidance.load_classifier(experiment, workdir)
    labels = build_labels(config, guide_classes=classifier.num_classes if classifier else 0)
    workdirs.output_folder(workdir, output)
    drawing.warn_of_batch(experiment)
    restored = drawing.restore(experiment, workdir, snapshot)
    folder = workdirs.output_folder(workdir, output or _default_output(config, restored.number))
    with locks.hold(folder, "--output"):
        params = classifier_guidance.all_params(restored.params, classifier)
        results.open_folder(folder, config, drawing.kinds_of_samples(experiment), params, flag="--output")
        num_images = num_images or _default_number(labels)
        arrays = results.read(folder / SAMPLES_FILE)
        if arrays is None or len(arrays["samples"]) != num_images:
            program = SamplingProgram(experiment, drawing.batch_size(experiment, num_images), guide=classifier)
            drawn = drawing.draw_samples(program, distributed.replicate(restored.params), folder / ROUNDS, num_images)
            of_samples = {"labels": labels_of_samples(labels, np.arange(num_images))} if labels else {}
            arrays = results.write(folder / SAMPLES_FILE, drawn.to_arrays() | of_samples)
        samples = Samples.from_arrays(arrays)
        if distributed.is_main_process():
            num_levels = experiment.scaler.num_levels
            plots.save_png(folder / "samples.png", drawing.picture(samples.levels, labels, num_levels))
            if png:
                for index, image in enumerate(plots.levels_to_uint8(samples.levels, num_levels)):
                    plots.save_png(folder / PNG_FOLDER / f"{index:05d}.png", image)
                for path in (folder / PNG_FOLDER).glob("*.png"):  # of an earlier, larger number of samples
                    if path.stem.isdecimal() and int(path.stem) >= len(samples.levels):
                        path.unlink()
            facts = {
                "checkpoint": {"number": restored.number, "step": restored.step, "ema": True},
                "seed": config.seed,
                "num_images": len(samples.levels),
                "labels": list(labels),
                "sampler": experiment.sampler_settings(),
                "nfe": samples.nfe,
                "seconds": samples.seconds,
                "compile_seconds": samples.compile_seconds,
                "images_per_second": samples.per_second,
                "num_levels": num_levels,
                "machine": distributed.describe_devices(),
            }
            results.record_facts(folder, facts)
        logging.info(
            "%d samples, %d network evaluations each, in %.1f s: %s",
            *(len(samples.levels), samples.nfe, samples.seconds, folder),
        )
    return folder
