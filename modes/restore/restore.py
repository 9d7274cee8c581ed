"""The mode "restore": images from measurements of them, by a checkpoint that knows nothing of the measurement."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float
from ml_collections import ConfigDict

import datasets
from configs.settings import of_group
from controllable_generation import Operator, build_operator
from controllable_generation.restoration import noise_in_range
from experiment import drawing
from experiment.build import Experiment, open_experiment
from experiment.drawing import Snapshot
from metrics.fidelity import psnr, ssim, ssim_window
from modes.restore.inputs import Inputs, brightness, build_measuring, load_inputs
from modes.restore.rounds import Draws, RestorationProgram, Rounds, mode_key
from parallel import distributed
from report import CheckpointInfo, number_text, plots
from report.restorations import (
    COMPARISON,
    NAME,
    Restorations,
    RestoredImage,
    Views,
    draw_comparison,
    summarize,
    write_pictures,
    write_summary,
)
from storage import files
from workdir import folder as workdirs
from workdir import locks, results
from workdir.progress import track

ROUNDS = "rounds"  # sub-folder of what a killed run goes on from
ARRAYS = "restorations.npz"  # of each image
NUM_SHOWN = 16  # images of the picture of all


def default_output(config: ConfigDict, number: int) -> str:
    """Returns the folder of restorations whose folder is not given, such as "restore/ckpt_2_inpaint_projection"."""
    operator = config.restore.operator.rpartition(":")[2]  # of FILE.py:FUNCTION the function
    return f"restore/ckpt_{number}_{operator}_{config.restore.method}"


def contents_of_restorations(config: ConfigDict, inputs: Inputs, operator: Operator) -> dict[str, str]:
    """Returns the hashes of what restorations depend on besides settings: images, mask, the code of an operator."""
    contents = {"images": inputs.sha256(), "measured": files.content_hash(operator.measured)}
    path, _, _ = config.restore.operator.rpartition(":")
    return contents | ({"operator": files.content_hash(Path(path).read_text())} if path else {})


# --- one image -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Says how good restorations are, and how they look.

    Attributes:
      operator: A.
      scaler: between levels and the network's range.
      noise: standard deviation of the measurement's noise, in the network's range.
    """

    operator: Operator
    scaler: datasets.Scaler
    noise: float

    @property
    def _mid_gray(self) -> float:
        """Grey halfway between black and white, in the network's range."""
        return 0.0 if self.scaler.centered else 0.5

    def measurement_as_image(self, y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "H W C"]:
        """Returns the image in [0, 1] nearest to mid-grey that has this measurement: what it leaves open is grey."""
        gray = jnp.full((1, *self.operator.image_shape), self._mid_gray)
        nearest = gray + self.operator.pseudo_inverse(jnp.asarray(y[None]) - self.operator.apply(gray))
        return brightness(np.asarray(nearest[0]), self.scaler)

    def measurement_as_file(self, y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "h w c"]:
        """Returns a measurement as a picture in [0, 1] that restore.input="measurement" reads, if there is one."""
        if self.operator.picture_shape is None:
            return self.measurement_as_image(y)
        return brightness(np.where(self.operator.measured > 0, y, self._mid_gray), self.scaler)

    def residual(self, x: Float[np.ndarray, "K H W C"], y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "K"]:
        """Returns the root mean square of A(x) - y over the measured values, in units of the network's range."""
        difference = np.asarray(self.operator.apply(jnp.asarray(x)), np.float64) - y[None]
        squares = np.sum(difference**2 * self.operator.measured[None], axis=tuple(range(1, difference.ndim)))
        return np.sqrt(squares / self.operator.num_measured)

    def views(self, draws: Float[np.ndarray, "K H W C"], y: np.ndarray, levels: np.ndarray | None) -> Views:
        """Returns restorations, their mean and standard deviation, and what they are compared with, as pictures."""
        pictures = brightness(draws, self.scaler)
        return Views(
            measurement=self.measurement_as_image(y),
            draws=pictures,
            mean=pictures.mean(axis=0),
            std=pictures.std(axis=0, ddof=1) if len(pictures) > 1 else None,
            truth=None if levels is None else levels / (self.scaler.num_levels - 1),
        )

    def qualities(self, x: Float[np.ndarray, "K H W C"], y: np.ndarray, views: Views) -> dict[str, list[float]]:
        """Returns what is known of the qualities that `report.restorations.QUALITIES` lists."""
        known: dict[str, list[float]] = {}
        residual = self.residual(x, y)
        if views.truth is not None:
            compared = {"draws": list(views.draws), "mean": [views.mean], "measurement": [views.measurement]}
            for name, pictures in compared.items():
                known[f"psnr_{name}"] = [psnr(views.truth, picture) for picture in pictures]
                if ssim_window(*views.truth.shape[:2]) is not None:
                    known[f"ssim_{name}"] = [ssim(views.truth, picture) for picture in pictures]
        if self.noise > 0:
            known["residual_noise"] = (residual / self.noise).tolist()
        known["residual_levels"] = (residual / self.scaler.bin_width).tolist()
        if views.std is not None:
            known["spread_levels"] = [float(np.sqrt(np.mean(views.std**2)) * (self.scaler.num_levels - 1))]
        return known


