"""`--mode compare`: reports of several evaluations side by side, if their numbers can be compared at all."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from errors import UserError
from metrics.metric import Metric
from metrics.naming import TEST_SUFFIX
from report.data import Report, read_report
from report.page import NOT_KNOWN, metric_text, number_text, table

MIN_FILES = 2
# What notes say of the result and not of how it was computed: the evaluations of an adaptive ODE solver, spreads.
MEASURED = re.compile(r", \d+ network evaluations(?=;)| is \S+ on average")
HASH_DIGITS = 16  # of a hash that are shown

# What a number depends on: what it is called -> its value in a report.
_Conditions = Mapping[str, Callable[[Report], object]]


def _extractor(report: Report) -> str:
    return f"{report.features.key} {report.features.hash[:HASH_DIGITS]}" if report.features else NOT_KNOWN


def _resizing(report: Report) -> str:
    return report.features.resize if report.features else NOT_KNOWN


def _reference_size(report: Report) -> int | str:
    return report.reference.num_samples if report.reference else NOT_KNOWN


def _num_samples(report: Report) -> int | str:
    return report.sampler.num_samples if report.sampler else NOT_KNOWN


def _rounding(report: Report) -> str:
    return (report.sampler and report.sampler.rounding) or NOT_KNOWN


def _reference(reports: Iterable[Report]) -> Callable[[Report], str]:
    """Returns how to name a reference: by its images if every report knows them, otherwise by its features.

    Features of the same images differ in the last digits between machines and batch sizes.
    """
    by_images = all(report.reference and report.reference.data_hash for report in reports)

    def name(report: Report) -> str:
        if report.reference is None:
            return NOT_KNOWN
        of = report.reference
        return (f"images {of.data_hash[:HASH_DIGITS]}, {of.preparation}") if by_images else of.hash[:HASH_DIGITS]

    return name


def _of_samples(reports: Sequence[Report]) -> _Conditions:
    return {
        "feature extractor": _extractor,
        "resizing for it": _resizing,
        "reference": _reference(reports),
        "images of the reference": _reference_size,
        "samples": _num_samples,
        "rounding of the samples": _rounding,
        "levels": lambda report: report.data.num_levels,
    }


OF_DATA: _Conditions = {
    "data set": lambda report: f"{report.data.name} {report.data.hash[:HASH_DIGITS] or '(hash not known)'}",
    "test images": lambda report: report.data.test_images,
    "levels": lambda report: report.data.num_levels,
}


def _is_of_samples(name: str) -> bool:
    """Says whether a metric compares features; the others are of the data's own values."""
    kinds = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall", "density", "coverage")
    return name.removesuffix(TEST_SUFFIX).startswith(kinds)


def _common_metrics(reports: Sequence[Report]) -> list[str]:
    """Returns the names of the metrics that every report has a number of, in the order of the first."""
    return [metric.name for metric in reports[0].metrics if all(report.metric(metric.name) for report in reports)]


def _metrics(reports: Sequence[Report], name: str) -> list[Metric]:
    return [metric for report in reports if (metric := report.metric(name))]


def differences(reports: Sequence[Report]) -> dict[str, list[object]]:
    """Returns what forbids a comparison of the metrics that reports have in common: {what: its value in each}.

    Samples must have been compared by the same network, with the same reference, as many and rounded alike; losses and
    bits/dim must be of the same images.
    """
    names = _common_metrics(reports)
    conditions: dict[str, Callable[[Report], object]] = {}
    if any(map(_is_of_samples, names)):
        conditions |= _of_samples(reports)
    if not all(map(_is_of_samples, names)):
        conditions |= OF_DATA
    values = {what: [value(report) for report in reports] for what, value in conditions.items()}
    others = [name for name in names if name.endswith(TEST_SUFFIX) or not _is_of_samples(name)]
    values |= {f"images of {name}": [m.num_samples for m in _metrics(reports, name)] for name in others}
    return {what: of_reports for what, of_reports in values.items() if len(set(of_reports)) > 1}


def _read(file: str | Path) -> Report:
    if not Path(file).is_file():
        raise UserError(f"there is no file {file}; give report_<k>.json files of --mode eval")
    try:
        return read_report(file)
    except UserError as error:
        raise UserError(f"{file} is no report_<k>.json of --mode eval ({error})") from error


