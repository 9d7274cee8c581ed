"""The mode "restore": images from measurements of them, by a checkpoint that was trained without measurements."""

from __future__ import annotations

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
from experiment.build import open_experiment
from metrics.fidelity import psnr, ssim, ssim_window
from modes.restore.inputs import Inputs, brightness, build_measuring, load_inputs
from modes.restore.rounds import RestorationProgram, build_draws, mode_key
from parallel import distributed
from report import CheckpointInfo, number_text, plots, restorations
from report.restorations import RestoredImage, Views
from storage import files
from workdir import folder as workdirs
from workdir import locks, results
from workdir.progress import track

ROUNDS = "rounds"  # sub-folder from which a killed run resumes
ARRAYS = "restorations.npz"  # of each image
NUM_SHOWN = 16  # images in the comparison
# Values of restore.json that settings.json repeats.
_FACTS = ("checkpoint", "seed", "source", "skipped", "num_draws", "nfe", "seconds", "compile_seconds", "machine")


def default_output(config: ConfigDict, number: int) -> str:
    """Return the default folder of restorations, such as "restore/ckpt_2_inpaint_projection"."""
    operator = config.restore.operator.rpartition(":")[2]  # the function of FILE.py:FUNCTION
    return f"restore/ckpt_{number}_{operator}_{config.restore.method}"


def contents_of_restorations(config: ConfigDict, inputs: Inputs, operator: Operator) -> dict[str, str]:
    """Return the hashes of what restorations depend on besides settings: images, mask, the code of an operator."""
    contents = {"images": inputs.sha256(), "measured": files.content_hash(operator.measured)}
    path, _, _ = config.restore.operator.rpartition(":")
    return contents | ({"operator": files.content_hash(Path(path).read_text())} if path else {})


@dataclass(frozen=True)
class Judge:
    """Measure the quality of restorations, and convert them to pictures."""

    operator: Operator
    scaler: datasets.Scaler
    noise: float  # standard deviation of the measurement's noise, in the network's range

    @property
    def _mid_gray(self) -> float:
        return 0.0 if self.scaler.centered else 0.5

    def measurement_as_image(self, y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "H W C"]:
        """Return the image in [0, 1] nearest to mid-grey that has this measurement; the unknown part is grey."""
        gray = jnp.full((1, *self.operator.image_shape), self._mid_gray)
        nearest = gray + self.operator.pseudo_inverse(jnp.asarray(y[None]) - self.operator.apply(gray))
        return brightness(np.asarray(nearest[0]), self.scaler)

    def measurement_as_file(self, y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "h w c"]:
        """Return a picture in [0, 1] that restore.input="measurement" reads, if the measurement is a picture."""
        if self.operator.picture_shape is None:
            return self.measurement_as_image(y)
        return brightness(np.where(self.operator.measured > 0, y, self._mid_gray), self.scaler)

    def residual(self, x: Float[np.ndarray, "K H W C"], y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "K"]:
        """Return the root mean square of A(x) - y over the measured values, in units of the network's range."""
        difference = np.asarray(self.operator.apply(jnp.asarray(x)), np.float64) - y[None]
        squares = np.sum(difference**2 * self.operator.measured[None], axis=tuple(range(1, difference.ndim)))
        return np.sqrt(squares / self.operator.num_measured)

    def views(self, draws: Float[np.ndarray, "K H W C"], y: np.ndarray, levels: np.ndarray | None) -> Views:
        """Return measurement, restorations, their mean and standard deviation, and the truth as pictures."""
        pictures = brightness(draws, self.scaler)
        return Views(
            measurement=self.measurement_as_image(y),
            draws=pictures,
            mean=pictures.mean(axis=0),
            std=pictures.std(axis=0, ddof=1) if len(pictures) > 1 else None,
            truth=None if levels is None else levels / (self.scaler.num_levels - 1),
        )

    def qualities(self, x: Float[np.ndarray, "K H W C"], y: np.ndarray, views: Views) -> dict[str, list[float]]:
        """Return the known ones of `report.restorations.QUALITIES`."""
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


