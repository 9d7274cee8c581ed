"""Checkpoints of score_sde and score_sde_pytorch into a workdir, and out of it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

import legacy
from errors import UserError
from experiment.build import Experiment, build_experiment
from losses import TrainState
from training.loop import check_first_step
from workdir import folder as workdirs
from workdir import locks
from workdir.checkpoints import CheckpointError, Checkpoints

NUM_NAMED = 3  # tensors that a sentence names


def _replace_states(opt_state: Any, adam: optax.ScaleByAdamState, count: Any) -> Any:
    """Puts Adam's moments, and the count that the warm-up goes by, in their places of the optimizer's state."""
    replaced = []
    for part in opt_state:
        if isinstance(part, optax.ScaleByAdamState):
            part = adam
        elif isinstance(part, optax.ScaleByScheduleState):
            part = optax.ScaleByScheduleState(count=count)
        replaced.append(part)
    return type(opt_state)(replaced)


def _build_state(experiment: Experiment, trees: Mapping[str, Any], source: legacy.LegacyCheckpoint) -> TrainState:
    """Builds the state from which training goes on as the original's would, numpy arrays on the host."""
    template = experiment.state_template()
    zeros = template.params
    step, count = np.asarray(source.step, np.int32), np.asarray(source.optimizer_step, np.int32)
    adam = optax.ScaleByAdamState(count=count, mu=trees.get("mu", zeros), nu=trees.get("nu", zeros))
    state = template.replace(  # type: ignore[attr-defined]
        step=step,
        params=trees["params"],
        params_ema=trees.get("params_ema", trees["params"]),
        opt_state=_replace_states(template.opt_state, adam, step),
    )
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, template)
    return state


# --- what fits -------------------------------------------------------------------------------------------------------


def print_table(rows: Sequence[legacy.Row]) -> None:
    """Prints every tensor of the file, its place here, both shapes, and what is wrong."""
    table = [legacy.Row("tensor of the file", "shape", "place here", "shape", ""), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row.note]).rstrip())


def _mismatch(rows: Sequence[legacy.Row]) -> str:
    """Says in a few words what does not fit; nothing if all does."""
    wrong: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            wrong.setdefault(row.note, []).append(row.source if row.destination == "-" else row.destination)
    parts = []
    for note, names in wrong.items():
        more = ", ..." if len(names) > NUM_NAMED else ""
        parts.append(f"{len(names)} {note} ({', '.join(names[:NUM_NAMED])}{more})")
    return ", ".join(parts)


def _check_place(config: ConfigDict, workdir: Path, number: int) -> None:
    """Checks that a workdir may take snapshot `number` of this experiment.

    Raises:
      WorkdirError: if it holds another experiment.
      CheckpointError: if it has that snapshot.
    """
    workdirs.check_same_experiment(workdir, config)
    taken = workdir / "checkpoints" / str(number)
    if taken.exists():
        raise CheckpointError(f"{taken} exists; nothing was overwritten: choose a new --workdir")


def _warn_of_differences(config: ConfigDict, source: legacy.LegacyCheckpoint) -> None:
    """Tells which settings of the original's training, as far as the file has them, are not those given."""
    for key, value in (("optim.lr", source.lr), ("model.ema_rate", source.ema_rate)):
        group, name = key.split(".")
        if value is not None and not math.isclose(value, config[group][name], rel_tol=1e-6):
            logging.warning(
                "the original trained with %s=%.6g, this configuration has %s; training goes on with the latter: pass "
                "--config.%s=%.6g to go on as the original would",
                *(key, value, config[group][name], key, value),
            )
    try:
        check_first_step(config, source.step)
    except UserError as error:
        logging.warning("to train further: %s", error)


# --- in and out ------------------------------------------------------------------------------------------------------


