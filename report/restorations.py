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
VISIBLE_PIXELS = 80  # smallest shorter side of an image in a comparison: the captions of its columns are as wide
DRAWS_SHOWN = 6  # in a comparison

# Quality -> (heading, unit, what it is). An image's draws are averaged.
QUALITIES = {
    "psnr_draws": ("PSNR of a draw", "dB", "peak signal-to-noise ratio of one restoration to the truth"),
    "psnr_mean": ("PSNR of the mean", "dB", "of the mean of the restorations, which is closer than one of them"),
    "psnr_measurement": ("PSNR of the measurement", "dB", "of the measurement itself, seen as an image"),
    "ssim_draws": ("SSIM of a draw", "", "structural similarity of one restoration to the truth, 1 for the same"),
    "ssim_mean": ("SSIM of the mean", "", "of the mean of the restorations"),
    "ssim_measurement": ("SSIM of the measurement", "", "of the measurement itself"),
    "residual_noise": (
        "A(x) - y by the noise",
        "sigma",
        "root mean square over the measured values, in standard deviations of the noise; the truth has 1",
    ),
    "residual_levels": ("A(x) - y", "grey levels", "root mean square over the measured values, before rounding"),
    "spread_levels": ("standard deviation of the draws", "grey levels", "root mean square over an image"),
}


@dataclasses.dataclass(frozen=True)
class Views:
    """One image and its restorations as pictures, float in [0, 1]."""

    measurement: Float[np.ndarray, "H W C"]  # shown as an image
    draws: Float[np.ndarray, "K H W C"]  # the restorations
    mean: Float[np.ndarray, "H W C"]  # of the draws
    std: Float[np.ndarray, "H W C"] | None  # of the draws; None if there is only one
    truth: Float[np.ndarray, "H W C"] | None  # None if unknown


