"""Parameters of score_sde_pytorch in the names of the 2021 code.

PyTorch numbers the layers of a network, `all_modules.7`, in the order in which its constructor makes them, including
those without parameters. Our networks call theirs in the same order, with one exception. Names inside a layer are
Flax's.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import numpy as np

from errors import UserError
from legacy.parameters import ImageShape, Leaf, trace_network
from models.ddpm import DDPM
from models.ncsnpp import NCSNpp
from models.normalization import NORMS

WRAPPER = "module."  # prefix of DataParallel
_PARAMETERS = {"kernel": "weight", "scale": "weight"}


class TorchLeaf(NamedTuple):
    """One parameter."""

    name: str  # in PyTorch
    original: str  # path in the 2021 code
    axes: tuple[int, ...] | None = None  # transposes a value of PyTorch to our order

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        """Return the value with its axes in our order; unchanged if its rank is another."""
        return value if self.axes is None or value.ndim != len(self.axes) else value.transpose(self.axes)


def match_torch_parameters(name: str, model: nn.Module, image_shape: ImageShape, leaves: list[Leaf]) -> list[TorchLeaf]:
    """List the parameters of a network, `leaves`, with their names in score_sde_pytorch, if it has such a network.

    `name` is that of the network here, for the message if it has not.
    """
    if isinstance(model, DDPM) and not model.conditional:
        raise UserError(
            "model.name='ddpm' with model.conditional=False: score_sde_pytorch conditions this network on the noise "
            "level anyway, so it is another network; set model.conditional=True"
        )
    if isinstance(model, DDPM) and model.block.norm != NORMS["GroupNorm"]:
        raise UserError("score_sde_pytorch has model.name='ddpm' only with model.normalization='GroupNorm'")
    if not isinstance(model, NCSNpp):  # DDPM is one
        raise UserError(
            f"model.name={name!r} is not supported for PyTorch checkpoints, only 'ncsnpp' and 'ddpm': "
            "score_sde_pytorch interpolates the feature maps of NCSN and NCSNv2 between other points"
        )
    names = [path[0] for path in trace_network(model, image_shape)[0] if len(path) == 1]
    ordered = list(names)
    # PyTorch upsamples a growing output before the next image is made from the features; we do it after.
    for own in [own for own in ordered if f"{own}_norm" in names]:
        ordered.remove(own)
        ordered.insert(ordered.index(f"{own}_norm"), own)
    numbers = {own: number for number, own in enumerate(ordered)}
    torch_leaves = []
    for leaf in leaves:
        _, *inner, parameter = leaf.original.split("/")
        axes: tuple[int, ...] | None = None
        if len(leaf.shape) == 4:
            axes = (2, 3, 1, 0)  # convolutions: [out, in, height, width] there, [height, width, in, out] here
        elif parameter == "kernel":
            axes = (1, 0)  # linear maps: [out, in] there; NIN, whose parameter is called W, is [in, out] in both
        parts = [f"all_modules.{numbers[leaf.path[0]]}", *inner, _PARAMETERS.get(parameter, parameter)]
        torch_leaves.append(TorchLeaf(".".join(parts), leaf.original, axes))
    return torch_leaves


def plain_name(name: str) -> str:
    """Return a parameter's name without DataParallel's prefix, with Flax's name of a convolution in all versions."""
    name = name.removeprefix(WRAPPER)
    layer, dot, parameter = name.rpartition(".")
    return f"{layer}_0{dot}{parameter}" if layer.endswith(".Conv") else name
