"""Least time of a training step and of a forward pass on accelerators, by counting: one JSON line on stdout.

  python -m benchmarks.roofline --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 128
  python -m benchmarks.roofline --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8 \
      --batch_size 128 --dtype float32 --dtype bfloat16 --markdown

Nothing is run and nothing compiled: JAX lowers both programs for CUDA and for TPUs on any machine, and the convolutions
and matrix products of what it hands to XLA are counted (`benchmarks.contractions`). Each takes at least as long as its
operations at the peak rate, and as its operands and result at the bandwidth of the memory; a program at least the sum
over them, one after the other. A training step also reads and writes its state once.

All else is taken to be free, fused with these: normalization, activation, dropout, resampling, softmax, losses. A
measured time is longer; how much longer says how far it is from what the machine could do. Nothing here was measured.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import checks
from benchmarks import contractions, measure, train_step
from benchmarks.contractions import Contraction
from experiment.build import build_experiment
from models.precision import DTYPES

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What a maker says of one chip.

    Attributes:
      name: of the chip.
      platform: that programs are lowered for, "cuda" or "tpu".
      peak: operations a second, by the type of the operands, as JAX multiplies them by default: float32 on tensor cores
        as TF32, on TPUs as bfloat16 ("Matmul precision", docs.jax.dev). No sparsity.
      bandwidth: of its memory, bytes a second.
      source: where the figures stand.
    """

    name: str
    platform: str
    peak: dict[str, float]
    bandwidth: float
    source: str


_A100 = "NVIDIA A100 Tensor Core GPU, datasheet (figures as quoted by others)"
ACCELERATORS = (
    Accelerator("A100 SXM 40 GB", "cuda", {"f32": 156e12, "bf16": 312e12}, 1.555e12, _A100),
    Accelerator("A100 SXM 80 GB", "cuda", {"f32": 156e12, "bf16": 312e12}, 2.039e12, _A100),
    Accelerator(
        "H100 SXM",
        "cuda",
        {"f32": 989e12 / 2, "bf16": 1979e12 / 2},  # the datasheet gives them with sparsity, which doubles them
        3.35e12,
        "NVIDIA H100 Tensor Core GPU, datasheet (figures as quoted by others)",
    ),
    Accelerator("TPU v4", "tpu", {"f32": 275e12, "bf16": 275e12}, 1.2e12, "Google Cloud documentation, TPU v4"),
    Accelerator("TPU v5e", "tpu", {"f32": 197e12, "bf16": 197e12}, 0.819e12, "Google Cloud documentation, TPU v5e"),
)
PLATFORMS = ("cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program has to do on one device.

    Attributes:
      contractions: its convolutions and matrix products.
      state_bytes: of what is read and written once besides.
    """

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
    """Returns the least seconds of a program, and whether operations or bytes are what takes it longer."""
    computing = [each.count * each.flops / accelerator.peak[each.element] for each in work.contractions]
    moving = [each.count * each.bytes / accelerator.bandwidth for each in work.contractions]
    state = 2 * work.state_bytes / accelerator.bandwidth
    return {
        "seconds": sum(map(max, computing, moving)) + state,
        "bound": "compute" if sum(computing) >= sum(moving) + state else "memory",
        "intensity_at_ridge": {name: peak / accelerator.bandwidth for name, peak in accelerator.peak.items()},
    }


def measure_program(program: jax.stages.Traced, state_bytes: int = 0) -> dict[str, Any]:
    """Returns operations, bytes and least times of one program."""
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
    """Counts a training step and a forward pass."""
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
    """Yields the lines of a table of the counts and least times."""
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


def main(argv: Sequence[str]) -> None:
    """Prints the JSON line or the table."""
    logging.set_verbosity(logging.WARNING)
    rows = []
    for batch_size in FLAGS.batch_size:
        for dtype in FLAGS.dtype or (FLAGS.config.model.dtype,):
            measure.progress(f"counting: batch of {batch_size}, {dtype}")
            rows.append(measure_config(FLAGS.config.copy_and_resolve_references(), batch_size=batch_size, dtype=dtype))
    if FLAGS.markdown:
        print("\n".join(markdown(rows)))
    else:
        measure.report({"rows": rows, "accelerators": [dataclasses.asdict(each) for each in ACCELERATORS]})


def define_flags() -> None:
    """Defines the flags."""
    config_flags.DEFINE_config_file("config", None, "Experiment; its data are not read.")
    flags.DEFINE_multi_integer("batch_size", [128], "Images of a step on one chip; may be given several times.")
    flags.DEFINE_multi_enum(
        "dtype", None, tuple(DTYPES), "Of the features, several times; by default the experiment's."
    )
    flags.DEFINE_bool("markdown", False, "Print a table instead of JSON.")
    flags.mark_flag_as_required("config")


if __name__ == "__main__":
    define_flags()
    app.run(main)
