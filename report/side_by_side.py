"""`--mode compare`: reports of several evaluations side by side, if their numbers are comparable."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from metrics.metric import TEST_SUFFIX, Metric
from report.data import Report, read_report
from report.page import NOT_KNOWN, metric_text, number_text, table

MIN_FILES = 2
# Results in notes, as opposed to how they were computed: the evaluations of an adaptive ODE solver, spreads.
MEASURED = re.compile(r", \d+ network evaluations(?=;)| is \S+ on average")
HASH_DIGITS = 16  # of a hash, shown


def _sample_conditions(report: Report, by_images: bool) -> dict[str, object]:
    """Return what the metrics of samples depend on; `by_images`: identify the reference by the hash of its images.

    Otherwise its features identify it, whose last digits differ between machines and batch sizes.
    """
    features, reference, sampler = report.features, report.reference, report.sampler
    reference_id = NOT_KNOWN
    if reference:
        reference_id = f"images {reference.data_hash[:HASH_DIGITS]}, {reference.preparation}"
        reference_id = reference_id if by_images else reference.hash[:HASH_DIGITS]
    return {
        "feature extractor": f"{features.key} {features.hash[:HASH_DIGITS]}" if features else NOT_KNOWN,
        "resizing for it": features.resize if features else NOT_KNOWN,
        "reference": reference_id,
        "images of the reference": reference.num_samples if reference else NOT_KNOWN,
        "samples": sampler.num_samples if sampler else NOT_KNOWN,
        "rounding of the samples": (sampler and sampler.rounding) or NOT_KNOWN,
        "levels": report.data.num_levels,
    }


def _data_conditions(report: Report) -> dict[str, object]:
    data = report.data
    return {
        "data set": f"{data.name} {data.hash[:HASH_DIGITS] or '(hash not known)'}",
        "test images": data.test_images,
        "levels": data.num_levels,
    }


def _is_of_samples(name: str) -> bool:
    """Return whether a metric compares features; the others are of the data's own values."""
    kinds = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall", "density", "coverage")
    return name.removesuffix(TEST_SUFFIX).startswith(kinds)


def _common_metrics(reports: Sequence[Report]) -> list[str]:
    """Return the names of the metrics that every report has a number of, in the order of the first."""
    return [metric.name for metric in reports[0].metrics if all(report.metric(metric.name) for report in reports)]


def _metrics(reports: Sequence[Report], name: str) -> list[Metric]:
    return [metric for report in reports if (metric := report.metric(name))]


def differences(reports: Sequence[Report]) -> dict[str, list[object]]:
    """Return what prevents a comparison of the reports' common metrics: {what: its value in each}.

    Samples must be compared by the same network with the same reference, and agree in number and rounding; losses and
    bits/dim must be of the same images.
    """
    names = _common_metrics(reports)
    conditions: list[dict[str, object]] = [{} for _ in reports]
    if any(map(_is_of_samples, names)):
        by_images = all(report.reference and report.reference.data_hash for report in reports)
        conditions = [_sample_conditions(report, by_images) for report in reports]
    if not all(map(_is_of_samples, names)):
        conditions = [found | _data_conditions(report) for found, report in zip(conditions, reports, strict=True)]
    values = {what: [found[what] for found in conditions] for what in conditions[0]}
    others = [name for name in names if name.endswith(TEST_SUFFIX) or not _is_of_samples(name)]
    values |= {f"images of {name}": [m.num_samples for m in _metrics(reports, name)] for name in others}
    return {what: of_reports for what, of_reports in values.items() if len(set(of_reports)) > 1}


def _read(file: str | Path) -> Report:
    if not Path(file).is_file():
        raise UserError(f"there is no file {file}; give report_<k>.json files of --mode eval")
    try:
        return read_report(file)
    except UserError as error:
        raise UserError(f"{file} is not a report_<k>.json of --mode eval ({error})") from error


def _padded_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a table in Markdown with columns as wide as their widest cell, readable on a terminal, too."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return table(padded[0], padded[1:])


def _difference_text(first: Metric, second: Metric) -> str:
    """Write second - first, with its standard error if the two are independent."""
    if first.value is None or second.value is None:
        return ""
    known = first.stderr is not None and second.stderr is not None
    error = math.hypot(first.stderr or 0.0, second.stderr or 0.0) if known else None
    return number_text(second.value - first.value, error) + (f" {first.unit}" if first.unit else "")


def _short_names(files: Sequence[str]) -> list[str]:
    """Return the paths without the folders that they have in common."""
    paths = [Path(file).absolute() for file in files]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def compare_reports(files: Sequence[str]) -> str:
    """Return a table of the metrics that reports have in common, one column for each.

    Two reports also get a column of differences, the second minus the first. Its error assumes that the two are
    independent; with the same reference, test images or seed it is too large.
    """
    if len(files) < MIN_FILES:
        raise UserError(f"{len(files)} file(s) to compare; expected 2 or more report_<k>.json files of --mode eval")
    reports = [_read(file) for file in files]
    names, common = _short_names(files), _common_metrics(reports)
    if not common:
        raise UserError(f"{', '.join(files)} have no metric in common; evaluate with the same metrics enabled")
    if found := differences(reports):
        listed = "; ".join(f"{what}: {' and '.join(map(str, values))}" for what, values in found.items())
        raise UserError(
            f"{', '.join(files)} cannot be compared, since these differ: {listed}; evaluate them with the same settings"
        )
    two = len(files) == MIN_FILES
    rows: list[list[object]] = [
        ["checkpoint", *(f"{report.checkpoint.number} (step {report.checkpoint.step:,})" for report in reports)],
        ["seed", *(report.seed for report in reports)],
        ["nfe", *(report.sampler.nfe if report.sampler else "" for report in reports)],
    ]
    rows = [[*row, ""] if two else row for row in rows]
    notes = []
    for name in common:
        metrics = _metrics(reports, name)
        cells: list[object] = [metrics[0].title, *map(metric_text, metrics)]
        rows.append([*cells, _difference_text(*metrics)] if two else cells)
        if len({MEASURED.sub("", metric.note) for metric in metrics}) > 1:
            of_files = "; ".join(f"{file}: {metric.note}" for file, metric in zip(names, metrics, strict=True))
            notes.append(f"{name} was computed differently. {of_files}.")
    text = _padded_table(["", *names, "difference"] if two else ["", *names], rows)
    first = reports[0]
    shared = [f"Data: {first.data.name}, {first.data.num_levels} levels."]
    if first.sampler and first.reference and any(map(_is_of_samples, common)):
        conditions = _sample_conditions(first, by_images=False)
        shared.append(
            f"{first.sampler.num_samples:,} samples, rounded to {conditions['rounding of the samples']}, against the "
            f"reference ({first.reference.words}) by the extractor {conditions['feature extractor']}."
        )
    shared.append("Numbers are value ± one standard error; that of a difference assumes that the two are independent.")
    return "\n\n".join([text, " ".join(shared), *notes])
