"""Checkpoints by Orbax: written in the background, visible only when complete, verified when read.

`checkpoints/` keeps every snapshot, number k taken at step k * snapshot_freq, or before it at the last step of a run;
`checkpoints-meta/` keeps the two newest states to resume from. Checksums of the arrays reveal damaged files, which a
run moves to `checkpoints-damaged/`: their numbers are then free to be written again. Process 0 alone reads and writes;
no other process needs the folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from errors import UserError
from losses import TrainState
from parallel import distributed
from storage import files

NUM_RESUMABLE = 2  # a damaged newest state leaves the one before it
POLL_SECONDS = 1.0

# Errors of Orbax and TensorStore for files that are missing, cut short or changed.
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
DAMAGED = "checkpoints-damaged"  # folder beside those of the checkpoints
_UNFINISHED = "*.orbax-checkpoint-tmp*"  # folders that Orbax writes in, until it renames them
# In TensorStore's errors: the system's number, where there is one, and the kind of every error.
_OS_ERROR, _STATUS = re.compile(r"os_error_code='(\d+)'"), re.compile(r"[A-Z]{4}[A-Z_]*: ")


class CheckpointError(UserError):
    """A checkpoint is missing or damaged, or cannot be written."""


def _checksums(tree: Any) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf).data) for path, leaf in leaves}


def _short(error: BaseException) -> str:
    """Return the message of an error of TensorStore or Orbax, without the pages of settings and trees that follow."""
    return str(error).split(" [tensorstore_spec", 1)[0].partition("\n")[0]


@contextlib.contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turn an error of the system, now or before in the background, into a `CheckpointError`."""
    directory = Path(manager.directory)
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        found = _OS_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(found.group(1)) if found else None
        if number is None and not _STATUS.match(str(error)):
            raise
        for folder in directory.glob(_UNFINISHED):  # they may fill the very disk that is full
            shutil.rmtree(folder, ignore_errors=True)
        reason = f"{directory}: {_short(error)}"
        if number is not None:
            reason = files.explain(OSError(number, os.strerror(number), str(directory)))
        raise CheckpointError(f"a checkpoint could not be written in {reason}") from error


def _save(manager: ocp.CheckpointManager, number: int, state: TrainState) -> None:
    info = {"step": int(state.step), "checksums": _checksums(state)}
    arrays = ocp.args.StandardSave(state)
    with _writing(manager):
        manager.save(number, args=ocp.args.Composite(state=arrays, info=ocp.args.JsonSave(info)), force=True)


def _restore(manager: ocp.CheckpointManager, number: int, template: TrainState) -> TrainState:
    name = f"checkpoint {number} in {manager.directory}"
    args = ocp.args.Composite(state=ocp.args.StandardRestore(template), info=ocp.args.JsonRestore())
    try:
        restored = manager.restore(number, args=args)
        stored = dict(restored["info"]["checksums"])
    except _READ_ERRORS as error:
        raise CheckpointError(f"{name} cannot be read: {_short(error)}") from error
    found = _checksums(restored["state"])
    damaged = sorted(path for path in found if found[path] != stored.get(path))
    if damaged:
        raise CheckpointError(f"{name} is damaged: the checksum of {damaged[0]} differs ({len(damaged)} arrays)")
    return restored["state"]


def _step_of(manager: ocp.CheckpointManager, number: int) -> int:
    """Return the training step of a checkpoint; -1 if it cannot be read."""
    try:
        return int(manager.restore(number, args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]["step"])
    except _READ_ERRORS:
        return -1


