"""By how much this process has grown at its peak: what its arrays take in fact, on a CPU under Linux."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


def _resident_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found  # on Linux
    return int(found[1]) * 1024


class Growth:
    """Growth from when this is made, with free pages given back first; known on Linux only."""

    def __init__(self) -> None:
        self._is_known = CLEAR_PEAK.exists()
        self.forget_peak()
        self._before = _resident_bytes("VmRSS") if self._is_known else 0

    def forget_peak(self) -> None:
        """Gives free pages back and has the peak begin again at what is taken then."""
        if self._is_known:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR_PEAK.write_text("5")

    def peak_bytes(self) -> int | None:
        """Returns the most that was taken since the peak began, less what was taken when this was made."""
        return _resident_bytes("VmHWM") - self._before if self._is_known else None
