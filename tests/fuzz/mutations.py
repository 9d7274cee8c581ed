"""Changes at random of bytes, and of what is inside containers whose checksums are then made right again.

Every function takes a `random.Random` first and returns the changed input; the same seed gives the same inputs.
"""

import io
import json
import struct
import zipfile
import zlib

import msgpack

EXTREMES = (0, 1, -1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63)
MAX_CHANGES = 4
MAX_SPAN = 64


# --- bytes -----------------------------------------------------------------------------------------------------------


def _span(random, data):
    start = random.randrange(len(data) + 1)
    return start, min(start + random.randrange(1, MAX_SPAN), len(data))


def _flip_bit(random, data, others):
    place = random.randrange(len(data))
    data[place] ^= 1 << random.randrange(8)


def _set_byte(random, data, others):
    data[random.randrange(len(data))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))


def _truncate(random, data, others):
    del data[random.randrange(len(data)) :]


def _delete(random, data, others):
    start, stop = _span(random, data)
    del data[start:stop]


def _duplicate(random, data, others):
    start, stop = _span(random, data)
    data[start:start] = data[start:stop] * random.choice((1, 1, 1, 50))


def _insert(random, data, others):
    place = random.randrange(len(data) + 1)
    data[place:place] = random.randbytes(random.randrange(1, 16))


def _extreme(random, data, others):
    """Replaces what may be an integer, of 1 to 8 bytes in either order."""
    width = random.choice((1, 2, 4, 8))
    value = (random.choice(EXTREMES) + random.choice((-1, 0, 0, 0, 1))) % 256**width
    place = random.randrange(len(data))
    data[place : place + width] = value.to_bytes(width, random.choice(("little", "big")))


def _splice(random, data, others):
    other = random.choice(others)
    place = random.randrange(len(other) + 1)
    data[random.randrange(len(data) + 1) :] = other[place:]


def _copy(random, data, others):
    start, stop = _span(random, data)
    place = random.randrange(len(data) + 1)
    data[place : place + stop - start] = data[start:stop]


OPERATIONS = (
    _flip_bit,
    _set_byte,
    _set_byte,
    _truncate,
    _delete,
    _duplicate,
    _insert,
    _extreme,
    _extreme,
    _splice,
    _copy,
)


def change(random, inputs, data=None):
    """Changes `data`, or one of the inputs, in one to four places."""
    data = bytearray(random.choice(inputs) if data is None else data)
    for _ in range(random.randrange(1, MAX_CHANGES + 1)):
        if not data:
            break
        random.choice(OPERATIONS)(random, data, inputs)
    return bytes(data)


# --- JSON ------------------------------------------------------------------------------------------------------------

ODD = (None, True, -1, 0, 2**63, 1e308, "", "x", "../../x", [], {}, [[]], {"a": {}}, [None], ["x", 1])


def change_tree(random, value):
    """Changes nested dictionaries and lists in one place."""
    if not isinstance(value, (dict, list)) or not value or random.random() < 0.05:
        return random.choice(ODD)
    copy = value.copy()
    key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    action = random.randrange(10)
    if action == 0:
        del copy[key]
    elif action == 1 and isinstance(copy, dict):
        copy[random.choice(("x", "", "__class__", f"{key}.x"))] = random.choice(ODD)
    elif action == 2:
        copy[key] = random.choice(ODD)
    else:
        copy[key] = change_tree(random, value[key])
    return copy


def change_json(random, inputs):
    """Changes the text or the tree of JSON; at times nests it deeply, or puts in what strict JSON does not have."""
    data = random.choice(inputs)
    kind = random.randrange(10)
    if kind < 3:
        return change(random, inputs, data)
    if kind == 3:
        depth = random.choice((100, 1000, 100_000))
        return b"[" * depth + b"]" * depth if random.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
    if kind == 4:
        digits = [place for place in range(len(data)) if data[place : place + 1].isdigit()]
        place = random.choice(digits)
        odd = random.choice((b"NaN", b"-Infinity", b"9" * 5000, b"1e999", b"\xff\xfe", b"\\ud800"))
        return data[:place] + odd + data[place + 1 :]
    return json.dumps(change_tree(random, json.loads(data))).encode()