class Checkpoints:
    """The checkpoints of one workdir; every process calls the same methods and gets the results of process 0.

    Args:
      workdir: of the run.
      snapshot_freq: steps between the kept snapshots.
      template: a state of the right structure; its values do not matter.
      read_only: for evaluation, which may run beside the training that writes.

    Attributes:
      restored_from: folder of the state that `restore_newest` returned last; None before.
    """

    def __init__(self, workdir: str | Path, *, snapshot_freq: int, template: TrainState, read_only: bool = False):
        self._root = Path(workdir).absolute()
        self.directory = self._root / "checkpoints"  # of the kept snapshots
        self.restored_from: Path | None = None
        self._snapshot_freq, self._read_only = snapshot_freq, read_only
        self._template = jax.tree.map(np.asarray, template)
        self._open()

    @distributed.on_main
    def _open(self) -> None:
        self._snapshots = self._manager(self.directory, None)
        self._resumable = self._manager(self._root / "checkpoints-meta", NUM_RESUMABLE)

    def __enter__(self) -> Checkpoints:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for pending writes and free the threads; a failure is raised unless another error is on its way."""
        if not distributed.is_main_process():  # not `on_main`: after an error the others may not arrive here
            return
        for manager in (self._snapshots, self._resumable):
            try:
                with _writing(manager):
                    manager.close()
            except Exception as failure:
                if error is None:
                    raise
                logging.warning("%s", _short(failure))

    def _manager(self, directory: Path, max_to_keep: int | None) -> ocp.CheckpointManager:
        if not self._read_only:
            directory.mkdir(parents=True, exist_ok=True)  # Orbax makes it for all processes or not at all
        # Not Orbax's own read_only, which adds only three warnings.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            create=False,
            cleanup_tmp_directories=not self._read_only,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix=directory.name
            ),
        )
        try:
            return ocp.CheckpointManager(directory, options=options)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{directory} cannot be opened: a _CHECKPOINT_METADATA in it is damaged ({error}); delete that file, "
                "which only holds the time when its checkpoint was written"
            ) from error

    @distributed.on_main
    def save(self, state: TrainState, *, is_last: bool = False) -> None:
        """Write a state, numpy arrays on the host, to the snapshots or as resumable.

        Snapshots are the steps that are multiples of `snapshot_freq`, and the last step of a run, under the number of
        the next multiple. A run that is continued replaces that one when it arrives there.
        """
        step = int(state.step)
        number, offset = divmod(step, self._snapshot_freq)
        if offset and not is_last:
            if step not in self._resumable.all_steps():
                _save(self._resumable, step, state)
            return
        number += offset > 0
        if number in self._snapshots.all_steps():
            stored = _step_of(self._snapshots, number)
            if stored == step or stored >= number * self._snapshot_freq:
                return
            self.wait()
            self._snapshots.delete(number)
        _save(self._snapshots, number, state)

    @distributed.on_main
    def save_snapshot(self, number: int, state: TrainState) -> None:
        """Write a state of another program as snapshot `number`, whatever its step; refuse to overwrite one."""
        if number in self._snapshots.all_steps():
            raise CheckpointError(f"checkpoint {number} is in {self.directory} already; it was not overwritten")
        _save(self._snapshots, number, state)

    @distributed.on_main
    def wait(self) -> None:
        """Return when everything saved so far is on disk; raise what failed in the background."""
        for manager in (self._snapshots, self._resumable):
            with _writing(manager):
                manager.wait_until_finished()

    @distributed.on_main
    def numbers(self) -> list[int]:
        """Return the numbers of the complete snapshots, ascending."""
        self._snapshots.reload()
        return sorted(self._snapshots.all_steps())

    def restore_newest(self) -> TrainState | None:
        """Restore the newest readable state of either folder; None if there is none at all.

        The log names damaged states, which a run that writes moves aside: it will reach their steps again.

        Raises:
          CheckpointError: if there are states, but every one is damaged.
        """
        state = distributed.once_tree(self._read_newest, self._template)
        folder = distributed.once(lambda: str(self.restored_from or ""))
        self.restored_from = Path(folder) if folder else None
        return state

    def _read_newest(self) -> TrainState | None:
        candidates = [(number * self._snapshot_freq, self._snapshots, number) for number in self._snapshots.all_steps()]
        if candidates:  # the newest may have been taken before its multiple, at the end of a run
            step, _, number = candidates.pop(max(range(len(candidates)), key=lambda i: candidates[i][0]))
            found = _step_of(self._snapshots, number)
            candidates.append((found if found >= 0 else step, self._snapshots, number))
        candidates += [(step, self._resumable, step) for step in self._resumable.all_steps()]
        damaged = []
        for _, manager, number in sorted(candidates, key=lambda candidate: candidate[0], reverse=True):
            try:
                state = _restore(manager, number, self._template)
            except CheckpointError as error:
                damaged.append((manager, number, str(error)))
                logging.warning("%s; using the one before it", error)
                continue
            logging.info("restored step %d from %s", int(state.step), manager.directory)
            self.restored_from = Path(manager.directory) / str(number)
            if not self._read_only:
                for of_damaged, damaged_number, _ in damaged:
                    self._set_aside(of_damaged, damaged_number)
            return state
        if damaged:
            reasons = "; ".join(reason for _, _, reason in damaged)
            raise CheckpointError(
                f"no checkpoint of this workdir can be read: {reasons}; nothing was changed: put a copy of one in its "
                "place, or choose a new --workdir to start again"
            )
        return None

    def _set_aside(self, manager: ocp.CheckpointManager, number: int) -> None:
        """Move a damaged checkpoint to the folder for these."""
        source, damaged = Path(manager.directory) / str(number), self._root / DAMAGED
        if source.exists():
            damaged.mkdir(exist_ok=True)
            name = f"{source.parent.name}-{number}"
            taken = len(list(damaged.glob(f"{name}*")))
            target = damaged / (f"{name}-{taken + 1}" if taken else name)
            source.rename(target)
            logging.warning("moved the damaged checkpoint %d to %s; the run writes it again", number, target)
        manager.reload()

    @distributed.on_main
    def resumable_steps(self) -> list[int]:
        """Return the steps of the complete states to resume from, ascending."""
        self._resumable.reload()
        return sorted(self._resumable.all_steps())

    @distributed.on_main
    def require(self, numbers: Iterable[int]) -> None:
        """Check that snapshots, or states to resume from by their steps, are there."""
        present = self.numbers() + self.resumable_steps()
        missing = [number for number in numbers if number not in present]
        if missing:
            raise CheckpointError(
                f"checkpoint {missing[0]} is not in {self.directory}; present: {self.present()}; set eval.begin_ckpt "
                "and eval.end_ckpt to these, or eval.wait_seconds to wait for a run that still trains"
            )

    def present(self) -> str:
        """Return the numbers of the snapshots, and the steps of other states, in words."""
        listed, steps = ", ".join(map(str, self.numbers())) or "none", ", ".join(map(str, self.resumable_steps()))
        return listed + (f"; states to resume from at the steps {steps}" if steps else "")

    def restore_snapshot(self, number: int, *, wait_seconds: float = 0.0) -> TrainState:
        """Restore one kept snapshot, waiting up to `wait_seconds` for it; or a state to resume from, by its step.

        Raises:
          CheckpointError: if it is missing after that time, or damaged.
        """

        def read() -> TrainState:
            deadline = time.monotonic() + wait_seconds
            while number not in (self.numbers() + self.resumable_steps()) and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(POLL_SECONDS, left))
            self.require([number])
            manager = self._snapshots if number in self.numbers() else self._resumable
            try:
                return _restore(manager, number, self._template)
            except CheckpointError as error:
                others = ", ".join(str(other) for other in self.numbers() if other != number) or "none"
                raise CheckpointError(
                    f"{error}; choose another one (there are: {others}) by eval.begin_ckpt and eval.end_ckpt, or "
                    "--snapshot"
                ) from error

        state = distributed.once_tree(read, self._template)
        assert state is not None
        return state
