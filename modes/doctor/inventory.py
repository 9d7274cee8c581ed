"""What --mode doctor examines: packages, devices, folders, weights, statistics, data and a configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from packaging.requirements import Requirement

import datasets
from checks import python_version, why_no_tensorflow
from configs.settings import check
from errors import UserError
from experiment import smoke
from experiment.build import build_experiment
from metrics import efficientnet, inception, tfgan
from modes.evaluate.real_features import choose_extractor
from parallel import distributed
from parallel.cluster import find_place, is_tpu_worker
from sources import tfds_build
from sources.tfds import data_folder
from storage.files import cache_folder, local_path

ROOT = Path(__file__).resolve().parents[2]
OK, MISSING, WARNING, BROKEN = "ok", "missing", "warning", "BROKEN"
GIB = 2**30
LITTLE_DISK = 2 * GIB  # free bytes; below it a warning
NUM_NAMED = 6  # items that a line names
ANY_CONFIG = "configs/vp/cifar10_ddpmpp_continuous.py"
INSTALL = "python -m pip install -r"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    group: str  # heading, such as "packages"
    name: str  # of what was examined
    state: str  # OK; MISSING if optional; WARNING if it may not work; BROKEN if nothing works with it
    text: str
    remedy: str = ""  # command or setting that fixes it


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def version_of(package: str) -> str:
    """Return the installed version; empty if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def requirements(file: str) -> list[Requirement]:
    """Return the packages that a requirements file itself names."""
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def _check_packages(file: str, name: str, purpose: str, state_of_missing: str) -> Iterator[Finding]:
    """Compare the installed packages with those that the requirements file itself names."""
    finding, fix = functools.partial(Finding, "packages"), f"{INSTALL} {file}"
    here = {"python_version": python_version()}
    wanted = [each for each in requirements(file) if each.marker is None or each.marker.evaluate(here)]
    if not wanted:
        reason, fix = why_no_tensorflow()
        yield finding(name, MISSING, f"{purpose}; {reason}", fix)
        return
    found = {each.name: version_of(each.name) for each in wanted}
    for each in wanted:
        if found[each.name] and not each.specifier.contains(found[each.name], prereleases=True):
            yield finding(each.name, WARNING, f"{found[each.name]} is installed; tested with {each.specifier}", fix)
    if missing := [package for package, version in found.items() if not version]:
        yield finding(name, state_of_missing, f"{purpose}; not installed: {', '.join(missing)}", fix)
    else:
        versions = ", ".join(f"{package} {version}" for package, version in found.items())
        yield finding(name, OK, f"{purpose}; {versions}")


def find_packages() -> Iterator[Finding]:
    """Examine Python and the packages."""
    [wanted] = re.findall(r'requires-python = "(.*?)"', (ROOT / "pyproject.toml").read_text())
    python = platform.python_version()
    if Requirement(f"python{wanted}").specifier.contains(python, prereleases=True):
        yield Finding("packages", "Python", OK, python)
    else:
        text = f"{python}; tested with {wanted}"
        yield Finding("packages", "Python", WARNING, text, "make demo PYTHON=python3.12")
    yield from _check_packages("requirements-core.txt", "core", "required", BROKEN)
    purpose = "prepares TFDS data sets, computes TF-GAN's features"
    yield from _check_packages("requirements.txt", "TensorFlow", purpose, MISSING)


def find_devices() -> Iterator[Finding]:
    """Examine what JAX computes on; if it is not available, use the CPU from here on."""
    finding = functools.partial(Finding, "devices")
    try:
        distributed.check_platform()
    except UserError as error:
        yield finding("platform", BROKEN, f"{error}; the rest is examined on the CPU")
        jax.config.update("jax_platforms", "cpu")
    found = distributed.describe_devices()
    text = f"{found['devices']} x {found['device_kind']}, {found['cpus']} CPUs, {found['processes']} process(es)"
    yield finding(found["platform"], OK, text)
    if found["platform"] == "cpu" and shutil.which("nvidia-smi"):
        text = "this machine has an NVIDIA driver, but JAX computes on the CPU"
        yield finding("gpu", WARNING, text, 'python -m pip install --upgrade "jax[cuda12]"')
    try:
        place = find_place(os.environ)
    except UserError as error:
        yield finding("processes", WARNING, str(error))
        return
    text = "only this one; neither SLURM nor Open MPI started others"
    if place:
        text = f"{place} (by {place.found_by})"
    elif is_tpu_worker(os.environ):
        text = "JAX looks for the other workers of a TPU pod"
    yield finding("processes", OK, text)