def _arrays(draws: Draws, y: np.ndarray, levels: np.ndarray | None, scaler: datasets.Scaler) -> dict[str, Any]:
    """Returns what the .npz file of an image holds."""
    costs = {"nfe": draws.nfe, "seconds": draws.seconds, "compile_seconds": draws.compile_seconds}
    truth = {} if levels is None else {"truth": levels}
    drawn = {"x": draws.x, "restorations": np.asarray(scaler.to_levels(jnp.asarray(draws.x)))}
    return {**drawn, "measurement": y, **truth, **costs}


class Restorer:
    """Restores the images of a run one after the other, each into a folder of its own.

    Args:
      experiment: of the workdir.
      snapshot: whose network restores.
      inputs: images or measurements.
      operator: that measures.
      folder: of the results.
    """

    def __init__(self, experiment: Experiment, snapshot: Snapshot, inputs: Inputs, operator: Operator, folder: Path):
        config, count, noise = experiment.config, len(inputs.names), noise_in_range(experiment.config)
        self.scaler, self.inputs, self.folder = experiment.scaler, inputs, folder
        self.judge = Judge(operator, experiment.scaler, noise)
        self.measurement = build_measuring(inputs, operator, experiment.scaler, key=mode_key(experiment), noise=noise)
        self.rounds = Rounds(
            RestorationProgram(experiment, operator, drawing.batch_size(experiment, count * config.restore.num_draws)),
            distributed.replicate(snapshot.params),
            folder / ROUNDS,
            measurement=self.measurement,
            num_images=count,
            num_draws=config.restore.num_draws,
        )

    def restore(self, i: int) -> tuple[RestoredImage, Views, float]:
        """Restores image i, or reads what is there; writes its pictures. Returns the seconds of compiling, too."""
        name = f"{i:05d}_{Path(self.inputs.names[i]).stem}"
        levels = None if self.inputs.levels is None else self.inputs.levels[i]
        y = self.measurement(i)
        compute = lambda: _arrays(self.rounds.draws(i), y, levels, self.scaler)  # noqa: E731
        arrays = results.cached(self.folder / name / ARRAYS, compute)
        views = self.judge.views(arrays["x"], y, levels)
        qualities = self.judge.qualities(arrays["x"], y, views)
        if distributed.is_main_process():
            write_pictures(self.folder / name, views, self.judge.measurement_as_file(y))
        costs = int(arrays["nfe"]), float(arrays["seconds"])
        return RestoredImage(self.inputs.names[i], name, qualities, *costs), views, float(arrays["compile_seconds"])


# --- the mode --------------------------------------------------------------------------------------------------------


def _log(restored: Restorations, folder: Path) -> None:
    """Says what came out, what was left out, and where the results are."""
    logging.info(
        "restored %d image(s) of %s, %d draws each, %d network evaluations a draw, in %.1f s",
        *(len(restored.images), restored.source, restored.num_draws, restored.nfe, restored.seconds),
    )
    for metric in summarize(restored.images):
        logging.info("  %-18s %s %s", metric.name, number_text(metric.value, metric.stderr), metric.unit)
    if restored.skipped:
        logging.warning("%d file(s) were left out: %s", len(restored.skipped), ", ".join(restored.skipped))
    logging.info("pictures and %s.md are in %s", NAME, folder)


