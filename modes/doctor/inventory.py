"""What --mode doctor looks at: packages, devices, folders, weights, statistics and data, present or missing."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from packaging.requirements import Requirement

import datasets
from checks import python_version, why_no_tensorflow
from configs.settings import check
from experiment.build import build_experiment
from metrics import efficientnet, inception, tfgan
from modes.evaluate.real_features import choose_extractor
from parallel import distributed
from parallel.cluster import find_place, is_tpu_worker
from sources import tfds_build
from sources.tfds import data_folder
from storage.files import cache_folder

ROOT = Path(__file__).resolve().parents[2]
OK, MISSING, WARNING, BROKEN = "ok", "missing", "warning", "BROKEN"
GIB = 2**30
LITTLE_DISK = 2 * GIB  # free bytes; below it a warning
NUM_NAMED = 6  # things that a line names
ANY_CONFIG = "configs/vp/cifar10_ddpmpp_continuous.py"
INSTALL = "python -m pip install -r"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      group: what it is about, such as "packages".
      name: of the thing.
      state: OK; MISSING, if it can be done without; WARNING, if it may not work as it is; BROKEN, if nothing works so.
      text: what was found.
      remedy: command or setting that mends it; empty if nothing is to be mended.
    """

    group: str
    name: str
    state: str
    text: str
    remedy: str = ""


def _named(names: list[str]) -> str:
    """Names the first few and counts the others."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


# --- packages and devices --------------------------------------------------------------------------------------------


def requirements(file: str) -> list[Requirement]:
    """Reads the packages that a requirements file itself names."""
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def version_of(package: str) -> str:
    """Returns the installed version; empty if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_packages(file: str, *, name: str, purpose: str, is_needed: bool) -> Iterator[Finding]:
    """Compares what is installed with a requirements file: one line if all is well, one for each that differs."""
    here = {"python_version": python_version()}
    wanted = [each for each in requirements(file) if each.marker is None or each.marker.evaluate(here)]
    install = f"{INSTALL} {file}"
    if not wanted:
        reason, fix = why_no_tensorflow()
        yield Finding("packages", name, MISSING, f"{purpose}; {reason}", fix)
        return
    found = {each.name: version_of(each.name) for each in wanted}
    missing = [package for package, version in found.items() if not version]
    if missing:
        state = BROKEN if is_needed else MISSING
        yield Finding("packages", name, state, f"{purpose}; not installed: {', '.join(missing)}", install)
    for each in wanted:
        if found[each.name] and not each.specifier.contains(found[each.name], prereleases=True):
            text = f"{found[each.name]} is installed, {each.specifier} is what was tried"
            yield Finding("packages", each.name, WARNING, text, install)
    if not missing:
        versions = ", ".join(f"{package} {version}" for package, version in found.items())
        yield Finding("packages", name, OK, f"{purpose}; {versions}")


def find_packages() -> Iterator[Finding]:
    """Looks at Python and the packages."""
    wanted = re.search(r'requires-python = "(.*?)"', (ROOT / "pyproject.toml").read_text())
    python = platform.python_version()
    fits = not wanted or Requirement(f"python{wanted[1]}").specifier.contains(python, prereleases=True)
    text = python if fits else f"{python}; {wanted[1] if wanted else ''} is supported"
    yield Finding("packages", "Python", OK if fits else WARNING, text, "" if fits else "make demo PYTHON=python3.12")
    yield from check_packages("requirements-core.txt", name="core", purpose="all that is needed", is_needed=True)
    purpose = "prepares TFDS data sets, computes TF-GAN's features"
    yield from check_packages("requirements.txt", name="TensorFlow", purpose=purpose, is_needed=False)


def find_devices() -> Iterator[Finding]:
    """Looks at what JAX computes on."""
    found = distributed.describe_devices()
    text = f"{found['devices']} x {found['device_kind']}, {found['cpus']} CPUs, {found['processes']} process(es)"
    yield Finding("devices", found["platform"], OK, text)
    if found["platform"] == "cpu" and shutil.which("nvidia-smi"):
        text = "this machine has an NVIDIA driver, but JAX computes on the CPU"
        yield Finding("devices", "gpu", WARNING, text, 'python -m pip install --upgrade "jax[cuda12]"')
    yield _find_processes(os.environ)


