"""samplers.json, samplers.md and samplers.png: samplers of one checkpoint by quality, network evaluations and time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metrics.metric import Metric
from metrics.naming import TEST_SUFFIX
from report import plots
from report.data import CheckpointInfo, DataInfo, FeatureInfo, ReferenceInfo, finite
from report.page import machine_rows, metric_text, settings_rows, table
from storage.files import write_bytes, write_json

NAME = "samplers"  # of the three files
QUALITIES = ("frechet_distance", "kernel_distance")  # metrics that are shown


@dataclasses.dataclass(frozen=True)
class SamplerResult:
    """What one sampler reached.

    Attributes:
      sampler: as it was given on the command line.
      family: the same without the number of steps.
      steps: of its grid; None if it chooses its own.
      grid: name of the times of its steps; empty if it chooses its own.
      settings: all that its samples depend on besides network and seed.
      nfe: network evaluations of a sample.
      seconds: of drawing all samples, without compiling.
      compile_seconds: of compiling it.
      batch_size: samples drawn at once.
      metrics: of its samples and, with "_test", of real test images in their place.
    """

    sampler: str
    family: str
    steps: int | None
    grid: str
    settings: Mapping[str, Any]
    nfe: int
    seconds: float
    compile_seconds: float
    batch_size: int
    metrics: tuple[Metric, ...]

    def metric(self, name: str) -> Metric:
        """Returns the metric of this name."""
        return next(metric for metric in self.metrics if metric.name == name)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Samplers of one checkpoint.

    Attributes:
      checkpoint: whose samples are compared.
      seed: of the samples; the same for all, so that all start from the same noise.
      num_images: samples of each sampler.
      data: the data set.
      features: what the metrics see of an image.
      reference: what samples are compared with.
      machine: what computed, package versions and commit.
      results: one for each sampler.
      skipped: {sampler: why it is left out}.
    """

    checkpoint: CheckpointInfo
    seed: int
    num_images: int
    data: DataInfo
    features: FeatureInfo
    reference: ReferenceInfo
    machine: Mapping[str, Any]
    results: tuple[SamplerResult, ...]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def floor(self, name: str) -> Metric:
        """Returns what real test images score in place of samples."""
        return self.results[0].metric(name + TEST_SUFFIX)

    @property
    def qualities(self) -> tuple[str, ...]:
        """Names of the metrics that are shown: a reference of statistics alone allows no kernel distance."""
        measured = {metric.name for metric in self.results[0].metrics}
        return tuple(name for name in QUALITIES if name in measured)

    def title(self, name: str) -> str:
        """Returns what a metric is called."""
        return self.results[0].metric(name).title

    def images_per_second(self, result: SamplerResult) -> float:
        """Returns the samples that a sampler draws in a second."""
        return self.num_images / result.seconds

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, None in place of what is not finite; the floor stands once."""
        values = dataclasses.asdict(self)
        for of_result, result in zip(values["results"], self.results, strict=True):
            of_result["images_per_second"] = self.images_per_second(result)
            of_result["metrics"] = [m for m in of_result["metrics"] if not m["name"].endswith(TEST_SUFFIX)]
        floor = [dataclasses.asdict(m) for m in self.results[0].metrics if m.name.endswith(TEST_SUFFIX)]
        return finite(values | {"floor": floor})


# --- the page --------------------------------------------------------------------------------------------------------


def _results_table(comparison: Comparison) -> str:
    rows: list[Sequence[object]] = [
        (
            f"`{result.sampler}`",
            "its own" if result.steps is None else result.steps,
            result.grid or "its own",
            result.nfe,
            f"{result.seconds:.2f}",
            f"{comparison.images_per_second(result):,.1f}",
            *(metric_text(result.metric(name)) for name in comparison.qualities),
        )
        for result in sorted(comparison.results, key=lambda result: (result.nfe, result.sampler))
    ]
    floor = (metric_text(comparison.floor(name)) for name in comparison.qualities)
    rows.append(("*floor: real test images*", "", "", "", "", "", *floor))
    return table(
        ("sampler", "steps", "grid", "nfe", "seconds", "images/s", *map(comparison.title, comparison.qualities)), rows
    )


def _introduction(comparison: Comparison) -> str:
    floor, machine = comparison.floor("frechet_distance"), comparison.machine
    titles = " and ".join(map(comparison.title, comparison.qualities))
    return (
        f"{comparison.num_images:,} samples of each sampler (seed {comparison.seed}) against the "
        f"reference ({comparison.reference.words}). {titles}, smaller is better, are written value "
        f"± one standard error; the floor is what {floor.num_samples:,} real test images score in place of samples, "
        "about the best a network can reach (a Fréchet distance comes out larger when there are fewer images). nfe "
        "counts network evaluations of a sample; seconds are those of drawing all samples, without compiling, on "
        f"{machine['devices']} {machine['platform']} device(s), {machine['cpus']} CPUs."
    )


def _dependence_table(comparison: Comparison) -> str:
    checkpoint, data = comparison.checkpoint, comparison.data
    common = dict(comparison.results[0].settings)
    for result in comparison.results[1:]:
        common = {key: value for key, value in common.items() if result.settings.get(key) == value}
    rows = settings_rows(checkpoint, comparison.seed, data)
    rows += [
        ("settings that all samplers share", ", ".join(f"{key}={value}" for key, value in common.items())),
        ("samples drawn at once", ", ".join(map(str, sorted({result.batch_size for result in comparison.results})))),
        ("seconds of compiling", ", ".join(f"{r.sampler} {r.compile_seconds:.1f}" for r in comparison.results)),
        ("feature extractor", f"{comparison.features.name}, `{comparison.features.hash[:16]}`"),
        ("reference", f"{comparison.reference.words}, `{comparison.reference.hash[:16]}`"),
        *machine_rows(comparison.machine),
    ]
    return table(("setting", "value"), rows)


def render_comparison(comparison: Comparison) -> str:
    """Returns the text of samplers.md."""
    checkpoint = comparison.checkpoint
    listed = ",".join(result.sampler for result in comparison.results)
    sections = [
        f"# Samplers of checkpoint {checkpoint.number} (step {checkpoint.step:,}) on {comparison.data.name}",
        _introduction(comparison),
        _results_table(comparison),
        f"![Quality against network evaluations and seconds]({NAME}.png)",
        f"Made by `--mode compare_samplers --samplers {listed} --num_images {comparison.num_images} --snapshot "
        f"{checkpoint.number}`.",
        *(f"Left out: `{sampler}`: {reason}." for sampler, reason in comparison.skipped.items()),
        "## What the numbers depend on",
        _dependence_table(comparison),
    ]
    return "\n\n".join(sections) + "\n"


def _draw_figure(comparison: Comparison) -> bytes:
    curves: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(comparison.results, key=lambda result: result.nfe):
        point: dict[str, Any] = {"nfe": result.nfe, "seconds": result.seconds}
        point |= {name: (result.metric(name).value, result.metric(name).stderr) for name in comparison.qualities}
        curves.setdefault(result.family, []).append(point)
    figure = plots.tradeoff_figure(
        curves,
        costs={"nfe": "network evaluations of a sample", "seconds": f"seconds for {comparison.num_images:,} samples"},
        qualities={name: f"{comparison.title(name)}, smaller is better" for name in comparison.qualities},
        floors={name: (comparison.floor(name).value, comparison.floor(name).stderr) for name in comparison.qualities},
        floor_label="floor: real test images",
    )
    return plots.figure_bytes(figure)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Writes samplers.json, samplers.md and samplers.png, each whole or not at all, when all three are computed."""
    values, page, picture = comparison.to_dict(), render_comparison(comparison), _draw_figure(comparison)
    write_json(folder / f"{NAME}.json", values)
    write_bytes(folder / f"{NAME}.png", picture)
    write_bytes(folder / f"{NAME}.md", page.encode())
