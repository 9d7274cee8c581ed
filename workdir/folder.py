"""The folder of a run: check that it can be written; its config.json."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from configs import settings
from errors import UserError
from parallel import distributed
from storage import untrusted
from storage.files import write_json

CONFIG_FILE = "config.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "diffrax", "numpy", "scipy")


class WorkdirError(UserError):
    """The workdir cannot be used for this run."""


def commit() -> str:
    """Return the git commit of this code, marked if there are uncommitted changes; "unknown" outside a checkout."""
    root = Path(__file__).parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions of the packages that a number may depend on."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


@distributed.on_main
def check_writable(workdir: str | Path, flag: str = "--workdir") -> None:
    """Make a folder, which `flag` of the command line names, if needed, and check that files can be written in it."""
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise WorkdirError(
            f"cannot write in {flag}={workdir}: {reason}; choose a folder that you may write in"
        ) from error


class Presence:
    """Notices that a folder, such as the workdir of a run, is removed or replaced: open files in it would be lost."""

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._status = os.stat(folder) if distributed.is_main_process() else None

    def require(self) -> None:
        """Raise a WorkdirError if the folder is no longer what it was; process 0 looks."""
        if self._status is None:
            return
        try:
            is_there = os.path.samestat(os.stat(self._folder), self._status)
        except (FileNotFoundError, NotADirectoryError):
            is_there = False
        if not is_there:
            raise WorkdirError(
                f"{self._folder} is gone: somebody has removed, moved or replaced it while the run wrote there; put it "
                "back and rerun the same command, or choose a new --workdir"
            )


@distributed.on_main
def check_trained(workdir: str | Path) -> None:
    """Check that the workdir holds a training run and can be written."""
    if not (Path(workdir) / CONFIG_FILE).exists():
        raise WorkdirError(f"--workdir={workdir} holds no training run; run --mode train there first")
    check_writable(workdir)


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the flat configuration of a config.json."""
    way_out = "put a copy in its place, or move it away to have the settings that you give taken for the run's"
    try:
        stored = untrusted.read_json(path).get("config")
    except UserError as error:
        raise WorkdirError(f"{error}; {way_out}") from error
    if not isinstance(stored, dict):
        raise WorkdirError(f"{path} is damaged: it holds no configuration; {way_out}")
    return stored


def output_folder(workdir: str | Path, output: str) -> Path:
    """Return the folder that --output names, inside the workdir."""
    folder = Path(workdir) / output
    if not folder.resolve().is_relative_to(Path(workdir).resolve()):
        raise UserError(f"--output={output} is outside --workdir={workdir}; give the name of a folder inside it")
    return folder


@distributed.on_main
def record_config(workdir: str | Path, config: ConfigDict) -> None:
    """Write config.json: the exact configuration, the versions of the packages and the commit of this code."""
    given = settings.flatten(config) | settings.of_jax()
    path = Path(workdir) / CONFIG_FILE
    if path.exists():
        stored = settings.flatten(settings.defaults()) | read_config(path)
        for key in sorted(key for key in given.keys() & stored.keys() if stored[key] != given[key]):
            logging.info("%s changes from %s to %s", key, stored[key], given[key])
    write_json(path, {"config": given, "versions": versions(), "commit": commit()})
