"""The report of an evaluation: what it holds (`data`) and how it reads (`page`)."""

from report.data import (
    CheckpointInfo,
    DataInfo,
    FeatureInfo,
    ReferenceInfo,
    Report,
    SamplerInfo,
    read_reports,
    report_path,
    save_report,
)
from report.page import metric_text, number_text, write_report

__all__ = [
    "CheckpointInfo",
    "DataInfo",
    "FeatureInfo",
    "ReferenceInfo",
    "Report",
    "SamplerInfo",
    "metric_text",
    "number_text",
    "read_reports",
    "report_path",
    "save_report",
    "write_report",
]
