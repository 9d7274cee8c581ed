"""Programs with many outputs that are computed alike: each computation is compiled once, and looped over its outputs.

A network's kernels are all drawn in a few ways, of a few shapes: of two of them only the number differs that Flax folds
into the key, which stands for the name of the parameter. XLA would compile each draw for itself, 0.04 s for each array
on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.interpreters import partial_eval
from jaxtyping import Array

REMAT_SETTING = "prevent_cse"  # what jax.checkpoint has and no other primitive; its name changes with JAX's version
FOLD_IN = "random_fold_in"  # the primitive whose constant operand may differ between outputs that are alike


@dataclasses.dataclass(frozen=True)
class _Computation:
    """How one output is computed.

    Attributes:
      text: that two outputs share if they differ in the numbers that are folded into keys alone.
      folded: these numbers, in the order of the equations.
      equations: that lead to the output, in order.
    """

    text: str
    folded: tuple[int, ...]
    equations: tuple[JaxprEqn, ...]


def _is_folded(equation: JaxprEqn, position: int) -> bool:
    """Says whether an operand is a constant that is folded into a key."""
    is_constant = isinstance(equation.invars[position], Literal)
    return equation.primitive.name == FOLD_IN and position == 1 and is_constant


def _equations_of(output: Var, sources: dict[Var, int], equations: Sequence[JaxprEqn]) -> tuple[JaxprEqn, ...]:
    """Returns the equations that lead to an output; `sources` has the index of the one that computes a variable."""
    found: set[int] = set()
    wanted = [output]
    while wanted:
        index = sources.get(wanted.pop())
        if index is not None and index not in found:
            found.add(index)
            wanted.extend(operand for operand in equations[index].invars if isinstance(operand, Var))
    return tuple(equations[index] for index in sorted(found))


def _describe(output: Var, equations: tuple[JaxprEqn, ...], texts: dict[int, str]) -> _Computation:
    """Says how an output is computed, whatever the names of the variables.

    Args:
      output: the variable.
      equations: that lead to it.
      texts: what was found out about the parameters of equations, by identity; added to.
    """
    names: dict[Var, str] = {}
    folded: list[int] = []
    lines = []
    for number, equation in enumerate(equations):
        operands = []
        for position, operand in enumerate(equation.invars):
            if isinstance(operand, Var):
                # What no equation of these computes is an input, the same in all outputs.
                operands.append(names.get(operand, f"input {id(operand)}"))
            elif _is_folded(equation, position):
                folded.append(int(operand.val))
                operands.append("folded")
            else:
                operands.append(f"{operand.val!r}:{operand.aval}")
        names |= {result: f"{number}.{i}" for i, result in enumerate(equation.outvars)}
        lines.append(f"{equation.primitive.name} {_settings(equation, texts)} {operands}")
    return _Computation("\n".join([*lines, names.get(output, f"input {id(output)}")]), tuple(folded), equations)


def _settings(equation: JaxprEqn, texts: dict[int, str]) -> str:
    """Returns the parameters of an equation as text; the inner functions, which many share, are printed once."""
    parts = []
    for name, value in sorted(equation.params.items()):
        inner = getattr(value, "jaxpr", None)
        if inner is None:
            parts.append(f"{name}={value}")
        else:
            parts.append(f"{name}={texts.setdefault(id(inner), str(value))}")
    return " ".join(parts)


def _apply(equation: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """Applies the primitive of an equation to operands; returns its results."""
    bound: Any = equation.primitive.get_bind_params(equation.params)
    functions, settings = bound if isinstance(bound, tuple) else ((), bound)  # JAX 0.10 has functions beside them
    results = equation.primitive.bind(*functions, *operands, **settings)
    return results if equation.primitive.multiple_results else [results]


def _inline(jaxpr: Jaxpr, *inputs: Any) -> list[Any]:
    """Computes a program, in whose blocks nothing is to be computed again: their equations take their place."""
    values: dict[Var, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))
    read = lambda operand: values[operand] if isinstance(operand, Var) else operand.val  # noqa: E731
    for equation in jaxpr.eqns:
        operands = [read(operand) for operand in equation.invars]
        is_block = REMAT_SETTING in equation.params
        results = _inline(equation.params["jaxpr"], *operands) if is_block else _apply(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(output) for output in jaxpr.outvars]


def _compute(computation: _Computation, output: Var, inputs: dict[Var, Any], folded: Sequence[Any] | Array) -> Any:
    """Computes an output, with these numbers in the place of its own."""
    values, numbers = dict(inputs), iter(folded)
    for equation in computation.equations:
        operands = [
            next(numbers) if _is_folded(equation, i) else values[v] if isinstance(v, Var) else v.val
            for i, v in enumerate(equation.invars)
        ]
        values.update(zip(equation.outvars, _apply(equation, operands), strict=True))
    return values[output]


def _compute_all(jaxpr: Jaxpr, inputs: dict[Var, Any]) -> list[Any]:
    """Computes all outputs of a program, those that are alike in one loop."""
    sources = {result: i for i, equation in enumerate(jaxpr.eqns) for result in equation.outvars}
    texts: dict[int, str] = {}
    computations = {
        output: _describe(output, _equations_of(output, sources, jaxpr.eqns), texts)
        for output in jaxpr.outvars
        if isinstance(output, Var)
    }
    groups: dict[str, dict[tuple[int, ...], list[Var]]] = {}
    for output, computation in computations.items():
        groups.setdefault(computation.text, {}).setdefault(computation.folded, []).append(output)
    values: dict[Var, Any] = {}
    for members in groups.values():
        first = next(iter(members.values()))[0]
        draw = functools.partial(_compute, computations[first], first, inputs)
        rows = jnp.array(list(members), jnp.uint32)
        results = jax.lax.map(draw, rows) if len(members) > 1 else [draw(rows[0])]
        for result, outputs in zip(results, members.values(), strict=True):
            values.update(dict.fromkeys(outputs, result))
    return [values[output] if isinstance(output, Var) else output.val for output in jaxpr.outvars]


def loop_over_alike(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that computes what `fn` does, to be jitted: outputs that are computed alike share their code.

    What leads to no output is left out. Any program is computed rightly; it is compiled faster if each of its outputs
    takes few operations, such as the draws of parameters.

    Args:
      fn: function of arrays that returns arrays.
    """

    def computed(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[:2]
        given = [value for value, is_used in zip(jax.tree.leaves(args), used, strict=True) if is_used]
        values = [*closed.consts, *given]
        flat = jax.make_jaxpr(functools.partial(_inline, jaxpr))(*values)
        inputs = dict(zip([*flat.jaxpr.constvars, *flat.jaxpr.invars], [*flat.consts, *values], strict=True))
        return jax.tree.unflatten(jax.tree.structure(shapes), _compute_all(flat.jaxpr, inputs))

    return computed
