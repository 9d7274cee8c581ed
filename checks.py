"""Checks of settings: a wrong value ends in one sentence that names it, what was expected and the way out."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Collection
from pathlib import Path

from errors import UserError

PYTHONS_OF_TENSORFLOW = ("3.11", "3.12", "3.13")  # TensorFlow 2.21 has no wheel for 3.14


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """Raises a ValueError if a setting's value is none of the known ones, which it lists."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(sorted(known))}")


def positive(name: str, value: float) -> None:
    """Raises a ValueError if a setting is not above 0."""
    if not value > 0:
        raise ValueError(f"{name}={value}: expected a positive number")


def not_negative(name: str, value: float) -> None:
    """Raises a ValueError if a setting is below 0."""
    if not value >= 0:
        raise ValueError(f"{name}={value}: expected 0 or more")


def inner_time(name: str, t: float, last: float) -> None:
    """Raises a ValueError if a time is not between 0 and the process's last one, T."""
    if not 0 < t < last:
        raise ValueError(f"{name}={t}: expected a time between 0 and T={last}")


def share(name: str, value: float) -> None:
    """Raises a ValueError if a setting is not a share, above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value}: expected a share, above 0 and at most 1")


def python_version() -> str:
    """Return the version of Python without its last number, such as "3.12"."""
    return ".".join(platform.python_version_tuple()[:2])


def why_no_tensorflow() -> tuple[str, str]:
    """Return what keeps a missing TensorFlow or TF-GAN from being here, and the command that fixes it."""
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
