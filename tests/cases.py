"""Which cases of a test run by default."""

import pytest


def by_default(default, cases):
    """Mark all cases but those in `default` as exhaustive, which `make test-all` runs."""
    return [case if case in default else pytest.param(case, marks=pytest.mark.exhaustive) for case in cases]
