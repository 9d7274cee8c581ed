"""Which cases of a test run by default."""

import pytest


def by_default(default, cases):
    """Mark all cases but those in `default` as exhaustive, which `make test-all` runs; a tuple is several arguments."""

    def mark(case):
        return case if case in default else pytest.param(*_arguments(case), marks=pytest.mark.exhaustive)

    return [mark(case) for case in cases]


def _arguments(case):
    return case if isinstance(case, tuple) else (case,)
