"""The modes "import" and "export": checkpoints of score_sde and score_sde_pytorch to snapshots, and back."""

from __future__ import annotations

import functools
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
from workdir import compatibility, locks
from workdir import folder as workdirs
from workdir.checkpoints import CheckpointError, Checkpoints

NUM_NAMED = 3  # tensors named in a message


def _build_state(experiment: Experiment, trees: Mapping[str, Any], source: legacy.LegacyCheckpoint) -> TrainState:
    """Build the state from which training resumes as the original's would, numpy arrays on the host."""
    template = experiment.state_template()
    zeros = template.params
    step, count = np.asarray(source.step, np.int32), np.asarray(source.optimizer_step, np.int32)
    opt_state = []
    for part in template.opt_state:
        if isinstance(part, optax.ScaleByAdamState):
            part = optax.ScaleByAdamState(count=count, mu=trees.get("mu", zeros), nu=trees.get("nu", zeros))
        elif isinstance(part, optax.ScaleByScheduleState):
            part = optax.ScaleByScheduleState(count=step)  # of the warm-up
        opt_state.append(part)
    state = template.replace(  # type: ignore[attr-defined]
        step=step,
        params=trees["params"],
        params_ema=trees.get("params_ema", trees["params"]),
        opt_state=type(template.opt_state)(opt_state),
    )
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, template)
    return state


def _print_table(rows: Sequence[legacy.Row]) -> None:
    table = [legacy.Row("tensor of the file", "shape", "place here", "shape", ""), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row.note]).rstrip())


def _mismatch(rows: Sequence[legacy.Row]) -> str:
    """Describe what does not fit; empty if all does."""
    wrong: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            wrong.setdefault(row.note, []).append(row.source if row.destination == "-" else row.destination)
    parts = []
    for note, names in wrong.items():
        more = ", ..." if len(names) > NUM_NAMED else ""
        parts.append(f"{len(names)} {note} ({', '.join(names[:NUM_NAMED])}{more})")
    return ", ".join(parts)


def _warn_of_differences(config: ConfigDict, source: legacy.LegacyCheckpoint) -> None:
    """Warn of settings that differ from those of the original's training, as far as the file has them."""
    for key, value in (("optim.lr", source.lr), ("model.ema_rate", source.ema_rate)):
        group, name = key.split(".")
        if value is not None and not math.isclose(value, config[group][name], rel_tol=1e-6):
            logging.warning(
                "the original trained with %s=%.6g, this configuration has %s; training resumes with the latter: pass "
                "--config.%s=%.6g to resume as the original would",
                *(key, value, config[group][name], key, value),
            )
    try:
        check_first_step(source.step, config.training.n_jitted_steps)
    except UserError as error:
        logging.warning("to train further: %s", error)


def import_checkpoint(
    config: ConfigDict, checkpoint: str | Path, workdir: str | Path, *, dry_run: bool = False
) -> bool:
    """Import a checkpoint of another program as a snapshot of a workdir, for training and evaluation.

    Its number is the original's, step // training.snapshot_freq. Everything is checked before anything is written.

    Args:
      config: experiment configuration.
      checkpoint: file of score_sde (msgpack) or of score_sde_pytorch (.pth).
      workdir: folder of the run; created if missing.
      dry_run: print where each tensor would go, write nothing, and return whether the file fits.

    Raises:
      UserError: if a setting is wrong, or the file is damaged or does not fit.
      WorkdirError: if the workdir cannot be written or holds another experiment.
      CheckpointError: if the workdir has that snapshot already.
    """
    workdir, experiment = Path(workdir), build_experiment(config)
    network = experiment.model, experiment.image_shape
    leaves = legacy.match_parameters(*network)
    match_torch = functools.partial(legacy.match_torch_parameters, config.model.name, *network, leaves)
    source = legacy.read_checkpoint(checkpoint, match_torch)
    rows = source.compare(leaves)
    mismatch = _mismatch(rows)
    if dry_run:
        _print_table(rows)
    if mismatch:
        message = f"{checkpoint} does not fit this configuration: {mismatch}"
        if dry_run:
            print(message)
            return False
        raise UserError(
            f"{message}; --dry_run lists every tensor; check config.model and config.data against the checkpoint's"
        )
    state, number = _build_state(experiment, source.trees(leaves), source), source.step // config.training.snapshot_freq
    compatibility.check_same_experiment(workdir, config)
    taken = workdir / "checkpoints" / str(number)
    if taken.exists():
        raise CheckpointError(f"{taken} exists; nothing was overwritten: choose a new --workdir")
    _warn_of_differences(config, source)
    if dry_run:
        print(f"{checkpoint} fits: {len(rows)} tensors, step {source.step}, would become checkpoint {number}")
        return True
    workdirs.check_writable(workdir)
    with (
        locks.hold(workdir),  # opening the checkpoints removes unfinished ones, which may be those of a training run
        Checkpoints(workdir, snapshot_freq=config.training.snapshot_freq, template=state) as checkpoints,
    ):
        workdirs.record_config(workdir, config)
        checkpoints.save_snapshot(number, state)
        checkpoints.wait()
    logging.info("imported %s, step %d, as checkpoint %d of %s", checkpoint, source.step, number, workdir)
    return True


def export_checkpoint(config: ConfigDict, workdir: str | Path, checkpoint: str | Path) -> None:
    """Export snapshot eval.begin_ckpt of a workdir to a new file that the 2021 code restores, atomically.

    Raises:
      UserError: if a setting is wrong, or the file exists or cannot be written.
      WorkdirError: if the workdir holds another experiment.
      CheckpointError: if there is no such snapshot.
    """
    if Path(checkpoint).exists():
        raise UserError(f"{checkpoint} exists; nothing was overwritten: choose another --checkpoint")
    experiment = build_experiment(config)
    compatibility.check_same_experiment(workdir, config, "checkpoints")
    template = experiment.state_template()
    with Checkpoints(
        workdir, snapshot_freq=config.training.snapshot_freq, template=template, read_only=True
    ) as checkpoints:
        state = checkpoints.restore_snapshot(config.eval.begin_ckpt)
    [adam] = [part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState)]
    try:
        legacy.write_score_sde(
            checkpoint,
            legacy.match_parameters(experiment.model, experiment.image_shape),
            {"params": state.params, "params_ema": state.params_ema, "mu": adam.mu, "nu": adam.nu},
            step=int(state.step),
            optimizer_step=int(adam.count),
            lr=config.optim.lr,
            ema_rate=config.model.ema_rate,
        )
    except OSError as error:
        raise UserError(f"cannot write {checkpoint}: {error.strerror}; choose another --checkpoint") from error
    logging.info("exported checkpoint %d, step %d, to %s", config.eval.begin_ckpt, int(state.step), checkpoint)
