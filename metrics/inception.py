"""The extractor "inception": the Inception network of 2015 by which FID and the Inception Score are defined.

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", as TensorFlow's frozen graph
classify_image_graph_def of 2015-12-05 has it, and PyTorch's pt_inception-2015-12-05: average pooling inside the blocks
does not count the padding, the last block pools by maxima, and the classes are 1008, of which ImageNet uses 1000.
Layers have the names that PyTorch gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from errors import UserError
from metrics.pretrained import PRECISION, ConvNorm, PretrainedExtractor, check_params, param_shapes
from storage.files import cache_folder, read_npz

SIDE = 299  # pixels of the network's input
NUM_FEATURES, NUM_CLASSES = 2048, 1008
WEIGHTS = "inception_2015.npz"  # in the cache's folder of weights
WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
RESIZE = "bilinear to 299x299 as in TensorFlow 1 (align_corners=False, half_pixel_centers=False, no antialiasing)"


# --- network ---------------------------------------------------------------------------------------------------------


def _branch(x: Array, name: str, *layers: tuple[int, int, int], downsample: bool = False) -> Array:
    """Applies convolutions (channels, kernel height, kernel width) one after another.

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
    """35x35 pixels: kernels 1x1, 5x5, twice 3x3, and pooling."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Concatenates the branches; D = 224 + pool_features."""
        branches = [
            _branch(x, "branch1x1", (64, 1, 1)),
            _branch(x, "branch5x5", (48, 1, 1), (64, 5, 5)),
            _branch(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            _branch(_mean_pool(x), "branch_pool", (self.pool_features, 1, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """From 35x35 to 17x17 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Concatenates the branches; D = 480 + C."""
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
        """Concatenates the branches."""
        c = self.channels
        branches = [
            _branch(x, "branch1x1", (192, 1, 1)),
            _branch(x, "branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
            _branch(x, "branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
            _branch(_mean_pool(x), "branch_pool", (192, 1, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(nn.Module):
    """From 17x17 to 8x8 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Concatenates the branches; D = 512 + C."""
        branches = [
            _branch(x, "branch3x3", (192, 1, 1), (320, 3, 3), downsample=True),
            _branch(x, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), downsample=True),
            _shrink(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """8x8 pixels: branches that end in a row and a column side by side, and pooling.

    Attributes:
      pool: by means in the first of the two blocks, by maxima in the last: the peculiarity of this network.
    """

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W 2048"]:
        """Concatenates the branches."""
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
    """The whole network.

    Attributes:
      logits_bias: add the bias to the class scores, as TensorFlow's graph does; the Inception Score's first code
        (Salimans et al. 2016) left it out.
    """

    logits_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B 299 299 3"]) -> tuple[Float[Array, "B 2048"], Float[Array, "B 1008"]]:
        """Returns the features after the last pooling ("pool_3") and the class scores before the softmax."""
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


# --- images ----------------------------------------------------------------------------------------------------------


def _neighbours(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, for each new pixel, the two old ones between which it lies, and how far it is from the first.

    In float32, in which TensorFlow computes them.
    """
    position = np.arange(new_size, dtype=np.float32) * (np.float32(size) / np.float32(new_size))
    low = position.astype(np.int32)
    return low, np.minimum(low + 1, size - 1), position - low.astype(np.float32)


def resize_tf1(x: Float[Array, "B H W C"], height: int, width: int) -> Float[Array, "B height width C"]:
    """Resizes as TensorFlow 1's tf.image.resize_bilinear: new pixel i lies at i * (old size / new size).

    Neither are pixels' centres aligned (the picture moves by up to half a pixel) nor is anything smoothed when it
    shrinks. FID's numbers depend on both.
    """
    low, high, share = _neighbours(x.shape[2], width)
    x = x[:, :, low] + (x[:, :, high] - x[:, :, low]) * share[None, None, :, None]
    low, high, share = _neighbours(x.shape[1], height)
    return x[:, low] + (x[:, high] - x[:, low]) * share[None, :, None, None]


def preprocess(x: Float[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """Resizes images in 0 .. 255 and scales them as the graph does: (x - 128) / 128."""
    return (resize_tf1(x, SIDE, SIDE) - 128.0) / 128.0


# --- building --------------------------------------------------------------------------------------------------------


def weights_path(weights: str = "") -> Path:
    """Returns where the weights are looked for: the file that is named, or where --mode convert_weights puts it."""
    return Path(weights) if weights else cache_folder("weights") / WEIGHTS


def how_to_get_weights(path: str | Path) -> str:
    """Returns the commands that make the weights file, on one line."""
    file = WEIGHTS_URL.rsplit("/", 1)[1]
    output = "" if Path(path) == weights_path() else f" --output {path}"
    return f"curl -LO {WEIGHTS_URL} && python main.py --mode convert_weights --checkpoint {file}{output}"


def build_inception(*, num_levels: int, weights: str = "") -> PretrainedExtractor:
    """Builds the extractor from a weights file of --mode convert_weights.

    Args:
      num_levels: of the images.
      weights: the file; empty: where that mode puts it by default.

    Raises:
      UserError: if there is none; it says how to get it.
      UserError: if it is damaged or holds something else.
    """
    path, model = weights_path(weights), Inception()
    if not path.exists():
        raise UserError(
            f"the weights of the Inception network are not in {path}; to get them: {how_to_get_weights(path)}"
        )
    try:
        params = check_params(str(path), read_npz(path), param_shapes(model, SIDE))
    except UserError as error:
        raise UserError(f"{error}; to make it anew: {how_to_get_weights(path)}") from error
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
