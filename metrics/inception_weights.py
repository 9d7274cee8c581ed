"""Weights of the 2015 Inception network, from the public files to the .npz that metrics/inception.py reads.

Three kinds of file hold the same numbers: PyTorch's pt_inception-2015-12-05-6726825d.pth, read without PyTorch and
without running what is in it; TensorFlow's frozen graph classify_image_graph_def.pb; and a TF-Hub SavedModel of that
graph. The last two are read by TensorFlow in a process of its own.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from errors import UserError
from legacy.torch_file import read_torch
from metrics.images import flatten_params, params_hash
from metrics.inception import SIDE, Inception, weights_path
from metrics.pretrained import check_params, param_shapes, params_from_torch
from storage.files import read_npz, write_atomically

PTH_SHA256 = "6726825d"  # how the published file's SHA-256 starts: PyTorch puts it in the name
GRAPH_SECONDS = 300  # limit for TensorFlow to start and read a graph

# --- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_layer(layer: str, part: str) -> str:
    """Returns PyTorch's name of a layer: "Mixed_5b/branch1x1" and "norm" are Mixed_5b.branch1x1.bn."""
    name = layer.replace("/", ".")
    return {"dense": name, "conv": f"{name}.conv", "norm": f"{name}.bn"}[part]


def _read_pth(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    state = read_torch(path)
    if not all(isinstance(value, np.ndarray) for value in state.values()):
        raise UserError(f"{path} holds no dictionary of tensors; expected pt_inception-2015-12-05-6726825d.pth")
    return params_from_torch(state, shapes, torch_layer)


# --- TensorFlow ------------------------------------------------------------------------------------------------------

STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")  # mixed, mixed_1, ..., mixed_10
# The branches of more than one layer, and that after a pooling, are TensorFlow's tower, tower_1, tower_2.
TOWERS = {
    **dict.fromkeys(("5b", "5c", "5d"), ("branch5x5", "branch3x3dbl", "branch_pool")),
    "6a": ("branch3x3dbl",),
    **dict.fromkeys(("6b", "6c", "6d", "6e"), ("branch7x7", "branch7x7dbl", "branch_pool")),
    "7a": ("branch3x3", "branch7x7x3"),
    **dict.fromkeys(("7b", "7c"), ("branch3x3", "branch3x3dbl", "branch_pool")),
}
TF_ARRAYS = {
    "kernel": "conv2d_params",
    "scale": "batchnorm/gamma",
    "bias": "batchnorm/beta",
    "mean": "batchnorm/moving_mean",
    "var": "batchnorm/moving_variance",
}
TF_DENSE = {"fc/kernel": "softmax/weights", "fc/bias": "softmax/biases"}
TF_LAST = "softmax/weights"  # tells what all names begin with, if the graph was imported into another


def _numbered(name: str, number: int) -> str:
    """Returns the name as TensorFlow makes it unique: conv, conv_1, conv_2."""
    return f"{name}_{number}" if number else name


def tensorflow_name(path: str) -> str:
    """Returns the name that the frozen graph gives to an array.

    Args:
      path: slash-joined, such as "Mixed_7b/branch3x3_2a/kernel", which is mixed_9/tower/mixed/conv/conv2d_params.
    """
    if path in TF_DENSE:
        return TF_DENSE[path]
    *block, layer, array = path.split("/")
    if not block:
        return f"{_numbered('conv', STEM.index(layer))}/{TF_ARRAYS[array]}"
    code = block[0].removeprefix("Mixed_")
    parts = [_numbered("mixed", BLOCKS.index(code))]
    match = re.fullmatch(r"(branch.*?)(?:_(\d)([ab]?))?", layer)
    assert match is not None
    branch, number, side = match.groups()
    if branch in TOWERS[code]:
        parts.append(_numbered("tower", TOWERS[code].index(branch)))
    if side:
        parts += ["mixed", _numbered("conv", "ab".index(side))]
    else:
        parts.append(_numbered("conv", int(number or 1) - 1))
    return "/".join([*parts, TF_ARRAYS[array]])


def _read_constants(path: Path) -> dict[str, np.ndarray]:
    """Reads the constants and variables of a TensorFlow graph by a process that has TensorFlow loaded."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "constants.npz"
        command = [sys.executable, "-m", "metrics.graph_constants", str(path.absolute()), str(output)]
        root = Path(__file__).resolve().parent.parent
        try:
            run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=GRAPH_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"TensorFlow did not read {path} in {GRAPH_SECONDS} s; use the .pth file") from error
        if run.returncode:
            reason = (run.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"{path} cannot be read by TensorFlow: {reason}; the .pth file needs no TensorFlow")
        return read_npz(output)


def _from_graph(constants: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Picks the network's arrays out of a graph's, of which it has others too."""
    prefixes = [name.removesuffix(TF_LAST) for name in constants if f"/{name}".endswith(f"/{TF_LAST}")]
    prefix = prefixes[0] if prefixes else ""
    found = {path: constants.get(prefix + tensorflow_name(path)) for path in shapes}
    return {path: array for path, array in found.items() if array is not None}


# --- conversion ------------------------------------------------------------------------------------------------------


def _read(source: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads the network's arrays from any of the three kinds of file, unchecked."""
    if source.is_dir() or source.suffix == ".pb":
        return _from_graph(_read_constants(source), shapes)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if not digest.startswith(PTH_SHA256):
        logging.warning(
            "%s is not the published file: its SHA-256 starts with %s, not %s; FID by these weights cannot be "
            "compared with others'",
            *(source, digest[: len(PTH_SHA256)], PTH_SHA256),
        )
    return _read_pth(source, shapes)


def convert_weights(checkpoint: str | Path, output: str | Path = "") -> tuple[Path, str]:
    """Writes the weights of the Inception network as the .npz file that the extractor reads, atomically.

    Args:
      checkpoint: pt_inception-2015-12-05-6726825d.pth, classify_image_graph_def.pb, or the folder of a TF-Hub
        SavedModel of tfgan/eval/inception/1.
      output: file to write; empty: where the extractor looks.

    Returns:
      (file, SHA-256 of the parameters).

    Raises:
      UserError: if there is no such file.
      UserError: if it does not hold the weights of this network, or the output cannot be written.
    """
    source, target, shapes = Path(checkpoint), weights_path(str(output)), param_shapes(Inception(), SIDE)
    if not source.exists():
        raise UserError(f"--checkpoint {source} does not exist")
    try:
        arrays = _read(source, shapes)
    except OSError as error:
        raise UserError(f"--checkpoint {source} cannot be read: {error.strerror}") from error
    params = check_params(str(source), arrays, shapes)
    flat: dict[str, Any] = {**flatten_params(params)}
    digest = params_hash(params)
    try:
        write_atomically(target, lambda file: np.savez(file, **flat))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another --output") from error
    logging.info("wrote %s: %d arrays, SHA-256 of the parameters %s", target, len(flat), digest)
    return target, digest
