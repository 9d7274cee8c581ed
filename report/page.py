"""report.md: the evaluation of a folder's checkpoints in plain language, with tables and pictures.

Every number has its uncertainty and everything needed to repeat it; what was not measured is "not run".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metrics.metric import FEW_SAMPLES, PUBLISHED_SAMPLES, TEST_SUFFIX, Metric
from report import plots
from report.data import CheckpointInfo, DataInfo, Report, read_reports
from storage.files import write_bytes

NOT_RUN = "not run"
NOT_KNOWN = "not known"
FLOOR_FACTOR = 3.0  # the Fréchet distance of good samples is within this factor of the floor


def number_text(value: float | None, stderr: float | None = None) -> str:
    """Write a number with its standard error, to the second digit of the latter: "2.963 ± 0.019"."""
    if value is None:
        return NOT_RUN
    if stderr is None or stderr <= 0.0:
        return f"{value:.4g}"
    digits = min(max(1 - math.floor(math.log10(stderr)), 0), 12)
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def metric_text(metric: Metric | None) -> str:
    """Write a metric with its standard error and unit; "not run" if there is none."""
    if metric is None:
        return NOT_RUN
    return number_text(metric.value, metric.stderr) + (f" {metric.unit}" if metric.unit else "")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table in Markdown."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [list(header), ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- sections of the page --------------------------------------------------------------------------------------------

# Name -> (heading, explanation); with "_test" for real test images. Whether a metric is FID is in its label.
SAMPLE_METRICS = {
    "frechet_distance": (
        "Fréchet distance to {reference}",
        "difference of the samples, as a whole, from {reference}; smaller is better",
    ),
    "frechet_distance_unbiased": (
        "the same, of infinitely many samples",
        "extrapolated, since the distance is larger for fewer samples; it may be below 0",
    ),
    "kernel_distance": ("kernel distance", "another measure of the difference, without such a bias; 0 is best"),
    "inception_score": (
        "exp of the mean information of class scores",
        "how clearly each sample belongs to a class, over many classes; larger is better",
    ),
    "inception_score_10": ("mean of 10 splits", "the same, as commonly published"),
    "precision": ("precision", "fraction of samples that look like real images"),
    "recall": ("recall", "fraction of real images that lie within the range of the samples"),
    "density": ("density", "number of real images near a sample: about 1 is best, more where samples crowd"),
    "coverage": ("coverage", "fraction of real images with a sample near them; larger is better"),
}
OTHER_METRICS = {
    "bits_per_dim": ("bits/dim of the network", "bits needed for one pixel value of a test image; smaller is better"),
    "bits_per_dim_bound": (
        "variational bound on bits/dim",
        "upper bound under the reverse-SDE model; the line above is for the ODE model",
    ),
    "log_likelihood": ("log-likelihood of an image", "log density log p(x) in the network's range; larger is better"),
    "log_likelihood_bound": ("variational bound on it", "lower bound under the reverse-SDE model"),
    "gaussian_bits_per_dim": ("bits/dim of a Gaussian", "the same for a Gaussian fitted to the training images"),
    "loss": ("loss on the test split", "the training objective on unseen images"),
}


def _reference_words(report: Report) -> str:
    return "the training images" if report.reference is None or report.reference.split == "train" else "the reference"


def heading(report: Report, name: str) -> str:
    """Return the heading of a metric: its label, which depends on the features, and what it is."""
    words = (SAMPLE_METRICS | OTHER_METRICS)[name][0].format(reference=_reference_words(report))
    label = next((metric.label for metric in report.metrics if metric.name == name), "")
    return f"{label}: {words}" if label else words


def short_heading(report: Report, name: str) -> str:
    """Return the label of a metric alone, if it has one; otherwise its `heading`."""
    return heading(report, name).split(": ")[0]


def _main_table(report: Report) -> str:
    rows: list[Sequence[object]] = [
        (
            heading(report, name),
            metric_text(report.metric(name)),
            metric_text(report.metric(name + TEST_SUFFIX)),
            meaning.format(reference=_reference_words(report)),
        )
        for name, (_, meaning) in SAMPLE_METRICS.items()
        if name != "inception_score_10" or report.metric(name)
    ]
    rows += [(words, metric_text(report.metric(name)), "", meaning) for name, (words, meaning) in OTHER_METRICS.items()]
    known = {*OTHER_METRICS, *SAMPLE_METRICS, *(name + TEST_SUFFIX for name in SAMPLE_METRICS)}
    rows += [(m.title, metric_text(m), "", m.note) for m in report.metrics if m.name not in known]
    return table(("metric", "this checkpoint", "real test images in place of samples", "what it measures"), rows)


def floor_sentence(report: Report) -> str:
    """Compare the Fréchet distance of the samples with the floor, and judge whether it is within three times of it.

    The limit is 3 floor + its standard error, that is 3 (floor ± stderr) at the upper end.
    """
    samples, floor = report.metric("frechet_distance"), report.metric("frechet_distance_test")
    if samples is None or floor is None or not floor.value or samples.value is None:
        return f"Fréchet distance of the samples against the floor: {NOT_RUN}."
    uncertainty = FLOOR_FACTOR * (floor.stderr or 0.0)
    limit = FLOOR_FACTOR * floor.value
    start = (
        f"The Fréchet distance of the samples is {number_text(samples.value, samples.stderr)}; the floor, the distance "
        f"of {floor.num_samples:,} real test images, is {number_text(floor.value, floor.stderr)}: "
        f"**{samples.value / floor.value:.2f} times the floor**. "
    )
    if samples.value <= limit:
        return start + f"That is within {FLOOR_FACTOR:.0f} times the floor ({limit:.4g}), even without its uncertainty."
    bound = f"{FLOOR_FACTOR:.0f} times the floor plus its uncertainty ({limit:.4g} + {uncertainty:.2g})"
    if samples.value <= limit + uncertainty:
        return start + f"That is within {bound}, but not without the uncertainty."
    return start + f"That is **not** within {bound}: it is {samples.value - limit - uncertainty:.4g} too much."


def bias_sentence(report: Report) -> str:
    """State which side of the comparison with the floor has the larger bias."""
    samples, floor = report.metric("frechet_distance"), report.metric("frechet_distance_test")
    if samples is None or floor is None or samples.num_samples == floor.num_samples:
        return ""
    fewer = "floor" if floor.num_samples < samples.num_samples else "distance of the samples"
    return (
        f"A Fréchet distance is larger for fewer images: here the {fewer} is raised more, since there are "
        f"{samples.num_samples:,} samples and {floor.num_samples:,} test images."
    )


def few_sentence(report: Report) -> str:
    """Warn of too few samples for a distance that is comparable with published ones."""
    samples = report.metric("frechet_distance")
    if samples is None or samples.num_samples >= PUBLISHED_SAMPLES:
        return ""
    return f"**{samples.num_samples:,} samples**: {FEW_SAMPLES}."


def bits_sentence(report: Report) -> str:
    """State whether the network compresses test images better than a Gaussian."""
    network, gaussian = report.metric("bits_per_dim"), report.metric("gaussian_bits_per_dim")
    if network is None or gaussian is None or network.value is None or gaussian.value is None:
        return f"bits/dim against the Gaussian: {NOT_RUN}."
    if network.num_samples != gaussian.num_samples:
        return "bits/dim of the network and of the Gaussian are for different images, and are not compared."
    gain = gaussian.value - network.value
    # Both are over the same images and positively correlated, so the sum of squares overestimates the uncertainty.
    uncertainty = math.hypot(network.stderr or 0.0, gaussian.stderr or 0.0)
    verdict = "beats" if gain > 0 else "does **not** beat"
    clear = "" if abs(gain) > 2 * uncertainty else ", which is less than twice the uncertainty"
    return f"The network {verdict} the Gaussian: the difference is {number_text(gain, uncertainty)} bits/dim{clear}."


def settings_rows(checkpoint: CheckpointInfo, seed: int, data: DataInfo) -> list[Sequence[object]]:
    """Return the rows (setting, value) that state what was measured on which data."""
    return [
        ("checkpoint", f"number {checkpoint.number}, step {checkpoint.step:,}"),
        ("parameters", "exponential moving average (EMA)" if checkpoint.ema else "as trained, not averaged"),
        ("seed", seed),
        (
            "data",
            f"{data.name}: {data.train_images:,} training and {data.test_images:,} test images, "
            f"{data.num_levels} levels",
        ),
    ]


def machine_rows(machine: Mapping[str, Any]) -> list[Sequence[object]]:
    """Return the rows (setting, value) of the machine and the package versions."""
    described = ", ".join(f"{key} {value}" for key, value in machine.items() if not isinstance(value, Mapping))
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [("machine", described), ("packages", packages)]


def _settings_table(report: Report) -> str:
    rows = settings_rows(report.checkpoint, report.seed, report.data)
    sampler, features, reference = report.sampler, report.features, report.reference
    if sampler is None:
        rows.append(("sampler", NOT_RUN))
    else:
        rows += [
            ("sampler", ", ".join(f"{key}={value}" for key, value in sampler.settings.items())),
            ("network evaluations per sample (nfe)", sampler.nfe),
            ("samples", f"{sampler.num_samples:,} in {sampler.seconds:.1f} s"),
            ("rounding of the samples", sampler.rounding or NOT_KNOWN),
        ]
    if features is None or reference is None:
        rows += [("feature extractor", NOT_RUN), ("reference", NOT_RUN)]
    else:
        accuracy = NOT_KNOWN if features.accuracy is None else f"{100 * features.accuracy:.1f} %"
        rows += [
            ("feature extractor", f"{features.name} (`{features.key}`)"),
            ("resizing of images for it", features.resize),
            ("its hash (SHA-256)", f"`{features.hash[:16]}`"),
            ("its accuracy on test images", accuracy),
            ("reference", reference.words),
            ("preparation of its images", reference.preparation or NOT_KNOWN),
            ("hash of its statistics (SHA-256)", f"`{reference.hash[:16]}`"),
        ]
    return table(("setting", "value"), rows)


def _notes_table(report: Report) -> str:
    def row(metric: Metric) -> Sequence[object]:
        title = metric.title if metric.title == metric.name else f"{metric.title} (`{metric.name}`)"
        text = metric_text(metric if metric.value is not None else None)
        if metric.interval is not None and metric.stderr is not None:
            low, high = (number_text(end, metric.stderr).split(" ")[0] for end in metric.interval)
            text += f"; 95 %: {low} to {high}"
        return title, text, metric.num_samples, metric.note

    return table(("metric", "value ± standard error", "images", "how it was computed"), map(row, report.metrics))


def _sweep_table(reports: Sequence[Report]) -> str:
    present = [name for name in (*SAMPLE_METRICS, *OTHER_METRICS) if any(report.metric(name) for report in reports)]
    headings = [short_heading(reports[-1], name) for name in present]
    rows = [
        (report.checkpoint.number, f"{report.checkpoint.step:,}", *(metric_text(report.metric(n)) for n in present))
        for report in reports
    ]
    return table(("checkpoint", "step", *headings), rows)


# --- pictures --------------------------------------------------------------------------------------------------------


def _curve(reports: Sequence[Report], name: str, level: str, label: str, level_label: str) -> bytes | None:
    points = [(report.checkpoint.step, metric) for report in reports if (metric := report.metric(name))]
    if len(points) < 2:
        return None
    line = reports[-1].metric(level)
    figure = plots.metric_figure(
        [step for step, _ in points],
        [metric.value for _, metric in points],
        [metric.stderr for _, metric in points],
        label=label,
        level=None if line is None else line.value,
        level_label=level_label,
    )
    return plots.figure_bytes(figure)


def _draw_pictures(reports: Sequence[Report], losses: Path) -> dict[str, bytes]:
    """Draw the curves that have data: {file name: PNG}."""
    drawn = {
        "frechet_distance.png": _curve(
            reports,
            "frechet_distance",
            "frechet_distance_test",
            short_heading(reports[-1], "frechet_distance"),  # the full heading is longer than the axis
            "floor: real test images",
        ),
        "bits_per_dim.png": _curve(
            reports, "bits_per_dim", "gaussian_bits_per_dim", "bits/dim", "Gaussian fitted to the training images"
        ),
    }
    records = plots.read_losses(losses) if losses.exists() else []
    if any(math.isfinite(record.get("loss") or math.nan) for record in records):
        drawn["loss_curve.png"] = plots.figure_bytes(plots.loss_figure(records))
    return {name: png for name, png in drawn.items() if png is not None}


PICTURES = {
    "real": "Real images beside samples",
    "grid": "Samples, the first ones drawn, not selected",
    "frechet_distance.png": "Fréchet distance of the checkpoints",
    "bits_per_dim.png": "bits/dim of the checkpoints",
    "loss_curve.png": "Training loss",
}


def render_report(folder: Path, reports: Sequence[Report], drawn: Mapping[str, bytes]) -> str:
    """Return the text of report.md; the last report is in the main table."""
    report = reports[-1]
    checkpoint = report.checkpoint
    extractor = "" if report.features is None else f" ({report.features.name})"
    sections = [
        f"# Evaluation of checkpoint {checkpoint.number} (step {checkpoint.step:,}) on {report.data.name}",
        "Numbers are given as value ± one standard error. Samples are compared with "
        f"{_reference_words(report)} by features of each image{extractor}; the column beside shows what real test "
        "images score in place of samples, about the best a model can reach.",
        _main_table(report),
        floor_sentence(report),
        bias_sentence(report),
        few_sentence(report),
        bits_sentence(report),
    ]
    files = {name: report.files.get(name) or (name if name in drawn else None) for name in PICTURES}
    pictures = [
        f"**{caption}**\n\n![{caption}]({file})\n"
        for name, caption in PICTURES.items()
        if (file := files[name]) and (file in drawn or (folder / file).exists())
    ]
    if len(reports) > 1:
        sections += ["## All checkpoints", _sweep_table(reports)]
    sections += ["## Pictures", *(pictures or [f"Pictures: {NOT_RUN}."])]
    sections += ["## What the numbers depend on", _settings_table(report)]
    sections += ["## How each number was computed", _notes_table(report)]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_report(folder: str | Path, *, losses: str | Path | None = None) -> Path:
    """Write report.md and its curves from every report_<k>.json of a folder; return the path of report.md.

    Everything is computed before the first file is written, and each file is written atomically: a failure leaves the
    old report. `losses` is the run's loss record; None: losses.jsonl in the folder's parent, the workdir.
    """
    folder = Path(folder)
    reports = read_reports(folder)
    drawn = _draw_pictures(reports, Path(losses) if losses else folder.parent / plots.LOSSES_FILE)
    page = render_report(folder, reports, drawn).encode()
    for name, content in (drawn | {"report.md": page}).items():
        write_bytes(folder / name, content)
    return folder / "report.md"
