"""Read files of other programs: run nothing in them, and check announced sizes before allocating memory.

docs/security.md states the limits. Unless stated otherwise, every error is a UserError that says what the file
announced and how to fix it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import reprlib
import struct
import tokenize
import types
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import UserError

MAX_PIXELS = 2**26  # of a picture: 8192 x 8192, at most 1 GiB as float32 with four channels
MAX_PICTURE_BYTES = 2**30  # of its file: twice the bound uncompressed, with four channels of 16 bits
# Of Pillow's; its EPS, for one, starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
START = 32  # bytes at the beginning of a file by which formats of pictures are recognized
MAX_JSON_BYTES = 2**26  # no file that we write comes near
# A compressed entry of an archive is read if it expands to less than this, or by less than this factor.
FREE_EXPANSION = 2**28
MAX_RATIO = 100  # photographs reach 2, digits 10; deflate could do 1032
ARRAY_KINDS = "biufcUS"  # of numpy's types: numbers, truth values and text, no Python objects
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others ask for memory by their own headers

# What Pillow raises for damaged files, found by truncating and changing 100,000 of them.
PICTURE_ERRORS = (
    *(OSError, ValueError, SyntaxError, TypeError, EOFError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
# What zipfile and zlib raise for damaged archives, and for encrypted ones (RuntimeError).
ZIP_ERRORS = (*(zipfile.BadZipFile, zlib.error, EOFError, RuntimeError), *(OSError, ValueError, struct.error))

# What numpy raises for headers, which it parses as Python literals and repairs if Python 2 may have written them.
HEADER_ERRORS = (*(ValueError, TypeError, SyntaxError, LookupError, OverflowError), tokenize.TokenError, RecursionError)

Result = TypeVar("Result")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


@contextlib.contextmanager
def _explaining(*errors: type[BaseException], what: str = "") -> Iterator[None]:
    """Raise these errors as UserErrors."""
    try:
        yield
    except errors as error:
        raise UserError(f"{what}{str(error) or type(error).__name__}") from error


def _webp_size(start: bytes) -> tuple[int, int]:
    """Return width and height from the first chunk of a WebP file, 0 if there are none.

    Pillow knows them only after libwebp has allocated the canvas.
    """
    kind, body = start[12:16], start[20:30]
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP" or len(body) < 10:
        return 0, 0
    if kind == b"VP8X":  # extended: 24 bits each, less one
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":  # lossless: 14 bits each, less one, after a byte
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"it has {width}x{height} pixels (width x height), more than {MAX_PIXELS:,} in all; make it smaller"
        )


def _check_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_PICTURE_BYTES:
        raise UserError(f"it has {num_bytes:,} bytes, more than {MAX_PICTURE_BYTES:,}; make it smaller")


def read_content(path: str | Path) -> bytes:
    """Read the file of a picture, unless it is larger than any that can be decoded; OSErrors are not converted."""
    with open(path, "rb") as file:
        _check_bytes(os.fstat(file.fileno()).st_size)
        return file.read()


def read_picture(data: bytes, convert: Callable[[Image.Image], Result], formats: tuple[str, ...] = FORMATS) -> Result:
    """Open a picture of a known format, check its size before decoding, and convert it with `convert`.

    `data` is the content of its file. (From an open file Pillow would read as many bytes as a PNG chunk announces.)
    """
    try:
        _check_pixels(*_webp_size(data[:30]))
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_pixels(*image.size)
            return convert(image)
    except UnidentifiedImageError as error:
        raise UserError("it is not a picture") from error
    except PICTURE_ERRORS as error:
        raise UserError(str(error) or type(error).__name__) from error


def check_array(file: IO[bytes], num_bytes: int) -> None:
    """Check that an .npy file of `num_bytes`, open at its beginning, holds what its header announces; rewind it."""
    with _explaining(*HEADER_ERRORS, what="it is not an array in numpy's format: "):
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise UserError(f"version {version} of numpy's format is of structures, which are not read")
        shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise UserError("Object arrays cannot be loaded: they are pickles, which may run code; save numbers or text")
    if dtype.kind not in ARRAY_KINDS or dtype.itemsize == 0:
        raise UserError(f"its array is of type {dtype}; only numbers and text are read")
    held, announced = num_bytes - file.tell(), math.prod(shape) * dtype.itemsize
    if any(type(n) is not int or n < 0 for n in shape) or announced != held:
        raise UserError(f"its array is {dtype}{list(shape)}, {announced:,} bytes, but it holds {held:,}")
    file.seek(0)


def read_array(file: IO[bytes], num_bytes: int) -> np.ndarray:
    """Read an .npy file after `check_array`."""
    check_array(file, num_bytes)
    with _explaining(ValueError):  # its data end early
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_entry(entry: zipfile.ZipInfo) -> None:
    if entry.compress_type not in COMPRESSIONS:
        raise UserError(f"its entry {entry.filename!r} is neither stored nor deflated; repack it with one of these")
    if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
        raise UserError(f"its entry {entry.filename!r} states two sizes")
    if entry.file_size > max(FREE_EXPANSION, MAX_RATIO * entry.compress_size):
        raise UserError(
            f"its entry {entry.filename!r} would expand to {_gib(entry.file_size)}, more than {_gib(FREE_EXPANSION)} "
            f"and than {MAX_RATIO} times its size; if that is correct, repack it without compression"
        )


def open_zip(path: str | Path) -> zipfile.ZipFile:
    """Open an archive whose entries together are no larger than the file and expand within the limits.

    Entries are read by name, never unpacked to where their names point.
    """
    try:
        size = os.stat(path).st_size
        archive = zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise UserError("there is no such file") from error
    except ZIP_ERRORS as error:
        raise UserError(str(error) or type(error).__name__) from error
    try:
        entries = archive.infolist()
        if sum(entry.compress_size for entry in entries) > size:
            raise UserError("its entries are larger than the file, or overlap; get it again")
        for entry in entries:
            _check_entry(entry)
    except UserError:
        archive.close()
        raise
    return archive


def check_total(entries: Sequence[zipfile.ZipInfo]) -> None:
    """Check the total size of entries that will be in memory together."""
    packed, expanded = sum(each.compress_size for each in entries), sum(each.file_size for each in entries)
    if expanded > max(FREE_EXPANSION, MAX_RATIO * packed):
        raise UserError(
            f"its entries would expand to {_gib(expanded)}, more than {MAX_RATIO} times their size; if that is "
            "correct, repack it without compression"
        )


def read_picture_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read an entry that is a picture, within the size limit of pictures; see `read_entry`."""
    _check_bytes(archive.getinfo(name).file_size)
    return read_entry(archive, name)


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo | str) -> bytes:
    """Read an entry of an archive opened by `open_zip` and verify its checksum."""
    with _explaining(*ZIP_ERRORS, KeyError):
        return archive.read(entry)


