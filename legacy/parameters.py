"""Parameters of the 2021 score_sde code, in its names and in ours.

The original let Flax name its layers: `Conv_0`, `Conv_1`, ... in the order in which a module calls them. So the
translation needs no table of names: it runs one of our networks abstractly, notes which layer calls which, and counts
the layers of each class as Flax did. What is written down here is what each class was called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from models import blocks, create_model, layers
from models.convolution import Conv

Path = tuple[str, ...]


class _Original(NamedTuple):
    """What the original called a class, and those of its parameters that have another name now."""

    name: str
    params: Mapping[str, str] = {}


_NIN = _Original("NIN", {"kernel": "W", "bias": "b"})

# Classes that are missing own no parameters and call no layers.
_CLASSES: dict[type[nn.Module], _Original] = {
    Conv: _Original("Conv"),
    layers.Dense: _Original("Dense"),
    layers.NIN: _NIN,
    layers.GroupNorm: _Original("GroupNorm"),
    layers.FourierFeatures: _Original("GaussianFourierProjection", {"frequencies": "W"}),
    layers.Attention: _Original("AttnBlockpp"),
    blocks.DDPMBlock: _Original("ResnetBlockDDPMpp"),
    blocks.BigGANBlock: _Original("ResnetBlockBigGANpp"),
    blocks.Upsample: _Original("Upsample"),
    blocks.Downsample: _Original("Downsample"),
    blocks.ResamplingConv: _Original("Conv2d", {"kernel": "weight"}),
    blocks.Combine: _Original("Combine"),
}


class Leaf(NamedTuple):
    """One parameter: its path in our tree, its original path, and its shapes in both."""

    path: Path
    original: str
    shape: tuple[int, ...]
    original_shape: tuple[int, ...]


def match_layers(model: nn.Module, *inputs: Any) -> list[Leaf]:
    """Lists the parameters of a network or layer, without computing anything.

    Args:
      model: a module whose layers have a twin in the original code.
      inputs: what it is called with; arrays or `jax.ShapeDtypeStruct`s.
    """
    calls: dict[Path, type[nn.Module]] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__":
            calls.setdefault(context.module.path, type(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(model.init, {"params": jax.random.key(0)}, *inputs)["params"]

    prefixes: dict[Path, str] = {(): ""}
    counts = Counter[str]()
    for path, cls in list(calls.items())[1:]:
        if cls in _CLASSES:
            name = f"{prefixes[path[:-1]]}{_CLASSES[cls].name}"
            prefixes[path] = f"{name}_{counts[name]}/"
            counts[name] += 1
    return [
        _leaf(path, prefixes[path[:-1]], calls[path[:-1]], value.shape) for path, value in flatten_dict(shapes).items()
    ]


def _leaf(path: Path, prefix: str, cls: type[nn.Module], shape: tuple[int, ...]) -> Leaf:
    original = _CLASSES[cls].params.get(path[-1], path[-1])
    # Flax 0.3 gave the scale and bias of group normalization the rank of an image.
    original_shape = (1, 1, 1, *shape) if cls is layers.GroupNorm else shape
    return Leaf(path, prefix + original, shape, original_shape)


def match_parameters(config: ConfigDict) -> list[Leaf]:
    """Lists the parameters of the network that a configuration describes."""
    data = config.data
    x = jax.ShapeDtypeStruct((1, data.image_size, data.image_width or data.image_size, data.num_channels), jnp.float32)
    return match_layers(create_model(config), x, jax.ShapeDtypeStruct((1,), jnp.float32))


def params_from_score_sde(config: ConfigDict, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Translates parameters of the 2021 code to parameters of `create_model(config)`.

    Args:
      config: describes the network that the parameters are of.
      flat: the original's parameters, {slash-joined path: array}.

    Returns:
      The tree of parameters, numpy arrays in their original precision.

    Raises:
      ValueError: if parameters are missing, left over, or of another shape, naming them.
    """
    leaves = match_parameters(config)
    _check_names({leaf.original for leaf in leaves}, set(flat))
    params = {}
    for leaf in leaves:
        value = np.asarray(flat[leaf.original])
        if value.shape not in (leaf.shape, leaf.original_shape):
            raise ValueError(
                f"{leaf.original} has shape {value.shape}, but the network of this configuration has "
                f"{leaf.original_shape} there; check config.model and config.data against the checkpoint's"
            )
        params[leaf.path] = value.reshape(leaf.shape)
    return unflatten_dict(params)


def params_to_score_sde(config: ConfigDict, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Translates parameters of `create_model(config)` to those of the 2021 code; undoes `params_from_score_sde`.

    Raises:
      ValueError: if `params` is not the tree of this network.
    """
    leaves, flat = match_parameters(config), flatten_dict(dict(params))
    _check_names({"/".join(leaf.path) for leaf in leaves}, {"/".join(path) for path in flat})
    return {leaf.original: np.asarray(flat[leaf.path]).reshape(leaf.original_shape) for leaf in leaves}


def _check_names(expected: set[str], got: set[str]) -> None:
    missing, unknown = sorted(expected - got), sorted(got - expected)
    if missing or unknown:
        raise ValueError(
            f"these are not the parameters of this configuration's network: {len(missing)} missing "
            f"({', '.join(missing[:3])}...), {len(unknown)} unknown ({', '.join(unknown[:3])}...); "
            "check config.model against the checkpoint's"
        )
