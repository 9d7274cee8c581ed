"""Evaluate checkpoints: losses, samples and bits/dim, in files that a restarted evaluation reuses; write the report."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

import datasets
from classifier import guidance as classifier_guidance
from classifier.guidance import Classifier
from dequantization import PROTOCOLS
from errors import UserError
from evaluation import gaussian_bits_per_dim
from experiment.build import Experiment, SamplingProgram, build_bpd_program, build_loss_program, open_experiment
from experiment.drawing import NUM_SHOWN, draw_samples, evenly_chosen
from losses import TrainState
from metrics.metric import Metric, mean_metric
from modes.evaluate.real_features import RealFeatures, every_image
from parallel import distributed
from report import CheckpointInfo, DataInfo, Report, SamplerInfo, metric_text, plots, write_report
from report.data import read_reports, report_path, save_report
from sampling import build_labels
from solvers import ode
from workdir import locks, results
from workdir.checkpoints import Checkpoints
from workdir.folder import WorkdirError
from workdir.progress import track

KINDS = ("samples", "loss", "likelihood")  # of results in a folder, see `configs.settings`
# A Gaussian needs this many training images per value of an image, and an image of at most this many values: the
# covariance of more takes minutes and gigabytes.
GAUSSIAN_IMAGES, GAUSSIAN_VALUES = 2, 12_288


def check_evaluation(config: ConfigDict) -> None:
    """Check the settings of an evaluation, or raise a UserError."""
    if config.eval.begin_ckpt > config.eval.end_ckpt:
        raise UserError(
            f"eval.begin_ckpt={config.eval.begin_ckpt} is after eval.end_ckpt={config.eval.end_ckpt}; swap them"
        )
    distributed.check_batch_size("eval.batch_size", config.eval.batch_size)


class Evaluator:
    """What the checkpoints of a sweep share; programs are built at their first use."""

    def __init__(self, experiment: Experiment, classifier: Classifier | None = None):
        self.experiment, self.config = experiment, experiment.config
        self.classifier = classifier  # guides the samples
        self.train, self.test = (datasets.build_source(self.config, split) for split in ("train", "test"))
        self.bpd_split = self.test if self.config.eval.bpd_dataset == "test" else self.train

    @functools.cached_property
    def data(self) -> DataInfo:
        """Data set as the report describes it."""
        return results.describe_data(self.config.data.dataset, self.train, self.test)

    @property
    def contents(self) -> dict[str, str]:
        """Hashes of what losses and bits/dim depend on besides the settings; samples depend on none."""
        return {"data": self.data.hash} if self.config.eval.enable_loss or self.config.eval.enable_bpd else {}

    @functools.cached_property
    def no_gaussian(self) -> str:
        """Why no Gaussian is fitted to the training images; empty if one is."""
        dimension = math.prod(self.experiment.image_shape)
        if dimension > GAUSSIAN_VALUES:
            return f"an image has {dimension:,} values, more than the {GAUSSIAN_VALUES:,} that are fitted here"
        if len(self.train) < GAUSSIAN_IMAGES * dimension:
            few = f"{len(self.train):,} training images, fewer than {GAUSSIAN_IMAGES} for each of {dimension:,} values"
            return f"there are {few}: its fit would mean nothing"
        return ""

    @functools.cached_property
    def gaussian(self) -> Metric:
        """bits/dim of the best Gaussian on the same split, equal for all checkpoints."""
        num_levels = self.experiment.scaler.num_levels
        return gaussian_bits_per_dim(every_image(self.train), every_image(self.bpd_split), num_levels)

    @functools.cached_property
    def loss(self) -> Callable[..., np.ndarray]:
        """Compiled loss."""
        return build_loss_program(self.experiment)

    @functools.cached_property
    def draw(self) -> SamplingProgram:
        """Compiled sampler."""
        return SamplingProgram(self.experiment, self.config.eval.batch_size, guide=self.classifier)

    @functools.cached_property
    def bpd(self) -> Callable[..., dict[str, np.ndarray]]:
        """Compiled bits/dim."""
        return build_bpd_program(self.experiment)


def measure_loss(evaluator: Evaluator, params: Any, folder: Path) -> np.ndarray:
    """Return the loss of every test image, float32[N]."""

    def compute() -> dict[str, np.ndarray]:
        batches = list(results.batches(evaluator.test, evaluator.config.eval.batch_size))
        losses = [
            evaluator.loss(params, evaluator.test.images(indices), indices)[:count]
            for _, indices, count in track(batches, "loss")
        ]
        return {"loss": np.concatenate(losses)}

    return results.cached(folder / "loss.npz", compute)["loss"]


def measure_bpd(evaluator: Evaluator, params: Any, folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of `build_bpd_program` for every image of the split, float[draws, N] each."""
    config, source = evaluator.config, evaluator.bpd_split
    batches = list(results.batches(source, config.eval.batch_size))
    rounds = [(draw, *batch) for draw in range(config.eval.bpd_num_draws) for batch in batches]

    def compute(draw: int, indices: np.ndarray, count: int) -> dict[str, np.ndarray]:
        result = evaluator.bpd(params, source.images(indices), indices, draw)
        ode.require_solved(result["bpd"], "bits/dim")
        return {name: array[:count] for name, array in result.items()}

    of_rounds = [
        results.cached(folder / f"bpd_{draw}_{index}.npz", functools.partial(compute, draw, indices, count))
        for draw, index, indices, count in track(rounds, "bits/dim")
    ]
    joined = {name: np.concatenate([result[name] for result in of_rounds]) for name in of_rounds[0]}
    return {name: array.reshape(config.eval.bpd_num_draws, len(source)) for name, array in joined.items()}


