"""Pictures: grids of images that keep their pixels, and curves with error bars.

Grids are numpy arrays until they are saved. Curves are matplotlib figures without global state: matplotlib is imported
only when one is drawn, pyplot never.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageDraw

from errors import UserError
from storage.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VISIBLE_PIXELS = 32  # smallest shorter side of an image in a grid: an 8x8 digit is enlarged 4 times
BETWEEN_IMAGES = 0.5  # grey between the images of a grid, visible beside black and white ones
CAPTION_PIXELS = 20  # height of the caption above a grid; Pillow's own font is 11 pixels high
LEGEND_CHARACTERS = 150  # in a row under a figure 11 inches wide
MAX_PNG_CHANNELS = 4
LOSS_KEYS = ("loss", "eval_loss")
LOSS_LABELS = {"loss": "training", "eval_loss": "test images"}


# --- images ----------------------------------------------------------------------------------------------------------


def to_uint8(images: Num[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Turn float images in [0, 1] into 0 .. 255, clipped and rounded half up; return uint8 ones unchanged."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"images have type {images.dtype}; expected uint8, or float in [0, 1]")
    if not np.isfinite(images).all():
        raise UserError("images have pixels that are NaN or infinite; the sampler diverged: look at its settings")
    return np.clip(images * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)


def levels_to_uint8(levels: UInt8[np.ndarray, "*shape"], num_levels: int) -> UInt8[np.ndarray, "*shape"]:
    """Spread the levels 0 .. num_levels - 1 evenly over 0 .. 255."""
    levels = np.asarray(levels)
    if levels.size and int(levels.max()) >= num_levels:
        raise UserError(f"level {levels.max()} is not below num_levels={num_levels}; give the data's num_levels")
    return to_uint8(levels.astype(np.float64) / (num_levels - 1))


def upscale(images: Num[np.ndarray, "*N H W C"], factor: int) -> Num[np.ndarray, "*N h w C"]:
    """Enlarge images `factor` times by repeating pixels."""
    if factor < 1:
        raise UserError(f"factor={factor}; expected 1 or more")
    return np.repeat(np.repeat(images, factor, axis=-3), factor, axis=-2)


def to_rgb(images: UInt8[np.ndarray, "*N H W C"]) -> UInt8[np.ndarray, "*N H W 3"]:
    """Make images visible: repeat grey as RGB, lay transparency (the last of 2 or 4 channels) on white.

    Of five or more channels the first three are shown.
    """
    C = images.shape[-1]
    if C in (2, 4):
        color, alpha = images[..., :-1] / 255, images[..., -1:] / 255
        images = to_uint8(alpha * color + (1 - alpha))
    return images[..., :3] if C >= 3 else np.repeat(images, 3, axis=-1)


def image_grid(
    images: Num[np.ndarray, "N H W C"], *, num_columns: int = 8, padding: int = 2, pad_value: float = 0.0
) -> UInt8[np.ndarray, "h w 3"]:
    """Lay out images row by row, `padding` pixels around and between them, as `to_rgb` shows them.

    The layout of the 2021 code's `utils.save_image`: empty places have the colour of the padding.

    Args:
      images: float in [0, 1], or uint8.
      num_columns: images in a row; fewer if there are fewer.
      padding: in pixels.
      pad_value: grey of the padding, in [0, 1].
    """
    images = np.asarray(images)
    if images.ndim != 4 or not images.size:
        raise UserError(f"images have shape {images.shape}; expected [N, H, W, C] with N >= 1")
    if num_columns < 1 or padding < 0:
        raise UserError(f"num_columns={num_columns}, padding={padding}; expected num_columns >= 1 and padding >= 0")
    N, H, W, _ = images.shape
    columns = min(num_columns, N)
    rows = math.ceil(N / columns)
    shape = (rows * (H + padding) + padding, columns * (W + padding) + padding, 3)
    grid = np.full(shape, to_uint8(np.array(pad_value, np.float64)), np.uint8)
    for index, image in enumerate(to_rgb(to_uint8(images))):
        top, left = (padding + (index // columns) * (H + padding), padding + (index % columns) * (W + padding))
        grid[top : top + H, left : left + W] = image
    return grid


def grid_of_levels(
    levels: UInt8[np.ndarray, "N H W C"], num_levels: int, num_columns: int | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Lay out images given as levels; enlarge small ones. Without `num_columns` the grid is about square."""
    images = levels_to_uint8(levels, num_levels)
    factor = max(1, math.ceil(VISIBLE_PIXELS / min(images.shape[1:3])))
    columns = num_columns or math.ceil(math.sqrt(len(images)))
    return image_grid(upscale(images, factor), num_columns=columns, pad_value=BETWEEN_IMAGES)


