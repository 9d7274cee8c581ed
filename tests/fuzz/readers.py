"""The readers of users' files, each with good inputs and with the way in which they are changed."""

import functools
import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

import jax
import legacy_writers
import numpy as np
import tiny
from PIL import Image
from reference import model_and_shape
from tensorboardX.record_writer import masked_crc32c

import legacy
import losses
from configs.settings import flatten
from controllable_generation.masks import read_mask
from fuzz import mutations
from fuzz.engine import Reader
from metrics.reference import load_reference
from report import compare_reports, plots
from sources import tfrecord
from sources.folder import Rules, load_folder
from sources.npz import load_npz, load_npz_split
from sources.pictures import Fit, load_pictures
from storage import files
from workdir import compatibility, progress, results
from workdir import folder as workdirs
from workdir.checkpoints import Checkpoints

DRAW = np.random.default_rng(0)
SHAPE = (4, 4, 3)
PICTURE = 5 * 2**29  # bytes that the largest picture may take while it is decoded
DECODING = 10.0  # seconds for the same, and to resize it


def bytes_of(write, *arguments, **options):
    file = io.BytesIO()
    write(file, *arguments, **options)
    return file.getvalue()


# --- checkpoints of other programs -----------------------------------------------------------------------------------


@functools.cache
def network():
    """A network's parameters with their names in PyTorch; found out once, not for each file."""
    config = tiny.make_config(model__num_res_blocks=1)
    of_config = model_and_shape(config)
    leaves = legacy.match_parameters(*of_config)
    return leaves, legacy.match_torch_parameters(config.model.name, *of_config, leaves)


def small_state():
    """A whole state of two parameters: it fits no network, but is read to its end."""
    groups = {name: {"Conv_0/bias": DRAW.random(3, np.float32), "x/W": np.zeros((2, 2))} for name in legacy.GROUPS}
    return legacy_writers.score_sde_state(**groups, step=38, optimizer_step=36, lr=1e-3, ema_rate=0.9)


def torch_state():
    names = ("module.all_modules.0.weight", "module.all_modules.0.bias")
    values = [DRAW.random((2, 3), np.float32), DRAW.random(2, np.float32)]
    moments = {i: {"step": 3, "exp_avg": value, "exp_avg_sq": value} for i, value in enumerate(values)}
    rate = legacy_writers.numpy_number(1e-3)
    return {
        "optimizer": {"state": moments, "param_groups": [{"lr": rate, "betas": (0.9, 0.99), "params": [0, 1]}]},
        "model": dict(zip(names, values, strict=True)),
        "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": values},
        "step": 3,
    }


def written(write, value):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file", value)
        return (Path(folder) / "file").read_bytes()


def read_legacy(path):
    leaves, torch_leaves = network()
    legacy.read_checkpoint(path, lambda: torch_leaves).compare(leaves)


def msgpack_reader():
    halves = {"shape": {"0": 2, "1": 2}, "chunks": {"0": np.ones(2), "1": np.ones(2)}}
    chunks = {"__msgpack_chunked_array__": True} | halves
    inputs = small_state(), {"x": chunks, "y": {"z": np.zeros((2, 0), np.int8)}}
    packed = tuple(legacy_writers.pack(each) for each in inputs)
    return Reader("msgpack", "checkpoint_3", packed, mutations.change_msgpack, read_legacy, prepare=network)


def torch_reader():
    inputs = (written(legacy_writers.write_zip, torch_state()), written(legacy_writers.write_zip, {"a": np.ones(2)}))
    return Reader("torch", "file.pth", inputs, mutations.change_zip, read_legacy, prepare=network)


def torch_legacy_reader():
    inputs = tuple(written(legacy_writers.write_legacy, each) for each in (torch_state(), {"a": np.ones(2)}))
    return Reader("torch_legacy", "file.pth", inputs, mutations.change, read_legacy, prepare=network)


# --- checkpoints of Orbax --------------------------------------------------------------------------------------------