def _sampling_part(evaluator: Evaluator, params: Any, real: RealFeatures, folder: Path) -> dict[str, Any]:
    """Draw and measure samples; return the report's fields about them."""
    drawn = draw_samples(evaluator.draw, params, folder, evaluator.config.eval.num_samples)
    levels, scaler = drawn.levels, evaluator.experiment.scaler
    if distributed.is_main_process():
        shown = levels[:NUM_SHOWN], evaluator.train.images(evenly_chosen(len(evaluator.train), NUM_SHOWN))
        plots.save_png(folder / "samples.png", plots.grid_of_levels(shown[0], scaler.num_levels))
        plots.save_png(folder / "samples_beside_real.png", plots.samples_beside_real(*shown, scaler.num_levels))
    settings = evaluator.experiment.sampler_settings()
    return {
        "metrics": real.measure(levels),
        "sampler": SamplerInfo(settings, drawn.nfe, drawn.seconds, num_samples=len(levels), rounding=scaler.rounding),
        "features": real.feature_info,
        "reference": real.reference_info,
        "files": {"grid": f"{folder.name}/samples.png", "real": f"{folder.name}/samples_beside_real.png"},
    }


def _bpd_metrics(evaluator: Evaluator, params: Any, folder: Path) -> tuple[Metric, ...]:
    config, measured = evaluator.config, measure_bpd(evaluator, params, folder)
    settings, protocol, draws = config.likelihood, config.likelihood.dequantization, config.eval.bpd_num_draws
    is_bound = PROTOCOLS[protocol].is_bound
    noise = f"{draws} draw(s) of dequantization {protocol}" + (
        "" if is_bound else ", which adds no noise: this is no bound on the bits/dim of the levels"
    )
    end = "the standard error is over images, and with them over their draws and {}"

    def bits(name: str, values: np.ndarray, stderr: np.ndarray, note: str, probes: str) -> Metric:
        # The draws of an image have independent noise and probes: their spread contains the spread over the probes,
        # `stderr`, which is all that one draw shows. The spread over the images contains both.
        own = values.std(axis=0, ddof=1) / math.sqrt(draws) if draws > 1 else stderr[0]
        if np.isfinite(own).all() and own.any():
            over = f"draws and {probes}" if draws > 1 else f"{probes} alone"
            note += f"; an image's own standard error over its {over} is {own.mean():.2g} on average"
        return mean_metric(name, values.mean(axis=0), unit="bits/dim", note=note)

    def nats(name: str, values: np.ndarray) -> Metric:
        note = "of an image: a density in the network's range, of the dequantized values; otherwise as in bits/dim"
        return mean_metric(name, values.mean(axis=0), unit="nats", note=note)

    by_ode = (
        f"{config.eval.bpd_dataset} split, {noise}; probability-flow ODE, trace {settings.trace} with "
        f"{settings.num_probes} probe(s), rtol {settings.rtol:g}, atol {settings.atol:g}, "
        f"{measured['nfe'].mean():.0f} network evaluations; {end.format('probes')}"
    )
    if is_bound and evaluator.no_gaussian:
        logging.info("no bits/dim of a Gaussian to compare with: %s", evaluator.no_gaussian)
        by_ode += f"; no Gaussian to compare with: {evaluator.no_gaussian}"
    metrics = [
        bits("bits_per_dim", measured["bpd"], measured["stderr"], by_ode, "probes"),
        nats("log_likelihood", measured["nats"]),
    ]
    if "bound" in measured:
        by_sde = (
            f"the same dequantized images, {noise}; variational bound of the reverse-time SDE with "
            f"{settings.bound_num_times} network evaluations, each at a time and noise of its own; "
            + end.format("times")
        )
        metrics += [
            bits("bits_per_dim_bound", measured["bound"], measured["bound_stderr"], by_sde, "times"),
            nats("log_likelihood_bound", measured["bound_nats"]),
        ]
    if is_bound and not evaluator.no_gaussian:  # the bits/dim of a Gaussian are a bound: compare them only with bounds
        metrics.append(evaluator.gaussian)
    return tuple(metrics)


