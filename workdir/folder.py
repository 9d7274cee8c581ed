"""The folder of a run: that it can be written, and that it belongs to this experiment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from errors import UserError
from parallel import distributed
from storage import guards
from storage.files import write_json

CONFIG_FILE = "config.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "diffrax", "numpy", "scipy")

# A workdir belongs to one network on one kind of data under one SDE: these may not change when a run is resumed.
FIXED_GROUPS = ("model.", "data.", "training.sde", "training.continuous")
# Where the data lie, how they are kept, and what may be changed on the way: a rate, and how the network is computed.
FREE_KEYS = ("data.path", "data.strict", "data.cache_gib", "model.ema_rate", "model.dtype", "model.remat")


class WorkdirError(UserError):
    """The workdir cannot be used for this run."""


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns a configuration as {dotted key: value}, tuples as lists, as it reads back from JSON."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(config.to_dict())).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def commit() -> str:
    """Returns the git commit of this code, marked if there are uncommitted changes; "unknown" outside a checkout."""
    root = Path(__file__).parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a number may depend on."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


@distributed.on_main
def check_writable(workdir: str | Path, flag: str = "--workdir") -> None:
    """Makes a folder if need be and checks that files can be written in it.

    Args:
      workdir: the folder.
      flag: of the command line that names it.

    Raises:
      WorkdirError: if they cannot.
    """
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise WorkdirError(
            f"cannot write in {flag}={workdir}: {reason}; choose a folder that you may write in"
        ) from error


class Presence:
    """Notices that a folder, such as the workdir of a run that goes on, is removed or replaced.

    What is open in it could be written on, and would be lost. Of several processes the first one looks.

    Args:
      folder: that is there now.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._status = os.stat(folder) if distributed.is_main_process() else None

    def require(self) -> None:
        """Raises a WorkdirError if the folder is no longer what it was."""
        if self._status is None:
            return
        try:
            is_there = os.path.samestat(os.stat(self._folder), self._status)
        except (FileNotFoundError, NotADirectoryError):
            is_there = False
        if not is_there:
            raise WorkdirError(
                f"{self._folder} is gone: somebody has removed, moved or replaced it while the run wrote there; put it "
                "back and give the same command again, or choose a new --workdir"
            )


@distributed.on_main
def check_trained(workdir: str | Path) -> None:
    """Checks that the workdir holds a training run and can be written.

    Raises:
      WorkdirError: if it does not, or cannot.
    """
    if not (Path(workdir) / CONFIG_FILE).exists():
        raise WorkdirError(f"--workdir={workdir} holds no training run; run --mode train there first")
    check_writable(workdir)


def read_config(path: str | Path) -> dict[str, Any]:
    """Returns the flat configuration of a config.json.

    Raises:
      WorkdirError: if it is damaged.
      UserError: if there is none.
    """
    way_out = "put a copy in its place, or move it away to have the settings that you give taken for the run's"
    try:
        stored = guards.read_json(path).get("config")
    except UserError as error:
        raise WorkdirError(f"{error}; {way_out}") from error
    if not isinstance(stored, dict):
        raise WorkdirError(f"{path} is damaged: it holds no configuration; {way_out}")
    return stored


@distributed.on_main
def check_same_experiment(workdir: str | Path, config: ConfigDict, group: str = "training") -> None:
    """Checks that an existing workdir was made with the same network, data and SDE, and counts checkpoints alike.

    A setting that the program did not have when the workdir was made is no difference.

    Args:
      workdir: that may hold a run.
      config: experiment configuration.
      group: of its settings that has the schedule of the checkpoints: "training", or "classifier".

    Raises:
      WorkdirError: naming every setting that differs.
    """
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        return
    stored, given = read_config(path), flatten(config)
    # Checkpoint k is that of step k * snapshot_freq: by another frequency a number would be taken already.
    fixed = (*FIXED_GROUPS, f"{group}.snapshot_freq")
    differences = {
        key: (stored[key], given[key])
        for key in sorted(stored.keys() & given.keys() - {f"{group}.snapshot_freq_for_preemption"})
        if key.startswith(fixed) and key not in FREE_KEYS and stored[key] != given[key]
    }
    if differences:
        listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differences.items())
        raise WorkdirError(f"--workdir={workdir} holds another experiment ({listed}); choose a new --workdir")


def output_folder(workdir: str | Path, output: str) -> Path:
    """Returns the folder that --output names.

    Raises:
      UserError: if it is not inside the workdir.
    """
    folder = Path(workdir) / output
    if not folder.resolve().is_relative_to(Path(workdir).resolve()):
        raise UserError(f"--output={output} is outside --workdir={workdir}; give the name of a folder inside it")
    return folder


@distributed.on_main
def record_config(workdir: str | Path, config: ConfigDict) -> None:
    """Writes config.json: the exact configuration, the versions of the packages and the commit of this code."""
    given = flatten(config)
    path = Path(workdir) / CONFIG_FILE
    if path.exists():
        stored = read_config(path)
        for key in sorted(key for key in given if stored.get(key) != given[key]):
            logging.info("%s changes from %s to %s", key, stored.get(key), given[key])
    write_json(path, {"config": given, "versions": versions(), "commit": commit()})
