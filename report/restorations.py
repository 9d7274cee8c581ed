"""restore.json, restore.md and the pictures of the mode "restore": how good restorations are, and how they look."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from metrics.metric import Metric, make_metric, mean_metric
from report import plots
from report.data import CheckpointInfo, finite
from report.page import NOT_RUN, machine_rows, metric_text, number_text, table
from storage.files import write_bytes, write_json

NAME = "restore"  # of restore.json and restore.md
COMPARISON = "comparison.png"
VISIBLE_PIXELS = 80  # shorter side of an image in a comparison, at the least: its columns' captions are as wide
DRAWS_SHOWN = 6  # in a comparison

# Quality -> (heading, unit, what it is). Of an image's draws the average counts.
QUALITIES = {
    "psnr_draws": ("PSNR of a draw", "dB", "peak signal-to-noise ratio of one restoration to the truth"),
    "psnr_mean": (
        "PSNR of the mean",
        "dB",
        "of the mean of an image's restorations, which errs less than one of them",
    ),
    "psnr_measurement": ("PSNR of the measurement", "dB", "of the measurement itself, seen as an image"),
    "ssim_draws": ("SSIM of a draw", "", "structural similarity of one restoration to the truth, 1 for the same"),
    "ssim_mean": ("SSIM of the mean", "", "of the mean of the restorations"),
    "ssim_measurement": ("SSIM of the measurement", "", "of the measurement itself"),
    "residual_noise": (
        "A(x) - y by the noise",
        "sigma",
        "root mean square over the measured values, in standard deviations of the noise; the truth has 1",
    ),
    "residual_levels": (
        "A(x) - y",
        "grey levels",
        "root mean square over the measured values, before the restoration is rounded to levels",
    ),
    "spread_levels": (
        "standard deviation of the draws",
        "grey levels",
        "root mean square over an image: how much the measurement leaves open",
    ),
}


@dataclasses.dataclass(frozen=True)
class Views:
    """One image and its restorations as pictures, float in [0, 1].

    Attributes:
      measurement: seen as an image, [H, W, C].
      draws: [K, H, W, C].
      mean: of the draws, [H, W, C].
      std: of the draws, [H, W, C]; None if there is only one.
      truth: [H, W, C]; None if it is not known.
    """

    measurement: Float[np.ndarray, "H W C"]
    draws: Float[np.ndarray, "K H W C"]
    mean: Float[np.ndarray, "H W C"]
    std: Float[np.ndarray, "H W C"] | None
    truth: Float[np.ndarray, "H W C"] | None


@dataclasses.dataclass(frozen=True)
class RestoredImage:
    """How good the restorations of one image are, and what they cost.

    Attributes:
      name: of the image.
      folder: of its files, inside the folder of the results.
      qualities: by the names of `QUALITIES`, a value for each draw or one; without those that are not known.
      nfe: network evaluations of a draw.
      seconds: of drawing them all.
    """

    name: str
    folder: str
    qualities: Mapping[str, Sequence[float]]
    nfe: int
    seconds: float

    def quality(self, name: str) -> float | None:
        """Returns a quality, averaged over the draws; None if it is not known or not finite."""
        values = self.qualities.get(name, ())
        return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON; a PSNR that is infinite, of the very truth, is null."""
        return finite(dataclasses.asdict(self))


def summarize(images: Sequence[RestoredImage]) -> tuple[Metric, ...]:
    """Returns each quality that is known, averaged over the images, with its standard error if there are two or more.

    An image whose PSNR is infinite is left out of that mean, and the note says so.
    """
    metrics = []
    for name, (_, unit, note) in QUALITIES.items():
        known = [image for image in images if image.qualities.get(name)]
        values = np.array([value for image in known if (value := image.quality(name)) is not None])
        if not len(values):
            continue
        left_out = len(known) - len(values)
        note = f"{note}; {left_out} image(s) left out, whose value is infinite" if left_out else note
        if len(values) == 1:
            metrics.append(make_metric(name, values[0], math.nan, 1, unit=unit, note=note))
        else:
            metrics.append(mean_metric(name, values, unit=unit, note=note))
    return tuple(metrics)


# --- pictures --------------------------------------------------------------------------------------------------------


def std_white(stds: Sequence[Float[np.ndarray, "H W C"]]) -> float:
    """Returns the standard deviation, in [0, 1], that pictures of these show as white: the largest; 1 if all are 0."""
    return max((float(std.max()) for std in stds), default=0.0) or 1.0


def _column(images: Sequence[np.ndarray]) -> UInt8[np.ndarray, "h w 3"]:
    stacked = np.stack(images)
    factor = max(1, math.ceil(VISIBLE_PIXELS / min(stacked.shape[1:3])))
    return plots.image_grid(plots.upscale(stacked, factor), num_columns=1, pad_value=plots.BETWEEN_IMAGES)


def draw_comparison(images: Sequence[Views]) -> UInt8[np.ndarray, "h w 3"]:
    """Shows a row for each image: truth (if known), measurement, mean and standard deviation (of two draws), draws.

    The standard deviation is drawn so that the largest of the picture is white; small images are enlarged.
    """
    columns: dict[str, list[np.ndarray]] = {}
    truths = [views.truth for views in images if views.truth is not None]
    if truths:  # all of them are known, or none is
        columns["truth"] = truths
    columns["measurement"] = [views.measurement for views in images]
    stds = [views.std for views in images if views.std is not None]
    if stds:
        white = std_white(stds)
        columns["mean"] = [views.mean for views in images]
        columns[f"std / {white:.2g}"] = [std / white for std in stds]
    for draw in range(min(len(images[0].draws), DRAWS_SHOWN)):
        columns[f"draw {draw}"] = [views.draws[draw] for views in images]
    return plots.side_by_side({caption: _column(column) for caption, column in columns.items()}, gap=0)


