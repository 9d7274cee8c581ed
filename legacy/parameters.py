"""Parameters of the 2021 score_sde code, in its names and in ours.

The original let Flax name its layers: `Conv_0`, `Conv_1`, ... in the order in which a module calls them. The
translation therefore traces one of our networks abstractly, records which layer calls which, and counts the layers of
each class as Flax did. It only needs a table of class names.
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

from configs import settings
from errors import UserError
from models import blocks, create_model, layers, normalization, refinenet, wideresnet
from models.convolution import Conv
from models.ddpm import DDPM
from models.ncsnpp import NCSNpp

Path = tuple[str, ...]
ImageShape = tuple[int, int, int]  # height, width, channels


class _Original(NamedTuple):
    """A class in the original."""

    name: str
    params: Mapping[str, str] = {}  # {our name: its name} of parameters whose names differ
    inside: Mapping[type[nn.Module], str] = {}  # another class name in networks of this class
    conditional: str = ""  # class name if conditioned on the label
    children: Mapping[str, str] = {}  # {our name: its name} of layers with explicit names, which are not counted
    is_image_shaped: bool = False  # its parameters have shape (1, 1, 1, C)


# Classes that are not listed own no parameters and call no layers.
_CLASSES: dict[type[nn.Module], _Original] = {
    Conv: _Original("Conv"),
    layers.Dense: _Original("Dense"),
    layers.NIN: _Original("NIN", {"kernel": "W", "bias": "b"}),
    layers.FourierFeatures: _Original("GaussianFourierProjection", {"frequencies": "W"}),
    layers.Attention: _Original("AttnBlockpp", inside={DDPM: "AttnBlock"}),
    normalization.GroupNorm: _Original("GroupNorm", is_image_shaped=True),
    normalization.InstanceNorm: _Original("InstanceNorm2d", is_image_shaped=True),
    normalization.InstanceNormPlus: _Original("InstanceNorm2dPlus", is_image_shaped=True),
    normalization.VarianceNorm: _Original("VarianceNorm2d", is_image_shaped=True),
    normalization.ConditionalInstanceNormPlus: _Original(
        "ConditionalInstanceNorm2dPlus", {"embedding": "Embed_0/embedding"}
    ),
    blocks.DDPMBlock: _Original("ResnetBlockDDPMpp", inside={DDPM: "ResnetBlockDDPM"}),
    blocks.BigGANBlock: _Original("ResnetBlockBigGANpp"),
    blocks.Upsample: _Original("Upsample"),
    blocks.Downsample: _Original("Downsample"),
    blocks.ResamplingConv: _Original("Conv2d", {"kernel": "weight"}),
    blocks.Combine: _Original("Combine"),
    refinenet.ConvMeanPool: _Original("ConvMeanPool"),
    refinenet.ResidualBlock: _Original("ResidualBlock", conditional="ConditionalResidualBlock"),
    refinenet.ResidualUnits: _Original("RCUBlock", conditional="CondRCUBlock"),
    refinenet.MultiResolutionFusion: _Original("MSFBlock", conditional="CondMSFBlock"),
    refinenet.ChainedPooling: _Original("CRPBlock", conditional="CondCRPBlock"),
    refinenet.RefineBlock: _Original("RefineBlock", conditional="CondRefineBlock"),
    wideresnet.WideResNet: _Original("WideResnet", children={"input": "init_conv", "output_norm": "pre-pool-bn"}),
    wideresnet.WideGroup: _Original("WideResnetGroup"),
    wideresnet.WideBlock: _Original(
        "WideResnetBlock", children={"norm1": "init_bn", "conv1": "conv1", "norm2": "bn_2", "conv2": "conv2"}
    ),
}


class Leaf(NamedTuple):
    """One parameter."""

    path: Path  # in our tree
    original: str  # slash-joined path in the original
    shape: tuple[int, ...]
    original_shape: tuple[int, ...]


def _trace_layers(model: nn.Module, *inputs: Any) -> tuple[dict[Path, nn.Module], dict[str, Any]]:
    """Return every layer by path in the order of calls, the module itself first, and the tree of parameter shapes."""
    calls: dict[Path, nn.Module] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__":
            calls.setdefault(context.module.path, context.module)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(model.init, {"params": jax.random.key(0)}, *inputs)["params"]
    return calls, shapes


def _network_inputs(image_shape: ImageShape) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((1, *image_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)


def trace_network(model: nn.Module, image_shape: ImageShape) -> tuple[dict[Path, nn.Module], dict[str, Any]]:
    """Return the layers of a network by path, in the order of calls, and the tree of parameter shapes."""
    return _trace_layers(model, *_network_inputs(image_shape))


def match_layers(model: nn.Module, *inputs: Any) -> list[Leaf]:
    """List the parameters of a network or layer with a twin in the original code, without computing anything.

    `inputs` are its arguments, arrays or `jax.ShapeDtypeStruct`s.
    """
    calls, shapes = _trace_layers(model, *inputs)
    prefixes: dict[Path, str] = {(): ""}
    counts = Counter[str]()
    for path, module in list(calls.items())[1:]:
        if type(module) not in _CLASSES:
            continue
        parent, own, original = path[:-1], path[-1], _CLASSES[type(module)]
        given = _CLASSES[type(calls[parent])].children if type(calls[parent]) in _CLASSES else {}
        if own in given:
            prefixes[path] = f"{prefixes[parent]}{given[own]}/"
            continue
        is_conditional = original.conditional and module.options.is_conditional
        class_name = original.conditional if is_conditional else original.inside.get(type(model), original.name)
        name = f"{prefixes[parent]}{class_name}"
        prefixes[path] = f"{name}_{counts[name]}/"
        counts[name] += 1
    leaves = []
    for path, value in flatten_dict(shapes).items():
        owner = _CLASSES[type(calls[path[:-1]])]
        name = prefixes[path[:-1]] + owner.params.get(path[-1], path[-1])
        leaves.append(Leaf(path, name, value.shape, (1, 1, 1, *value.shape) if owner.is_image_shaped else value.shape))
    return leaves


def match_parameters(model: nn.Module, image_shape: ImageShape) -> list[Leaf]:
    """List the parameters of a network for images of shape (H, W, C).

    Raises:
      UserError: if it is conditioned on classes, which no network of the original is.
    """
    if isinstance(model, NCSNpp) and model.num_classes:
        raise UserError(
            f"model.num_classes={model.num_classes}: score_sde has no class-conditional networks, so there "
            "is nothing to import or export; set model.num_classes=0"
        )
    return match_layers(model, *_network_inputs(image_shape))


def params_from_score_sde(config: ConfigDict, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Translate parameters of the 2021 code, {slash-joined path: array}, to parameters of `create_model(config)`.

    Returns a tree of numpy arrays in their original precision. Traced arrays and `jax.ShapeDtypeStruct`s stay abstract.

    Raises:
      UserError: naming parameters that are missing, left over, or of another shape.
    """
    leaves = match_parameters(create_model(config), settings.image_shape(config))
    _check_names({leaf.original for leaf in leaves}, set(flat))
    params = {}
    for leaf in leaves:
        value = flat[leaf.original]
        if np.shape(value) not in (leaf.shape, leaf.original_shape):
            raise UserError(
                f"{leaf.original} has shape {np.shape(value)}, but the network of this configuration has "
                f"{leaf.original_shape} there; check config.model and config.data against the checkpoint's"
            )
        params[leaf.path] = _reshape(value, leaf.shape)
    return unflatten_dict(params)


def params_to_score_sde(config: ConfigDict, params: Mapping[str, Any]) -> dict[str, Any]:
    """Translate parameters of `create_model(config)` to the 2021 code's; the inverse of `params_from_score_sde`.

    Raises:
      UserError: if `params` is not the tree of this network.
    """
    leaves, flat = match_parameters(create_model(config), settings.image_shape(config)), flatten_dict(dict(params))
    _check_names({"/".join(leaf.path) for leaf in leaves}, {"/".join(path) for path in flat})
    return {leaf.original: _reshape(flat[leaf.path], leaf.original_shape) for leaf in leaves}


def _reshape(value: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, value.dtype)
    return (value if isinstance(value, jax.core.Tracer) else np.asarray(value)).reshape(shape)


def _check_names(expected: set[str], got: set[str]) -> None:
    missing, unknown = sorted(expected - got), sorted(got - expected)
    if missing or unknown:
        raise UserError(
            f"these are not the parameters of this configuration's network: {len(missing)} missing "
            f"({', '.join(missing[:3])}...), {len(unknown)} unknown ({', '.join(unknown[:3])}...); "
            "check config.model against the checkpoint's"
        )
