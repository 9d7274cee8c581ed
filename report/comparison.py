"""samplers.json, samplers.md and samplers.png: samplers of one checkpoint by quality, network evaluations and time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metrics.metric import TEST_SUFFIX, Metric
from report import plots
from report.data import CheckpointInfo, DataInfo, FeatureInfo, ReferenceInfo, finite
from report.page import machine_rows, metric_text, settings_rows, table
from storage.files import write_bytes, write_json

NAME = "samplers"  # of the three files
QUALITIES = ("frechet_distance", "kernel_distance")  # metrics that are shown


@dataclasses.dataclass(frozen=True)
class SamplerResult:
    """What one sampler reached."""

    sampler: str  # as given on the command line
    family: str  # the same without the number of steps
    steps: int | None  # of its grid; None if it chooses its own
    grid: str  # name of its time grid; empty if it chooses its own
    settings: Mapping[str, Any]  # everything its samples depend on besides network and seed
    nfe: int  # network evaluations per sample
    seconds: float  # of drawing all samples, without compilation
    compile_seconds: float
    batch_size: int  # samples drawn at a time
    metrics: tuple[Metric, ...]  # of its samples and, with "_test", of real test images in their place

    def metric(self, name: str) -> Metric:
        """Return the metric of this name."""
        return next(metric for metric in self.metrics if metric.name == name)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Samplers of one checkpoint."""

    checkpoint: CheckpointInfo
    seed: int  # of the samples, the same for all, so that all start from the same noise
    num_images: int  # samples of each sampler
    data: DataInfo
    features: FeatureInfo
    reference: ReferenceInfo
    machine: Mapping[str, Any]  # hardware, package versions and commit
    results: tuple[SamplerResult, ...]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {sampler: why it is left out}

    def floor(self, name: str) -> Metric:
        """Return what real test images score in place of samples."""
        return self.results[0].metric(name + TEST_SUFFIX)

    @property
    def qualities(self) -> tuple[str, ...]:
        """Names of the metrics that are shown: a reference of statistics alone has no kernel distance."""
        measured = {metric.name for metric in self.results[0].metrics}
        return tuple(name for name in QUALITIES if name in measured)

    def title(self, name: str) -> str:
        """Return the title of a metric."""
        return self.results[0].metric(name).title

    def images_per_second(self, result: SamplerResult) -> float:
        """Return the samples that a sampler draws per second."""
        return self.num_images / result.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, None in place of what is not finite; the floor appears once."""
        values = dataclasses.asdict(self)
        for of_result, result in zip(values["results"], self.results, strict=True):
            of_result["images_per_second"] = self.images_per_second(result)
            of_result["metrics"] = [m for m in of_result["metrics"] if not m["name"].endswith(TEST_SUFFIX)]
        floor = [dataclasses.asdict(m) for m in self.results[0].metrics if m.name.endswith(TEST_SUFFIX)]
        return finite(values | {"floor": floor})


def render_comparison(comparison: Comparison) -> str:
    """Return the text of samplers.md."""
    checkpoint, machine, qualities = comparison.checkpoint, comparison.machine, comparison.qualities
    titles = [comparison.title(name) for name in qualities]
    results: list[Sequence[object]] = [
        (
            f"`{result.sampler}`",
            "its own" if result.steps is None else result.steps,
            result.grid or "its own",
            result.nfe,
            f"{result.seconds:.2f}",
            f"{comparison.images_per_second(result):,.1f}",
            *(metric_text(result.metric(name)) for name in qualities),
        )
        for result in sorted(comparison.results, key=lambda result: (result.nfe, result.sampler))
    ]
    floors = (metric_text(comparison.floor(name)) for name in qualities)
    results.append(("*floor: real test images*", "", "", "", "", "", *floors))
    common = dict(comparison.results[0].settings)
    for result in comparison.results[1:]:
        common = {key: value for key, value in common.items() if result.settings.get(key) == value}
    dependences = [
        *settings_rows(checkpoint, comparison.seed, comparison.data),
        ("settings of all samplers", ", ".join(f"{key}={value}" for key, value in common.items())),
        ("samples drawn at a time", ", ".join(map(str, sorted({result.batch_size for result in comparison.results})))),
        ("seconds of compilation", ", ".join(f"{r.sampler} {r.compile_seconds:.1f}" for r in comparison.results)),
        ("feature extractor", f"{comparison.features.name}, `{comparison.features.hash[:16]}`"),
        ("reference", f"{comparison.reference.words}, `{comparison.reference.hash[:16]}`"),
        *machine_rows(machine),
    ]
    listed = ",".join(result.sampler for result in comparison.results)
    sections = [
        f"# Samplers of checkpoint {checkpoint.number} (step {checkpoint.step:,}) on {comparison.data.name}",
        f"{comparison.num_images:,} samples of each sampler (seed {comparison.seed}) against the reference "
        f"({comparison.reference.words}). {' and '.join(titles)}, smaller is better, are given as value ± one standard "
        f"error; the floor is what {comparison.floor('frechet_distance').num_samples:,} real test images score in "
        "place of samples, about the best a network can reach (a Fréchet distance is larger for fewer images). nfe is "
        "the number of network evaluations per sample; seconds are for drawing all samples, without compilation, on "
        f"{machine['devices']} {machine['platform']} device(s), {machine['cpus']} CPUs.",
        table(("sampler", "steps", "grid", "nfe", "seconds", "images/s", *titles), results),
        f"![Quality against network evaluations and seconds]({NAME}.png)",
        f"Made by `--mode compare_samplers --samplers {listed} --num_images {comparison.num_images} --snapshot "
        f"{checkpoint.number}`.",
        *(f"Left out: `{sampler}`: {reason}." for sampler, reason in comparison.skipped.items()),
        "## What the numbers depend on",
        table(("setting", "value"), dependences),
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
        costs={"nfe": "network evaluations per sample", "seconds": f"seconds for {comparison.num_images:,} samples"},
        qualities={name: f"{comparison.title(name)}, smaller is better" for name in comparison.qualities},
        floors={name: (comparison.floor(name).value, comparison.floor(name).stderr) for name in comparison.qualities},
        floor_label="floor: real test images",
    )
    return plots.figure_bytes(figure)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write samplers.json, samplers.md and samplers.png, each atomically, when all three are computed."""
    values, page, picture = comparison.to_dict(), render_comparison(comparison), _draw_figure(comparison)
    write_json(folder / f"{NAME}.json", values)
    write_bytes(folder / f"{NAME}.png", picture)
    write_bytes(folder / f"{NAME}.md", page.encode())
