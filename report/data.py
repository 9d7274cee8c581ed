"""The contents of an evaluation's report, stored for each checkpoint as report_<k>.json.

Every number has its uncertainty and everything needed to repeat it. What was not measured is null.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from metrics.metric import Metric
from storage import untrusted
from storage.files import write_json


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """Which parameters were evaluated: checkpoint number, training step, and whether they are the moving average."""

    number: int
    step: int
    ema: bool = True


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Name of the data set, images of its splits, and levels of a pixel.

    `hash` changes with the images of either split or their preparation; empty if unknown.
    """

    name: str
    train_images: int
    test_images: int
    num_levels: int
    hash: str = ""


@dataclasses.dataclass(frozen=True)
class SamplerInfo:
    """Settings of the sampler, network evaluations per sample, seconds of drawing all samples, their number.

    `rounding` is how they became levels, in words; empty if unknown.
    """

    settings: Mapping[str, Any]
    nfe: int
    seconds: float
    num_samples: int
    rounding: str = ""


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """The feature extractor: name in words, hash of its parameters, fraction of test images it classifies correctly.

    `key` is one of metrics.extractors.KEYS, `resize` how it resizes images.
    """

    name: str
    hash: str
    accuracy: float | None
    key: str = "classifier"
    resize: str = "none"


@dataclasses.dataclass(frozen=True)
class ReferenceInfo:
    """What samples are compared with: split or file, number of its images (0: unknown), hash of its statistics.

    `data_hash` is the fingerprint of its images, `preparation` what was done to them; both empty if unknown.
    """

    split: str
    num_samples: int
    hash: str
    data_hash: str = ""
    preparation: str = ""

    @property
    def words(self) -> str:
        """What it is and of how many images, for reports."""
        what = f"{self.split} split" if self.split in ("train", "test") else self.split
        return f"{what}, {self.images}"

    @property
    def images(self) -> str:
        """The number of its images in words."""
        return f"{self.num_samples:,} images" if self.num_samples else "images whose number is not known"


@dataclasses.dataclass(frozen=True)
class Report:
    """The evaluation of one checkpoint.

    `files` are relative to the folder of the report: "grid" of samples, "real" images beside samples.
    """

    checkpoint: CheckpointInfo
    seed: int
    data: DataInfo
    metrics: tuple[Metric, ...]  # what was measured; other metrics were not run
    sampler: SamplerInfo | None = None  # None if no samples were drawn
    features: FeatureInfo | None = None  # None if no metric of samples was run
    reference: ReferenceInfo | None = None  # None in the same case
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def metric(self, name: str) -> Metric | None:
        """Return the metric of this name, or None if it was not run or is not finite."""
        return next((m for m in self.metrics if m.name == name and m.value is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, None in place of what is not finite."""
        return finite(dataclasses.asdict(dataclasses.replace(self, files=dict(self.files))))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Build a report from what `to_dict` returned."""
        try:
            return untrusted.build(cls, values)
        except UserError as error:
            raise UserError(f"not a report of this version ({error})") from error


def finite(value: Any) -> Any:
    """Replace floats that are not finite by None, in nested dictionaries and sequences."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_path(folder: str | Path, number: int) -> Path:
    """Return the path of a checkpoint's report in the folder of an evaluation."""
    return Path(folder) / f"report_{number}.json"


def save_report(folder: str | Path, report: Report) -> None:
    """Write report_<k>.json, atomically."""
    write_json(report_path(folder, report.checkpoint.number), report.to_dict())


def read_report(path: str | Path) -> Report:
    """Read a report_<k>.json."""
    return Report.from_dict(untrusted.parse_json(Path(path).read_bytes(), object))


def read_reports(folder: str | Path) -> list[Report]:
    """Read every report_<k>.json of a folder, in the order of their training steps."""
    reports = []
    for path in Path(folder).glob("report_*.json"):
        if not re.fullmatch(r"report_\d+\.json", path.name):
            continue
        try:
            reports.append(read_report(path))
        except UserError as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and evaluate that checkpoint again") from error
    if not reports:
        raise UserError(f"{folder} holds no report_<k>.json; run with --mode eval first")
    return sorted(reports, key=lambda report: report.checkpoint.step)
