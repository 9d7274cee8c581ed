"""The mode "doctor": print what is installed, present or missing and how to get it, and run a self-test."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Iterator

from absl import logging
from ml_collections import ConfigDict

from errors import UserError
from modes.doctor import self_test
from modes.doctor.inventory import BROKEN, MISSING, OK, WARNING, Finding, take_inventory

WIDTH = 88  # characters of the text column; with the columns before it 120
INDENT = " " * 32
MEANINGS = {
    OK: "as it should be",
    MISSING: "not there; fine, unless you need it",
    WARNING: "may not work as you expect",
    BROKEN: "fix this first",
}


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """Format findings as they come: a heading for each group; state, name and text in columns; the remedy below."""
    group = ""
    for each in findings:
        if each.group != group:
            group = each.group
            yield f"\n{group}"
        first, *others = textwrap.wrap(each.text, WIDTH) or [""]
        yield f"  {each.state:<8} {each.name:<20} {first}"
        yield from (f"{INDENT}{line}" for line in others)
        if each.remedy:
            yield f"{INDENT}-> {each.remedy}"  # on one line, to be copied


def doctor(config: ConfigDict | UserError | None = None) -> bool:
    """Print what is installed, present or missing and how to get it, and run a self-test of about ten seconds.

    Also examines the settings and the data set of `config`; an error from loading it is one of the findings. Returns
    whether nothing is broken; what is missing but optional does not count.
    """
    counts, logger = dict.fromkeys(MEANINGS, 0), logging.get_absl_logger()
    level = logger.level

    def counted() -> Iterator[Finding]:
        outcomes = ((name, self_test.run_check(name)) for name in self_test.CHECKS)
        tests = (Finding("self-test", name, OK if passed else BROKEN, text) for name, (passed, text) in outcomes)
        for finding in itertools.chain(take_inventory(config), tests):
            counts[finding.state] += 1
            yield finding

    logger.setLevel("WARNING")  # the self-test would log between the lines
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
