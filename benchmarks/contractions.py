"""Convolutions and matrix products of a program, with their operations and bytes, counted in its StableHLO.

JAX lowers a program for a platform whose hardware is absent; the result is what XLA receives, before it optimizes.
Everything else in our networks is elementwise or a reduction, which the compiler of an accelerator fuses with its
neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

ELEMENT_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Convolutions or matrix products of one place in a program."""

    kind: str  # "convolution" or "dot"
    element: str  # type of the first operand in StableHLO: "f32", "bf16"
    flops: int  # twice the products of two numbers, without those with zeros of padding or dilation, as XLA counts
    bytes: int  # of the operands and of the result, each moved once
    count: int = 1  # times that it runs


def of_program(program: jax.stages.Traced, platform: str) -> list[Contraction]:
    """Return the contractions of a traced program.

    A loop counts as often as JAX's `scan` and `fori_loop` from 0 run it; one without a constant end counts once. Of the
    branches of a condition the one with the most operations counts.
    """
    module: ir.Module = program.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    functions = {ir.StringAttr(op.attributes["sym_name"]).value: op for op in _inside(module.operation.regions)}

    def walk(operations: Iterable[Any], count: int) -> Iterator[Contraction]:
        for operation in operations:
            match operation.name:
                case "stablehlo.convolution":
                    yield _contraction("convolution", operation, _convolution_flops(operation), count)
                case "stablehlo.dot_general":
                    yield _contraction("dot", operation, _dot_flops(operation), count)
                case "func.call":
                    callee = ir.FlatSymbolRefAttr(operation.attributes["callee"]).value
                    yield from walk(_inside(functions[callee].regions), count)
                case "stablehlo.while":
                    yield from walk(_inside(operation.regions), count * _turns(operation))
                case "stablehlo.case" | "stablehlo.if":
                    branches = [list(walk(_inside([region]), count)) for region in operation.regions]
                    yield from max(branches, key=total_flops)
                case _:
                    yield from walk(_inside(operation.regions), count)

    return list(walk(_inside(functions["main"].regions), 1))


def total_flops(contractions: Sequence[Contraction]) -> int:
    """Return the operations of all of them."""
    return sum(each.count * each.flops for each in contractions)


def total_bytes(contractions: Sequence[Contraction]) -> int:
    """Return the bytes of all of them."""
    return sum(each.count * each.bytes for each in contractions)


def _inside(regions: Iterable[Any]) -> Iterator[Any]:
    """Yield the operations directly inside regions."""
    for region in regions:
        for block in region.blocks:
            for operation in block.operations:
                yield operation.operation


def _turns(loop: Any) -> int:
    """Return the constant that the condition of a loop compares its counter with, or 1."""
    for operation in _inside([loop.regions[0]]):
        if operation.name == "stablehlo.compare":
            end = operation.operands[1].owner
            if isinstance(end, ir.Operation | ir.OpView) and end.operation.name == "stablehlo.constant":
                return int(ir.DenseIntElementsAttr(end.operation.attributes["value"])[0])
    return 1


def _shape(value: Any) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def _element(value: Any) -> str:
    return str(ir.RankedTensorType(value.type).element_type)


def _contraction(kind: str, operation: Any, flops: int, count: int) -> Contraction:
    values = [*operation.operands, *operation.results]
    moved = sum(math.prod(_shape(value)) * ELEMENT_BYTES[_element(value)] for value in values)
    return Contraction(kind, _element(values[0]), flops, moved, count)


def _dot_flops(operation: Any) -> int:
    dimensions = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
    left, result = _shape(operation.operands[0]), _shape(operation.results[0])
    return 2 * math.prod(result) * math.prod(left[axis] for axis in dimensions.lhs_contracting_dimensions)


def _convolution_flops(operation: Any) -> int:
    """Return 2 × examples × input and output channels of a group × pairs of an output and a tap that meet a pixel."""
    attributes = operation.attributes
    dimensions = stablehlo.ConvDimensionNumbers(attributes["dimension_numbers"])
    inputs, kernel = (_shape(operand) for operand in operation.operands)
    result, pairs = _shape(operation.results[0]), 1
    axes = len(dimensions.input_spatial_dimensions)
    zeros = ir.DenseIntElementsAttr(attributes["padding"]) if "padding" in attributes else [0] * 2 * axes
    stride, dilation, tap_dilation = (
        list(attributes[name]) if name in attributes else [1] * axes
        for name in ("window_strides", "lhs_dilation", "rhs_dilation")
    )
    for axis in range(axes):
        outputs = result[dimensions.output_spatial_dimensions[axis]]
        taps = kernel[dimensions.kernel_spatial_dimensions[axis]]
        last = (inputs[dimensions.input_spatial_dimensions[axis]] - 1) * dilation[axis]
        places = [
            output * stride[axis] + tap * tap_dilation[axis] - zeros[2 * axis]
            for output in range(outputs)
            for tap in range(taps)
        ]
        # Others meet a zero of padding or dilation.
        pairs *= sum(0 <= place <= last and place % dilation[axis] == 0 for place in places)
    examples = inputs[dimensions.input_batch_dimension] // ir.IntegerAttr(attributes["batch_group_count"]).value
    channels = kernel[dimensions.kernel_input_feature_dimension] * kernel[dimensions.kernel_output_feature_dimension]
    return int(2 * examples * channels * pairs)
