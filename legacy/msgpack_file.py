"""Read and write files in the msgpack format of Flax, which the 2021 code wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
from flax import serialization
from flax.traverse_util import flatten_dict

from errors import UserError
from storage import files

# What msgpack and Flax raise for content that is cut short, nested too deeply, or no msgpack of Flax.
_FORMAT_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError),
    msgpack.exceptions.UnpackException,
)


def read_msgpack(path: str | Path) -> dict[str, Any]:
    """Read a file of `flax.serialization.to_bytes`: nested dictionaries with numpy arrays or other values as leaves."""
    try:
        with open(path, "rb") as file:
            # Memory for a list is allocated before its entries are read: check first that all of them are there.
            msgpack.Unpacker(file, read_size=2**20, max_buffer_size=0).skip()
        tree = serialization.msgpack_restore(Path(path).read_bytes())
        if not isinstance(tree, dict):
            raise UserError("it does not hold a map")
        flatten_dict(tree, sep="/")  # all names are text
        return tree
    except _FORMAT_ERRORS as error:
        reason = str(error) or type(error).__name__  # a StackError, of maps nested too deeply, says nothing
        raise UserError(f"{path} is damaged or no msgpack file of Flax: {reason}") from error


def write_msgpack(path: str | Path, tree: dict[str, Any]) -> None:
    """Write nested dictionaries of numpy arrays, in their order, as `flax.serialization.to_bytes` does, atomically."""
    # In place: the copy that Flax would make otherwise sorts the keys.
    files.write_bytes(path, serialization.msgpack_serialize(tree, in_place=True))
