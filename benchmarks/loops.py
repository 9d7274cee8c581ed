"""Convolutions in the loops of a compiled program, counted in the text of its HLO."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLEES = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# An instruction of HLO's own, or a call of a platform's library in its place.
_CONVOLUTION = re.compile(r" convolution\(|custom_call_target=\"__\w+\$conv")


class Convolutions(NamedTuple):
    """Convolutions as they stand in a program: those in a loop's body once, whatever its number of turns."""

    in_loops: int
    elsewhere: int


class _Computation:
    def __init__(self) -> None:
        self.own = 0  # convolutions
        self.called: list[str] = []  # computations, once for each call
        self.looped: list[str] = []  # bodies of its loops


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Return the computations of a module by name, and the name of the first to run."""
    found: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = found[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current:
            current.own += bool(_CONVOLUTION.search(line))
            callees = _CALLEES.findall(line)
            for branches in _BRANCHES.findall(line):
                callees += [branch.strip().lstrip("%") for branch in branches.split(",")]
            (current.looped if " while(" in line else current.called).extend(callees)
    return found, entry


def count_convolutions(compiled: jax.stages.Compiled | str) -> Convolutions:
    """Count the convolutions of a program, but for kernels of one pixel, which the networks compute as products."""
    computations, entry = _parse(compiled if isinstance(compiled, str) else compiled.as_text() or "")
    if not entry:
        raise ValueError("the text of the compiled program names no ENTRY computation; expected optimized HLO")

    @functools.cache
    def count(name: str, is_in_loop: bool) -> Convolutions:
        computation = computations[name]
        parts = [Convolutions(computation.own, 0) if is_in_loop else Convolutions(0, computation.own)]
        parts += [count(callee, is_in_loop) for callee in computation.called]
        parts += [count(body, True) for body in computation.looped]
        return Convolutions(sum(part.in_loops for part in parts), sum(part.elsewhere for part in parts))

    return count(entry, False)
