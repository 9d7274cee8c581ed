"""The mode "compare_samplers": quality against network evaluations and seconds, for samplers of one checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

import checks
import datasets
from classifier import guidance as classifier_guidance
from classifier.guidance import Classifier
from errors import UserError
from experiment import drawing
from experiment.build import Experiment, SamplingProgram, open_experiment
from experiment.drawing import NUM_SHOWN, Samples, Snapshot
from modes.compare_samplers.specs import SamplerSpec, choose_samplers
from modes.evaluate.real_features import RealFeatures
from parallel import distributed
from report import CheckpointInfo, number_text, plots
from report.comparison import Comparison, SamplerResult, write_comparison
from workdir import folder as workdirs
from workdir import locks, results


@dataclasses.dataclass(frozen=True)
class Comparer:
    """What the samplers of a comparison share."""

    snapshot: Snapshot
    folder: Path
    num_images: int  # samples of each sampler
    real: RealFeatures
    classifiers: Mapping[str, Classifier | None]  # guide the samples of each sampler, by its text

    @functools.cached_property
    def params(self) -> Any:
        """Parameters of the network on every device."""
        return distributed.replicate(self.snapshot.params)

    def draw(self, spec: SamplerSpec, experiment: Experiment) -> tuple[Samples, int]:
        """Draw the samples of one sampler, reusing those in its folder; return them and the batch size."""
        folder = self.folder / spec.folder
        kinds = drawing.kinds_of_samples(experiment)
        classifier = self.classifiers[spec.text]
        params = classifier_guidance.all_params(self.snapshot.params, classifier)
        results.open_folder(folder, experiment.config, kinds, params, flag="--output")
        program = SamplingProgram(experiment, drawing.batch_size(experiment, self.num_images), guide=classifier)
        samples = drawing.draw_samples(program, self.params, folder, self.num_images)
        if distributed.is_main_process():
            grid = plots.grid_of_levels(samples.levels[:NUM_SHOWN], experiment.scaler.num_levels)
            plots.save_png(folder / "samples.png", grid)
        return samples, program.batch_size

    def measure(self, spec: SamplerSpec, experiment: Experiment) -> SamplerResult:
        """Draw and measure the samples of one sampler."""
        samples, batch_size = self.draw(spec, experiment)
        settings = experiment.sampler_settings()
        grid = "uniform" if spec.changes["method"] == "pc" else settings["sampling.time_grid"]
        result = SamplerResult(
            sampler=spec.text,
            family=spec.family,
            steps=None if spec.is_adaptive else settings["sampling.num_steps"],
            grid="" if spec.is_adaptive else grid,
            settings=settings,
            nfe=samples.nfe,
            seconds=samples.seconds,
            compile_seconds=samples.compile_seconds,
            batch_size=batch_size,
            metrics=self.real.measure(samples.levels),
        )
        distance = result.metric("frechet_distance")
        logging.info(
            "%s: %d network evaluations, %.2f s and %.1f s of compiling, %s %s",
            *(spec.text, samples.nfe, samples.seconds, samples.compile_seconds, distance.title),
            number_text(distance.value, distance.stderr),
        )
        return result


def compare_samplers(
    config: ConfigDict,
    workdir: str | Path,
    output: str = "",
    *,
    samplers: str = "",
    snapshot: int = 0,
    num_images: int = 0,
) -> Path:
    """Measure the samples of several samplers of one checkpoint: FD and KID against network evaluations and seconds.

    Writes samplers.json, samplers.md and samplers.png after each sampler. Reuses the samples of an interrupted run.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      output: folder of the results, inside the workdir; empty: "compare_ckpt_<number>".
      samplers: separated by commas, METHOD[:STEPS][:KEY=VALUE...] with keys of config.sampling, which sets everything
        that a sampler does not; empty: `specs.DEFAULT`.
      snapshot: number of the checkpoint; 0: the newest.
      num_images: samples of each sampler; 0: eval.num_samples.

    Returns:
      The folder of the results.

    Raises:
      UserError: if a sampler or a setting is wrong, or features cannot be computed.
      WorkdirError: if the workdir holds another experiment, or the folder samples of other settings.
      CheckpointError: if the checkpoint is missing or damaged.
    """
    experiment, workdir = open_experiment(config, workdir), Path(workdir)
    config = experiment.config
    checks.not_negative("--num_images", num_images)
    workdirs.output_folder(workdir, output)
    chosen, skipped = choose_samplers(experiment, samplers)
    for spec, of_sampler in chosen:
        drawing.warn_of_batch(of_sampler, spec.text)
    classifiers = {spec.text: classifier_guidance.load_classifier(each, workdir) for spec, each in chosen}
    train, test = (datasets.build_source(config, split) for split in ("train", "test"))
    restored = drawing.restore(experiment, workdir, snapshot)
    folder = workdirs.output_folder(workdir, output or f"compare_ckpt_{restored.number}")
    with locks.hold(folder, "--output"):
        real = RealFeatures.compute(config, train, test, workdir)
        if real.test is None:
            raise UserError(
                f"the test split has {len(test)} images, too few for the floor that samplers are compared with"
            )
        comparer = Comparer(restored, folder, num_images or config.eval.num_samples, real, classifiers)
        made_by = {"versions": workdirs.versions(), "commit": workdirs.commit()}
        comparison = Comparison(
            checkpoint=CheckpointInfo(restored.number, restored.step, ema=True),
            seed=config.seed,
            num_images=comparer.num_images,
            data=results.describe_data(config.data.dataset, train, test),
            features=real.feature_info,
            reference=real.reference_info,
            machine=distributed.describe_devices() | made_by,
            results=(),
            skipped=skipped,
        )
        for spec, of_sampler in chosen:
            result = comparer.measure(spec, of_sampler)
            comparison = dataclasses.replace(comparison, results=(*comparison.results, result))
            if distributed.is_main_process():
                write_comparison(folder, comparison)
        logging.info("table: %s", folder / "samplers.md")
    return folder
