"""What a program multiplies: its convolutions and matrix products, with their operations and bytes, from StableHLO.

JAX lowers a program for a platform whose hardware is not there (`of_program`); what comes out is what XLA is given,
before it optimizes. Everything else in our networks works on one element at a time or sums over some, and the compiler
of an accelerator fuses it with its neighbours; these operations are what is left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

ELEMENT_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Convolutions or matrix products of one place in a program.

    Attributes:
      kind: "convolution" or "dot".
      element: type of the first operand, as StableHLO writes it: "f32", "bf16".
      flops: twice the products of two numbers; those with zeros of padding or dilation do not count, as in XLA's own
        cost analysis.
      bytes: of the operands and of the result, each moved once.
      count: times that it is done.
    """

    kind: str
    element: str
    flops: int
    bytes: int
    count: int = 1


def of_program(program: jax.stages.Traced, platform: str) -> list[Contraction]:
    """Returns the contractions of a traced program.

    A loop counts as often as JAX's `scan` and `fori_loop` from 0 turn it; one whose end is not a constant counts once.
    Of the branches of a condition the one with the most operations counts.
    """
    module: ir.Module = program.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    functions = {_text(op.attributes["sym_name"]): op for op in _operations(module.operation)}
    return list(_of_regions(functions["main"], functions, 1))


def _text(attribute: Any) -> str:
    return str(ir.StringAttr(attribute).value)


def _operations(operation: Any) -> Iterator[Any]:
    """Yields the operations directly inside of one."""
    for region in operation.regions:
        yield from _of_region(region)


def _of_region(region: Any) -> Iterator[Any]:
    for block in region.blocks:
        for operation in block.operations:
            yield operation.operation


def _of_regions(operation: Any, functions: dict[str, Any], count: int) -> Iterator[Contraction]:
    for inner in _operations(operation):
        yield from _of_operation(inner, functions, count)


def _of_operation(operation: Any, functions: dict[str, Any], count: int) -> Iterator[Contraction]:
    match operation.name:
        case "stablehlo.convolution":
            yield _contraction("convolution", operation, _convolution_flops(operation), count)
        case "stablehlo.dot_general":
            yield _contraction("dot", operation, _dot_flops(operation), count)
        case "func.call":
            callee = ir.FlatSymbolRefAttr(operation.attributes["callee"]).value
            yield from _of_regions(functions[callee], functions, count)
        case "stablehlo.while":
            yield from _of_regions(operation, functions, count * _turns(operation))
        case "stablehlo.case" | "stablehlo.if":
            yield from max((_of_branch(region, functions, count) for region in operation.regions), key=total_flops)
        case _:
            yield from _of_regions(operation, functions, count)


def _of_branch(region: Any, functions: dict[str, Any], count: int) -> list[Contraction]:
    return [each for operation in _of_region(region) for each in _of_operation(operation, functions, count)]


def total_flops(contractions: Sequence[Contraction]) -> int:
    """Returns the operations of all of them."""
    return sum(each.count * each.flops for each in contractions)


def total_bytes(contractions: Sequence[Contraction]) -> int:
    """Returns the bytes of all of them."""
    return sum(each.count * each.bytes for each in contractions)


def _turns(loop: Any) -> int:
    """Returns the constant that the condition of a loop compares its counter with, or 1."""
    for operation in _of_region(loop.regions[0]):
        if operation.name == "stablehlo.compare":
            end = operation.operands[1].owner
            if isinstance(end, ir.Operation | ir.OpView) and end.operation.name == "stablehlo.constant":
                return int(ir.DenseIntElementsAttr(end.operation.attributes["value"])[0])
    return 1


def _shape(value: Any) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def _element(value: Any) -> str:
    return str(ir.RankedTensorType(value.type).element_type)


def _bytes(value: Any) -> int:
    return math.prod(_shape(value)) * ELEMENT_BYTES[_element(value)]


def _contraction(kind: str, operation: Any, flops: int, count: int) -> Contraction:
    values = [*operation.operands, *operation.results]
    return Contraction(kind, _element(values[0]), flops, sum(map(_bytes, values)), count)


def _dot_flops(operation: Any) -> int:
    dimensions = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
    left, result = _shape(operation.operands[0]), _shape(operation.results[0])
    return 2 * math.prod(result) * math.prod(left[axis] for axis in dimensions.lhs_contracting_dimensions)


def _integers(operation: Any, name: str, length: int) -> list[int]:
    """Returns the numbers of an attribute for each spatial axis, 1 if it is left out."""
    return list(operation.attributes[name]) if name in operation.attributes else [1] * length


def _convolution_flops(operation: Any) -> int:
    """Returns 2 × examples × input and output channels of a group × pairs of an output and a tap that meet a pixel."""
    attributes = operation.attributes
    dimensions = stablehlo.ConvDimensionNumbers(attributes["dimension_numbers"])
    inputs, kernel = (_shape(operand) for operand in operation.operands)
    result = _shape(operation.results[0])
    axes = len(dimensions.input_spatial_dimensions)
    strides, dilations, tap_dilations = (
        _integers(operation, name, axes) for name in ("window_strides", "lhs_dilation", "rhs_dilation")
    )
    zeros = ir.DenseIntElementsAttr(attributes["padding"]) if "padding" in attributes else [0] * 2 * axes
    pairs = 1
    for axis in range(axes):
        pairs *= _pairs_that_meet(
            outputs=result[dimensions.output_spatial_dimensions[axis]],
            taps=kernel[dimensions.kernel_spatial_dimensions[axis]],
            inputs=inputs[dimensions.input_spatial_dimensions[axis]],
            before=zeros[2 * axis],
            stride=strides[axis],
            dilation=dilations[axis],
            tap_dilation=tap_dilations[axis],
        )
    examples = inputs[dimensions.input_batch_dimension] // ir.IntegerAttr(attributes["batch_group_count"]).value
    channels = kernel[dimensions.kernel_input_feature_dimension] * kernel[dimensions.kernel_output_feature_dimension]
    return int(2 * examples * channels * pairs)


def _pairs_that_meet(
    *, outputs: int, taps: int, inputs: int, before: int, stride: int, dilation: int, tap_dilation: int
) -> int:
    """Returns how many pairs of an output and a tap of one axis meet an input, not a zero of padding or dilation."""
    last = (inputs - 1) * dilation
    places = (p * stride + tap * tap_dilation - before for p in range(outputs) for tap in range(taps))
    return sum(0 <= place <= last and place % dilation == 0 for place in places)
