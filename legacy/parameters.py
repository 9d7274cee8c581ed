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

from errors import UserError
from models import blocks, create_model, layers, normalization, refinenet, wideresnet
from models.convolution import Conv
from models.ddpm import DDPM
from models.factory import image_size, num_classes_of

Path = tuple[str, ...]


class _Original(NamedTuple):
    """What the original called a class.

    Attributes:
      name: of the class; the layers of a class are counted.
      params: those of its parameters that have another name now.
      inside: its name in a network of the given class, if that is another.
      conditional: its name if it is conditioned on the label.
      children: layers of it that the original named itself, so that they are not counted: {our name: its name}.
      is_image_shaped: its parameters had the rank of an image, (1, 1, 1, C).
    """

    name: str
    params: Mapping[str, str] = {}
    inside: Mapping[type[nn.Module], str] = {}
    conditional: str = ""
    children: Mapping[str, str] = {}
    is_image_shaped: bool = False


# Classes that are missing own no parameters and call no layers.
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
    """One parameter: its path in our tree, its original path, and its shapes in both."""

    path: Path
    original: str
    shape: tuple[int, ...]
    original_shape: tuple[int, ...]


def trace_layers(model: nn.Module, *inputs: Any) -> tuple[dict[Path, nn.Module], dict[str, Any]]:
    """Runs a network or layer abstractly; nothing is computed.

    Args:
      model: any module.
      inputs: what it is called with; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Every layer by its path, the module itself first, in the order in which they are called; and the shapes of the
      parameters, a tree.
    """
    calls: dict[Path, nn.Module] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__":
            calls.setdefault(context.module.path, context.module)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(model.init, {"params": jax.random.key(0)}, *inputs)["params"]
    return calls, shapes


def trace_network(config: ConfigDict) -> tuple[dict[Path, nn.Module], dict[str, Any]]:
    """Runs the network that a configuration describes abstractly; see `trace_layers`."""
    return trace_layers(create_model(config), *_network_inputs(config))


def _network_inputs(config: ConfigDict) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    shape = (1, *image_size(config), config.data.num_channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)


def match_layers(model: nn.Module, *inputs: Any) -> list[Leaf]:
    """Lists the parameters of a network or layer, without computing anything.

    Args:
      model: a module whose layers have a twin in the original code.
      inputs: what it is called with; arrays or `jax.ShapeDtypeStruct`s.
    """
    calls, shapes = trace_layers(model, *inputs)
    prefixes: dict[Path, str] = {(): ""}
    counts = Counter[str]()
    for path, module in list(calls.items())[1:]:
        if type(module) not in _CLASSES:
            continue
        parent, own = path[:-1], path[-1]
        given = _CLASSES[type(calls[parent])].children if type(calls[parent]) in _CLASSES else {}
        if own in given:
            prefixes[path] = f"{prefixes[parent]}{given[own]}/"
            continue
        name = f"{prefixes[parent]}{_class_name(module, model)}"
        prefixes[path] = f"{name}_{counts[name]}/"
        counts[name] += 1
    return [
        _leaf(path, prefixes[path[:-1]], type(calls[path[:-1]]), value.shape)
        for path, value in flatten_dict(shapes).items()
    ]


def _class_name(module: nn.Module, network: nn.Module) -> str:
    original = _CLASSES[type(module)]
    if original.conditional and module.options.is_conditional:
        return original.conditional
    return original.inside.get(type(network), original.name)


def _leaf(path: Path, prefix: str, cls: type[nn.Module], shape: tuple[int, ...]) -> Leaf:
    original = _CLASSES[cls]
    original_shape = (1, 1, 1, *shape) if original.is_image_shaped else shape
    return Leaf(path, prefix + original.params.get(path[-1], path[-1]), shape, original_shape)


def match_parameters(config: ConfigDict) -> list[Leaf]:
    """Lists the parameters of the network that a configuration describes.

    Raises:
      UserError: if it is told classes, which no network of the original is.
    """
    if num_classes_of(config):
        raise UserError(
            f"model.num_classes={config.model.num_classes}: score_sde has no networks that are told classes, so there "
            "is nothing to import or export; set model.num_classes=0"
        )
    return match_layers(create_model(config), *_network_inputs(config))


def params_from_score_sde(config: ConfigDict, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Translates parameters of the 2021 code to parameters of `create_model(config)`.

    Args:
      config: describes the network that the parameters are of.
      flat: the original's parameters, {slash-joined path: array}; arrays that `jax.eval_shape` or `jax.jit` traces, and
        `jax.ShapeDtypeStruct`s, will do.

    Returns:
      The tree of parameters, numpy arrays in their original precision, or what they were if they are abstract.

    Raises:
      UserError: if parameters are missing, left over, or of another shape, naming them.
    """
    leaves = match_parameters(config)
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
    """Translates parameters of `create_model(config)` to those of the 2021 code; undoes `params_from_score_sde`.

    Returns:
      {slash-joined path: array}, numpy arrays, or what they were if they are abstract.

    Raises:
      UserError: if `params` is not the tree of this network.
    """
    leaves, flat = match_parameters(config), flatten_dict(dict(params))
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
