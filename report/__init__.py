"""Reports of evaluations: their data (`data`), their page (`page`), and several compared (`side_by_side`)."""

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
from report.side_by_side import compare_reports

__all__ = [
    "CheckpointInfo",
    "DataInfo",
    "FeatureInfo",
    "ReferenceInfo",
    "Report",
    "SamplerInfo",
    "compare_reports",
    "metric_text",
    "number_text",
    "read_reports",
    "report_path",
    "save_report",
    "write_report",
]