def evaluate_checkpoint(
    evaluator: Evaluator, state: TrainState, number: int, real: RealFeatures | None, folder: Path
) -> Report:
    """Measure what the configuration enables of one checkpoint, or read it from the folder."""
    config, of_checkpoint = evaluator.config, folder / f"ckpt_{number}"
    of_samples = classifier_guidance.all_params(state.params_ema, evaluator.classifier)
    contents = evaluator.contents
    results.open_folder(of_checkpoint, config, KINDS, of_samples, flag="--eval_folder", contents=contents)
    params = distributed.replicate(state.params_ema)
    fields: dict[str, Any] = _sampling_part(evaluator, params, real, of_checkpoint) if real else {"metrics": ()}
    if config.eval.enable_bpd:
        fields["metrics"] += _bpd_metrics(evaluator, params, of_checkpoint)
    if config.eval.enable_loss:
        fields["metrics"] += (mean_metric("loss", measure_loss(evaluator, params, of_checkpoint)),)
    checkpoint = CheckpointInfo(number, int(state.step), ema=True)
    return Report(checkpoint=checkpoint, seed=config.seed, data=evaluator.data, **fields)


def other_reports(folder: Path, numbers: range, real: RealFeatures) -> list[Path]:
    """Return the reports that used another extractor or reference, and must be recomputed: one page cannot mix them.

    Samples depend on neither and are kept.

    Raises:
      WorkdirError: if such a report is of a checkpoint outside this sweep.
    """
    if not list(folder.glob("report_*.json")):
        return []
    of_real = real.feature_info, real.reference_info
    others = [each for each in read_reports(folder) if each.features and (each.features, each.reference) != of_real]
    for number in sorted(report.checkpoint.number for report in others):
        if number not in numbers:
            raise WorkdirError(
                f"{report_path(folder, number)} has metrics of another feature extractor or reference; evaluate "
                f"checkpoint {number} in the same sweep (eval.begin_ckpt, eval.end_ckpt), or choose a new --eval_folder"
            )
    return [report_path(folder, report.checkpoint.number) for report in others]


def _write(folder: Path, workdir: Path, report: Report, others: list[str]) -> None:
    """Write and log the report of a checkpoint, delete the others, and write the page."""
    save_report(folder, report)
    for path in others:
        logging.info("recompute %s: it used another feature extractor or reference", path)
        if Path(path) != report_path(folder, report.checkpoint.number):
            Path(path).unlink()
    write_report(folder, losses=workdir / plots.LOSSES_FILE)
    logging.info("checkpoint %d (step %d):", report.checkpoint.number, report.checkpoint.step)
    width = max((len(metric.title) for metric in report.metrics), default=0)
    for metric in report.metrics:
        logging.info("  %-*s  %s", width, metric.title, metric_text(metric))
    if "grid" in report.files:
        logging.info("samples: %s", folder / report.files["grid"])
    logging.info("report:  %s", folder / "report.md")


def _load_classifier(experiment: Experiment, workdir: Path) -> Classifier | None:
    """Load the classifier that guides the samples, if any are drawn, and check their labels."""
    if not experiment.config.eval.enable_sampling:
        return None
    classifier = classifier_guidance.load_classifier(experiment, workdir)
    build_labels(experiment.config, guide_classes=classifier.num_classes if classifier else 0)
    return classifier


def evaluate(config: ConfigDict, workdir: str | Path, eval_folder: str = "eval") -> None:
    """Evaluate the checkpoints eval.begin_ckpt .. eval.end_ckpt, and write the report after each.

    Reuses the results of an earlier, interrupted evaluation.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      eval_folder: folder of the results, inside the workdir.

    Raises:
      UserError: if a setting is wrong.
      WorkdirError: if the workdir holds another experiment, or the folder results of other settings.
      CheckpointError: if a checkpoint is missing or damaged.
    """
    experiment, workdir = open_experiment(config, workdir), Path(workdir)
    config, folder = experiment.config, workdir / eval_folder
    check_evaluation(config)
    classifier = _load_classifier(experiment, workdir)
    numbers = range(config.eval.begin_ckpt, config.eval.end_ckpt + 1)
    snapshot_freq, template = config.training.snapshot_freq, experiment.state_template()
    with (
        locks.hold(folder, "--eval_folder"),
        Checkpoints(workdir, snapshot_freq=snapshot_freq, template=template, read_only=True) as checkpoints,
    ):
        if not config.eval.wait_seconds:
            checkpoints.require(numbers)
        evaluator, real, others = Evaluator(experiment, classifier), None, []
        if config.eval.enable_sampling:
            real = RealFeatures.compute(config, evaluator.train, evaluator.test, workdir)
            others = distributed.once(lambda: list(map(str, other_reports(folder, numbers, real))))
        for number in numbers:
            state = checkpoints.restore_snapshot(number, wait_seconds=config.eval.wait_seconds)
            report = evaluate_checkpoint(evaluator, state, number, real, folder)
            if distributed.is_main_process():
                _write(folder, workdir, report, others)
            others = []  # delete them only after a checkpoint was evaluated: a refusal must not cost a report
