"""Files of others: nothing in them is run, nothing lands outside, and what they announce is not believed.

Each small case here was found by tests/fuzz or by reading; see docs/security.md.
"""

import ast
import contextlib
import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile
import zlib

import jax
import legacy_writers
import msgpack
import numpy as np
import pytest
import tiny
from fuzz.mutations import pack_png, png_chunks
from PIL import Image
from tensorboardX.record_writer import masked_crc32c

import losses
from classifier.experiment import Normalization
from controllable_generation.masks import read_mask
from legacy import torch_file
from legacy.msgpack_file import read_msgpack
from legacy.torch_file import read_torch
from metrics.reference import load_reference
from report import plots
from report.data import read_report
from sources import tfds, tfrecord
from sources.folder import Rules, load_folder
from sources.listing import list_folder, root
from sources.npz import load_npz_split
from sources.pictures import Fit, decode_picture, read_picture
from storage import files, untrusted
from workdir import compatibility
from workdir.checkpoints import CheckpointError, Checkpoints
from workdir.folder import WorkdirError
from workdir.progress import TrainingProgress

SHAPE = (4, 4, 3)
MIB = 2**20


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path_factory.mktemp("cache")))


def peak_of(function, *arguments):
    """Returns the most memory that Python and numpy took during a call that must fail, and its error."""
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"\w") as error:
        function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, str(error.value)


# --- the code --------------------------------------------------------------------------------------------------------