def change_lines(random, inputs):
    """Changes one line of JSON lines, or the whole."""
    lines = random.choice(inputs).splitlines(keepends=True)
    if random.random() < 0.3:
        return change(random, inputs)
    place = random.randrange(len(lines))
    lines[place] = change_json(random, [lines[place]]).rstrip(b"\n") + b"\n"
    return b"".join(lines)


# --- containers ------------------------------------------------------------------------------------------------------


def _set_sizes(random, data):
    """Replaces a size or place in the directory of an archive."""
    data = bytearray(data)
    start = data.rfind(b"PK\x01\x02")
    if start >= 0:
        struct.pack_into("<I", data, start + random.choice((20, 24, 42)), random.choice(EXTREMES) % 2**32)
    return bytes(data)


def change_zip(random, inputs, inner=change):
    """Changes entries of an archive and packs them anew with the right checksums, or the archive itself."""
    kind = random.randrange(10)
    if kind < 3:
        return change(random, inputs)
    data = random.choice(inputs)
    if kind == 3:
        return _set_sizes(random, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(entry.filename, archive.read(entry), entry.compress_type) for entry in archive.infolist()]
    place = random.randrange(len(entries))
    name, content, method = entries[place]
    if kind == 4:
        name = random.choice((f"../../{name}", f"/{name}", f"{name}/", "x.npy", "x.png", " ", name.upper()))
    elif kind == 5:
        method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    else:
        content = inner(random, [each for _, each, _ in entries], content)
    entries[place] = (name, content, method)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content, method in entries:
            archive.writestr(name, content, compress_type=method)
    return file.getvalue()


def change_folder(random, inputs):
    """Changes one file of a folder, which an archive stands for: its bytes, its JSON, or whether it is there at all."""
    with zipfile.ZipFile(io.BytesIO(random.choice(inputs))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(list(entries))
    kind = random.randrange(8)
    if kind == 0:
        del entries[name]
    elif kind == 1:
        entries[name] = random.choice(list(entries.values()))
    elif entries[name].lstrip().startswith(b"{") and kind < 6:
        entries[name] = change_json(random, [entries[name]])
    else:
        entries[name] = change(random, list(entries.values()), entries[name])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def change_array(random, inputs, data=None):
    """Changes an .npy file: mostly its header's text, whose length stays right."""
    data = random.choice(inputs) if data is None else data
    if random.random() < 0.3 or not data.startswith(b"\x93NUMPY\x01"):
        return change(random, inputs, data)
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].decode("latin1")
    shape = random.choice(
        ("(1099511627776, 1099511627776)", "(-1, -4)", "(4611686018427387904, 0)", "()", "(True,)", "3")
    )
    kind = random.choice(("|O", "<U0", "<f2", "<M8[s]", "|V8", "<c16", "[('a', 'O')]", ">i8", "|S3", "x"))
    old = header[header.index("'descr'") : header.index(", 'fortran")]
    start, stop = header.index("'shape'"), header.rindex(")") + 1 if ")" in header else len(header)
    chosen = random.randrange(3)
    if chosen == 0:
        header = header[:start] + f"'shape': {shape}" + header[stop:]
    elif chosen == 1:
        header = header.replace(old, f"'descr': {kind!r}")
    else:
        header = change(random, [header.encode("latin1")]).decode("latin1")
    packed = header.rstrip().encode("latin1")[: 2**16 - 2] + b"\n"
    return data[:8] + len(packed).to_bytes(2, "little") + packed + data[10 + length :]