def _find_processes(environ: Mapping[str, str]) -> Finding:
    """Looks for other processes, which training, evaluation and the like would join; the doctor itself does not."""
    try:
        place = find_place(environ)
    except ValueError as error:
        return Finding("devices", "processes", WARNING, str(error))
    if place:
        text = f"{place} (by {place.found_by})"
    elif is_tpu_worker(environ):
        text = "JAX looks for the other workers of a TPU pod"
    else:
        text = "this one; neither SLURM nor Open MPI started others"
    return Finding("devices", "processes", OK, text)


# --- folders ---------------------------------------------------------------------------------------------------------


def _existing(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def _find_folder(name: str, folder: Path, remedy: str) -> Finding:
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("folders", name, BROKEN, f"{folder} cannot be written", remedy)
    free = shutil.disk_usage(existing).free
    text = f"{folder}{'' if folder.exists() else ' (not made yet)'}, {free / GIB:.1f} GiB free"
    return Finding("folders", name, WARNING, text, remedy) if free < LITTLE_DISK else Finding("folders", name, OK, text)


def find_folders() -> Iterator[Finding]:
    """Looks at where things are kept."""
    yield _find_folder("cache", cache_folder("data").parent, "export SCORE_SDE_CACHE=FOLDER, on another disk")
    compiled = Path(getattr(jax.config, "jax_compilation_cache_dir", None) or cache_folder("xla"))
    yield _find_folder("compiled programs", compiled, "export JAX_COMPILATION_CACHE_DIR=FOLDER, on another disk")


# --- weights and statistics ------------------------------------------------------------------------------------------


def _find_inception() -> Finding:
    path, get = inception.weights_path(), inception.how_to_get_weights(inception.weights_path())
    if not path.exists():
        return Finding("weights", "inception", MISSING, f"FID's network; {path} is not there", get)
    if not zipfile.is_zipfile(path):
        return Finding("weights", "inception", BROKEN, f"{path} is damaged", get)
    return Finding("weights", "inception", OK, f"{path}, {path.stat().st_size / 2**20:.0f} MiB")


def _find_saved_model() -> Finding:
    """Looks where TensorFlow Hub keeps what it has downloaded."""
    cache = os.environ.get("TFHUB_CACHE_DIR") or str(Path(tempfile.gettempdir()) / "tfhub_modules")
    folder = Path(cache) / hashlib.sha1(tfgan.TFHUB_URL.encode(), usedforsecurity=False).hexdigest()
    if (folder / "saved_model.pb").exists():
        return Finding("weights", "tfgan", OK, str(folder))
    text = f"TF-GAN's SavedModel; {folder} is not there, and is downloaded when first used"
    unpack = f"mkdir -p {folder} && curl -L '{tfgan.TFHUB_URL}?tf-hub-format=compressed' | tar -xz -C {folder}"
    return Finding("weights", "tfgan", MISSING, text, unpack)


def find_weights() -> Iterator[Finding]:
    """Looks for the weights of the feature extractors."""
    yield _find_inception()
    if efficientnet.is_installed():
        yield Finding("weights", "efficientnet_lite0", OK, f"in the package {efficientnet.PACKAGE}")
    else:
        text = "ImageNet features where there is no Inception; not installed"
        yield Finding("weights", "efficientnet_lite0", MISSING, text, efficientnet.HOW_TO_INSTALL)
    yield _find_saved_model()
    yield Finding("weights", "classifier", OK, "is trained on the data set itself, in each workdir")


def find_statistics() -> Iterator[Finding]:
    """Looks for statistics of real images that are kept."""
    files = sorted(path.name for path in cache_folder("stats").glob("*.npz"))
    if files:
        yield Finding("statistics", "reference", OK, f"{len(files)} in {cache_folder('stats')}: {_named(files)}")
    else:
        text = f"none in {cache_folder('stats')}; without, an evaluation computes them from the training images"
        yield Finding("statistics", "reference", MISSING, text, "python main.py --config CONFIG --mode stats")


# --- data ------------------------------------------------------------------------------------------------------------


def _find_digits() -> Finding:
    try:
        sizes = [len(datasets.load_digits(split)) for split in ("train", "test")]
    except (ImportError, OSError, ValueError) as error:
        return Finding("data", "digits", BROKEN, f"cannot be read: {error}", f"{INSTALL} requirements-core.txt")
    return Finding("data", "digits", OK, f"{sizes[0]:,} and {sizes[1]:,} images, inside scikit-learn")


def prepared_names(folder: Path) -> list[str]:
    """Names the data sets of a TFDS folder that can be read by index."""
    found = {path.parent for depth in ("*/*", "*/*/*") for path in folder.glob(f"{depth}/*.array_record*")}
    return sorted(str(path.relative_to(folder)) for path in found if (path / "dataset_info.json").exists())


def _find_kept() -> Finding:
    files = sorted(cache_folder("data").glob("*/images.npy"))
    if not files:
        return Finding("data", "decoded images", OK, "none are kept yet")
    size = sum(path.stat().st_size for path in files) / GIB
    shapes = [" x ".join(map(str, np.load(path, mmap_mode="r", allow_pickle=False).shape)) for path in files]
    return Finding("data", "decoded images", OK, f"{size:.2f} GiB kept, which may be deleted: {_named(shapes)}")


def find_data(path: str = "") -> Iterator[Finding]:
    """Looks for data sets; `path` is a TFDS folder, empty: the usual one."""
    yield _find_digits()
    folder = data_folder(path)
    names = prepared_names(folder)
    if names:
        yield Finding("data", "TFDS", OK, f"{folder}: {_named(names)}")
    else:
        how = f"python main.py --config {ANY_CONFIG} --mode prepare"
        yield Finding("data", "TFDS", MISSING, f"nothing is prepared in {folder}", how)
    yield _find_kept()


# --- the configuration -----------------------------------------------------------------------------------------------


def _look_for_data(config: ConfigDict) -> tuple[str, str, str]:
    """Returns state, text and remedy for the configured data set; nothing is decoded that is not yet."""
    data, flag = config.data, "--config.data.path=DIR"
    check(config, "data")
    if name := datasets.tfds_name(config):
        if tfds_build.is_prepared(name, data.path):
            return OK, f"prepared in {data_folder(data.path)}", ""
        text = f"{name} is not prepared in {data_folder(data.path)}"
        place = f" --config.data.path={data.path}" if data.path else ""
        return MISSING, text, f"python main.py --config CONFIG --mode prepare{place}"
    file = data.path
    if data.dataset in ("FFHQ", "CelebAHQ"):
        file, flag = data.tfrecords_path, "--config.data.tfrecords_path=FILE"
    if data.dataset == "digits":
        return OK, "inside scikit-learn", ""
    if not file or not Path(file).expanduser().exists():
        return MISSING, f"{file!r} is not there" if file else "no place is configured", flag
    return OK, f"{file} is there", ""


def _find_extractor(config: ConfigDict) -> Finding:
    """Looks for what measures samples; which one "auto" is depends on what there is."""
    try:
        key = choose_extractor(config)
    except ValueError as error:
        return Finding("configuration", "extractor", BROKEN, str(error))
    text, weights = f"{key} measures samples", inception.weights_path(config.eval.weights)
    if key == "inception" and not weights.exists():
        return Finding(
            "configuration",
            "extractor",
            MISSING,
            f"{text}; {weights} is not there",
            inception.how_to_get_weights(weights),
        )
    if key == "efficientnet_lite0" and not efficientnet.is_installed():
        return Finding("configuration", "extractor", MISSING, f"{text}; not installed", efficientnet.HOW_TO_INSTALL)
    return Finding("configuration", "extractor", OK, text)


def _find_reference(config: ConfigDict) -> Finding:
    file = config.eval.reference
    if not file:
        return Finding("configuration", "reference", OK, "samples are compared with the training images")
    if Path(file).expanduser().exists():
        return Finding("configuration", "reference", OK, f"samples are compared with {file}")
    remedy = f"python main.py --config CONFIG --mode stats --output {file}"
    return Finding("configuration", "reference", MISSING, f"eval.reference={file!r} is not there", remedy)


def find_configured(config: ConfigDict) -> Iterator[Finding]:
    """Looks at a configuration: whether it can be built, and its data set."""
    try:
        build_experiment(config)
        distributed.check_batch_size("training.batch_size", config.training.batch_size)
        yield Finding("configuration", "settings", OK, "are understood")
    except ValueError as error:
        yield Finding("configuration", "settings", BROKEN, str(error))
    try:
        state, text, remedy = _look_for_data(config)
    except ValueError as error:
        state, text, remedy = BROKEN, str(error), ""
    yield Finding("configuration", f"data.dataset={config.data.dataset}", state, text, remedy)
    yield _find_extractor(config)
    yield _find_reference(config)


def take_inventory(config: Any = None) -> Iterator[Finding]:
    """Yields what there is and what is missing; `config` is an experiment configuration, or None."""
    yield from find_packages()
    yield from find_devices()
    yield from find_folders()
    yield from find_weights()
    yield from find_statistics()
    yield from find_data(config.data.path if config is not None and datasets.tfds_name(config) else "")
    if config is not None:
        yield from find_configured(config)