@dataclasses.dataclass(frozen=True)
class RestoredImage:
    """How good the restorations of one image are, and their cost."""

    name: str
    folder: str  # of its files, inside the folder of the results
    qualities: Mapping[str, Sequence[float]]  # by the names of `QUALITIES`, of each draw or one
    nfe: int  # network evaluations per draw
    seconds: float  # of all draws

    def quality(self, name: str) -> float | None:
        """Return a quality, averaged over the draws; None if unknown or not finite."""
        values = self.qualities.get(name, ())
        return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; an infinite PSNR is null."""
        return finite(dataclasses.asdict(self))


def summarize(images: Sequence[RestoredImage]) -> tuple[Metric, ...]:
    """Return each known quality, averaged over the images, with its standard error if there are two or more.

    An image whose PSNR is infinite is left out of that mean, as the note states.
    """
    metrics = []
    for name, (_, unit, note) in QUALITIES.items():
        known = [image for image in images if image.qualities.get(name)]
        values = np.array([value for image in known if (value := image.quality(name)) is not None])
        if not len(values):
            continue
        left_out = len(known) - len(values)
        note = f"{note}; {left_out} image(s) with an infinite value left out" if left_out else note
        if len(values) == 1:
            metrics.append(make_metric(name, values[0], math.nan, 1, unit=unit, note=note))
        else:
            metrics.append(mean_metric(name, values, unit=unit, note=note))
    return tuple(metrics)


# --- pictures --------------------------------------------------------------------------------------------------------


def std_white(stds: Sequence[Float[np.ndarray, "H W C"]]) -> float:
    """Return the standard deviation, in [0, 1], that is shown as white: the largest of all; 1 if all are 0."""
    return max((float(std.max()) for std in stds), default=0.0) or 1.0


def _column(images: Sequence[np.ndarray]) -> UInt8[np.ndarray, "h w 3"]:
    stacked = np.stack(images)
    factor = max(1, math.ceil(VISIBLE_PIXELS / min(stacked.shape[1:3])))
    return plots.image_grid(plots.upscale(stacked, factor), num_columns=1, pad_value=plots.BETWEEN_IMAGES)


def draw_comparison(images: Sequence[Views]) -> UInt8[np.ndarray, "h w 3"]:
    """Show a row per image: truth (if known), measurement, mean and standard deviation (of two or more draws), draws.

    The largest standard deviation of the picture is drawn white; small images are enlarged.
    """
    columns: dict[str, list[np.ndarray]] = {}
    truths = [views.truth for views in images if views.truth is not None]
    if truths:  # all are known, or none
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
    """Write the PNGs of one image; `measurement` is a picture of its own size, in [0, 1]."""
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
    """The result of a run of the mode."""

    checkpoint: CheckpointInfo
    seed: int  # of noise and draws
    source: str  # origin of the images, in words
    sha256: str  # hash of their content
    skipped: Mapping[str, str]  # {file: why it was left out}
    settings: Mapping[str, Any]  # of `restore` and of the sampler, {dotted key: value}
    num_draws: int  # restorations per image
    num_measured: int  # values per measurement
    ssim_window: int | None  # in pixels; None if the images are too small for SSIM
    compile_seconds: float
    machine: Mapping[str, Any]  # hardware, package versions and commit
    images: Sequence[RestoredImage]

    @property
    def nfe(self) -> int:
        """Network evaluations per restoration."""
        return max(image.nfe for image in self.images)

    @property
    def seconds(self) -> float:
        """Seconds of drawing all restorations, without compilation."""
        return sum(image.seconds for image in self.images)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("images", "checkpoint")]
        values = {name: getattr(self, name) for name in names} | {"checkpoint": dataclasses.asdict(self.checkpoint)}
        values |= {"nfe": self.nfe, "seconds": self.seconds}
        values["metrics"] = [dataclasses.asdict(metric) for metric in summarize(self.images)]
        values["images"] = [image.to_dict() for image in self.images]
        return finite(values)


def render(restored: Restorations) -> str:
    """Return the text of restore.md."""
    checkpoint, images, settings = restored.checkpoint, restored.images, restored.settings
    window = f", SSIM in a uniform window of {restored.ssim_window} pixels" if restored.ssim_window else ""
    has_truth = any("psnr_mean" in image.qualities for image in images)
    truth = f" PSNR is of values in [0, 1], clipped and not yet rounded to levels{window}." if has_truth else ""
    means = [(QUALITIES[m.name][0], metric_text(m), m.num_samples, m.note) for m in summarize(images)]
    shown = [name for name in QUALITIES if any(name in image.qualities for image in images)]
    headings = [heading + (f" ({unit})" if unit else "") for heading, unit, _ in map(QUALITIES.__getitem__, shown)]
    rows = [
        (f"[{image.folder}]({image.folder}/{COMPARISON})", *(number_text(image.quality(name)) for name in shown))
        for image in images
    ]
    dependences = [
        ("checkpoint", f"number {checkpoint.number}, step {checkpoint.step:,}, exponential moving average (EMA)"),
        ("images", f"{restored.source}, content `{restored.sha256[:16]}`"),
        ("values of a measurement", f"{restored.num_measured:,}"),
        ("settings", ", ".join(f"{key}={value}" for key, value in settings.items())),
        ("seconds of compilation", f"{restored.compile_seconds:.1f}"),
        *machine_rows(restored.machine),
    ]
    left_out = [f"- `{name}`: {why}" for name, why in restored.skipped.items()]
    sections = [
        f"# Restorations by checkpoint {checkpoint.number} (step {checkpoint.step:,})",
        f"{len(images)} image(s) of {restored.source}, {restored.num_draws} restorations of each (seed "
        f"{restored.seed}), {restored.nfe} network evaluations each, {restored.seconds:.1f} s in total without "
        f"compilation. Operator `{settings['restore.operator']}`, method `{settings['restore.method']}`, noise "
        f"{settings['restore.noise']} (of a range of 1). Means over images are given as value ± one standard "
        f"error.{truth}",
        f"![The first images]({COMPARISON})",
        table(("quality", "mean over images", "images", "what it is"), means),
        "## Each image",
        table(("image", *headings), rows).replace(NOT_RUN, ""),
        *([f"## {len(left_out)} file(s) left out", "\n".join(left_out)] if left_out else []),
        "## What the numbers depend on",
        table(("setting", "value"), dependences),
    ]
    return "\n\n".join(sections) + "\n"


def write_summary(folder: Path, restored: Restorations) -> None:
    """Write restore.json and restore.md, each atomically, when both are computed."""
    values, page = restored.to_dict(), render(restored)
    write_json(folder / f"{NAME}.json", values)
    write_bytes(folder / f"{NAME}.md", page.encode())