def png_chunks(data):
    """Returns [(kind, content)] of a PNG file."""
    chunks, place = [], 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def pack_png(chunks):
    """Returns a PNG file of these chunks."""
    packed = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def change_png(random, data):
    """Changes the content of a chunk of a PNG file, also inside its compression; the checksum is right."""
    chunks = png_chunks(data)
    place = random.randrange(len(chunks))
    kind, content = chunks[place]
    choice = random.randrange(6)
    if choice == 0:
        bomb = zlib.compress(bytes(2**24))
        name, text = random.choice(((b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")))
        chunks.insert(random.randrange(1, len(chunks) + 1), (name, text + bomb))
    elif choice == 1:
        chunks.insert(random.randrange(len(chunks) + 1), random.choice(chunks))
    elif choice == 2 and kind == b"IDAT":
        try:
            chunks[place] = (kind, zlib.compress(change(random, [zlib.decompress(content)])))
        except zlib.error:
            chunks[place] = (kind, b"")
    elif choice == 3:
        size = (random.choice((0, 1, 2**13, 2**16, 2**31 - 1, 2**31)), random.choice((0, 1, 2**13, 2**16, 2**31 - 1)))
        chunks[0] = (chunks[0][0], struct.pack(">II", *size) + chunks[0][1][8:])
    else:
        chunks[place] = (kind, change(random, [content or b"\0"]))
    return pack_png(chunks)


def change_picture(random, inputs):
    """Changes a picture; those of PNG half the time inside their chunks."""
    data = random.choice(inputs)
    if data.startswith(b"\x89PNG") and random.random() < 0.5:
        return change_png(random, data)
    return change(random, inputs, data)


def change_records(random, inputs, frame):
    """Changes a TFRecord file, or the data of its records under right lengths and checksums.

    Args:
      frame: returns a record of (data, length to be announced).
    """
    data = random.choice(inputs)
    if random.random() < 0.4:
        return change(random, inputs, data)
    records, place = [], 0
    while place < len(data):
        length = int.from_bytes(data[place : place + 8], "little")
        records.append(data[place + 12 : place + 12 + length])
        place += 16 + length
    chosen = random.randrange(len(records))
    if random.random() < 0.3:
        announced = random.choice(EXTREMES) % 2**64
        return b"".join(frame(each, announced if i == chosen else len(each)) for i, each in enumerate(records))
    records[chosen] = change(random, records, records[chosen])
    return b"".join(frame(each, len(each)) for each in records)


def change_msgpack(random, inputs):
    """Changes a file of Flax, its tree, or an array inside it; at times one of maps, lists and sizes without end."""
    data = random.choice(inputs)
    kind = random.randrange(10)
    if kind < 4:
        return change(random, inputs, data)
    if kind == 4:
        depth = random.choice((60, 200, 500, 1000))
        start = random.choice((b"\x81\xa1x", b"\x91", b"\xdd\x00\x0f\xff\xff", b"\xdf\x00\x00\x00\x01\xa1x"))
        return start * depth + b"\x01" * 2**20 * random.randrange(2)
    tree = msgpack.unpackb(data, raw=False, strict_map_key=False)
    if kind == 5:
        return msgpack.packb(change_tree(random, tree))
    arrays = []
    _find_arrays(tree, arrays)
    if not arrays:
        return change(random, inputs, data)
    parent, key = random.choice(arrays)
    content = msgpack.unpackb(parent[key].data, raw=True)
    if kind < 8 and isinstance(content, list) and len(content) == 3:
        place = random.randrange(3)
        shape = [random.choice(EXTREMES) % 2**63 for _ in range(random.randrange(12))]
        content[place] = (shape, random.choice(("object", "float64", "O", "V8", b"\xff")), b"")[place]
        content = msgpack.packb(content)
    else:
        content = change(random, [parent[key].data])
    parent[key] = msgpack.ExtType(random.choice((1, 1, 1, 2, 3, 9)), content)
    return msgpack.packb(tree)


def _find_arrays(tree, found):
    for key, value in tree.items():
        if isinstance(value, dict):
            _find_arrays(value, found)
        elif isinstance(value, msgpack.ExtType):
            found.append((tree, key))