def write_pictures(folder: Path, views: Views, measurement: Float[np.ndarray, "h w c"]) -> None:
    """Writes the PNGs of one image: truth, measurement, mean, std, each draw, and the comparison of them.

    Args:
      folder: of the image.
      views: of it and its restorations.
      measurement: as a picture of its own size, in [0, 1].
    """
    pictures = {"measurement": measurement, "mean": views.mean}
    pictures |= {f"draw_{draw}": picture for draw, picture in enumerate(views.draws)}
    if views.truth is not None:
        pictures["truth"] = views.truth
    if views.std is not None:
        pictures["std"] = views.std / std_white([views.std])
    for name, picture in pictures.items():
        plots.save_png(folder / f"{name}.png", plots.to_uint8(picture))
    plots.save_png(folder / COMPARISON, draw_comparison([views]))


# --- numbers ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Restorations:
    """What a run of the mode has restored.

    Attributes:
      checkpoint: whose network restored them.
      seed: of noise and draws.
      source: where the images are from, in words.
      sha256: hash of their content.
      skipped: {file: why it was left out}.
      settings: of `restore` and of the sampler, {dotted key: value}.
      num_draws: restorations of each image.
      num_measured: values of a measurement.
      ssim_window: pixels; None if the images are too small for SSIM.
      compile_seconds: of compiling the program.
      machine: what computed, package versions and commit.
      images: that were restored.
    """

    checkpoint: CheckpointInfo
    seed: int
    source: str
    sha256: str
    skipped: Mapping[str, str]
    settings: Mapping[str, Any]
    num_draws: int
    num_measured: int
    ssim_window: int | None
    compile_seconds: float
    machine: Mapping[str, Any]
    images: Sequence[RestoredImage]

    @property
    def nfe(self) -> int:
        """Network evaluations of a restoration."""
        return max(image.nfe for image in self.images)

    @property
    def seconds(self) -> float:
        """Seconds of drawing all restorations, without compiling."""
        return sum(image.seconds for image in self.images)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("images", "checkpoint")]
        values = {name: getattr(self, name) for name in names} | {"checkpoint": dataclasses.asdict(self.checkpoint)}
        values |= {"nfe": self.nfe, "seconds": self.seconds}
        values["metrics"] = [dataclasses.asdict(metric) for metric in summarize(self.images)]
        values["images"] = [image.to_dict() for image in self.images]
        return finite(values)


def _introduction(restored: Restorations) -> str:
    count, settings = len(restored.images), restored.settings
    window = f", SSIM in a uniform window of {restored.ssim_window} pixels" if restored.ssim_window else ""
    has_truth = any("psnr_mean" in image.qualities for image in restored.images)
    truth = f" PSNR is of values in [0, 1], clipped and not yet rounded to levels{window}." if has_truth else ""
    return (
        f"{count} image(s) of {restored.source}, {restored.num_draws} restorations of each (seed {restored.seed}), "
        f"{restored.nfe} network evaluations each, {restored.seconds:.1f} s in all without compiling. Operator "
        f"`{settings['restore.operator']}`, method `{settings['restore.method']}`, noise {settings['restore.noise']} "
        f"(of a range of 1). Means over images are written value ± one standard error.{truth}"
    )


def _summary_table(restored: Restorations) -> str:
    rows = [
        (QUALITIES[metric.name][0], metric_text(metric), metric.num_samples, metric.note)
        for metric in summarize(restored.images)
    ]
    return table(("quality", "mean over images", "images", "what it is"), rows)


def _images_table(restored: Restorations) -> str:
    shown = [name for name in QUALITIES if any(name in image.qualities for image in restored.images)]
    rows = [
        (f"[{image.folder}]({image.folder}/{COMPARISON})", *(number_text(image.quality(name)) for name in shown))
        for image in restored.images
    ]
    heading = lambda name: f"{QUALITIES[name][0]}{f' ({QUALITIES[name][1]})' if QUALITIES[name][1] else ''}"  # noqa: E731
    return table(("image", *map(heading, shown)), rows).replace(NOT_RUN, "")


def _dependence_table(restored: Restorations) -> str:
    checkpoint = restored.checkpoint
    rows = [
        ("checkpoint", f"number {checkpoint.number}, step {checkpoint.step:,}, exponential moving average (EMA)"),
        ("images", f"{restored.source}, content `{restored.sha256[:16]}`"),
        ("values of a measurement", f"{restored.num_measured:,}"),
        ("settings", ", ".join(f"{key}={value}" for key, value in restored.settings.items())),
        ("seconds of compiling", f"{restored.compile_seconds:.1f}"),
        *machine_rows(restored.machine),
    ]
    return table(("setting", "value"), rows)


def render(restored: Restorations) -> str:
    """Returns the text of restore.md."""
    checkpoint = restored.checkpoint
    left_out = [f"- `{name}`: {why}" for name, why in restored.skipped.items()]
    sections = [
        f"# Restorations by checkpoint {checkpoint.number} (step {checkpoint.step:,})",
        _introduction(restored),
        f"![The first images]({COMPARISON})",
        _summary_table(restored),
        "## Each image",
        _images_table(restored),
        *([f"## {len(left_out)} file(s) left out", "\n".join(left_out)] if left_out else []),
        "## What the numbers depend on",
        _dependence_table(restored),
    ]
    return "\n\n".join(sections) + "\n"


def write_summary(folder: Path, restored: Restorations) -> None:
    """Writes restore.json and restore.md, each whole or not at all, when both are computed."""
    values, page = restored.to_dict(), render(restored)
    write_json(folder / f"{NAME}.json", values)
    write_bytes(folder / f"{NAME}.md", page.encode())
