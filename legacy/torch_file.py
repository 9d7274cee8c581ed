"""Files of `torch.save`, read without PyTorch and without running what is in them.

Such a file is a pickle, which may name any function to be called. This reader knows the dozen that tensors, and
optimizers with numpy numbers, are made of; at any other name it stops.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from errors import UserError
from storage import guards

MAX_PICKLE_BYTES = 2**23  # a pickle holds names and shapes, a tenth of this; the values lie beside it
BYTES_OF_ITEM = 16  # what an item of an argument of a function counts for
MAX_LINE_BYTES = 2**10  # names of functions
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # opens files of PyTorch before 1.6
LEGACY_VERSION = 1001
ZIP_START, LEGACY_START = b"PK\x03\x04", b"\x80\x02\x8a\x0a"


class _StorageType(NamedTuple):
    """Stands for the class of a storage."""

    code: str


_STORAGES = {
    "FloatStorage": _StorageType("<f4"),
    "DoubleStorage": _StorageType("<f8"),
    "HalfStorage": _StorageType("<f2"),
    "LongStorage": _StorageType("<i8"),
    "IntStorage": _StorageType("<i4"),
    "ShortStorage": _StorageType("<i2"),
    "CharStorage": _StorageType("i1"),
    "ByteStorage": _StorageType("u1"),
    "BoolStorage": _StorageType("?"),
}
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_ERRORS = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError),
    *(AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError),
)


class _Storage(NamedTuple):
    """What a persistent id says of the values of some tensors."""

    key: str
    dtype: np.dtype
    size: int


def _parse_storage(persistent_id: Any) -> _Storage:
    if not isinstance(persistent_id, tuple) or len(persistent_id) not in (5, 6) or persistent_id[0] != "storage":
        raise UserError("a reference is not to the values of a tensor")
    _, kind, key, _, size = persistent_id[:5]
    if persistent_id[5:] not in ((), (None,)):
        raise UserError("values that are part of other values are not supported")
    if not isinstance(kind, _StorageType) or not isinstance(key, str) or type(size) is not int or size < 0:
        raise UserError("a reference to values is malformed")
    return _Storage(key, np.dtype(kind.code), size)


# --- stand-ins for the functions that a pickle names -----------------------------------------------------------------


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> np.ndarray:
    """Returns the values as a view, after checking that it stays inside the storage."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise UserError("a tensor has no values")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        raise UserError("a tensor has no shape")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise UserError("a tensor's shape, strides or offset are not counts")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if last >= storage.size or math.prod(size) > storage.size:
        raise UserError(f"a tensor of shape {size} is larger than its values")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


class _NumpyType:
    """A numpy type as a pickle describes it: by its name, then by its byte order."""

    def __init__(self, name: Any, *unused: Any) -> None:
        self.dtype = np.dtype(name) if name in ("f4", "f8", "i4", "i8", "b1") else None

    def __setstate__(self, state: Any) -> None:
        if self.dtype is None or not isinstance(state, tuple) or state[1] not in ("<", "|"):
            raise UserError("a numpy number is of an unknown type")


def _numpy_scalar(dtype: Any, data: Any) -> np.ndarray:
    if not isinstance(dtype, _NumpyType) or dtype.dtype is None or not isinstance(data, bytes):
        raise UserError("a numpy number is malformed")
    return np.frombuffer(data, dtype.dtype, count=1).reshape(())


def _encode(text: Any, encoding: Any) -> bytes:
    """How the second pickle protocol stores bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise UserError("bytes are malformed")
    return text.encode("latin1")


def _check_key(key: Any) -> None:
    """Refuses keys that are tuples: one may refer to itself so often that its hash is never done."""
    if type(key) not in (str, int):
        raise UserError(f"a dictionary has a key of type {type(key).__name__}")


def _ordered_dict(pairs: Any = ()) -> collections.OrderedDict[Any, Any]:
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(each, (list, tuple)) for each in pairs):
        raise UserError("an ordered dictionary is not made of pairs")
    for key, _ in pairs:
        _check_key(key)
    return collections.OrderedDict(pairs)


def _size(counts: Any) -> tuple[Any, ...]:
    if not isinstance(counts, (list, tuple)):
        raise UserError("a shape is not made of counts")
    return tuple(counts)


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *unused: data,
    ("torch", "Size"): _size,
    ("numpy", "dtype"): _NumpyType,
    ("_codecs", "encode"): _encode,
    **{(module, "scalar"): _numpy_scalar for module in _NUMPY_MODULES},
    **{("torch", name): kind for name, kind in _STORAGES.items()},
}


# All that the second pickle protocol, which torch.save uses, needs for dictionaries of tensors.
_OPCODES = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.TUPLE, pickle.TUPLE1),
    *(pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.APPEND),
    *(pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET),
    pickle.LONG_BINGET,
)


class _PickleBytes:
    """The part of a file that a pickle may take: no single text, and no pickle, is longer than is sensible."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_PICKLE_BYTES

    def take(self, num_bytes: int) -> None:
        """Counts bytes, and stops at too many."""
        self._left -= num_bytes
        if self._left < 0:
            raise UserError(f"a pickle has more than {MAX_PICKLE_BYTES} bytes")

    def read(self, num_bytes: int) -> bytes:
        """Reads so many bytes, or what is left of the file."""
        self.take(num_bytes)
        return self._file.read(num_bytes)

    def readline(self) -> bytes:
        """Reads a name."""
        line = self._file.readline(MAX_LINE_BYTES)
        self.take(len(line))
        return line