def find_folders() -> Iterator[Finding]:
    """Examine the folders of the caches."""
    compiled = Path(getattr(jax.config, "jax_compilation_cache_dir", None) or cache_folder("xla"))
    for name, folder, variable in (
        ("cache", cache_folder("data").parent, "SCORE_SDE_CACHE"),
        ("compiled programs", compiled, "JAX_COMPILATION_CACHE_DIR"),
    ):
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(existing).free
        state, text = OK, f"{folder}{'' if folder.exists() else ' (not created yet)'}, {free / GIB:.1f} GiB free"
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            state, text = BROKEN, f"{folder} cannot be written"
        elif free < LITTLE_DISK:
            state = WARNING
        yield Finding("folders", name, state, text, "" if state == OK else f"export {variable}=FOLDER, on another disk")


def find_weights() -> Iterator[Finding]:
    """Look for the weights of the feature extractors."""
    finding, path = functools.partial(Finding, "weights"), inception.weights_path()
    get = inception.how_to_get_weights(path)
    if not path.exists():
        yield finding("inception", MISSING, f"FID's network; {path} is not there", get)
    elif not zipfile.is_zipfile(path):
        yield finding("inception", BROKEN, f"{path} is damaged", get)
    else:
        yield finding("inception", OK, f"{path}, {path.stat().st_size / 2**20:.0f} MiB")
    if efficientnet.is_installed():
        yield finding("efficientnet_lite0", OK, f"in the package {efficientnet.PACKAGE}")
    else:
        text = "ImageNet features where there is no Inception; not installed"
        yield finding("efficientnet_lite0", MISSING, text, efficientnet.HOW_TO_INSTALL)
    # Where TensorFlow Hub keeps what it has downloaded.
    cache = os.environ.get("TFHUB_CACHE_DIR") or str(Path(tempfile.gettempdir()) / "tfhub_modules")
    folder = Path(cache) / hashlib.sha1(tfgan.TFHUB_URL.encode(), usedforsecurity=False).hexdigest()
    if (folder / "saved_model.pb").exists():
        yield finding("tfgan", OK, str(folder))
    else:
        text = f"TF-GAN's SavedModel; {folder} is not there, and is downloaded when first used"
        unpack = f"mkdir -p {folder} && curl -L '{tfgan.TFHUB_URL}?tf-hub-format=compressed' | tar -xz -C {folder}"
        yield finding("tfgan", MISSING, text, unpack)
    yield finding("classifier", OK, "is trained on the data set itself, in each workdir")


def find_statistics() -> Iterator[Finding]:
    """Look for cached statistics of real images."""
    folder = cache_folder("stats")
    files = sorted(path.name for path in folder.glob("*.npz"))
    if files:
        yield Finding("statistics", "reference", OK, f"{len(files)} in {folder}: {_named(files)}")
    else:
        text = f"none in {folder}; without them an evaluation computes them from the training images"
        yield Finding("statistics", "reference", MISSING, text, "python main.py --config CONFIG --mode stats")


def find_data(path: str = "") -> Iterator[Finding]:
    """Look for data sets; `path` is a TFDS folder, empty: the usual one."""
    finding = functools.partial(Finding, "data")
    try:
        train, test = (len(datasets.load_digits(split)) for split in ("train", "test"))
        yield finding("digits", OK, f"{train:,} and {test:,} images, inside scikit-learn")
    except (ImportError, OSError, ValueError) as error:
        yield finding("digits", BROKEN, f"cannot be read: {error}", f"{INSTALL} requirements-core.txt")
    folder = data_folder(path)
    found = {file.parent for depth in ("*/*", "*/*/*") for file in folder.glob(f"{depth}/*.array_record*")}
    names = sorted(str(each.relative_to(folder)) for each in found if (each / "dataset_info.json").exists())
    if names:
        yield finding("TFDS", OK, f"{folder}: {_named(names)}")
    else:
        how = f"python main.py --config {ANY_CONFIG} --mode prepare"
        yield finding("TFDS", MISSING, f"nothing is prepared in {folder}", how)
    text, files = "none are cached yet", sorted(cache_folder("data").glob("*/images.npy"))
    if files:
        size = sum(file.stat().st_size for file in files) / GIB
        shapes = [" x ".join(map(str, np.load(file, mmap_mode="r", allow_pickle=False).shape)) for file in files]
        text = f"{size:.2f} GiB cached, may be deleted: {_named(shapes)}"
    yield finding("decoded images", OK, text)