def side_by_side(grids: Mapping[str, UInt8[np.ndarray, "h w 3"]], gap: int = 16) -> UInt8[np.ndarray, "H W 3"]:
    """Set grids, {caption: grid}, side by side on white, `gap` pixels apart, each with its caption above it.

    Grids keep their pixels and start in row `CAPTION_PIXELS`.
    """
    height = CAPTION_PIXELS + max(grid.shape[0] for grid in grids.values())
    width = sum(grid.shape[1] for grid in grids.values()) + gap * (len(grids) - 1)
    picture = Image.new("RGB", (width, height), "white")
    pen, left = ImageDraw.Draw(picture), 0
    for caption, grid in grids.items():
        pen.text((left + 2, 4), caption, fill="black")
        picture.paste(Image.fromarray(grid), (left, CAPTION_PIXELS))
        left += grid.shape[1] + gap
    return np.array(picture)


def samples_beside_real(
    samples: UInt8[np.ndarray, "N H W C"], real: UInt8[np.ndarray, "M H W C"], num_levels: int, num_images: int = 64
) -> UInt8[np.ndarray, "h w 3"]:
    """Show the first samples and the first real images side by side, not selected, both given as levels."""
    count = min(num_images, len(samples), len(real))
    grids = {"real images": real[:count], "samples": samples[:count]}
    return side_by_side({caption: grid_of_levels(levels, num_levels) for caption, levels in grids.items()})


def png_bytes(image: UInt8[np.ndarray, "h w C"]) -> bytes:
    """Encode an image as PNG, which is lossless: grey, RGB, or either with transparency."""
    if image.shape[-1] > MAX_PNG_CHANNELS:
        raise UserError(f"an image has {image.shape[-1]} channels; a PNG can have 1 to {MAX_PNG_CHANNELS}")
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | Path, image: UInt8[np.ndarray, "h w C"]) -> None:
    """Write an image as PNG (see `png_bytes`), atomically; make its folder."""
    write_bytes(path, png_bytes(image))


# --- curves ----------------------------------------------------------------------------------------------------------


LOSSES_FILE = "losses.jsonl"  # the loss record of a run, in its workdir