class _Unpickler(pickle._Unpickler):
    """Unpickles nothing but plain values, tensors and numpy numbers.

    The one in Python: that in C allocates as much memory as a pickle says, and knows every instruction. Instructions
    that work on whatever lies on the stack are kept to what they are there for: BUILD could otherwise set attributes
    of the functions and classes that stand in for PyTorch's.
    """

    dispatch: ClassVar[dict[int, Any]] = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES}
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: BinaryIO, load_storage: Callable[[_Storage], np.ndarray]) -> None:
        self._bytes = _PickleBytes(file)
        super().__init__(self._bytes, encoding="utf-8")
        self._load_storage = load_storage

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if not any(function is known for known in _FUNCTIONS.values()):
            raise UserError("it calls something that is no function")
        # A pickle may refer to a long argument in two bytes, as often as it likes.
        sizes = [len(each) for each in arguments if isinstance(each, (str, bytes, list, tuple))]
        self._bytes.take(BYTES_OF_ITEM * sum(sizes))
        self.stack[-1] = function(*arguments)

    def _build(self) -> None:
        """Gives a numpy type its byte order; drops the attributes of dictionaries, which PyTorch's versions are."""
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, _NumpyType):
            value.__setstate__(state)
        elif not isinstance(value, dict):
            raise UserError(f"it sets attributes of a value of type {type(value).__name__}")

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UserError("it appends to something that is no list")
        self.stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise UserError("it sets entries of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            self.stack[-1][key] = value

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _setitems(self) -> None:
        self._set_items(self.pop_mark())

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Returns our stand-in for a function, never the function itself."""
        if (module, name) not in _FUNCTIONS:
            raise UserError(f"it asks for {module}.{name}, which no checkpoint needs; it was not run")
        return _FUNCTIONS[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Returns the values that a tensor refers to."""
        return self._load_storage(_parse_storage(pid))


# --- the two layouts -------------------------------------------------------------------------------------------------


def _read_zip(file: BinaryIO) -> Any:
    """Reads the layout of PyTorch 1.6 and later: NAME/data.pkl, and NAME/data/KEY for each storage."""
    with guards.open_zip(file.name) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or members[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise UserError("it is not an archive of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in members and (members[order].file_size > 8 or guards.read_entry(archive, order) != b"little"):
            raise UserError("its byte order is not little-endian")
        storages: dict[str, np.ndarray] = {}

        def load(storage: _Storage) -> np.ndarray:
            if storage.key not in storages:
                info = members[f"{root}data/{storage.key}"]
                stored = info.compress_type == zipfile.ZIP_STORED
                if not stored or info.file_size != storage.size * storage.dtype.itemsize:
                    raise UserError(f"the size of {info.filename} is not what the tensors say")
                storages[storage.key] = np.frombuffer(guards.read_entry(archive, info), storage.dtype)
            return _of_type(storages[storage.key], storage)

        if members[pickles[0]].compress_type != zipfile.ZIP_STORED:
            raise UserError("its pickle is compressed")
        return _Unpickler(io.BytesIO(guards.read_entry(archive, pickles[0])), load).load()


def _of_type(values: np.ndarray, storage: _Storage) -> np.ndarray:
    if (values.dtype, values.size) != (storage.dtype, storage.size):
        raise UserError("two tensors disagree about their values")
    return values


def _read_legacy(file: BinaryIO, num_bytes: int) -> Any:
    """Reads the layout before PyTorch 1.6: four pickles, the list of storages, and their values one after another."""
    storages: dict[str, np.ndarray] = {}
    left = num_bytes

    def load(storage: _Storage) -> np.ndarray:
        nonlocal left
        if storage.key not in storages:
            left -= storage.size * storage.dtype.itemsize
            if left < 0:
                raise UserError("its tensors are larger than the file")
            storages[storage.key] = np.zeros(storage.size, storage.dtype)  # filled below: the values come last
        return _of_type(storages[storage.key], storage)

    def no_storage(storage: _Storage) -> np.ndarray:
        raise UserError("its header refers to tensors")

    magic, version, system = (_Unpickler(file, no_storage).load() for _ in range(3))
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION or not isinstance(system, dict):
        raise UserError("it is not a file of torch.save")
    if system.get("little_endian") is not True:
        raise UserError("its byte order is not little-endian")
    content = _Unpickler(file, load).load()
    keys = _Unpickler(file, no_storage).load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise UserError("the list of its storages is not what the tensors say")
    for key in keys:
        size = struct.unpack("<q", file.read(8))[0]
        values = file.read(storages[key].nbytes) if size == storages[key].size else b""
        if len(values) != storages[key].nbytes:
            raise UserError("it is cut short")
        storages[key][:] = np.frombuffer(values, storages[key].dtype)
    return content


def is_torch_file(start: bytes) -> bool:
    """Tells from the first bytes whether `torch.save` wrote a file, in either layout."""
    return start.startswith((ZIP_START, LEGACY_START))


def read_torch(path: str | Path) -> Any:
    """Reads a file of `torch.save`: dictionaries, lists, numbers, and numpy arrays for tensors.

    Raises:
      UserError: naming the file, if it is damaged, no such file, or holds anything but such values.
      UserError: if there is none.
    """
    assert sys.byteorder == "little"
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP_START)) == ZIP_START
        file.seek(0)
        try:
            return _read_zip(file) if is_zip else _read_legacy(file, Path(path).stat().st_size)
        except _ERRORS as error:
            raise UserError(f"{path} cannot be read as a checkpoint of PyTorch: {error}") from error
