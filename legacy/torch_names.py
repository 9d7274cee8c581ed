"""Parameters of score_sde_pytorch in the names of the 2021 code.

PyTorch numbers the layers of a network, `all_modules.7`, in the order in which its constructor made them, those without
parameters included. That is the order in which our networks call theirs, but for one place. Inside a layer its names
are those that Flax gave.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from errors import UserError
from legacy.parameters import Leaf, trace_network

WRAPPER = "module."  # what DataParallel puts before every name
_PARAMETERS = {"kernel": "weight", "scale": "weight"}


class TorchLeaf(NamedTuple):
    """One parameter: its name in PyTorch, its original path, and the order of its axes there, seen from ours."""

    name: str
    original: str
    axes: tuple[int, ...] | None = None

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        """Returns the value with its axes in our order; one of another rank as it is."""
        return value if self.axes is None or value.ndim != len(self.axes) else value.transpose(self.axes)


def _check_supported(config: ConfigDict) -> None:
    """Checks that score_sde_pytorch has this network, and that it computes the same."""
    name = config.model.name
    if name == "ddpm" and not config.model.conditional:
        raise UserError(
            "model.name='ddpm' with model.conditional=False: score_sde_pytorch tells this network the noise level all "
            "the same, so that it is another one; set model.conditional=True"
        )
    if name == "ddpm" and config.model.normalization != "GroupNorm":
        raise UserError("score_sde_pytorch has model.name='ddpm' only with model.normalization='GroupNorm'")
    if name not in ("ncsnpp", "ddpm"):
        raise UserError(
            f"model.name={name!r} is not supported for PyTorch checkpoints, only 'ncsnpp' and 'ddpm': "
            "score_sde_pytorch interpolates the feature maps of NCSN and NCSNv2 between other points"
        )


def _layers_in_order(config: ConfigDict) -> list[str]:
    """Returns the names of the network's own layers as PyTorch numbers them; nothing is computed."""
    calls, _ = trace_network(config)
    names = [path[0] for path in calls if len(path) == 1]
    ordered = list(names)
    # A growing output is upsampled before the next image is made from the features; we do it after.
    for name in [name for name in ordered if f"{name}_norm" in names]:
        ordered.remove(name)
        ordered.insert(ordered.index(f"{name}_norm"), name)
    return ordered


def match_torch_parameters(config: ConfigDict, leaves: list[Leaf]) -> list[TorchLeaf]:
    """Lists the parameters of a network with their names in score_sde_pytorch.

    Args:
      config: describes the network.
      leaves: its parameters, see `match_parameters`.

    Raises:
      UserError: if score_sde_pytorch has no such network.
    """
    _check_supported(config)
    numbers = {name: number for number, name in enumerate(_layers_in_order(config))}
    return [_torch_leaf(numbers[leaf.path[0]], leaf) for leaf in leaves]


def _torch_leaf(number: int, leaf: Leaf) -> TorchLeaf:
    _, *inner, parameter = leaf.original.split("/")
    name = ".".join([f"all_modules.{number}", *inner, _PARAMETERS.get(parameter, parameter)])
    axes: tuple[int, ...] | None = None
    if len(leaf.shape) == 4:
        axes = (2, 3, 1, 0)  # convolutions: [out, in, height, width] there, [height, width, in, out] here
    elif parameter == "kernel":
        axes = (1, 0)  # linear maps: [out, in] there; NIN, whose parameter is called W, is [in, out] in both
    return TorchLeaf(name, leaf.original, axes)


def plain_name(name: str) -> str:
    """Returns the name of a parameter without what wrappers and versions of score_sde_pytorch made of it."""
    name = name.removeprefix(WRAPPER)
    layer, dot, parameter = name.rpartition(".")
    return f"{layer}_0{dot}{parameter}" if layer.endswith(".Conv") else name