def read_record(line: str) -> dict[str, Any] | None:
    """Return a line of losses.jsonl, "step" and numbers; None if it is anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if all(value is None or type(value) in (int, float) for value in record.values()) else None


def read_losses(path: str | Path) -> list[dict[str, Any]]:
    """Read losses.jsonl: one {"step", "loss", "eval_loss" (not in each)} per line.

    An unfinished last line is left out: the run may still be writing it.
    """
    records = []
    lines = Path(path).read_text(errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        record = read_record(line)
        if record is None:
            raise UserError(
                f"{path}, line {number}, is not a record of a step; expected JSON with 'step' and numbers; delete it"
            )
        records.append(record)
    return records


def blank_figure(x_label: str, y_label: str) -> tuple[Figure, Any]:
    """Return a figure with one panel and its axes, labelled and with a grid."""
    from matplotlib.figure import Figure  # lazily: half a second; a bare Figure needs no pyplot

    figure = Figure(figsize=(7.0, 4.0), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def loss_figure(records: Iterable[Mapping[str, Any]]) -> Figure:
    """Draw the training and the test loss against the step; values that are not finite are left out.

    A record has "step" and any of "loss" and "eval_loss".
    """
    records = list(records)
    curves = {
        key: [(r["step"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
        for key in LOSS_KEYS
    }
    values = [value for points in curves.values() for _, value in points]
    if not values:
        raise UserError("no record has a finite loss; train first, or give the losses.jsonl of a run")
    figure, axes = blank_figure("training step", "loss per image")
    for key, points in curves.items():
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=LOSS_LABELS[key], marker="." if len(points) < 40 else None, linewidth=1.2)
    if min(values) > 0.0:  # the first loss is often a hundred times the last one
        axes.set_yscale("log")
    axes.legend()
    return figure


def metric_figure(
    steps: Sequence[int],
    values: Sequence[float | None],
    stderrs: Sequence[float | None],
    *,
    label: str,
    level: float | None = None,
    level_label: str = "",
) -> Figure:
    """Draw a metric of several checkpoints with its standard error, and a dashed level to compare it with.

    `values` are None where the metric was not measured; without a standard error there is no bar.
    """
    rows = sorted(zip(steps, values, stderrs, strict=True), key=lambda row: row[0])
    points = [(step, value, stderr or 0.0) for step, value, stderr in rows if value is not None]
    if not points:
        raise UserError(f"no checkpoint has a value of {label}; evaluate with that metric enabled")
    figure, axes = blank_figure("training step of the checkpoint", label)
    x, y, bars = zip(*points, strict=True)
    axes.errorbar(x, y, yerr=bars, marker="o", capsize=4, linewidth=1.2, label="checkpoints, ± one standard error")
    if level is not None:
        axes.axhline(level, linestyle="--", color="black", linewidth=1.0, label=level_label)
    axes.legend()
    return figure


# Okabe and Ito's colours, which most colour-blind people can distinguish; markers differ, too. Black is the floor's.
CURVE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
CURVE_MARKERS = "os^Dv<>PX*"
TICKS = (1.0, 2.0, 5.0)  # of each decade
CLEARANCE = 1.25  # factor between the outermost costs and the frame


def _draw_curves(axes: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]], cost: str, quality: str) -> None:
    for index, (label, points) in enumerate(curves.items()):
        present = [(point[cost], *point[quality]) for point in points if point[quality][0] is not None]
        rows = [(x, y, stderr or 0.0) for x, y, stderr in present]
        if rows:
            x, y, bars = zip(*rows, strict=True)
            style = {
                "color": CURVE_COLORS[index % len(CURVE_COLORS)],
                "marker": CURVE_MARKERS[index % len(CURVE_MARKERS)],
                "linestyle": ("-", ":")[index // len(CURVE_COLORS) % 2],
            }
            axes.errorbar(x, y, yerr=bars, label=label, capsize=3, linewidth=1.2, markersize=6, alpha=0.9, **style)


def _label_ticks(axis: Any, locator: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _scale_quality(axes: Any, values: Sequence[float], noise: float) -> None:
    """Make the axis logarithmic or, if a value is not positive, linear below the power of ten above the noise."""
    from matplotlib.ticker import LogLocator, SymmetricalLogLocator

    if all(value > 0 for value in values):
        axes.set_yscale("log", nonpositive="clip")
        _label_ticks(axes.yaxis, LogLocator(subs=TICKS))
    else:
        threshold = 10.0 ** math.ceil(math.log10(max(noise, 1e-12)))
        axes.set_yscale("symlog", linthresh=threshold)
        _label_ticks(axes.yaxis, SymmetricalLogLocator(linthresh=threshold, base=10.0, subs=TICKS))


def tradeoff_figure(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    costs: Mapping[str, str],
    qualities: Mapping[str, str],
    floors: Mapping[str, tuple[float | None, float | None]],
    floor_label: str,
) -> Figure:
    """Draw qualities against costs, one panel for each pair: a row for a quality, a column for a cost.

    Args:
      curves: label -> points, joined in their order; a point holds each cost by name and each quality by name as
        (value, standard error), None where unknown.
      costs: name -> label of its axis, which is logarithmic.
      qualities: name -> label of its axis.
      floors: name of a quality -> (value, standard error), drawn as a dashed line in a band.
      floor_label: what the line is.
    """
    if not any(curves.values()):
        raise UserError("there is no point to draw; expected one result or more")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11.0, 8.6), dpi=110, layout="constrained")
    panels = figure.subplots(len(qualities), len(costs), squeeze=False, sharex="col", sharey="row")
    points = [point for of_curve in curves.values() for point in of_curve]
    for row, (quality, quality_label) in enumerate(qualities.items()):
        values = [point[quality][0] for point in points if point[quality][0] is not None]
        floor, noise = floors[quality][0], floors[quality][1] or 0.0
        for column, (cost, cost_label) in enumerate(costs.items()):
            axes = panels[row][column]
            paid = [point[cost] for point in points]
            axes.set_xscale("log")
            axes.set_xlim(min(paid) / CLEARANCE, max(paid) * CLEARANCE)  # there may be only one value
            _label_ticks(axes.xaxis, LogLocator(subs=TICKS))
            if floor is not None:
                axes.axhline(floor, linestyle="--", color="black", linewidth=1.0, label=floor_label)
                axes.axhspan(floor - noise, floor + noise, color="black", alpha=0.08, linewidth=0)
            _draw_curves(axes, curves, cost, quality)
            axes.grid(alpha=0.3, which="both", linewidth=0.5)
            axes.set_xlabel(cost_label if row == len(qualities) - 1 else "")
            axes.set_ylabel(quality_label if column == 0 else "")
        _scale_quality(panels[row][0], values, noise)
    handles, labels = panels[0][0].get_legend_handles_labels()
    columns = max(LEGEND_CHARACTERS // (max(map(len, labels)) + 8), 1)  # 8: the marker, and the gap to the next
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns), frameon=False)
    return figure


def figure_bytes(figure: Figure) -> bytes:
    """Render a figure as PNG with matplotlib's own rasterizer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