def restore(
    config: ConfigDict, workdir: str | Path, output: str = "", *, snapshot: int = 0, num_images: int = 0
) -> Path:
    """Restore images from what `config.restore` measures of them: in-painting, super-resolution and other problems.

    Writes a folder for each image, with its measurement, its restorations, their mean and standard deviation, and the
    summary of all, restore.md and restore.json. Reuses what an earlier, killed run has drawn; names and skips files
    that cannot be read. Returns the folder of the results.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      output: folder of the results, inside the workdir; empty: "restore/ckpt_<number>_<operator>_<method>".
      snapshot: number of the checkpoint; 0: the newest.
      num_images: largest number of images; 0: all of restore.images, or 8 of the test split.

    Raises:
      UserError: if a setting is wrong, or there is no usable image.
      WorkdirError: if the workdir holds another experiment, or the folder results of other settings or images.
      CheckpointError: if the checkpoint is missing or damaged.
      SolverError: if a restoration diverged.
    """
    experiment, workdir = open_experiment(config, workdir), Path(workdir)
    config, scaler, num_draws = experiment.config, experiment.scaler, experiment.config.restore.num_draws
    noise = noise_in_range(config.restore.noise, centered=scaler.centered)
    operator = build_operator(config, experiment.image_shape)
    RestorationProgram(experiment, operator, distributed.device_count())  # its checks, before anything is read
    workdirs.output_folder(workdir, output)
    inputs = load_inputs(config, operator, num_images)
    count = len(inputs.names)
    distributed.require_same({"content of restore.images": inputs.sha256()})
    drawing.warn_of_batch(experiment)
    restored = drawing.restore(experiment, workdir, snapshot)
    folder = workdirs.output_folder(workdir, output or default_output(config, restored.number))
    with locks.hold(folder, "--output"):
        contents = contents_of_restorations(config, inputs, operator)
        kinds = (*drawing.kinds_of_samples(experiment), "restorations")
        results.open_folder(folder, config, kinds, restored.params, flag="--output", contents=contents)
        judge = Judge(operator, scaler, noise)
        measurement = build_measuring(inputs, operator, scaler, key=mode_key(experiment), noise=noise)
        draws_of = build_draws(
            RestorationProgram(experiment, operator, drawing.batch_size(experiment, count * num_draws)),
            distributed.replicate(restored.params),
            folder / ROUNDS,
            measurement=measurement,
            num_images=count,
            num_draws=num_draws,
        )

        def restore_image(i: int) -> tuple[RestoredImage, Views, float]:
            name = f"{i:05d}_{Path(inputs.names[i]).stem}"
            levels, y = None if inputs.levels is None else inputs.levels[i], measurement(i)

            def compute() -> dict[str, Any]:
                drawn = draws_of(i)
                drawn |= {"restorations": np.asarray(scaler.to_levels(jnp.asarray(drawn["x"]))), "measurement": y}
                return drawn if levels is None else drawn | {"truth": levels}

            arrays = results.cached(folder / name / ARRAYS, compute)
            views = judge.views(arrays["x"], y, levels)
            qualities = judge.qualities(arrays["x"], y, views)
            if distributed.is_main_process():
                restorations.write_pictures(folder / name, views, judge.measurement_as_file(y))
            costs = int(arrays["nfe"]), float(arrays["seconds"])
            return RestoredImage(inputs.names[i], name, qualities, *costs), views, float(arrays["compile_seconds"])

        images, shown, compile_seconds = [], [], 0.0
        for i in track(range(count), "restorations", units="images"):
            image, views, seconds = restore_image(i)
            images.append(image)
            shown += [views] if i < NUM_SHOWN else []
            compile_seconds = max(compile_seconds, seconds)
        machine = {"versions": workdirs.versions(), "commit": workdirs.commit()}
        summary = restorations.Restorations(
            checkpoint=CheckpointInfo(restored.number, restored.step, ema=True),
            seed=config.seed,
            source=inputs.source,
            sha256=inputs.sha256(),
            skipped=inputs.skipped,
            settings=of_group(config, "restore") | experiment.sampler_settings(),
            num_draws=num_draws,
            num_measured=operator.num_measured,
            ssim_window=ssim_window(*experiment.image_shape[:2]),
            compile_seconds=compile_seconds,
            machine=distributed.describe_devices() | machine,
            images=images,
        )
        if distributed.is_main_process():
            plots.save_png(folder / restorations.COMPARISON, restorations.draw_comparison(shown))
            restorations.write_summary(folder, summary)
            values = summary.to_dict()
            results.record_facts(folder, {name: values[name] for name in _FACTS} | {"num_images": count})
        _log(summary, folder)
    return folder


def _log(restored: restorations.Restorations, folder: Path) -> None:
    logging.info(
        "restored %d image(s) of %s, %d draws each, %d network evaluations a draw, in %.1f s",
        *(len(restored.images), restored.source, restored.num_draws, restored.nfe, restored.seconds),
    )
    for metric in restorations.summarize(restored.images):
        logging.info("  %-18s %s %s", metric.name, number_text(metric.value, metric.stderr), metric.unit)
    if restored.skipped:
        logging.warning("%d file(s) were left out: %s", len(restored.skipped), ", ".join(restored.skipped))
    logging.info("pictures and %s.md are in %s", restorations.NAME, folder)
