"""Prepare a TFDS data set as ArrayRecord files, in a separate process: only there is TensorFlow imported.

    python -m sources.tfds_build NAME FOLDER

TFDS downloads and writes; this explains its errors in one sentence.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from absl import logging as absl_logging

from checks import require_tensorflow
from errors import UserError
from sources.tfds import NotPreparedError, data_folder, open_builder

ROOT = Path(__file__).resolve().parent.parent
EXIT_REFUSED = 3  # the last line of stdout says why
MARK = "tfds_build: "  # before that line
CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
NUM_NAMED = 8  # files that a message names
MAX_RETRIES = 3  # of a download; TFDS's own 10 take 204 s to fail without a network


class RefusedError(Exception):
    """What stopped the preparation, as a sentence for the user."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _files(builder: Any, url: str) -> str:
    """Name the files of a data set; if there are many, only the one at `url`."""
    names = {info.filename for info in builder.url_infos.values() if info.filename}
    if len(names) > NUM_NAMED:
        names = {Path(urlsplit(url).path).name}
    return ", ".join(sorted(names)) or "its files"


def _explain(error: Exception, builder: Any, manual: Path) -> str:
    """Explain an error of TFDS in a sentence; empty if it is not one that the user can fix.

    `manual` is the folder where TFDS looks for files that were downloaded by hand.
    """
    from requests.exceptions import RequestException
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError

    for cause in _causes(error):
        if isinstance(cause, ImportError):
            return (
                f"TFDS lacks a package for it: {_first_line(cause)}; install that, or get the "
                "pictures and use data.dataset=folder"
            )
        if isinstance(cause, OSError) and (cause.errno in CANNOT_WRITE or "disk space" in str(cause)):
            return f"its files cannot be written: {_first_line(cause)}; set --config.data.path to another folder"
        if isinstance(cause, NonMatchingChecksumError):
            return f"a file is not the one that TFDS expects, get it again: {_first_line(cause).rstrip(':')}"
        if isinstance(cause, (RequestException, DownloadError)):
            url = f"{cause.request.url!s}" if isinstance(cause, RequestException) and cause.request else ""
            return (
                f"a download failed: {url or _first_line(cause)} ({type(cause).__name__}); connect this machine to the "
                f"network, or put {_files(builder, url)}, downloaded elsewhere, in {manual}"
            )
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        how = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        return f"it must be downloaded by hand to {manual}: {how}"
    return ""


def build(name: str, folder: Path) -> None:
    """Download and prepare a data set; RefusedError explains what stopped it.

    Args:
      name: TFDS name.
      folder: TFDS data folder; its subfolder downloads/manual is for files that were downloaded by hand.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = MAX_RETRIES
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a warning for each retry
    builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
    config = tfds.download.DownloadConfig(try_download_gcs=False)  # Google's copies are not ArrayRecord files
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except Exception as error:
        if sentence := _explain(error, builder, folder / "downloads" / "manual"):
            raise RefusedError(sentence) from error
        raise


def main(name: str, folder: str) -> int:
    """Prepare a data set; return the exit code."""
    try:
        build(name, Path(folder))
    except RefusedError as error:
        print(f"\n{MARK}{error}", flush=True)
        return EXIT_REFUSED
    return 0


def is_prepared(name: str, path: str = "") -> bool:
    """Return whether a data set is prepared (see `open_builder`)."""
    try:
        open_builder(name, path)
    except NotPreparedError:
        return False
    return True


def prepare(name: str, path: str = "") -> None:
    """Prepare a TFDS data set unless it is already; TFDS's progress goes to stderr.

    Args:
      name: TFDS name, such as "cifar10".
      path: TFDS data folder; empty: see `data_folder`.
    """
    folder = data_folder(path)
    if is_prepared(name, path):
        absl_logging.info("TFDS has %s in %s", name, folder)
        return
    require_tensorflow("tensorflow", f"preparing {name!r} here (prepared data can be copied from another machine)")
    absl_logging.info("TFDS downloads and prepares %s in %s", name, folder)
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}  # TensorFlow needs no accelerator for this
    command = [sys.executable, "-m", "sources.tfds_build", name, str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | quiet, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode == EXIT_REFUSED:
        reason = result.stdout.rpartition(MARK)[2].strip()
        raise UserError(f"{name!r} cannot be prepared in {folder}: {reason}")
    if result.returncode:
        raise UserError(
            f"{name!r} cannot be prepared in {folder}: TFDS ended with exit code {result.returncode}; see its output "
            "above"
        )
    open_builder(name, path)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
