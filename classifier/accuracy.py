"""Accuracy of a classifier at each noise level: a table and a picture (compare Song et al. 2021, Fig. 13)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

import datasets
import losses
from classifier.experiment import Normalization
from classifier.loss import classify_noisy
from experiment.build import Experiment
from losses import TrainState
from models.wideresnet import make_logit_fn
from parallel import distributed, rng
from report import plots
from solvers import noise_levels
from storage import files
from workdir import results
from workdir.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SIGMAS = 21  # noise levels of the table, evenly spaced in log(sigma)

# (params, indices of test images, times) -> cross-entropies in nats, float32[B], and which are correct, bool[B]
Measure = Callable[
    [Any, Int[np.ndarray, "B"], Float[np.ndarray, "B"]], tuple[Float[np.ndarray, "B"], Bool[np.ndarray, "B"]]
]


def build_measure(experiment: Experiment, normalization: Normalization, test: datasets.Source) -> Measure:
    """Compile the classification of noisy test images, with replicated parameters.

    The noise of an image follows from (seed, index): it has the same direction at every time.
    """
    prepare, key = experiment.preparation(train=False), experiment.keys["eval"]

    def classify(
        params: Any, levels: UInt8[Array, "B H W C"], labels: Int[Array, "B"], indices: Int[Array, "B"], t: Array
    ) -> tuple[Array, Array]:
        key_data, key_noise = rng.split(jax.vmap(jax.random.fold_in, (None, 0))(key, indices))
        logit_fn = make_logit_fn(experiment.model, params, mean=normalization.mean, std=normalization.std)
        return classify_noisy(key_noise, logit_fn, experiment.sde, prepare(key_data, levels), labels, t)

    program = distributed.pmap(classify)

    def measure(params: Any, indices: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        arrays = (test.images(indices), test.labels(indices).astype(np.int32), indices, times.astype(np.float32))
        outputs = program(params, *(distributed.shard(distributed.host_share(array)) for array in arrays))
        cross_entropy, is_correct = map(distributed.gather, outputs)
        return cross_entropy, is_correct

    return measure


def spread_times(T: float, num_images: int) -> Float[np.ndarray, "B"]:
    """Return times spread evenly over those of training: a mean over them varies less than over drawn ones."""
    places = (np.arange(num_images) + 0.5) / num_images
    return losses.TRAINING_EPS + places * (T - losses.TRAINING_EPS)


def measure_levels(
    experiment: Experiment, measure: Measure, state: TrainState, test: datasets.Source
) -> list[dict[str, float]]:
    """Measure the averaged parameters on every test image at each of `NUM_SIGMAS` noise levels, ascending.

    Returns:
      For each level its time "t", its "sigma" = std / mean_coeff in the network's range, the "accuracy" with its
      binomial standard error "stderr", and the mean "cross_entropy" in nats.
    """
    params, sde = distributed.replicate(state.params_ema), experiment.sde
    grid = noise_levels.noise_levels(sde, noise_levels.time_grid(sde, NUM_SIGMAS - 1, "log_snr")[::-1])
    # No larger than needed: the images that fill the last batch cost as much as the others.
    size = distributed.round_up(min(experiment.config.eval.batch_size, len(test)))
    rows = []
    for t, sigma in track(list(zip(grid.t, grid.sigma, strict=True)), "accuracy"):
        parts = []
        for _, indices, count in results.batches(test, size):
            parts.append([array[:count] for array in measure(params, indices, np.full(size, t))])
        cross_entropy, is_correct = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        accuracy = float(is_correct.mean())
        stderr = float(np.sqrt(accuracy * (1 - accuracy) / len(test)))
        row = {"accuracy": accuracy, "stderr": stderr, "cross_entropy": float(cross_entropy.mean())}
        rows.append({"t": float(t), "sigma": float(sigma), **row})
    return rows


def accuracy_figure(rows: Sequence[Mapping[str, float]], num_classes: int) -> Figure:
    """Draw the accuracy against the noise level, with two standard errors."""
    figure, axes = plots.blank_figure("noise level σ = std / mean coefficient", "test images classified correctly")
    sigma, accuracy, stderr = (np.array([row[name] for row in rows]) for name in ("sigma", "accuracy", "stderr"))
    axes.errorbar(sigma, accuracy, yerr=2 * stderr, marker="o", capsize=3, label="classifier, ± two standard errors")
    axes.axhline(1 / num_classes, linestyle="--", color="black", linewidth=1.0, label=f"1 / {num_classes} classes")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.03)
    axes.legend()
    return figure


def training_figure(records: Iterable[Mapping[str, Any]]) -> Figure:
    """Draw the loss of training and test images and the accuracy on the latter, at times spread over [0, T].

    Records are those of losses.jsonl: {"step", "loss", "eval_loss", "eval_accuracy"}; one may lack some of them.
    """
    records = list(records)
    figure, axes = plots.blank_figure("training step", "cross-entropy [nats]")
    curves = {"loss": "training images", "eval_loss": "test images"}
    for (name, label), color in zip(curves.items(), plots.CURVE_COLORS, strict=False):
        axes.plot(*_curve(records, name), color=color, label=f"{label}: loss", linewidth=1.2)
    right = axes.twinx()
    steps, accuracy = _curve(records, "eval_accuracy")
    right.plot(steps, accuracy, color=plots.CURVE_COLORS[2], label="test images: accuracy (right)", linewidth=1.2)
    right.set_ylabel("fraction classified correctly")
    right.set_ylim(0, 1)
    axes.set_ylim(bottom=0)
    handles = [handle for panel in (axes, right) for handle in panel.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper right")
    return figure


def _curve(records: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]


def write_report(folder: Path, rows: Sequence[Mapping[str, float]], facts: Mapping[str, Any]) -> None:
    """Write accuracy.json, accuracy.png and training.png into the classifier's folder, which has its losses.jsonl."""
    files.write_json(folder / "accuracy.json", {**facts, "levels": list(rows)})
    records = plots.read_losses(folder / plots.LOSSES_FILE)
    files.write_bytes(folder / "accuracy.png", plots.figure_bytes(accuracy_figure(rows, facts["num_classes"])))
    files.write_bytes(folder / "training.png", plots.figure_bytes(training_figure(records)))
