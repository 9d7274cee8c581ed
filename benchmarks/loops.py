"""What a compiled program does over and over: operations in the bodies of its loops, counted in the text of its HLO."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLEES = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# An instruction of HLO's own, or a call of a platform's library in its place.
_CONVOLUTION = re.compile(r" convolution\(|custom_call_target=\"__\w+\$conv")


class Convolutions(NamedTuple):
    """Convolutions of a program, each as often as it is written: a loop's body once, whatever its number of turns."""

    in_loops: int
    elsewhere: int


class _Computation(NamedTuple):
    own: int  # convolutions that it does itself
    called: tuple[str, ...]  # computations, once for each call
    looped: tuple[str, ...]  # bodies of its loops


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Returns the computations of a module by name, and the name of the first to run."""
    found: dict[str, _Computation] = {}
    entry, name = "", ""
    own, called, looped = 0, [], []  # type: int, list[str], list[str]
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, own, called, looped = header[2], 0, [], []
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            found[name] = _Computation(own, tuple(called), tuple(looped))
            name = ""
        elif name:
            own += bool(_CONVOLUTION.search(line))
            callees = _CALLEES.findall(line)
            for branches in _BRANCHES.findall(line):
                callees += [branch.strip().lstrip("%") for branch in branches.split(",")]
            (looped if " while(" in line else called).extend(callees)
    return found, entry


def count_convolutions(compiled: jax.stages.Compiled | str) -> Convolutions:
    """Counts the convolutions of a program inside its loops and outside of them.

    Convolutions with a kernel of one pixel do not count: the networks here compute them as products of matrices.
    """
    computations, entry = _parse(compiled if isinstance(compiled, str) else compiled.as_text() or "")
    if not entry:
        raise ValueError("the text of the compiled program names no ENTRY computation; expected optimized HLO")
    totals: dict[tuple[str, bool], Convolutions] = {}

    def count(name: str, is_in_loop: bool) -> Convolutions:
        if (name, is_in_loop) not in totals:
            computation = computations[name]
            parts = [Convolutions(computation.own, 0) if is_in_loop else Convolutions(0, computation.own)]
            parts += [count(callee, is_in_loop) for callee in computation.called]
            parts += [count(body, True) for body in computation.looped]
            totals[name, is_in_loop] = Convolutions(sum(p.in_loops for p in parts), sum(p.elsewhere for p in parts))
        return totals[name, is_in_loop]

    return count(entry, False)