def orbax_reader():
    """Reads a workdir that an archive stands for; the error names the folder that it is unpacked to."""
    optimizer = losses.make_optimizer(lr=1e-3, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=10, grad_clip=1.0)
    params = {"block": {"kernel": np.ones((3, 4), np.float32)}, "bias": np.arange(3, dtype=np.float32)}
    unpacked = Path(tempfile.mkdtemp()) / "workdir"

    @functools.cache
    def template():
        return jax.tree.map(np.asarray, losses.init_state(params, optimizer))

    def write():
        with tempfile.TemporaryDirectory() as folder:
            with Checkpoints(folder, snapshot_freq=10, template=template()) as checkpoints:
                checkpoints.save(template().replace(step=np.int32(7)))
                checkpoints.wait()
            return pack_folder(Path(folder))

    def read(path):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(unpacked)
        with Checkpoints(unpacked, snapshot_freq=10, template=template(), read_only=True) as checkpoints:
            state = checkpoints.restore_newest()
        if state is not None:
            jax.tree.map(np.testing.assert_array_equal, state, template().replace(step=np.int32(7)))

    return Reader(
        *("orbax", "workdir.zip", functools.cache(lambda: (write(),)), mutations.change_folder, read),
        clean=lambda: shutil.rmtree(unpacked, ignore_errors=True),
        name_in_message=str(unpacked),
        share=0.1,  # an input takes 50 ms
        address_space=2**35,  # of TensorStore's threads; what is taken is held against `memory`
    )


