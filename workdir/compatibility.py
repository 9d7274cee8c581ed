"""Whether results on disk may be continued or mixed with the settings that are given now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import settings
from parallel import distributed
from workdir.folder import CONFIG_FILE, WorkdirError, read_config


def check_same(stored: Mapping[str, Any], given: Mapping[str, Any], holder: str, way_out: str) -> None:
    """Check that results on disk were made with the settings that are given now.

    A setting that was not stored did not exist yet, and had its default; those of JAX are unknown then.

    Args:
      stored: settings by name.
      given: settings that matter, see `settings.affecting`.
      holder: beginning of the message, such as "<folder> holds results of other settings".
      way_out: what to do if they differ.

    Raises:
      WorkdirError: with every setting that differs, both values and the fix.
    """
    known = settings.flatten(settings.defaults()) | dict(stored)
    differing = sorted(key for key in given.keys() & known.keys() if known[key] != given[key])
    if not differing:
        return
    listed = "; ".join(f"{key}: {known[key]!r} there, {given[key]!r} now" for key in differing)
    of_jax = {key.replace("jax.", "JAX_").upper(): known[key] for key in differing if key.startswith("jax.")}
    if len(of_jax) == len(differing):
        as_there = [f"unset {name}" if value is None else f"set {name}={value}" for name, value in of_jax.items()]
        way_out = f"{' and '.join(as_there)}, or {way_out}"
    raise WorkdirError(f"{holder} ({listed}); {way_out}")


@distributed.on_main
def check_same_experiment(workdir: str | Path, config: ConfigDict, kind: str = "run") -> None:
    """Check that a workdir, if it holds a run, was made with the same settings.

    Args:
      workdir: that may hold a run.
      config: experiment configuration.
      kind: of `settings.affecting`: "run" to resume its training, "checkpoints" to use them, "classifier" for the
        folder of a classifier.

    Raises:
      WorkdirError: naming every setting that differs.
    """
    path = Path(workdir) / CONFIG_FILE
    if path.exists():
        holder = f"--workdir={workdir} holds another experiment"
        check_same(read_config(path), settings.affecting(config, kind), holder, "choose a new --workdir")