def _check_comparable(files: Sequence[str], reports: Sequence[Report]) -> None:
    if not _common_metrics(reports):
        raise UserError(f"{', '.join(files)} have no metric in common; evaluate with the same metrics enabled")
    found = differences(reports)
    if found:
        listed = "; ".join(f"{what}: {' and '.join(map(str, values))}" for what, values in found.items())
        raise UserError(
            f"{', '.join(files)} cannot be compared, since these differ: {listed}; evaluate them with the same settings"
        )


# --- the table -------------------------------------------------------------------------------------------------------


def _padded_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Writes a table in Markdown with columns as wide as their widest cell, to be read on a terminal, too."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return table(padded[0], padded[1:])


def _difference_text(first: Metric, second: Metric) -> str:
    """Writes second - first, with the error that it has if the two are independent."""
    if first.value is None or second.value is None:
        return ""
    known = first.stderr is not None and second.stderr is not None
    error = math.hypot(first.stderr or 0.0, second.stderr or 0.0) if known else None
    return number_text(second.value - first.value, error) + (f" {first.unit}" if first.unit else "")


def _rows(reports: Sequence[Report]) -> list[list[object]]:
    def row(name: str) -> list[object]:
        metrics = _metrics(reports, name)
        cells: list[object] = [metrics[0].title, *map(metric_text, metrics)]
        return [*cells, _difference_text(*metrics)] if len(reports) == MIN_FILES else cells

    return [row(name) for name in _common_metrics(reports)]


def _settings_rows(reports: Sequence[Report]) -> list[list[object]]:
    described: dict[str, Callable[[Report], object]] = {
        "checkpoint": lambda report: f"{report.checkpoint.number} (step {report.checkpoint.step:,})",
        "seed": lambda report: report.seed,
        "nfe": lambda report: report.sampler.nfe if report.sampler else "",
    }
    end = [""] if len(reports) == MIN_FILES else []
    return [[what, *map(value, reports), *end] for what, value in described.items()]


def _short_names(files: Sequence[str]) -> list[str]:
    """Returns the paths without the folders that all of them are in."""
    paths = [Path(file).absolute() for file in files]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def _notes(files: Sequence[str], reports: Sequence[Report]) -> list[str]:
    """Says of which metrics the way of computing differs, and how."""
    lines = []
    for name in _common_metrics(reports):
        notes = [metric.note for metric in _metrics(reports, name)]
        if len({MEASURED.sub("", note) for note in notes}) > 1:
            of_files = "; ".join(f"{file}: {note}" for file, note in zip(files, notes, strict=True))
            lines.append(f"{name} was not computed alike. {of_files}.")
    return lines


def compare_reports(files: Sequence[str]) -> str:
    """Returns a table of the metrics that reports have in common, one column for each.

    Of two reports it has their difference, too, the second less the first. Its error supposes that the two are
    independent; the same reference, test images or seed make it too large.

    Args:
      files: report_<k>.json of --mode eval.

    Raises:
      UserError: if there are fewer than two files, one is no report, they have no metric in common, or what a number
        depends on differs: it says what.
      UserError: if there is no such file.
    """
    if len(files) < MIN_FILES:
        raise UserError(f"{len(files)} file(s) to compare; expected 2 or more report_<k>.json files of --mode eval")
    reports = [_read(file) for file in files]
    _check_comparable(files, reports)
    names = _short_names(files)
    header = ["", *names, "difference"] if len(files) == MIN_FILES else ["", *names]
    text = _padded_table(header, _settings_rows(reports) + _rows(reports))
    first = reports[0]
    shared = [f"Data: {first.data.name}, {first.data.num_levels} levels."]
    if first.sampler and first.reference and any(map(_is_of_samples, _common_metrics(reports))):
        shared.append(
            f"{first.sampler.num_samples:,} samples, rounded to {_rounding(first)}, against the reference "
            f"({first.reference.words}) by the extractor {_extractor(first)}."
        )
    shared.append("Numbers are value ± one standard error; that of a difference supposes that the two are independent.")
    return "\n\n".join([text, " ".join(shared), *_notes(names, reports)])
