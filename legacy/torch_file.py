"""Read files of `torch.save` without PyTorch and without running what is in them.

A pickle may name any function. This reader knows the names that tensors and optimizers need, replaces each by a
function of its own, and refuses all others.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from errors import UserError
from storage import untrusted

MAX_PICKLE_BYTES = 2**23  # names and shapes need a tenth of this; the values are stored beside the pickle
MAX_SHARED_TUPLES = 4  # references to earlier tuples: each may double the time to hash a key
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # start of files of PyTorch before 1.6
# Instructions that never make a tuple.
NO_TUPLES = ("GLOBAL", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "EMPTY_DICT", "EMPTY_LIST", "REDUCE")
ZIP_START, LEGACY_START = b"PK\x03\x04", b"\x80\x02\x8a\x0a"

_ERRORS = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, RuntimeError),
    *(AttributeError, LookupError, OverflowError, TypeError, ValueError),
)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> np.ndarray:
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise UserError("a tensor has no values")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        raise UserError("a tensor has no shape")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise UserError("a tensor's shape, strides or offset are not counts")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.size or math.prod(size) > storage.size:
        raise UserError(f"a tensor of shape {size} is larger than its values")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _rebuild_parameter(data: Any, *unused: Any) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise UserError("a parameter is no tensor")
    return data


class _Dict(dict[Any, Any]):
    """An OrderedDict without its attributes, such as the versions in a state_dict."""

    def __setstate__(self, state: Any) -> None:
        pass


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda: _Dict(),
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    # Numbers of numpy, with their types and bytes: learning rates, which are not needed.
    ("numpy", "dtype"): lambda *unused: _Dict(),
    ("numpy.core.multiarray", "scalar"): lambda *unused: None,
    ("numpy._core.multiarray", "scalar"): lambda *unused: None,
    ("_codecs", "encode"): lambda *unused: None,
}
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}

LoadStorage = Callable[[str, np.dtype, int], np.ndarray]  # values by key, type and size


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, load_storage: LoadStorage):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in _FUNCTIONS:
            raise UserError(f"it asks for {module}.{name}, which no checkpoint needs; it was not run")
        function = _FUNCTIONS[module, name]
        # A fresh function: a pickle can set attributes of what it names.
        return lambda *arguments: function(*arguments)

    def persistent_load(self, pid: Any) -> np.ndarray:
        name, code, key, _, size, *view = pid
        if name != "storage" or code not in _STORAGES.values() or type(key) is not str or type(size) is not int:
            raise UserError("a reference to the values of a tensor is malformed")
        if view not in ([], [None]):
            raise UserError("values that are part of other values are not supported")
        values = self._load_storage(key, np.dtype(code), size)
        if (values.dtype, values.size) != (np.dtype(code), size):
            raise UserError("two tensors disagree about their values")
        return values


def _check_pickle(data: bytes) -> int:
    """Return the length of the pickle at the start of `data`; refuse instructions that could exhaust memory or time.

    The unpickler allocates what an instruction announces, and the memo up to its largest index.
    """
    previous, shared, length = "", 0, 0
    plain: set[int] = set()  # indices of stored values that are no tuples
    argument: Any
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        if opcode.proto > 2 or opcode.name == "DUP":
            raise UserError(f"its instruction {opcode.name} is not one that torch.save writes")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > max(count, 255):
                raise UserError(f"it stores value {argument} after {count} instructions")
            (plain.add if previous in NO_TUPLES else plain.discard)(argument)
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            shared += argument not in plain
        previous, length = opcode.name, (position or 0) + 1
    if shared > MAX_SHARED_TUPLES:
        raise UserError(f"it refers to tuples {shared} times, more than {MAX_SHARED_TUPLES}")
    return length


def _unpickle(data: bytes, load_storage: LoadStorage) -> tuple[Any, int]:
    length = _check_pickle(data)
    return _Unpickler(data[:length], load_storage).load(), length


def _read_zip(file: BinaryIO) -> Any:
    """Read the layout of PyTorch 1.6 and later: NAME/data.pkl, and NAME/data/KEY for each storage."""
    with untrusted.open_zip(file.name) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or members[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise UserError("it is not an archive of torch.save")
        if members[pickles[0]].compress_type != zipfile.ZIP_STORED:
            raise UserError("its pickle is compressed")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in members and (members[order].file_size > 8 or untrusted.read_entry(archive, order) != b"little"):
            raise UserError("its byte order is not little-endian")
        storages: dict[str, np.ndarray] = {}

        def load(key: str, dtype: np.dtype, size: int) -> np.ndarray:
            if key not in storages:
                info = members[f"{root}data/{key}"]
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != size * dtype.itemsize:
                    raise UserError(f"the size of {info.filename} is not what the tensors say")
                storages[key] = np.frombuffer(untrusted.read_entry(archive, info), dtype)
            return storages[key]

        return _unpickle(untrusted.read_entry(archive, pickles[0]), load)[0]


def _read_legacy(file: BinaryIO) -> Any:
    """Read the layout before PyTorch 1.6: five pickles, the last lists the storages, whose values follow."""
    storages: dict[str, np.ndarray] = {}
    left = Path(file.name).stat().st_size

    def load(key: str, dtype: np.dtype, size: int) -> np.ndarray:
        nonlocal left
        if key not in storages:
            left -= size * dtype.itemsize
            if left < 0:
                raise UserError("its tensors are larger than the file")
            storages[key] = np.zeros(size, dtype)  # filled below: the values come last
        return storages[key]

    def read_pickle() -> Any:
        start = file.tell()
        value, length = _unpickle(file.read(MAX_PICKLE_BYTES), load)
        file.seek(start + length)
        return value

    magic, version, system = (read_pickle() for _ in range(3))
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION or not isinstance(system, dict):
        raise UserError("it is not a file of torch.save")
    if system.get("little_endian") is not True:
        raise UserError("its byte order is not little-endian")
    content, keys = read_pickle(), read_pickle()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise UserError("the list of its storages is not what the tensors say")
    for key in keys:
        (size,) = struct.unpack("<q", file.read(8))
        values = file.read(storages[key].nbytes) if size == storages[key].size else b""
        if len(values) != storages[key].nbytes:
            raise UserError("it is cut short")
        storages[key][:] = np.frombuffer(values, storages[key].dtype)
    return content


def is_torch_file(start: bytes) -> bool:
    """Return whether the first bytes of a file are those of `torch.save`, in either layout."""
    return start.startswith((ZIP_START, LEGACY_START))


def read_torch(path: str | Path) -> dict[Any, Any]:
    """Read a dictionary from a file of `torch.save`: lists, Python's numbers, and tensors as numpy arrays."""
    assert sys.byteorder == "little"
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP_START)) == ZIP_START
        file.seek(0)
        try:
            content = _read_zip(file) if is_zip else _read_legacy(file)
            if not isinstance(content, dict):
                raise UserError("it holds no dictionary")
            return content
        except _ERRORS as error:
            raise UserError(f"{path} cannot be read as a checkpoint of PyTorch: {error}") from error
