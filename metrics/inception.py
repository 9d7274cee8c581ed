"""The extractor "inception": the Inception network of 2015 that defines FID and the Inception Score.

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", as in TensorFlow's frozen graph
classify_image_graph_def of 2015-12-05 and PyTorch's pt_inception-2015-12-05: average pooling inside the blocks does
not count the padding, the last block uses max pooling, and there are 1008 classes, of which ImageNet uses 1000.
Layers have PyTorch's names.

`convert_weights` makes the .npz of the weights from any of three public files with the same numbers: PyTorch's
pt_inception-2015-12-05-6726825d.pth, read without PyTorch and without running its content; TensorFlow's frozen graph
classify_image_graph_def.pb; and a TF-Hub SavedModel of that graph. TensorFlow reads the last two in a separate process.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from errors import UserError
from legacy.torch_file import read_torch
from metrics.images import flatten_params, params_hash
from metrics.pretrained import PRECISION, ConvNorm, PretrainedExtractor, check_params, param_shapes, params_from_torch
from storage.files import cache_folder, local_path, read_npz, write_atomically

SIDE = 299  # pixels of the network's input
NUM_FEATURES, NUM_CLASSES = 2048, 1008
WEIGHTS = "inception_2015.npz"  # in the cache's folder of weights
WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
RESIZE = "bilinear to 299x299 as in TensorFlow 1 (align_corners=False, half_pixel_centers=False, no antialiasing)"


def _branch(x: Array, name: str, *layers: tuple[int, int, int], downsample: bool = False) -> Array:
    """Apply convolutions (channels, kernel height, kernel width) in sequence.

    With `downsample` the last one has stride 2 and no padding.
    """
    for number, (features, height, width) in enumerate(layers, start=1):
        last = downsample and number == len(layers)
        layer = ConvNorm(
            features,
            (height, width),
            stride=2 if last else 1,
            padding="VALID" if last else "SAME",
            name=name if len(layers) == 1 else f"{name}_{number}",
        )
        x = layer(x)
    return x


def _mean_pool(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _shrink(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


class BlockA(nn.Module):
    """35x35 pixels: kernels 1x1, 5x5, twice 3x3, and pooling; D = 224 + pool_features."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        branches = [
            _branch(x, "branch1x1", (64, 1, 1)),
            _branch(x, "branch5x5", (48, 1, 1), (64, 5, 5)),
            _branch(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            _branch(_mean_pool(x), "branch_pool", (self.pool_features, 1, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """From 35x35 to 17x17 pixels; D = 480 + C."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        branches = [
            _branch(x, "branch3x3", (384, 3, 3), downsample=True),
            _branch(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), downsample=True),
            _shrink(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(nn.Module):
    """17x17 pixels: kernels 7x7 as rows and columns, once and twice, and pooling."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W 768"]:
        c = self.channels
        branches = [
            _branch(x, "branch1x1", (192, 1, 1)),
            _branch(x, "branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
            _branch(x, "branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
            _branch(_mean_pool(x), "branch_pool", (192, 1, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(nn.Module):
    """From 17x17 to 8x8 pixels; D = 512 + C."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        branches = [
            _branch(x, "branch3x3", (192, 1, 1), (320, 3, 3), downsample=True),
            _branch(x, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), downsample=True),
            _shrink(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """8x8 pixels: branches that end in a row and a column kernel in parallel, and pooling.

    `pool` is the mean in the first of the two blocks and the maximum in the last: the peculiarity of this network.
    """

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W 2048"]:
        short = _branch(x, "branch3x3_1", (384, 1, 1))
        long = _branch(_branch(x, "branch3x3dbl_1", (448, 1, 1)), "branch3x3dbl_2", (384, 3, 3))
        branches = [
            _branch(x, "branch1x1", (320, 1, 1)),
            _branch(short, "branch3x3_2a", (384, 1, 3)),
            _branch(short, "branch3x3_2b", (384, 3, 1)),
            _branch(long, "branch3x3dbl_3a", (384, 1, 3)),
            _branch(long, "branch3x3dbl_3b", (384, 3, 1)),
            _branch(self.pool(x), "branch_pool", (192, 1, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(nn.Module):
    """The whole network; returns the features after the last pooling ("pool_3") and the logits.

    `logits_bias` adds the bias to the logits, as TensorFlow's graph does; the first code of the Inception Score
    (Salimans et al. 2016) left it out.
    """

    logits_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B 299 299 3"]) -> tuple[Float[Array, "B 2048"], Float[Array, "B 1008"]]:
        x = ConvNorm(32, (3, 3), stride=2, padding="VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = _shrink(ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = _shrink(ConvNorm(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x))
        for letter, pool_features in zip("bcd", (32, 64, 64), strict=True):
            x = BlockA(pool_features, name=f"Mixed_5{letter}")(x)
        x = BlockB(name="Mixed_6a")(x)
        for letter, channels in zip("bcde", (128, 160, 160, 192), strict=True):
            x = BlockC(channels, name=f"Mixed_6{letter}")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(_mean_pool, name="Mixed_7b")(x)
        x = BlockE(_max_pool, name="Mixed_7c")(x)
        features = x.mean(axis=(1, 2))
        return features, nn.Dense(NUM_CLASSES, use_bias=self.logits_bias, precision=PRECISION, name="fc")(features)


def _neighbours(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two old pixels around each new one, and its distance to the first; float32, as in TensorFlow."""
    position = np.arange(new_size, dtype=np.float32) * (np.float32(size) / np.float32(new_size))
    low = position.astype(np.int32)
    return low, np.minimum(low + 1, size - 1), position - low.astype(np.float32)


def resize_tf1(x: Float[Array, "B H W C"], height: int, width: int) -> Float[Array, "B height width C"]:
    """Resize as TensorFlow 1's tf.image.resize_bilinear: new pixel i lies at i * (old size / new size).

    Pixel centres are not aligned (the picture moves by up to half a pixel) and shrinking is not antialiased. FID's
    values depend on both.
    """
    low, high, weight = _neighbours(x.shape[2], width)
    x = x[:, :, low] + (x[:, :, high] - x[:, :, low]) * weight[None, None, :, None]
    low, high, weight = _neighbours(x.shape[1], height)
    return x[:, low] + (x[:, high] - x[:, low]) * weight[None, :, None, None]


def preprocess(x: Float[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """Resize images in 0 .. 255 and scale them as the graph does: (x - 128) / 128."""
    return (resize_tf1(x, SIDE, SIDE) - 128.0) / 128.0


# --- building --------------------------------------------------------------------------------------------------------


def weights_path(weights: str = "") -> Path:
    """Return the weights file: `weights`, or where --mode convert_weights puts it."""
    return local_path(weights, "eval.weights") if weights else cache_folder("weights") / WEIGHTS


def how_to_get_weights(path: str | Path) -> str:
    """Return the commands that make the weights file, on one line."""
    file = WEIGHTS_URL.rsplit("/", 1)[1]
    output = "" if Path(path) == weights_path() else f" --output {path}"
    return f"curl -LO {WEIGHTS_URL} && python main.py --mode convert_weights --checkpoint {file}{output}"


def build_inception(*, num_levels: int, weights: str = "") -> PretrainedExtractor:
    """Build the extractor from a weights file of --mode convert_weights; empty: from where that mode puts it."""
    path, model = weights_path(weights), Inception()
    if not path.exists():
        raise UserError(
            f"the weights of the Inception network are not in {path}; to get them: {how_to_get_weights(path)}"
        )
    try:
        params = check_params(str(path), read_npz(path), param_shapes(model, SIDE))
    except UserError as error:
        raise UserError(f"{error}; to make it again: {how_to_get_weights(path)}") from error
    return PretrainedExtractor(
        key="inception",
        name="Inception of 2015-12-05, pool_3, trained on ImageNet",
        model=model,
        params=params,
        preprocess=preprocess,
        num_features=NUM_FEATURES,
        resize=RESIZE,
        num_levels=num_levels,
    )


# --- conversion of public files --------------------------------------------------------------------------------------

PTH_SHA256 = "6726825d"  # how the published file's SHA-256 starts: PyTorch puts it in the name
GRAPH_SECONDS = 300  # limit for TensorFlow to start and read a graph


def torch_layer(layer: str, part: str) -> str:
    """Return PyTorch's name of a layer: "Mixed_5b/branch1x1" and "norm" give Mixed_5b.branch1x1.bn."""
    name = layer.replace("/", ".")
    return {"dense": name, "conv": f"{name}.conv", "norm": f"{name}.bn"}[part]


STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")  # mixed, mixed_1, ..., mixed_10
# Branches with more than one layer or with pooling are TensorFlow's tower, tower_1, tower_2.
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
TF_LAST = "softmax/weights"  # shows the prefix of all names, if the graph was imported into another


def _numbered(name: str, number: int) -> str:
    """Make a name unique as TensorFlow does: conv, conv_1, conv_2."""
    return f"{name}_{number}" if number else name


def tensorflow_name(path: str) -> str:
    """Return the frozen graph's name of an array: mixed_9/tower/mixed/conv/conv2d_params of
    "Mixed_7b/branch3x3_2a/kernel".
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
    """Read the constants and variables of a TensorFlow graph in a process that imports TensorFlow."""
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
    """Pick the network's arrays out of a graph's."""
    prefixes = [name.removesuffix(TF_LAST) for name in constants if f"/{name}".endswith(f"/{TF_LAST}")]
    prefix = prefixes[0] if prefixes else ""
    found = {path: constants.get(prefix + tensorflow_name(path)) for path in shapes}
    return {path: array for path, array in found.items() if array is not None}


def _read(source: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read the network's arrays from any of the three kinds of file, unchecked."""
    if source.is_dir() or source.suffix == ".pb":
        return _from_graph(_read_constants(source), shapes)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if not digest.startswith(PTH_SHA256):
        logging.warning(
            "%s is not the published file: its SHA-256 starts with %s, not %s; FID by these weights is not comparable "
            "with published values",
            *(source, digest[: len(PTH_SHA256)], PTH_SHA256),
        )
    state = read_torch(source)
    if not all(isinstance(value, np.ndarray) for value in state.values()):
        raise UserError(f"{source} holds no dictionary of tensors; expected pt_inception-2015-12-05-6726825d.pth")
    return params_from_torch(state, shapes, torch_layer)


def convert_weights(checkpoint: str | Path, output: str | Path = "") -> tuple[Path, str]:
    """Write the weights of the Inception network as the .npz file that the extractor reads, atomically.

    Args:
      checkpoint: pt_inception-2015-12-05-6726825d.pth, classify_image_graph_def.pb, or the folder of a TF-Hub
        SavedModel of tfgan/eval/inception/1.
      output: file to write; empty: where the extractor looks.

    Returns:
      (file, SHA-256 of the parameters).
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
