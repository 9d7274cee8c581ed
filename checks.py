"""Rules for single values: a wrong one ends in one sentence that names it and what was expected."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import platform
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from errors import UserError

PYTHONS_OF_TENSORFLOW = ("3.11", "3.12", "3.13")  # TensorFlow 2.21 has no wheel for 3.14


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value may be.

    Attributes:
      expected: the rule in words, as they follow "expected".
      accepts: whether a value of the right type is allowed.
    """

    expected: str
    accepts: Callable[[Any], bool]

    def __call__(self, name: str, value: Any) -> None:
        """Raise a UserError that calls the value by this name if it is refused."""
        if not self.accepts(value):
            raise UserError(f"{name}={value!r}: expected {self.expected}")


def at_least(smallest: float) -> Rule:
    """Return the rule of values that are not below the smallest."""
    return Rule(f"{smallest} or more", lambda value: value >= smallest)


def between(smallest: float, largest: float) -> Rule:
    """Return the rule of values in a closed interval."""
    return Rule(f"{smallest} to {largest}", lambda value: smallest <= value <= largest)


anything = Rule("any value", lambda value: True)
positive = Rule("a positive number", lambda value: value > 0)
not_negative = at_least(0)
below_one = Rule("0 or more and less than 1", lambda value: 0 <= value < 1)
up_to_one = Rule("more than 0 and at most 1", lambda value: 0 < value <= 1)
inside_unit = Rule("more than 0 and less than 1", lambda value: 0 < value < 1)


def one_of(name: str, value: str, known: Collection[str], form: str = "") -> None:
    """Raise a UserError that lists the known names, and the form of free ones, if a value is none of them."""
    if value not in known:
        listed = [*sorted(known), *([form] if form else [])]
        raise UserError(f"{name}={value!r} is unknown; known: {', '.join(listed)}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A name out of several.

    Attributes:
      names: that are allowed.
      table: "module.NAME" of a collection whose names are allowed too; it is imported at the first check.
      form: how a free name is written, such as "tfds:NAME".
      pattern: that a free name matches.
    """

    names: tuple[str, ...] = ()
    table: str = ""
    form: str = ""
    pattern: str = ""

    @property
    def known(self) -> tuple[str, ...]:
        """All names."""
        module, _, name = self.table.rpartition(".")
        return (*self.names, *(getattr(importlib.import_module(module), name) if module else ()))

    def __call__(self, name: str, value: Any) -> None:
        """Raise a UserError that lists the known names if the value is none of them."""
        if not (self.pattern and re.fullmatch(self.pattern, value)):
            one_of(name, value, self.known, self.form)


def choice(*names: str) -> Choice:
    """Return the rule of a value that is one of these names."""
    return Choice(names)


def key_of(table: str, *names: str, form: str = "", pattern: str = "") -> Choice:
    """Return the rule of a value that is a name in "module.TABLE", or another of these."""
    return Choice(names, table, form, pattern)


def inner_time(name: str, t: float, last: float) -> None:
    """Raise a UserError if a time is not between 0 and the process's last one, T."""
    if not 0 < t < last:
        raise UserError(f"{name}={t}: expected a time between 0 and T={last}")


def python_version() -> str:
    """Return the version of Python without its last number, such as "3.12"."""
    return ".".join(platform.python_version_tuple()[:2])


def why_no_tensorflow() -> tuple[str, str]:
    """Return why TensorFlow or TF-GAN is missing, and the command that installs it."""
    if python_version() in PYTHONS_OF_TENSORFLOW:
        return "not installed", "python -m pip install -r requirements.txt"
    newest = PYTHONS_OF_TENSORFLOW[-1]
    fix = f"sh tools/make_venv.sh python{newest} .venv requirements.txt"
    return f"not available for Python {python_version()}, only up to {newest}", fix


def require_tensorflow(package: str, purpose: str) -> Path:
    """Return the folder of `package`, TensorFlow or one on top of it; raise a UserError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        reason, fix = why_no_tensorflow()
        raise UserError(f"{purpose} needs {package}, which is {reason}; to install it: {fix}")
    return Path(spec.submodule_search_locations[0])
