"""Files in the msgpack format of Flax, which the 2021 code wrote: read with suspicion, written to the byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import msgpack
import numpy as np

from errors import UserError
from storage import files

MAX_BYTES = 2**34  # several times the largest checkpoint of the paper
MAX_RANK = 8
MAX_DEPTH = 64  # of maps in maps
MAX_ENTRIES = 2**20  # of all maps and lists together: an entry of three bytes takes two hundred in memory
MAX_LIST = 2**12  # chunks of an array, a GiB each; of a list memory is taken before its entries are read
ARRAY, COMPLEX, SCALAR = 1, 2, 3  # Flax's extension types
DTYPES = {
    *("float16", "float32", "float64", "complex64", "complex128", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
}
CHUNKED = "__msgpack_chunked_array__"  # marks an array that was too large for one entry

# What msgpack raises for content that is cut short, nested too deeply, or no msgpack.
_FORMAT_ERRORS = (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException)


def _array(data: bytes) -> np.ndarray:
    entry = msgpack.unpackb(data, raw=True, max_array_len=MAX_RANK, max_map_len=0)
    if not isinstance(entry, list) or len(entry) != 3:
        raise UserError("an array is not (shape, type, values)")
    shape, name, values = entry
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in shape):
        raise UserError(f"{shape!r} is not the shape of an array")
    dtype = name.decode("ascii") if isinstance(name, bytes) else name
    if dtype not in DTYPES:
        raise UserError(f"arrays of type {dtype!r} are not supported")
    # A declared shape is never believed: nothing is allocated but what the file holds.
    if not isinstance(values, bytes) or len(values) != math.prod(shape) * np.dtype(dtype).itemsize:
        raise UserError(f"an array of shape {tuple(shape)} and type {dtype} does not have that many bytes")
    return np.frombuffer(values, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def _extension(code: int, data: bytes) -> Any:
    if code == ARRAY:
        return _array(data)
    if code == SCALAR:
        return _array(data).reshape(())
    if code == COMPLEX:
        real, imaginary = msgpack.unpackb(data, max_array_len=2, max_map_len=0)
        return np.asarray(complex(real, imaginary))
    raise UserError(f"extension type {code} is unknown")


class _Counter:
    """Counts the entries of maps and lists as they are read, and stops at too many."""

    def __init__(self) -> None:
        self.entries = 0

    def count(self, value: Any) -> Any:
        """Adds the entries of a list, or of a map before its keys were compared."""
        self.entries += len(value)
        if self.entries > MAX_ENTRIES:
            raise UserError(f"it has more than {MAX_ENTRIES} entries")
        return value

    def pairs(self, value: list[tuple[Any, Any]]) -> dict[Any, Any]:
        """Returns the map that has these entries."""
        return dict(self.count(value))


def _indexed(value: Any) -> list[Any]:
    """Returns the items of a list, which Flax also wrote as a map from "0", "1", ..."""
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping) or any(str(i) not in value for i in range(len(value))):
        raise UserError("an array in chunks is not complete")
    return [value[str(i)] for i in range(len(value))]


def _join_chunks(value: Any, depth: int = 0) -> Any:
    if not isinstance(value, dict):
        return value
    if depth == MAX_DEPTH:
        raise UserError(f"maps are nested more than {MAX_DEPTH} times")
    if not all(isinstance(key, str) for key in value):
        raise UserError("a map has a name that is no text")
    if CHUNKED not in value:
        return {key: _join_chunks(inner, depth + 1) for key, inner in value.items()}
    shape, chunks = _indexed(value.get("shape")), _indexed(value.get("chunks"))
    if not chunks or not all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks):
        raise UserError("an array in chunks has something else among them")
    return np.concatenate(chunks).reshape([int(n) for n in shape])


def _unpack(data: bytes) -> Any:
    counter = _Counter()
    return msgpack.unpackb(
        data,
        ext_hook=_extension,
        object_pairs_hook=counter.pairs,
        list_hook=counter.count,
        raw=False,
        strict_map_key=True,
        max_array_len=MAX_LIST,
        max_map_len=MAX_ENTRIES,
    )


def read_msgpack(path: str | Path) -> dict[str, Any]:
    """Reads a file that `flax.serialization.to_bytes` wrote.

    Returns:
      Nested dictionaries with numpy arrays, or whatever else stood there, as leaves.

    Raises:
      UserError: naming the file, if it is cut short or no such file.
      UserError: if there is none.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES} bytes: no checkpoint of score_sde")
    try:
        tree = _unpack(path.read_bytes())
        if not isinstance(tree, dict):
            raise UserError("it does not hold a map")
        return _join_chunks(tree)
    except _FORMAT_ERRORS as error:
        reason = str(error) or type(error).__name__  # a StackError, of maps nested too deeply, says nothing
        raise UserError(f"{path} is damaged or no msgpack file of Flax: {reason}") from error


def write_msgpack(path: str | Path, tree: dict[str, Any]) -> None:
    """Writes nested dictionaries of numpy arrays, in their order, as `flax.serialization.to_bytes` does, atomically."""
    # In place: the copy that Flax would make otherwise sorts the keys.
    files.write_bytes(path, flax.serialization.msgpack_serialize(tree, in_place=True))