def _build_frame(
    experiment: Experiment, snapshot: Snapshot, inputs: Inputs, operator: Operator
) -> Callable[..., Restorations]:
    """Returns the summary but for the images and the time of compiling."""
    config, machine = experiment.config, distributed.describe_devices()
    return functools.partial(
        Restorations,
        checkpoint=CheckpointInfo(snapshot.number, snapshot.step, ema=True),
        seed=config.seed,
        source=inputs.source,
        sha256=inputs.sha256(),
        skipped=inputs.skipped,
        settings=of_group(config, "restore") | experiment.sampler_settings(),
        num_draws=config.restore.num_draws,
        num_measured=operator.num_measured,
        ssim_window=ssim_window(*experiment.image_shape[:2]),
        machine=machine | {"versions": workdirs.versions(), "commit": workdirs.commit()},
    )


def _facts(summary: Restorations) -> dict[str, Any]:
    """Returns what settings.json says of the results, as that of the mode "sample" does."""
    names = ("checkpoint", "seed", "source", "skipped", "num_draws", "nfe", "seconds", "compile_seconds", "machine")
    values = summary.to_dict()
    return {name: values[name] for name in names} | {"num_images": len(summary.images)}


def restore(
    config: ConfigDict, workdir: str | Path, output: str = "", *, snapshot: int = 0, num_images: int = 0
) -> Path:
    """Restore images from what `config.restore` measures of them: in-painting, super-resolution and other problems.

    Writes a folder for each image, with its measurement, its restorations, their mean and standard deviation, and the
    summary of all, restore.md and restore.json. Reuses what an earlier, killed run has drawn; names and skips files
    that cannot be read.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      output: folder of the results, inside the workdir; empty: "restore/ckpt_<number>_<operator>_<method>".
      snapshot: number of the checkpoint; 0: the newest.
      num_images: largest number of images; 0: all of restore.images, or 8 of the test split.

    Returns:
      The folder of the results.

    Raises:
      UserError: if a setting is wrong, or there is no usable image.
      WorkdirError: if the workdir holds another experiment, or the folder results of other settings or images.
      CheckpointError: if the checkpoint is missing or damaged.
      SolverError: if a restoration diverged.
    """
    experiment, workdir = open_experiment(config, workdir), Path(workdir)
    config = experiment.config
    operator = build_operator(config, experiment.image_shape)
    RestorationProgram(experiment, operator, distributed.device_count())  # its checks, before anything is read
    workdirs.output_folder(workdir, output)
    inputs = load_inputs(config, operator, num_images)
    distributed.require_same({"content of restore.images": inputs.sha256()})
    drawing.warn_of_batch(experiment)
    restored = drawing.restore(experiment, workdir, snapshot)
    folder = workdirs.output_folder(workdir, output or default_output(config, restored.number))
    with locks.hold(folder, "--output"):
        contents = contents_of_restorations(config, inputs, operator)
        kinds = (*drawing.kinds_of_samples(experiment), "restorations")
        results.open_folder(folder, config, kinds, restored.params, flag="--output", contents=contents)
        restorer = Restorer(experiment, restored, inputs, operator, folder)
        images, shown, compile_seconds = [], [], 0.0
        for i in track(range(len(inputs.names)), "restorations", units="images"):
            image, views, seconds = restorer.restore(i)
            images.append(image)
            shown += [views] if i < NUM_SHOWN else []
            compile_seconds = max(compile_seconds, seconds)
        summary = _build_frame(experiment, restored, inputs, operator)(images=images, compile_seconds=compile_seconds)
        if distributed.is_main_process():
            plots.save_png(folder / COMPARISON, draw_comparison(shown))
            write_summary(folder, summary)
            results.record_facts(folder, _facts(summary))
        _log(summary, folder)
    return folder
