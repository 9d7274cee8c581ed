"""Disks that tests may fill, and disks that nobody may write on."""

import contextlib
import subprocess

import pytest


def _mount(*arguments):
    result = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    return result.stderr.strip() if result.returncode else ""


@contextlib.contextmanager
def small_disk(folder, kibibytes):
    """Mounts a disk of that size on a folder; skips the test where that is not allowed. Yields what resizes it."""
    folder.mkdir()
    if refused := _mount("-t", "tmpfs", "-o", f"size={kibibytes}k", "score_sde_test", folder):
        pytest.skip(f"mounting a small disk needs root: {refused}")

    def resize(kibibytes):
        assert _mount("-o", f"remount,size={kibibytes}k", folder) == ""

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_read_only(folder):
    """Has the disk that is mounted on a folder refuse every write from now on."""
    assert _mount("-o", "remount,ro", folder) == ""
