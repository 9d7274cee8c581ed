"""Samples of a checkpoint, drawn in rounds on disk that a killed run resumes from."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

import checks
from experiment.build import Experiment, SamplingProgram
from losses import TrainState
from parallel import distributed
from report import plots
from workdir import results
from workdir.checkpoints import CheckpointError, Checkpoints
from workdir.progress import track

NUM_SHOWN = 100  # samples in a picture


def depends_on_batch(experiment: Experiment) -> bool:
    """Whether a sample depends on the others of its batch: the paper's Langevin corrector averages over them."""
    sampling = experiment.config.sampling
    return (sampling.method, sampling.corrector, sampling.langevin_norm) == ("pc", "langevin", "batch")


def kinds_of_samples(experiment: Experiment) -> tuple[str, ...]:
    """Return the kinds of `settings.affecting` that samples are of."""
    return ("samples", "batches") if depends_on_batch(experiment) else ("samples",)


def warn_of_batch(experiment: Experiment, sampler: str = "the sampler") -> None:
    """Log a warning if samples depend on the batch."""
    if depends_on_batch(experiment):
        logging.warning(
            "%s: a sample depends on the others of its batch, since sampling.langevin_norm='batch'; with "
            "sampling.langevin_norm='sample' it follows from the seed and its number alone",
            sampler,
        )


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint to draw from: its number, training step, and averaged parameters (numpy arrays on the host)."""

    number: int
    step: int
    params: Any


def restore(experiment: Experiment, workdir: Path, number: int = 0) -> Snapshot:
    """Restore snapshot `number` of a workdir, or the state to resume from at the step `number`.

    0 stands for the newest snapshot, or for the newest other state where there is none.

    Raises:
      UserError: if the number is negative.
      CheckpointError: if there is no such snapshot, or it is damaged.
    """
    checks.not_negative("--snapshot", number)
    template = experiment.state_template()
    with Checkpoints(
        workdir, snapshot_freq=experiment.config.training.snapshot_freq, template=template, read_only=True
    ) as checkpoints:
        snapshots, steps = checkpoints.numbers(), checkpoints.resumable_steps()
        if not snapshots + steps:
            raise CheckpointError(f"{checkpoints.directory} holds no checkpoint; train until one is written")
        if number not in (0, *snapshots, *steps):
            raise CheckpointError(
                f"checkpoint {number} is not in {checkpoints.directory}; present: {checkpoints.present()}; set "
                "--snapshot to one of these, or to 0 for the newest"
            )
        number = number or (snapshots or steps)[-1]
        state: TrainState = checkpoints.restore_snapshot(number)
    logging.info("restored checkpoint %d (step %d) from %s", number, int(state.step), workdir)
    return Snapshot(number, int(state.step), state.params_ema)


def evenly_chosen(num_images: int, num_shown: int) -> Int[np.ndarray, "n"]:
    """Return indices of images at even distances, since the first ones may all be of one class."""
    shown = min(num_shown, num_images)
    return np.arange(shown) * num_images // shown


def rows_of_labels(num_images: int, num_labels: int, limit: int) -> Int[np.ndarray, "R C"]:
    """Return the numbers of the samples, at most `limit`, in a picture with a row for each label.

    Sample i has label number i mod num_labels. Only whole columns, so that every label is shown as often, unless there
    are fewer samples than labels.
    """
    num_shown = min(num_images, limit)
    rows, columns = min(num_labels, num_shown), max(1, num_shown // num_labels)
    return np.arange(rows)[:, None] + num_labels * np.arange(columns)[None, :]


def picture(
    levels: UInt8[np.ndarray, "N H W C"], labels: Sequence[int], num_levels: int, *, limit: int = NUM_SHOWN
) -> UInt8[np.ndarray, "h w 3"]:
    """Lay out samples 0 .. N - 1, at most `limit`, with a row for each label if they have labels in turn."""
    if not labels:
        return plots.grid_of_levels(levels[:limit], num_levels)
    rows = rows_of_labels(len(levels), len(labels), limit)
    return plots.grid_of_levels(levels[rows.ravel()], num_levels, num_columns=rows.shape[1])


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples and what they cost.

    Attributes:
      levels: uint8[N, H, W, C].
      nfe: network evaluations of a sample, the largest number of any round and device.
      seconds: of drawing all rounds, without compiling.
      compile_seconds: of compiling the sampler.
    """

    levels: UInt8[np.ndarray, "N H W C"]
    nfe: int
    seconds: float
    compile_seconds: float

    @property
    def per_second(self) -> float:
        """Samples per second."""
        return len(self.levels) / self.seconds

    def to_arrays(self) -> dict[str, Any]:
        """Return the arrays of an .npz file."""
        costs = {"nfe": self.nfe, "seconds": self.seconds, "compile_seconds": self.compile_seconds}
        return {"samples": self.levels, **costs}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Samples:
        """Build them from what `to_arrays` returned."""
        costs = int(arrays["nfe"]), float(arrays["seconds"]), float(arrays["compile_seconds"])
        return cls(arrays["samples"], *costs)


def batch_size(experiment: Experiment, num_images: int) -> int:
    """Return the samples of a round: eval.batch_size or all that are wanted, rounded up to what the devices divide."""
    return distributed.round_up(min(experiment.config.eval.batch_size, num_images))


def draw_samples(program: SamplingProgram, params: Any, folder: Path, num_images: int) -> Samples:
    """Draw samples 0 .. num_images - 1 in rounds, reusing those that are in the folder.

    A round's file is named after its first sample and used if it holds as many as wanted from there: any batch size and
    number of devices resumes from the rounds of any other.

    Args:
      program: the sampler.
      params: of the network, replicated.
      folder: of the rounds.
      num_images: N.
    """
    rounds = []
    for first in track(range(0, num_images, program.batch_size), "samples"):
        path, wanted = folder / f"samples_from_{first}.npz", min(program.batch_size, num_images - first)
        arrays = results.read(path)
        if arrays is None or len(arrays["samples"]) < wanted:
            program.compile(params)
            start = time.monotonic()
            levels, nfe = program(params, np.arange(first, first + program.batch_size))
            drawn = Samples(levels, nfe, time.monotonic() - start, program.compile_seconds)
            arrays = results.write(path, drawn.to_arrays())
        rounds.append(Samples.from_arrays(arrays | {"samples": arrays["samples"][:wanted]}))
    return Samples(
        levels=np.concatenate([each.levels for each in rounds]),
        nfe=max(each.nfe for each in rounds),
        seconds=sum(each.seconds for each in rounds),
        compile_seconds=max(each.compile_seconds for each in rounds),
    )