SOURCES = sorted(
    path
    for path in tiny.ROOT.rglob("*.py")
    if not {"tests", ".venv", ".cache", "runs"} & set(path.relative_to(tiny.ROOT).parts[:1])
)
# What would run what it reads, and where it is used in such a way that it does not.
MODULES = {name: set() for name in ("marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "tarfile")}
# The reader of checkpoints of PyTorch, and the cache of compiled programs, which are machine code in any case.
MODULES["pickle"] = {"legacy/torch_file.py", "experiment/programs.py"}
NEVER = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "extractall",
    "unpack_archive",
    "system",
    "popen",
    "fromfile",
)
CALLS = {name: set() for name in NEVER} | {
    "exec_module": {"controllable_generation/restoration.py"},  # FILE.py:FUNCTION, which docs/security.md names
    "ZipFile": {"storage/untrusted.py"},
}


def calls(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def called(node):
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def owner(node):
    return getattr(getattr(node.func, "value", None), "id", "")


def test_the_code_runs_nothing_that_it_reads():
    assert len(SOURCES) > 100
    for path in SOURCES:
        check_that_nothing_is_run(path)


def check_that_nothing_is_run(path):
    name = str(path.relative_to(tiny.ROOT))
    for node in ast.walk(ast.parse(path.read_text())):
        imported = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        imported += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for module in imported:
            assert name in MODULES.get(module.split(".")[0], {name}), f"{name} imports {module}"
        if isinstance(node, ast.keyword):
            value = getattr(node.value, "value", None)
            assert (node.arg, value) not in (("shell", True), ("allow_pickle", True)), f"{name}:{node.value.lineno}"
    for node in calls(path):
        where, function = f"{name}:{node.lineno}", called(node)
        is_method = function in ("compile", "eval") and isinstance(node.func, ast.Attribute)  # re.compile, jit's
        assert is_method or name in CALLS.get(function, {name}), f"{where} calls {function}"
        if (owner(node), function) in (("np", "load"), ("numpy", "load"), ("format", "read_array")):
            keywords = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
            assert keywords.get("allow_pickle") is False, f"{where}: np.load without allow_pickle=False"
        if (owner(node), function) == ("Image", "open"):
            assert name == "storage/untrusted.py", f"{where} opens a picture without its bounds"


# --- checkpoints of other programs -----------------------------------------------------------------------------------


def write_pickle(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


START = pickle.PROTO + b"\x02"
TEXT = pickle.BINUNICODE + struct.pack("<I", 12) + b"__defaults__"
LONG_TEXT = pickle.BINUNICODE + struct.pack("<I", MIB) + b"x" * MIB
REBUILD = name_of("torch._utils", "_rebuild_tensor_v2")
ENCODE_AGAIN = pickle.BINGET + b"\1" + pickle.BINGET + b"\0" + pickle.BINGET + b"\2" + pickle.TUPLE2 + pickle.REDUCE
# A tuple of itself twice, a hundred times over: its hash would take 2 ** 100 steps.
LAUGHS = pickle.EMPTY_TUPLE + b"".join(
    pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.TUPLE2 for _ in range(100)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # BUILD with (None, {name: value}) sets attributes: here the defaults of the reader's own function.
        (
            REBUILD + pickle.NONE + pickle.EMPTY_DICT + TEXT + pickle.EMPTY_TUPLE + pickle.SETITEM
            + pickle.TUPLE2 + pickle.BUILD,
            "it holds no dictionary",
        ),
        (name_of("numpy", "dtype") + pickle.EMPTY_DICT + pickle.BUILD, "it holds no dictionary"),
        (pickle.EMPTY_DICT + LAUGHS + pickle.NONE + pickle.SETITEM, "times, more than 4"),
        (
            name_of("collections", "OrderedDict") + pickle.EMPTY_LIST + LAUGHS + pickle.NONE + pickle.TUPLE2
            + pickle.APPEND + pickle.TUPLE1 + pickle.REDUCE,
            "times, more than 4",
        ),
        (pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.REDUCE, "object is not callable"),
        (pickle.EMPTY_DICT + pickle.NONE + pickle.APPEND, "object has no attribute 'append'"),
        (pickle.EMPTY_LIST + pickle.NONE + pickle.NONE + pickle.SETITEM, "list indices must be integers"),
        # One text of a MiB, encoded again and again.
        (
            LONG_TEXT + pickle.BINPUT + b"\0" + name_of("_codecs", "encode") + pickle.BINPUT + b"\1"
            + pickle.BINUNICODE + struct.pack("<I", 6) + b"latin1" + pickle.BINPUT + b"\2" + ENCODE_AGAIN * 1000,
            "it holds no dictionary",
        ),
        (pickle.BINUNICODE + struct.pack("<I", 2**32 - 1) + b"x", "but only 2 remain"),
        (b"r" + struct.pack("<I", 2**24), "it stores value 16777216 after 1 instructions"),
        (b"\x96" + struct.pack("<q", 2**28), "but only 1 remain"),
        (b"\x96" + struct.pack("<q", 1) + b"x", "its instruction BYTEARRAY8 is not one that torch.save writes"),
    ],
    ids=["defaults", "class", "key", "ordered", "call", "append", "item", "again", "long", "memo", "bytes", "proto"],
)  # fmt: skip
def test_a_pickle_can_do_only_what_tensors_need(tmp_path, content, message):
    path = tmp_path / "file.pth"
    write_pickle(path, START + content + pickle.STOP)
    peak, told = peak_of(read_torch, path)
    assert message in told
    assert "file.pth" in told
    assert peak < 16 * MIB
    assert torch_file._rebuild_tensor.__defaults__ is None  # the reader is as it was
    legacy_writers.write_zip(path, {"x": np.arange(3, dtype=np.float32)})
    np.testing.assert_array_equal(read_torch(path)["x"], np.arange(3))


@pytest.mark.parametrize(
    "content",
    [
        b"\xdd\x00\x0f\xff\xff" * 400 + b"\x01" * MIB,  # lists in lists, announced but not there
        b"\x81\xa1x" * 500 + b"\x01",  # maps in maps
        msgpack.packb({str(i): [0] * 4000 for i in range(300)}),
    ],
    ids=["lists", "maps", "entries"],
)
def test_msgpack_takes_no_memory_for_what_it_announces(tmp_path, content):
    """What is all there may be read: it takes memory in proportion to the file."""
    (tmp_path / "checkpoint_3").write_bytes(content)
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        read_msgpack(tmp_path / "checkpoint_3")
    assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    tracemalloc.stop()


# --- archives and arrays ---------------------------------------------------------------------------------------------


def array_bytes(header, content=b""):
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def header(shape, kind="|u1"):
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array_bytes(header("(1099511627776, 4, 4, 3)")), "52,776,558,133,248 bytes, but it holds 0"),
        (array_bytes(header("(-1, 4, 4, -3)"), bytes(48)), "but it holds 48"),
        (array_bytes(header("(True, 4, 4, 3)"), bytes(48)), "but it holds 48"),
        (array_bytes(header("(1,)", "|O"), pickle.dumps(print)), "Object arrays cannot be loaded"),
        (array_bytes(header("(1099511627776,)", "<U0")), "only numbers and text are read"),
        (array_bytes("{'descr': '|u1\0'"), "not an array in numpy's format"),
        (array_bytes("(" * 5000), "not an array in numpy's format"),
        (b"\x93NUMPY\x03\x00", "version (3, 0)"),
    ],
    ids=["terabytes", "negative", "bool", "objects", "empty text", "null byte", "nested", "version"],
)
def test_an_array_is_not_believed(tmp_path, content, message):
    (tmp_path / "own.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "own.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    (tmp_path / "one.npy").write_bytes(content)
    for read, name in (
        (lambda path: load_npz_split(str(path), "train", SHAPE, 256), "own.npy"),
        (lambda path: load_npz_split(str(path), "train", SHAPE, 256), "own.npz"),
        (files.read_npz, "own.npz"),
    ):
        peak, told = peak_of(read, tmp_path / name)
        assert message in told
        assert str(tmp_path / name) in told
        assert peak < 2 * MIB
    with pytest.raises(ValueError, match="it cannot be read: "):
        decode_picture(content, "one.npy")


def zip_of(path, content, *, size=None, method=zipfile.ZIP_DEFLATED, name="images.npy"):
    """Writes an archive of one entry whose directory states another size."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, content)
    data = bytearray(path.read_bytes())
    if size is not None:
        struct.pack_into("<I", data, data.rfind(b"PK\x01\x02") + 24, size)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 2**32 - 2}, "would expand to 4.00 GiB, more than 0.25 GiB and than 100 times its size"),
        ({"size": 2**32 - 2, "method": zipfile.ZIP_STORED}, "states two sizes"),
        ({"method": zipfile.ZIP_LZMA}, "neither stored nor deflated"),
        ({"name": "images.txt"}, "its entry 'images.txt' is not an array"),
    ],
    ids=["deflated", "stored", "lzma", "other"],
)
def test_an_archive_is_not_believed(tmp_path, options, message):
    zip_of(tmp_path / "r.npz", array_bytes(header("(2, 4, 4, 3)"), bytes(96)), **options)
    for read in (load_reference, lambda path: load_npz_split(str(path), "train", SHAPE, 256)):
        peak, told = peak_of(read, tmp_path / "r.npz")
        assert message in told
        assert "r.npz is damaged or not an .npz file" in told
        assert peak < MIB


def test_a_bomb_of_zeros_is_not_unpacked(tmp_path, monkeypatch):
    """A real one: 16 MiB of zeros are 16 KiB deflated. What is stored, or expands by less, may have any size."""
    monkeypatch.setattr(untrusted, "FREE_EXPANSION", MIB)
    content = array_bytes(header(f"({16 * MIB},)"), bytes(16 * MIB))
    zip_of(tmp_path / "r.npz", content)
    peak, told = peak_of(files.read_npz, tmp_path / "r.npz")
    assert "would expand to 0.02 GiB" in told
    assert "if that is correct, repack it without compression" in told
    assert peak < MIB
    zip_of(tmp_path / "r.npz", content, method=zipfile.ZIP_STORED)
    assert files.read_npz(tmp_path / "r.npz")["images"].size == 16 * MIB
    noise = np.random.default_rng(0).integers(0, 16, 4 * MIB, dtype=np.uint8)
    zip_of(tmp_path / "r.npz", array_bytes(header(f"({4 * MIB},)"), noise.tobytes()))
    np.testing.assert_array_equal(files.read_npz(tmp_path / "r.npz")["images"], noise)


def test_entries_that_overlap_are_refused(tmp_path):
    """A hundred entries that are the same bytes of the file."""
    content = array_bytes(header("(4096,)"), bytes(4096))
    zip_of(tmp_path / "r.npz", content, method=zipfile.ZIP_STORED, name="0000.npy")
    data = (tmp_path / "r.npz").read_bytes()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entries = b"".join(data[start:end].replace(b"0000.npy", b"%04d.npy" % number) for number in range(100))
    end_record = bytearray(data[end:])
    struct.pack_into("<HHI", end_record, 8, 100, 100, len(entries))
    (tmp_path / "r.npz").write_bytes(data[:start] + entries + end_record)
    with pytest.raises(ValueError, match=r"r.npz is damaged .*larger than the file, or overlap"):
        files.read_npz(tmp_path / "r.npz")


def png(shape=(6, 5, 3)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_names_that_leave_the_folder_are_only_names(tmp_path):
    """Every entry is read, and nothing is written but in the cache; a link is a file that is no picture."""
    names = ("../../escaped.png", "/tmp/escaped-score-sde.png", "a/../../escaped.png", "C:\\escaped.png", "good.png")
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, png((6, 5 + number, 3)))
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    rules = Rules(Fit(SHAPE, "crop", group="data"), 256)
    splits = [load_folder(str(tmp_path / "own.zip"), split, rules) for split in ("train", "test")]
    assert sum(map(len, splits)) == 3  # a part of a name that starts with a dot is hidden
    assert not list(tmp_path.parent.rglob("escaped*"))
    assert not os.path.exists("/tmp/escaped-score-sde.png")


def test_long_names_and_many_tensors_take_no_longer_than_their_length(tmp_path):
    """Folders in folders, and storages of a file of PyTorch before 1.6: 4 s of the processor each if squared."""
    names = [f"{'a/' * 20_000}{number}.png" for number in range(200)]
    start = time.process_time()
    assert root(names) == "a/" * 20_000
    assert time.process_time() - start < 1  # 0.05
    content = {str(number): np.zeros(1, np.float32) for number in range(15_000)}
    legacy_writers.write_legacy(tmp_path / "file.pth", content)
    start = time.process_time()
    assert len(read_torch(tmp_path / "file.pth")) == len(content)
    assert time.process_time() - start < 2  # 0.5


# --- pictures --------------------------------------------------------------------------------------------------------


def large_png(width, height):
    chunks = png_chunks(png())
    kind, content = chunks[0]
    return pack_png([(kind, struct.pack(">II", width, height) + content[8:]), *chunks[1:]])


def large(kind, offset, layout, *size):
    file = io.BytesIO()
    Image.new("P" if kind == "GIF" else "RGB", (5, 6)).save(file, kind, lossless=True)
    data = bytearray(file.getvalue())
    struct.pack_into(layout, data, offset, *size)
    return bytes(data)


# Each beyond our bound, and below the 89 million pixels of which Pillow itself would warn.
BOMBS = {
    "PNG": large_png(8193, 8192),
    "GIF": large("GIF", 6, "<HH", 9000, 9000),
    "BMP": large("BMP", 18, "<ii", 9000, 9000),
    "WEBP": large("WEBP", 21, "<I", 8999 | 8999 << 14),
    "PPM": b"P6 9000 9000 255\n" + bytes(30),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_picture_beyond_the_bound_is_not_decoded(tmp_path, monkeypatch, kind):
    if kind == "WEBP":  # whose canvas is allocated when it is opened
        monkeypatch.setattr(Image, "open", lambda *arguments, **options: pytest.fail("it was opened"))
    (tmp_path / "mask.png").write_bytes(BOMBS[kind])
    size = "8193x8192" if kind == "PNG" else "9000x9000"
    read_as_mask = lambda: read_mask(str(tmp_path / "mask.png"), SHAPE, 0)  # noqa: E731
    for read in (lambda: decode_picture(BOMBS[kind], "one.png"), read_as_mask):
        peak, told = peak_of(read)
        assert f"it has {size} pixels (width x height), more than 67,108,864 in all; make it smaller" in told
        assert peak < MIB


def test_sizes_beyond_what_pillow_takes_are_refused_by_either():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for size in (10_000, 60_000):
            with pytest.raises(ValueError, match="pixels"):
                decode_picture(large("GIF", 6, "<HH", size, size), "one.png")


@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xd7\xcd\xc6\x9a" + bytes(40)]
)
def test_kinds_that_would_start_programs_are_no_pictures(start, monkeypatch):
    """Pillow draws EPS by Ghostscript, whatever the file is called."""
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **options: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match="it is not a picture"):
        decode_picture(start, "one.png")


@pytest.mark.parametrize(
    "chunk",
    [(b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")],
    ids=["profile", "text", "international text"],
)
def test_text_of_a_picture_is_not_expanded_without_end(chunk):
    """64 MiB of zeros in a chunk: refused, or passed over."""
    kind, start = chunk
    chunks = png_chunks(png())
    data = pack_png([chunks[0], (kind, start + zlib.compress(bytes(64 * MIB))), *chunks[1:]])
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        decode_picture(data, "one.png")
    assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    tracemalloc.stop()


def test_a_file_larger_than_any_picture_is_not_read(tmp_path):
    """A hole on disk of 4 GiB, as a picture, as an array, and of a folder."""
    for name in ("one.png", "one.npy"):
        with (tmp_path / name).open("wb") as file:
            file.write(png() if name == "one.png" else array_bytes(header("(65536, 65536)")))
            file.truncate(2**32)
        for read in (
            lambda name=name: read_picture(tmp_path / name),
            lambda name=name: list_folder(tmp_path).read(name),
            lambda name=name: read_mask(str(tmp_path / name), SHAPE, 0),
        ):
            peak, told = peak_of(read)
            assert "4,294,967,296 bytes, more than 1,073,741,824; make it smaller" in told
            assert peak < MIB
    (tmp_path / "one.npy").unlink()
    with pytest.raises(ValueError, match=r"one.png: it .* 4,294,967,296 bytes"):
        load_folder(str(tmp_path), "train", Rules(Fit(SHAPE, "crop"), 256, strict=True))


def test_pixels_are_not_believed(tmp_path):
    """Pillow would read the 2 GiB that a chunk announces at once."""
    mask = png((4, 4))
    place = mask.index(b"IDAT")
    path = tmp_path / "mask.png"
    path.write_bytes(mask[: place - 4] + struct.pack(">I", 2**31 - 1) + mask[place:])
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        read_mask(str(path), SHAPE, 0)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


def test_a_record_of_gigabytes_is_not_read(tmp_path):
    """A hole on disk: the file is as large as it says."""
    length = struct.pack("<Q", 2**31)
    with (tmp_path / "r02.tfrecords").open("wb") as file:
        file.write(length + struct.pack("<I", masked_crc32c(length)))
        file.seek(2**31 + 3, os.SEEK_CUR)
        file.write(b"\0")
    source = tfrecord.load_tfrecord(str(tmp_path / "r02.tfrecords"), SHAPE)
    peak, told = peak_of(source.images, np.array([0]))
    assert "record 0 of" in told
    assert "no more than 268,435,456 are read as an image" in told
    assert peak < MIB


# --- data sets of TFDS -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["now", "old"])
def test_a_data_set_cannot_have_a_module_imported(tmp_path, monkeypatch, form):
    """TFDS imports the modules of the classes that features.json names; here one that leaves a mark."""
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    inner = {"now": {"pythonClassName": "evil_module.Feature"}, "old": {"type": "evil_module.F", "content": {}}}[form]
    own = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    folder = tmp_path / "data" / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    features = {"pythonClassName": own, "featuresDict": {"features": {"image": inner}}}
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "dataset_info.json").write_text(json.dumps({"name": "mine", "version": "1.0.0"}))
    with pytest.raises(ValueError, match=r"features.json names the class 'evil_module.F.*, which would be imported"):
        tfds.open_builder("mine", str(tmp_path / "data"))
    assert not (tmp_path / "executed").exists()


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"config": NaN}', "nan is not a finite|NaN is not a finite"),
        ('{"config": 1e999}', "1e999 is not a finite number"),
        ("[]", "of type list; expected dict"),
        ("{}", "holds no configuration"),
        ("\xff", "damaged"),
    ],
    ids=["deep", "nan", "large", "list", "empty", "text"],
)
def test_a_damaged_configuration_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text, encoding="latin1")
    with pytest.raises(WorkdirError, match=message) as error:
        compatibility.check_same_experiment(tmp_path, tiny.make_config())
    assert "config.json" in str(error.value)
    assert "put a copy in its place" in str(error.value)


def test_fields_of_a_report_have_their_types(tmp_path):
    metric = {"name": "x", "value": 1, "stderr": None, "num_samples": 5, "interval": [0, 2.5]}
    good = {"checkpoint": {"number": 1, "step": 2, "ema": True}, "seed": 1, "data": None, "metrics": [metric]}
    good["data"] = {"name": "d", "train_images": 1, "test_images": 1, "num_levels": 256, "hash": ""}
    path = tmp_path / "report_1.json"
    path.write_text(json.dumps(good))
    read = read_report(path)
    assert read.metrics[0].interval == (0, 2.5)
    for changes, message in (
        ({"seed": True}, "seed is True; expected int"),
        ({"metrics": {}}, "metrics is {}; expected"),
        ({"metrics": [metric | {"value": "1"}]}, "value is '1'; expected float"),
        ({"metrics": [metric | {"interval": [1]}]}, r"interval is \[1\]; expected"),
        ({"checkpoint": None}, "checkpoint is None; expected a map"),
        ({"features": {"name": "x"}}, "missing 2 required"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
        ({"sampler": {"settings": [], "nfe": 1, "seconds": 1, "num_samples": 1}}, r"settings is \[\]; expected"),
    ):
        path.write_text(json.dumps(good | changes))
        with pytest.raises(ValueError, match=message):
            read_report(path)


def test_a_damaged_normalization_is_named(tmp_path):
    for text in ("[]", '{"mean": 1, "std": [1]}', '{"mean": ["x"], "std": [1]}', "{"):
        (tmp_path / "normalization.json").write_text(text)
        with pytest.raises(ValueError, match=r"normalization.json is damaged .*remove it"):
            Normalization.read(tmp_path / "normalization.json")


@pytest.mark.parametrize(
    "line", ["[1]", '{"loss": 1}', '{"step": "x"}', '{"step": 1, "loss": []}', "[" * 100_000, "{", '{"step": 1e999}']
)
def test_a_damaged_line_of_the_losses_is_named(tmp_path, line):
    (tmp_path / plots.LOSSES_FILE).write_text(f'{{"step": 1, "loss": 0.5}}\n{line}\n')
    told = r"losses.jsonl, line 2, is not a record of a step; expected JSON with 'step' and numbers; delete it"
    with pytest.raises(ValueError, match=told):
        plots.read_losses(tmp_path / plots.LOSSES_FILE)
    with TrainingProgress(tmp_path, first_step=1, num_steps=9, batch_size=2):  # a run drops the line and goes on
        assert (tmp_path / plots.LOSSES_FILE).read_text() == '{"step": 1, "loss": 0.5}\n'


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_cannot_point_elsewhere(tmp_path):
    """The list of files of OCDBT, with its checksum made right: TensorStore refuses names that leave the folder."""
    import tensorstore

    folder, outside = tmp_path / "db", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    spec = {"driver": "ocdbt", "base": f"file://{folder}/"}
    settings = {"config": {"compression": None, "max_inline_value_bytes": 0}}
    tensorstore.KvStore.open(spec | settings).result().write("a", b"value").result()
    whole = (folder / "manifest.ocdbt").read_bytes()
    place = whole.index(b"d/")
    name = whole[place : place + 34]  # of the file with the data
    read = lambda: bytes(tensorstore.KvStore.open(spec).result().read("a").result().value)  # noqa: E731
    assert read() == b"value"
    (outside / ("x" * 27)).write_bytes((folder / name.decode()).read_bytes())
    for other in (b"../out/" + b"x" * 27, b"d/../../out/" + b"x" * 22, str(outside).encode()[:34].ljust(34, b"x")):
        changed = whole[:place] + other + whole[place + 34 : -4]
        masked = (masked_crc32c(changed) - 0xA282EAD8) % 2**32
        checksum = (masked << 15 | masked >> 17) % 2**32
        (folder / "manifest.ocdbt").write_bytes(changed + struct.pack("<I", checksum))
        with pytest.raises(ValueError, match="Invalid key"):
            read()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("_CHECKPOINT_METADATA", "1", "a _CHECKPOINT_METADATA in it is damaged .*; delete that file"),
        ("_CHECKPOINT_METADATA", "[" * 100_000, "checkpoint 7 in .* cannot be read|_CHECKPOINT_METADATA in it is"),
        ("info/metadata", "{}", "checkpoint 7 in .* cannot be read"),
        ("info/metadata", '{"checksums": [1]}', "checkpoint 7 in .* cannot be read"),
        ("info/metadata", "[" * 100_000, "checkpoint 7 in .* cannot be read"),
        ("state/_METADATA", '{"tree_metadata": []}', "checkpoint 7 in .* cannot be read"),
    ],
)
def test_damaged_notes_of_a_checkpoint_are_named(tmp_path, name, text, message):
    optimizer = losses.make_optimizer(lr=1e-3, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=10, grad_clip=1.0)
    state = jax.tree.map(np.asarray, losses.init_state({"w": np.ones(3, np.float32)}, optimizer))
    with Checkpoints(tmp_path, snapshot_freq=10, template=state) as checkpoints:
        checkpoints.save(state.replace(step=np.int32(7)))
        checkpoints.wait()
    (tmp_path / "checkpoints-meta" / "7" / name).write_text(text)
    with (
        pytest.raises(CheckpointError, match=message),
        Checkpoints(tmp_path, snapshot_freq=10, template=state, read_only=True) as checkpoints,
    ):
        checkpoints.restore_newest()


def test_kinds_of_pictures_are_named_and_bounded():
    """A sign that the bounds are those that docs/security.md states."""
    text = (tiny.ROOT / "docs" / "security.md").read_text()
    for number in (
        untrusted.MAX_PIXELS,
        untrusted.MAX_RATIO,
        untrusted.MAX_JSON_BYTES // MIB,
        untrusted.FREE_EXPANSION // MIB,
    ):
        assert f"{number:,}" in text
    for kind in untrusted.FORMATS:
        assert kind.lower() in text.lower()
