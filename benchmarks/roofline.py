"""Least time of a training step and of a forward pass on accelerators, by counting: one JSON line on stdout.

  python -m benchmarks.roofline --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 128
  python -m benchmarks.roofline --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8 \
      --batch_size 128 --dtype float32 --dtype bfloat16 --markdown

Nothing runs and nothing is compiled: JAX lowers both programs for CUDA and for TPUs on any machine, and their
convolutions and matrix products are counted (`benchmarks.contractions`). Each takes at least the time of its operations
at the peak rate, and of its operands and result at the memory's bandwidth; a program takes at least the sum over them.
A training step also reads and writes its state once.

Everything else counts as free, fused with these: normalization, activation, dropout, resampling, softmax, losses. Times
are lower bounds, not measurements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

import checks
from benchmarks import contractions, measure, train_step
from benchmarks.contractions import Contraction
from experiment.build import build_experiment
from models.precision import DTYPES


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Published figures of one chip."""

    name: str
    platform: str  # "cuda" or "tpu"
    # Operations a second by type of operand, as JAX multiplies by default: float32 on tensor cores as TF32, on TPUs as
    # bfloat16 ("Matmul precision", docs.jax.dev). No sparsity.
    peak: dict[str, float]
    bandwidth: float  # of its memory, bytes a second
    source: str


_A100 = "NVIDIA A100 Tensor Core GPU, datasheet (figures as quoted by others)"
_H100 = "NVIDIA H100 Tensor Core GPU, datasheet (figures as quoted by others)"
ACCELERATORS = (
    Accelerator("A100 SXM 40 GB", "cuda", {"f32": 156e12, "bf16": 312e12}, 1.555e12, _A100),
    Accelerator("A100 SXM 80 GB", "cuda", {"f32": 156e12, "bf16": 312e12}, 2.039e12, _A100),
    # The datasheet gives them with sparsity, which doubles them.
    Accelerator("H100 SXM", "cuda", {"f32": 989e12 / 2, "bf16": 1979e12 / 2}, 3.35e12, _H100),
    Accelerator("TPU v4", "tpu", {"f32": 275e12, "bf16": 275e12}, 1.2e12, "Google Cloud documentation, TPU v4"),
    Accelerator("TPU v5e", "tpu", {"f32": 197e12, "bf16": 197e12}, 0.819e12, "Google Cloud documentation, TPU v5e"),
)
PLATFORMS = ("cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Work:
    """Contractions of a program on one device, and the bytes of a state that it reads and writes once."""

    contractions: tuple[Contraction, ...]
    state_bytes: int = 0

    @property
    def flops(self) -> int:
        """Operations of all contractions."""
        return contractions.total_flops(self.contractions)

    @property
    def bytes(self) -> int:
        """Bytes that are moved at least."""
        return contractions.total_bytes(self.contractions) + 2 * self.state_bytes


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def least_time(work: Work, accelerator: Accelerator) -> dict[str, Any]:
    """Return the least seconds of a program, and whether computing or memory bounds them."""
    computing = [each.count * each.flops / accelerator.peak[each.element] for each in work.contractions]
    moving = [each.count * each.bytes / accelerator.bandwidth for each in work.contractions]
    state = 2 * work.state_bytes / accelerator.bandwidth
    return {
        "seconds": sum(map(max, computing, moving)) + state,
        "bound": "compute" if sum(computing) >= sum(moving) + state else "memory",
        "intensity_at_ridge": {name: peak / accelerator.bandwidth for name, peak in accelerator.peak.items()},
    }


def measure_program(program: jax.stages.Traced, state_bytes: int = 0) -> dict[str, Any]:
    """Return operations, bytes and least times of one program."""
    work = {each: Work(tuple(contractions.of_program(program, each)), state_bytes) for each in PLATFORMS}
    first = work[PLATFORMS[0]]
    if any(each.flops != first.flops for each in work.values()):
        raise RuntimeError(f"operations differ by platform: { {name: each.flops for name, each in work.items()} }")
    return {
        "flops": first.flops,
        "bytes": first.bytes,
        "flops_per_byte": first.flops / first.bytes,
        "convolutions": sum(each.count for each in first.contractions if each.kind == "convolution"),
        "dots": sum(each.count for each in first.contractions if each.kind == "dot"),
        "least": {each.name: least_time(work[each.platform], each) for each in ACCELERATORS},
    }


def measure_config(config: ConfigDict, *, batch_size: int, dtype: str) -> dict[str, Any]:
    """Count a training step and a forward pass."""
    checks.positive("--batch_size", batch_size)
    config.training.update(batch_size=batch_size, n_jitted_steps=1)
    config.model.dtype = dtype
    experiment = build_experiment(config)
    state = experiment.state_shapes
    return {
        "batch_size": batch_size,
        "dtype": dtype,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "programs": {
            "training step": measure_program(train_step.trace_program(experiment, "step"), _bytes(state)),
            "forward pass": measure_program(train_step.trace_program(experiment, "forward")),
        },
    }


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of the counts and least times."""
    names = [each.name for each in ACCELERATORS]
    yield "| program | dtype | batch | GFLOP | GB | FLOP/byte | " + " | ".join(names) + " |"
    yield "|---|---|---|---|---|---|" + "---|" * len(names)
    for row in rows:
        for program, counted in row["programs"].items():
            times = (f"{1e3 * each['seconds']:.2f} ms, {each['bound']}" for each in counted["least"].values())
            yield (
                f"| {program} | {row['dtype']} | {row['batch_size']} | {counted['flops'] / 1e9:,.0f} | "
                f"{counted['bytes'] / 1e9:.2f} | {counted['flops_per_byte']:.0f} | {' | '.join(times)} |"
            )


def main() -> dict[str, Any] | None:
    """Return the counts, or print the table."""
    config, rows = flags.FLAGS.config, []
    for batch_size in flags.FLAGS.batch_size:
        for dtype in flags.FLAGS.dtype or (config.model.dtype,):
            measure.progress(f"counting: batch of {batch_size}, {dtype}")
            rows.append(measure_config(config.copy_and_resolve_references(), batch_size=batch_size, dtype=dtype))
    if flags.FLAGS.markdown:
        print("\n".join(markdown(rows)))
        return None
    return {"rows": rows, "accelerators": [dataclasses.asdict(each) for each in ACCELERATORS]}


if __name__ == "__main__":
    measure.define_flags()
    flags.DEFINE_multi_integer("batch_size", [128], "Images of a step on one chip; can be given several times.")
    flags.DEFINE_multi_enum("dtype", None, tuple(DTYPES), "Of the features, several times; default: the experiment's.")
    flags.DEFINE_bool("markdown", False, "Print a table instead of JSON.")
    measure.main(main)
