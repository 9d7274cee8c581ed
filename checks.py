"""Checks of settings: a wrong value ends in one sentence that names it, what was expected and the way out."""

from __future__ import annotations

from collections.abc import Collection

from errors import UserError


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """Raises a ValueError if a setting's value is none of the known ones, which it lists."""
    if value not in known:
        raise UserError(f"{name}={value!r} is unknown; known: {', '.join(sorted(known))}")


def positive(name: str, value: float) -> None:
    """Raises a ValueError if a setting is not above 0."""
    if not value > 0:
        raise UserError(f"{name}={value}: expected a positive number")


def not_negative(name: str, value: float) -> None:
    """Raises a ValueError if a setting is below 0."""
    if not value >= 0:
        raise UserError(f"{name}={value}: expected 0 or more")


def inner_time(name: str, t: float, last: float) -> None:
    """Raises a ValueError if a time is not between 0 and the process's last one, T."""
    if not 0 < t < last:
        raise UserError(f"{name}={t}: expected a time between 0 and T={last}")


def share(name: str, value: float) -> None:
    """Raises a ValueError if a setting is not a share, above 0 and at most 1."""
    if not 0 < value <= 1:
        raise UserError(f"{name}={value}: expected a share, above 0 and at most 1")
