"""Keeps Orbax from a call of TensorStore that loses memory with every array of every checkpoint.

TensorStore 0.1.86, the newest when this was written, never frees the texts that `KvStore.Spec.to_json` returns, 209
bytes and more. Orbax 0.12 asks for it at each array that it writes, only to learn what it has just said: of files the
answer is the question. With a checkpoint of 300 such calls every 100 steps a run grew by 1.2 MB every 1,000 steps;
without them it does not grow (benchmarks/long_run.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorstore

try:
    from orbax.checkpoint._src.serialization import tensorstore_utils
except ImportError:  # another version of Orbax, in which this may not be needed
    tensorstore_utils = None


class _FileSpec:
    """A specification of files that is known as JSON already."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec

    def to_json(self) -> dict[str, Any]:
        """Returns what TensorStore would."""
        return dict(self._spec)


class _KvStore:
    """Stands for `tensorstore.KvStore`, but for specifications of files."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorstore.KvStore, name)

    def Spec(self, spec: Any) -> Any:
        """Returns a specification of which JSON may be asked."""
        is_of_files = isinstance(spec, dict) and spec.keys() == {"driver", "path"} and spec["driver"] == "file"
        return _FileSpec(spec) if is_of_files else tensorstore.KvStore.Spec(spec)


class _TensorStore:
    """Stands for TensorStore in that module of Orbax which builds specifications."""

    KvStore = _KvStore()

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorstore, name)


def spare_specs() -> None:
    """Lets Orbax do without the call, for the rest of the process; does nothing if that is done already."""
    if getattr(tensorstore_utils, "ts", None) is tensorstore:
        tensorstore_utils.ts = _TensorStore()
