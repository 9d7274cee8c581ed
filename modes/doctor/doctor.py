"""The mode "doctor": what is installed, present or missing, how to get it, and whether the mathematics comes out."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Iterator

from absl import logging
from ml_collections import ConfigDict

from modes.doctor import self_test
from modes.doctor.inventory import BROKEN, MISSING, OK, WARNING, Finding, take_inventory

WIDTH = 88  # characters of what was found; with the columns before it 120
INDENT = " " * 32
MEANINGS = {
    OK: "as it should be",
    MISSING: "not there; fine, unless you want what it is for",
    WARNING: "may not work as you expect",
    BROKEN: "must be mended first",
}


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """Formats findings as they come: a heading for each group, state, name and text in columns, the remedy below."""
    group = ""
    for each in findings:
        if each.group != group:
            group = each.group
            yield f"\n{group}"
        first, *others = textwrap.wrap(each.text, WIDTH) or [""]
        yield f"  {each.state:<8} {each.name:<20} {first}"
        yield from (f"{INDENT}{line}" for line in others)
        if each.remedy:
            yield f"{INDENT}-> {each.remedy}"  # in one piece: to be copied


def test_findings() -> Iterator[Finding]:
    """Runs the self-test."""
    for name in self_test.CHECKS:
        outcome = self_test.run_check(name)
        yield Finding("self-test", name, OK if outcome.passed else BROKEN, outcome.text)


def examine(config: ConfigDict | None = None) -> bool:
    """Prints what was found, line by line as it is found.

    Args:
      config: experiment configuration whose data set is looked for, too; None: none.

    Returns:
      Whether nothing is broken.
    """
    counts, logger = dict.fromkeys(MEANINGS, 0), logging.get_absl_logger()
    level = logger.level

    def counted() -> Iterator[Finding]:
        for finding in itertools.chain(take_inventory(config), test_findings()):
            counts[finding.state] += 1
            yield finding

    logger.setLevel("WARNING")  # what the self-test does would be said between the lines
    try:
        for line in lines(counted()):
            print(line, flush=True)
    finally:
        logger.setLevel(level)
    print()
    for state, meaning in MEANINGS.items():
        if counts[state]:
            print(f"{counts[state]:3} {state}: {meaning}")
    return not counts[BROKEN]