def read_array_entry(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read the array `name`, the entry NAME.npy of an archive opened by `open_zip`."""
    with _explaining(*ZIP_ERRORS, KeyError, what=f"array {name!r}: "):
        entry = archive.getinfo(f"{name}.npy")
        with archive.open(entry) as file:
            return read_array(file, entry.file_size)


def array_chunks(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """Yield the content of NAME.npy in chunks of 1 MiB, after `check_array`."""
    with _explaining(*ZIP_ERRORS, KeyError, what=f"array {name!r}: "):
        entry = archive.getinfo(f"{name}.npy")
        with archive.open(entry) as file:
            check_array(file, entry.file_size)
            while chunk := file.read(2**20):
                yield chunk


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of the arrays of an .npz file."""
    names = archive.namelist()
    others = [name for name in names if not name.endswith(".npy")]
    if others:
        raise UserError(f"its entry {others[0]!r} is not an array")
    return [name.removesuffix(".npy") for name in names]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UserError(f"{text[:20]} is not a finite number")
    return value


def parse_json(text: str | bytes, kind: type = dict) -> Any:
    """Parse JSON that must be a value of this kind with finite numbers."""
    if len(text) > MAX_JSON_BYTES:
        raise UserError(f"it has {len(text):,} bytes, more than {MAX_JSON_BYTES:,}, the limit for JSON")
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if not isinstance(value, kind):
        raise UserError(f"it holds a value of type {type(value).__name__}; expected {kind.__name__}")
    return value


def read_json(path: str | Path, kind: type = dict) -> Any:
    """Read a JSON file that must hold a value of this kind with finite numbers; errors name the file."""
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(MAX_JSON_BYTES + 1), kind)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{path} is not a file") from error
    except UserError as error:
        raise UserError(f"{path} is damaged or not written by this program: {error}") from error


def _convert(value: Any, hint: Any, what: str) -> Any:
    """Convert a JSON value to the annotated type; lists become tuples, integers may stand for floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        [hint] = [each for each in arguments if each is not types.NoneType]
        return _convert(value, hint, what)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, what)
    if origin is tuple and isinstance(value, list):
        hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(value) == len(hints):
            return tuple(_convert(each, hint, what) for each, hint in zip(value, hints, strict=True))
    if origin is Mapping and isinstance(value, dict):
        return {key: _convert(each, arguments[1], f"{what}.{key}") for key, each in value.items()}
    if hint is Any or type(value) is hint or (hint is float and type(value) is int):
        return value
    raise UserError(f"{what} is {reprlib.repr(value)}; expected {getattr(hint, '__name__', hint)}")


def build(kind: Callable[..., Result], values: Any, what: str = "it") -> Result:
    """Build a dataclass, and those nested in it, from the JSON form of `dataclasses.asdict`.

    Fields are numbers, text, dataclasses, mappings or tuples of these, or None; `what` names the value in messages.
    """
    if not isinstance(values, dict):
        raise UserError(f"{what} is {reprlib.repr(values)}; expected a map")
    hints = typing.get_type_hints(kind)
    converted = {key: _convert(each, hints[key], key) if key in hints else each for key, each in values.items()}
    with _explaining(TypeError):
        return kind(**converted)
