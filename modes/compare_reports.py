"""The mode "compare"."""

from collections.abc import Sequence

import report


def compare_reports(files: Sequence[str]) -> None:
    """Print a table of the metrics of several evaluations, and the difference of two.

    Args:
      files: report_<k>.json files of --mode eval, two or more.

    Raises:
      UserError: if a file is missing or no report, or the reports differ in extractor, reference, number of samples,
        rounding or data.
    """
    print(report.compare_reports(files))