def import_checkpoint(
    config: ConfigDict, checkpoint: str | Path, workdir: str | Path, *, dry_run: bool = False
) -> bool:
    """Makes a checkpoint of another program a snapshot of a workdir, from which training and evaluation go on.

    Its number is the original's, step // training.snapshot_freq. Everything is checked before anything is written.

    Args:
      config: experiment configuration.
      checkpoint: file of score_sde (msgpack) or of score_sde_pytorch (.pth).
      workdir: folder of the run; made if need be.
      dry_run: print where each tensor would go and write nothing.

    Returns:
      Whether the file fits, which is false only in a dry run.

    Raises:
      UserError: if a setting is wrong, or the file is damaged or does not fit.
      WorkdirError: if the workdir cannot be written or holds another experiment.
      CheckpointError: if the workdir has that snapshot already.
    """
    workdir, experiment = Path(workdir), build_experiment(config)
    leaves = legacy.match_parameters(config)
    source = legacy.read_checkpoint(checkpoint, config, leaves)
    rows = source.compare(leaves)
    mismatch = _mismatch(rows)
    if dry_run:
        print_table(rows)
    if mismatch and dry_run:
        print(f"{checkpoint} does not fit this configuration: {mismatch}")
        return False
    if mismatch:
        raise UserError(
            f"{checkpoint} does not fit this configuration: {mismatch}; --dry_run lists every tensor; check "
            "config.model and config.data against the checkpoint's"
        )
    state, number = _build_state(experiment, source.trees(leaves), source), source.step // config.training.snapshot_freq
    _check_place(config, workdir, number)
    _warn_of_differences(config, source)
    if dry_run:
        print(f"{checkpoint} fits: {len(rows)} tensors, step {source.step}, would become checkpoint {number}")
        return True
    _write(config, workdir, number, state)
    logging.info("imported %s, step %d, as checkpoint %d of %s", checkpoint, source.step, number, workdir)
    return True


def _write(config: ConfigDict, workdir: Path, number: int, state: TrainState) -> None:
    workdirs.check_writable(workdir)
    with (
        locks.hold(workdir),  # opening the checkpoints removes unfinished ones, which may be those of a training run
        Checkpoints(workdir, snapshot_freq=config.training.snapshot_freq, template=state) as checkpoints,
    ):
        workdirs.record_config(workdir, config)
        checkpoints.save_snapshot(number, state)
        checkpoints.wait()


def export_checkpoint(config: ConfigDict, workdir: str | Path, checkpoint: str | Path) -> None:
    """Writes snapshot eval.begin_ckpt of a workdir as a file that the 2021 code restores.

    Args:
      config: experiment configuration.
      workdir: folder of a training run.
      checkpoint: file to write, atomically.

    Raises:
      UserError: if a setting is wrong, or the file exists or cannot be written.
      WorkdirError: if the workdir holds another experiment.
      CheckpointError: if there is no such snapshot.
    """
    if Path(checkpoint).exists():
        raise UserError(f"{checkpoint} exists; nothing was overwritten: choose another --checkpoint")
    experiment = build_experiment(config)
    workdirs.check_same_experiment(workdir, config, "checkpoints")
    template = experiment.state_template()
    with Checkpoints(
        workdir, snapshot_freq=config.training.snapshot_freq, template=template, read_only=True
    ) as checkpoints:
        state = checkpoints.restore_snapshot(config.eval.begin_ckpt)
    [adam] = [part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState)]
    try:
        legacy.write_score_sde(
            checkpoint,
            legacy.match_parameters(config),
            {"params": state.params, "params_ema": state.params_ema, "mu": adam.mu, "nu": adam.nu},
            step=int(state.step),
            optimizer_step=int(adam.count),
            lr=config.optim.lr,
            ema_rate=config.model.ema_rate,
        )
    except OSError as error:
        raise UserError(f"cannot write {checkpoint}: {error.strerror}; choose another --checkpoint") from error
    logging.info("exported checkpoint %d, step %d, to %s", config.eval.begin_ckpt, int(state.step), checkpoint)