def _find_configured_data(config: ConfigDict) -> Finding:
    """Look for the configured data set; decodes nothing."""
    data = config.data
    finding = functools.partial(Finding, "configuration", f"data.dataset={data.dataset}")
    try:
        check(config, "data")
        if tfds_name := datasets.tfds_name(data.dataset, data.category):
            if tfds_build.is_prepared(tfds_name, data.path):
                return finding(OK, f"prepared in {data_folder(data.path)}")
            place = f" --config.data.path={data.path}" if data.path else ""
            remedy = f"python main.py --config CONFIG --mode prepare{place}"
            return finding(MISSING, f"{tfds_name} is not prepared in {data_folder(data.path)}", remedy)
        if data.dataset == "digits":
            return finding(OK, "inside scikit-learn")
        name, value = ("tfrecords_path", "FILE") if data.dataset in ("FFHQ", "CelebAHQ") else ("path", "DIR")
        file, flag = data[name], f"--config.data.{name}={value}"
        if not file or not local_path(file, f"data.{name}").exists():
            return finding(MISSING, f"{file!r} is not there" if file else "no path is configured", flag)
        return finding(OK, f"{file} is there")
    except UserError as error:
        return finding(BROKEN, str(error))


def _find_extractor(config: ConfigDict) -> Finding:
    finding = functools.partial(Finding, "configuration", "extractor")
    try:
        key = choose_extractor(config)
    except UserError as error:
        return finding(BROKEN, str(error))
    text, weights = f"{key} measures samples", inception.weights_path(config.eval.weights)
    if key == "inception" and not weights.exists():
        return finding(MISSING, f"{text}; {weights} is not there", inception.how_to_get_weights(weights))
    if key == "efficientnet_lite0" and not efficientnet.is_installed():
        return finding(MISSING, f"{text}; not installed", efficientnet.HOW_TO_INSTALL)
    return finding(OK, text)


def _find_reference(config: ConfigDict) -> Finding:
    file, finding = config.eval.reference, functools.partial(Finding, "configuration", "reference")
    if not file:
        return finding(OK, "samples are compared with the training images")
    try:
        if local_path(file, "eval.reference").exists():
            return finding(OK, f"samples are compared with {file}")
    except UserError as error:
        return finding(BROKEN, str(error))
    remedy = f"python main.py --config CONFIG --mode stats --output {file}"
    return finding(MISSING, f"eval.reference={file!r} is not there", remedy)


def find_configured(config: ConfigDict) -> Iterator[Finding]:
    """Examine a configuration: whether it can be built, its data set, extractor and reference."""
    try:
        build_experiment(config)
        distributed.check_batch_size("training.batch_size", config.training.batch_size)
        yield Finding("configuration", "settings", OK, "are valid")
    except UserError as error:
        yield Finding("configuration", "settings", BROKEN, str(error))
    yield _find_configured_data(config)
    yield _find_extractor(config)
    yield _find_reference(config)


def take_inventory(config: ConfigDict | UserError | None = None) -> Iterator[Finding]:
    """Yield what is there and what is missing; `config`: see `doctor.doctor`."""
    for find in (find_packages, find_devices, find_folders, find_weights, find_statistics):
        yield from find()
    if config is None or isinstance(config, UserError):
        yield from find_data()
        if config is not None:
            yield Finding("configuration", "--config", BROKEN, str(config))
        return
    resolved = smoke.shrink(config) if config.training.smoke else config  # unchecked: what is wrong is a finding
    data, folder = resolved.data, ""
    with contextlib.suppress(UserError):  # which `_find_configured_data` reports
        folder = str(data_folder(data.path)) if datasets.tfds_name(data.dataset, data.category) else ""
    yield from find_data(folder)
    yield from find_configured(resolved)
