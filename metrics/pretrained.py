"""What extractors with fixed weights have in common: layers, reading weights by name, applying them to images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from errors import UserError
from metrics.images import RGB, apply_in_batches, check_photographs, params_hash
from parallel import distributed

BATCH_SIZE = 32  # images per device that a network is compiled for; the last batch is padded
PRECISION = jax.lax.Precision.HIGHEST  # full float32 on accelerators, too: less would change FID
NORM_EPSILON = 1e-3  # of batch normalization in TensorFlow's networks, the origin of both of ours
MAX_LEVEL = 255.0  # networks trained on photographs take the range 0 .. 255
# Where PyTorch keeps each array of a ConvNorm: the layer, convolution or normalization, and the name in it.
TORCH_ARRAYS = {
    "kernel": ("conv", "weight"),
    "scale": ("norm", "weight"),
    "bias": ("norm", "bias"),
    "mean": ("norm", "running_mean"),
    "var": ("norm", "running_var"),
}
NUM_NAMED = 3  # arrays that a sentence names


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalization with fixed statistics, and an activation.

    `padding` is TensorFlow's "SAME" or "VALID". With as many `groups` as channels, each channel is convolved alone.
    """

    features: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    groups: int = 1
    activation: Callable[[Array], Array] | None = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w features"]:
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale, var = (self.param(name, ones, (self.features,)) for name in ("scale", "var"))
        bias, mean = (self.param(name, zeros, (self.features,)) for name in ("bias", "mean"))
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
            precision=PRECISION,
        )
        factor = scale * jax.lax.rsqrt(var + NORM_EPSILON)
        x = x * factor[None, None, None] + (bias - mean * factor)[None, None, None]
        return self.activation(x) if self.activation else x


@functools.cache
def param_shapes(model: nn.Module, side: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a network by its slash-joined path; nothing is computed.

    The model takes images float[B, side, side, 3].
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, RGB)))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()}


def check_params(source: str, params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Check arrays by slash-joined path against a network's shapes, and return them as its tree, float32.

    `source` names their origin in the error; `shapes` is from `param_shapes`.
    """
    wrong = [f"{path} is missing" for path in sorted(shapes.keys() - params.keys())]
    wrong += [f"{path} is unknown" for path in sorted(params.keys() - shapes.keys())]
    for path in sorted(shapes.keys() & params.keys()):
        array = np.asarray(params[path])
        if array.shape != shapes[path]:
            wrong.append(f"{path} has shape {array.shape}, expected {shapes[path]}")
        elif array.dtype.kind != "f" or not np.isfinite(array).all():
            wrong.append(f"{path} is not of finite numbers")
    if wrong:
        more = f", and {len(wrong) - NUM_NAMED} more" if len(wrong) > NUM_NAMED else ""
        raise UserError(f"{source} does not hold the weights of this network: {'; '.join(wrong[:NUM_NAMED])}{more}")
    flat = {path: np.asarray(params[path], np.float32) for path in shapes}
    return traverse_util.unflatten_dict(flat, sep="/")


def params_from_torch(
    state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], layer_name: Callable[[str, str], str]
) -> dict[str, np.ndarray]:
    """Pick a network's arrays out of a PyTorch state, and transpose kernels to our layout.

    Args:
      state: arrays by PyTorch's names.
      shapes: see `param_shapes`; a layer without "mean" is dense, all others are ConvNorm.
      layer_name: maps a layer's path and "conv", "norm" or "dense" to PyTorch's name of that layer.

    Returns:
      The arrays found, by slash-joined path; and those of `state` that belong to no layer, by their own names, except
      PyTorch's count of training batches.
    """
    left = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
    params = {}
    for path in shapes:
        layer, name = path.rsplit("/", 1)
        if f"{layer}/mean" in shapes:
            part, torch_array = TORCH_ARRAYS[name]
        else:
            part, torch_array = "dense", {"kernel": "weight", "bias": "bias"}[name]
        array = left.pop(f"{layer_name(layer, part)}.{torch_array}", None)
        if array is not None:
            params[path] = _our_layout(np.asarray(array)) if name == "kernel" else array
    return params | left


def _our_layout(kernel: np.ndarray) -> np.ndarray:
    """Turn [out, in, height, width] into [height, width, in, out], and [out, in] into [in, out]."""
    return np.ascontiguousarray(kernel.transpose((2, 3, 1, 0) if kernel.ndim == 4 else None))


@functools.partial(jax.jit, static_argnames=("model", "preprocess"))
def _apply(model: nn.Module, preprocess: Callable[[Array], Array], params: Any, levels: Array, factor: Array) -> Any:
    x = jnp.broadcast_to(levels, (*levels.shape[:3], RGB)).astype(jnp.float32) * factor
    return model.apply({"params": params}, preprocess(x))


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedExtractor:
    """Features of a network that was trained on photographs, with fixed weights (see `extractors.Extractor`)."""

    key: str
    name: str
    model: nn.Module  # maps the output of `preprocess` to (features, logits)
    params: Any  # of the model, a tree of numpy arrays
    preprocess: Callable[[Array], Array]  # maps images [B, H, W, 3] in 0 .. 255 to the model's input
    num_features: int
    resize: str
    num_levels: int  # of the images; level 0 is black, the last one white
    batch_size: int = BATCH_SIZE  # images per device that are computed together
    accuracy: ClassVar[float | None] = None  # None: not measured here

    @functools.cached_property
    def hash(self) -> str:
        return params_hash(self.params)

    @functools.cached_property
    def _device_params(self) -> Any:
        return distributed.place_copies(self.params)

    def __call__(
        self, levels: UInt8[np.ndarray, "N H W C"]
    ) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]:
        check_photographs(self.key, levels, self.num_levels)
        factor = np.float32(MAX_LEVEL / (self.num_levels - 1))

        def apply(batch: np.ndarray) -> tuple[Array, Array]:
            return _apply(self.model, self.preprocess, self._device_params, distributed.place_batch(batch), factor)

        return apply_in_batches(apply, levels, self.batch_size * distributed.local_device_count())
