"""Which checkout of this repository a benchmark measures: its own, or the one that --root names.

A benchmark that knows --root imports its helpers, then puts `chosen(sys.argv)` first on sys.path, then imports the
product's modules, which so come from there; its main function works from there as well, so that --config names a file
of that checkout.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

OWN = Path(__file__).resolve().parent.parent
FLAG = "--root"


def define_flag() -> None:
    """Defines --root for the help and the check of flags; `chosen` has read it by then."""
    flags.DEFINE_string("root", None, "Checkout of this repository whose product is measured; default: this one.")


def chosen(arguments: Sequence[str]) -> str:
    """Returns the folder that `--root DIR` or `--root=DIR` names, the last one if there are several, else our own.

    Args:
      arguments: of the command line; they are read before the flags are defined, since the product's modules define
        flags of their own.

    Raises:
      SystemExit: if the folder holds no product, in one sentence.
    """
    named = [after for flag, after in itertools.pairwise(arguments) if flag == FLAG]
    named += [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{FLAG}=")]
    if not named:
        return str(OWN)
    folder = Path(named[-1]).resolve()
    if not (folder / "experiment" / "build.py").is_file():
        raise SystemExit(f"--root={named[-1]} is no checkout of score_sde: it has no experiment/build.py")
    return str(folder)


def _git(folder: str | Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        return None
    return done.stdout.strip()


def describe(folder: str | Path) -> dict[str, Any]:
    """Returns the `commit` that a checkout is at, None if git does not know, and whether its files are `modified`."""
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "modified": bool(changes)}