def pack_folder(folder):
    """Returns an archive of the files of a folder."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(folder))
    return file.getvalue()


# --- images ----------------------------------------------------------------------------------------------------------


def frame(data, length):
    header = struct.pack("<Q", length)
    return header + struct.pack("<I", masked_crc32c(header)) + data + bytes(4)


def example(shape):
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    message.features.feature["shape"].int64_list.value.extend(shape)
    message.features.feature["data"].bytes_list.value.append(DRAW.bytes(int(np.prod(shape))))
    return message.SerializeToString()


def tfrecord_reader():
    records = [example((3, 4, 4)) for _ in range(3)]
    inputs = (b"".join(frame(each, len(each)) for each in records), frame(records[0], len(records[0])))

    def read(path):
        source = tfrecord.load_tfrecord(str(path), SHAPE)
        for index in range(len(source)):
            source.images(np.array([index]))

    change = functools.partial(mutations.change_records, frame=frame)
    return Reader("tfrecord", "r02.tfrecords", inputs, change, read)


def images(count=3):
    return DRAW.integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def clean_cache():
    shutil.rmtree(files.cache_folder("data"), ignore_errors=True)


def read_split(path):
    source = load_npz_split(str(path), "train", SHAPE, 256, 0.4)
    source.images(np.arange(len(source)))
    if source.num_classes:
        source.labels(np.arange(len(source)))


def npz_reader():
    labels = {"labels": np.array([0, 2, 1]), "num_classes": np.array(3)}
    inputs = (
        bytes_of(np.savez, images=images(), **labels),
        bytes_of(np.savez_compressed, samples=images(), **labels),
        bytes_of(np.savez, images=np.asfortranarray(images())),
    )

    def read(path):
        read_split(path)
        load_npz(path, SHAPE, 256)

    change = functools.partial(mutations.change_zip, inner=mutations.change_array)
    return Reader("npz", "own.npz", inputs, change, read, clean=clean_cache)


def npy_reader():
    inputs = (bytes_of(np.save, images()), bytes_of(np.save, images(5)))
    return Reader("npy", "own.npy", inputs, mutations.change_array, read_split, clean=clean_cache)


def statistics_reader():
    rows = DRAW.random((6, 3))
    provenance = json.dumps({"extractor": "inception", "num_levels": 256})
    inputs = (
        bytes_of(np.savez, mean=rows.mean(0), cov=np.cov(rows.T), num_samples=6, features=rows, provenance=provenance),
        bytes_of(np.savez_compressed, mu=rows.mean(0), sigma=np.cov(rows.T)),
        bytes_of(np.savez, pool_3=rows),
    )
    change = functools.partial(mutations.change_zip, inner=mutations.change_array)
    return Reader("statistics", "r.npz", inputs, change, load_reference)


@functools.cache
def pictures():
    """Small pictures of every kind, with transparency, palettes, an orientation, a colour profile and text."""
    color = Image.fromarray(DRAW.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    alpha, gray = color.convert("RGBA"), color.convert("L")
    exif = color.getexif()
    exif[0x0112] = 6
    made = [
        bytes_of(color.save, "PNG", exif=exif, icc_profile=bytes(300)),
        bytes_of(alpha.save, "PNG", compress_level=0),
        bytes_of(gray.save, "PNG", transparency=3),
        bytes_of(color.quantize(8).save, "PNG"),
        bytes_of(Image.fromarray(DRAW.integers(0, 2**16, (5, 6), dtype=np.uint16)).save, "PNG"),
        *(bytes_of(color.save, "JPEG", exif=exif, **options) for options in ({}, {"progressive": True})),
        bytes_of(color.convert("CMYK").save, "JPEG", icc_profile=bytes(300)),
        bytes_of(color.quantize(8).save, "GIF", save_all=True, append_images=[color.quantize(4)]),
        *(bytes_of(each.save, "BMP") for each in (color, gray.convert("1"), color.quantize(8))),
        *(bytes_of(alpha.save, "WEBP", lossless=lossless, exif=exif) for lossless in (True, False)),
        bytes_of(color.save, "WEBP", save_all=True, append_images=[alpha]),
        *(bytes_of(color.save, "TIFF", compression=kind) for kind in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")),
        bytes_of(gray.convert("1").save, "TIFF", compression="group4"),
        bytes_of(color.save, "PPM"),
        b"P3 3 2 255\n" + b"1 2 3 " * 6,
    ]
    return tuple(made)


def bomb():
    """A whole picture of 144 million black pixels in 150 KB, which Pillow itself would only warn of."""
    return bytes_of(Image.new("P", (12_000, 12_000)).save, "PNG")


def picture_reader():
    fit = Fit((4, 4, 3), "crop", convert_channels=True)

    def read(path):
        load_pictures(path, fit, num_levels=256)

    return Reader(
        "picture",
        "one.png",
        lambda: (*pictures(), bomb()),
        mutations.change_picture,
        read,
        memory=PICTURE,
        seconds=DECODING,
    )


def mask_reader():
    masks = [np.kron([[0, 255], [255, 0]], np.ones((2, 2))).astype(np.uint8)]
    inputs = tuple(
        bytes_of(Image.fromarray(each).save, kind) for each in masks for kind in ("PNG", "BMP", "GIF", "TIFF")
    )
    read = lambda path: read_mask(str(path), SHAPE, 0)  # noqa: E731
    return Reader("mask", "mask.png", inputs, mutations.change_picture, read, memory=PICTURE, seconds=DECODING)


def folder_reader():
    def pack(names, method):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, content in zip(names, pictures()[1:], strict=False):
                archive.writestr(name, content)
            archive.writestr("train/b/a.npy", bytes_of(np.save, images()[0]))
        return file.getvalue()

    names = ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png")
    inputs = (
        pack(names, zipfile.ZIP_STORED),
        pack(names, zipfile.ZIP_DEFLATED),
        pack(("x/1.png",), zipfile.ZIP_STORED),
    )
    rules = Rules(Fit((4, 4, 3), "crop", convert_channels=True, group="data"), 256)

    def read(path):
        for split in ("train", "test"):
            source = load_folder(str(path), split, rules)
            source.images(np.arange(len(source)))

    def inner(random, others, data):
        if data.startswith(b"\x93NUMPY"):
            return mutations.change_array(random, others, data)
        return mutations.change_picture(random, [data])

    change = functools.partial(mutations.change_zip, inner=inner)
    return Reader(
        "zip_folder", "own.zip", inputs, change, read, clean=clean_cache, memory=2 * PICTURE, seconds=DECODING
    )


# --- JSON ------------------------------------------------------------------------------------------------------------


def report_text(value):
    from metrics.metric import Metric
    from report import CheckpointInfo, DataInfo, FeatureInfo, ReferenceInfo, Report, SamplerInfo

    metrics = (Metric("frechet_distance", value, 0.1, 50, interval=(1.0, 2.0)), Metric("bpd", 3.1, None, 9, "bits/dim"))
    report = Report(
        CheckpointInfo(3, 36),
        42,
        DataInfo("digits", 1500, 297, 17, "ab12"),
        metrics,
        SamplerInfo({"sampling.method": "pc"}, 50, 1.5, 200, "the nearest of 17 levels"),
        FeatureInfo("a network", "cd34", 0.9),
        ReferenceInfo("train", 1500, "ef56"),
        {"grid": "samples.png"},
    )
    return json.dumps(report.to_dict()).encode()


def report_reader():
    other = Path(tempfile.mkdtemp()) / "report_4.json"
    other.write_bytes(report_text(2.0))
    inputs = (report_text(1.0), report_text(None))
    read = lambda path: compare_reports([str(path), str(other)])  # noqa: E731
    return Reader("report", "report_3.json", inputs, mutations.change_json, read)


def config_reader():
    config = tiny.make_config()
    text = json.dumps({"config": flatten(config), "versions": workdirs.versions(), "commit": "x"}).encode()

    def read(path):
        compatibility.check_same_experiment(path.parent, config)
        workdirs.record_config(path.parent, config)

    # What differs is told by the name of the folder.
    return Reader(
        *("config", workdirs.CONFIG_FILE, (text,), mutations.change_json, read),
        name_in_message=tempfile.gettempdir(),
    )


def settings_reader():
    config, names = tiny.make_config(), ("samples",)
    folder = Path(tempfile.mkdtemp())
    results.open_folder(folder, config, names, {"w": np.zeros(3)}, flag="--output", contents={"images": "ab"})
    text = (folder / results.SETTINGS_FILE).read_bytes()

    def read(path):
        results.open_folder(path.parent, config, names, {"w": np.zeros(3)}, flag="--output", contents={"images": "ab"})
        results.record_facts(path.parent, {"x": 1})

    # What differs is told by the name of the folder.
    return Reader(
        *("settings", results.SETTINGS_FILE, (text,), mutations.change_json, read),
        name_in_message=tempfile.gettempdir(),
    )


def losses_reader():
    lines = b"".join(json.dumps({"step": 2 * i, "loss": 0.5, "eval_loss": 1.0}).encode() + b"\n" for i in range(4))

    def read(path):
        plots.loss_figure(plots.read_losses(path))
        with progress.TrainingProgress(path.parent, first_step=4, num_steps=9, batch_size=2):
            pass

    return Reader("losses", plots.LOSSES_FILE, (lines,), mutations.change_lines, read)


# --- all -------------------------------------------------------------------------------------------------------------

READERS = {
    "msgpack": msgpack_reader,
    "torch": torch_reader,
    "torch_legacy": torch_legacy_reader,
    "tfrecord": tfrecord_reader,
    "npz": npz_reader,
    "npy": npy_reader,
    "statistics": statistics_reader,
    "picture": picture_reader,
    "mask": mask_reader,
    "zip_folder": folder_reader,
    "report": report_reader,
    "config": config_reader,
    "settings": settings_reader,
    "losses": losses_reader,
    "orbax": orbax_reader,
}


def use_own_cache():
    """Puts the cache into a folder that is thrown away."""
    os.environ["SCORE_SDE_CACHE"] = tempfile.mkdtemp()
