"""Checkpoints of score_sde and score_sde_pytorch as one thing: tensors by original path, steps and rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from errors import UserError
from legacy.msgpack_file import read_msgpack, write_msgpack
from legacy.parameters import Leaf
from legacy.torch_file import is_torch_file, read_torch
from legacy.torch_names import TorchLeaf, match_torch_parameters, plain_name

# Parameters, their average, and the first and second moments of Adam.
GROUPS = ("params", "params_ema", "mu", "nu")
MAX_STEP = 2**31 - 1
_MOMENTS = {"mu": "grad_ema", "nu": "grad_sq_ema"}
_TORCH_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_TORCH_BUFFERS = ("sigmas",)  # noise levels, which follow from the configuration
_UNTRAINED = "GaussianFourierProjection_0/W"  # PyTorch neither averages nor optimizes it


class Tensor(NamedTuple):
    """One tensor of a file: where it stands there, its shape there, and its value with axes in our order."""

    source: str
    shape: tuple[int, ...]
    value: np.ndarray


class Row(NamedTuple):
    """One tensor, from where to where; `note` says what is wrong, if anything."""

    source: str
    source_shape: str
    destination: str
    shape: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class LegacyCheckpoint:
    """What a checkpoint of another program holds.

    Attributes:
      tensors: of each of GROUPS by original path; only "params" if the file has nothing else.
      unused: tensors that have no place here.
      step: training steps taken.
      optimizer_step: updates that Adam counts, for the correction of its moments.
      lr: learning rate after the warm-up, if the file says.
      ema_rate: decay of the average, if the file says.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    unused: tuple[Tensor, ...] = ()
    step: int = 0
    optimizer_step: int = 0
    lr: float | None = None
    ema_rate: float | None = None

    @property
    def is_bare(self) -> bool:
        """Says whether there are parameters only, without averages and moments."""
        return len(self.tensors) == 1

    def compare(self, leaves: Iterable[Leaf]) -> list[Row]:
        """Lists every tensor with its place in the network whose parameters are `leaves`, and every empty place."""
        leaves, rows = list(leaves), []
        for group, tensors in self.tensors.items():
            rows += [_row(group, leaf, tensors.get(leaf.original)) for leaf in leaves]
            known = {leaf.original for leaf in leaves}
            rows += [_left_over(tensor) for path, tensor in tensors.items() if path not in known]
        return rows + [_left_over(tensor) for tensor in self.unused]

    def trees(self, leaves: Iterable[Leaf]) -> dict[str, dict[str, Any]]:
        """Returns the tree of the network's parameters in each group; `compare` has found nothing wrong."""
        leaves = list(leaves)
        return {
            group: unflatten_dict(
                # Copies: some of these are views of a file's content, which could not be written to.
                {leaf.path: np.array(tensors[leaf.original].value).reshape(leaf.shape) for leaf in leaves}
            )
            for group, tensors in self.tensors.items()
        }


def _left_over(tensor: Tensor) -> Row:
    return Row(tensor.source, str(tensor.shape), "-", "-", "left over")


def _row(group: str, leaf: Leaf, tensor: Tensor | None) -> Row:
    destination, shape = f"{group}/{'/'.join(leaf.path)}", str(leaf.shape)
    if tensor is None:
        return Row("-", "-", destination, shape, "missing")
    note = ""
    if tensor.value.shape not in (leaf.shape, leaf.original_shape):
        note = "of another shape"
    elif tensor.value.dtype != np.float32:
        note = f"{tensor.value.dtype}, expected float32"
    elif not np.isfinite(tensor.value).all():
        note = "holds NaN or infinity"
    return Row(tensor.source, str(tensor.shape), destination, shape, note)


def _number(value: Any, name: str, kind: type) -> Any:
    """Returns a number that a file holds as such or as an array without axes."""
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not whole):
        raise UserError(f"{name} is {type(value).__name__}, no number")
    if kind is int and not 0 <= value <= MAX_STEP:
        raise UserError(f"{name}={value} is no number of steps")
    return kind(value)


def _map(tree: Any, name: str) -> Mapping[Any, Any]:
    """Returns the map at a slash-joined path."""
    for part in name.split("/"):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    if not isinstance(tree, Mapping):
        raise UserError(f"it has no map {name}")
    return tree


# --- files of score_sde ----------------------------------------------------------------------------------------------


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    flat = {}
    for path, value in flatten_dict(dict(tree), sep="/").items():
        if not isinstance(value, np.ndarray):
            raise UserError(f"{prefix}{path} is {type(value).__name__}, no array")
        flat[path] = Tensor(f"{prefix}{path}", value.shape, value)
    return flat


def _from_msgpack(tree: dict[str, Any]) -> LegacyCheckpoint:
    if "optimizer" not in tree:
        return LegacyCheckpoint({"params": _flat(tree, "")})
    prefix = "optimizer/state/param_states/"
    states = _flat(_map(tree, prefix.rstrip("/")), prefix)
    tensors = {
        "params": _flat(_map(tree, "optimizer/target"), "optimizer/target/"),
        "params_ema": _flat(_map(tree, "params_ema"), "params_ema/"),
    }
    for group, name in _MOMENTS.items():
        tensors[group] = {
            path.removesuffix(f"/{name}"): states.pop(path) for path in list(states) if path.endswith(f"/{name}")
        }
    return LegacyCheckpoint(
        tensors,
        unused=(*states.values(), *_flat(_map(tree, "model_state"), "model_state/").values()),
        step=_number(tree.get("step"), "step", int),
        optimizer_step=_number(_map(tree, "optimizer/state").get("step"), "optimizer/state/step", int),
        lr=_number(tree.get("lr"), "lr", float),
        ema_rate=_number(tree.get("ema_rate"), "ema_rate", float),
    )


def write_score_sde(
    path: str | Path,
    leaves: Iterable[Leaf],
    groups: Mapping[str, Any],
    *,
    step: int,
    optimizer_step: int,
    lr: float,
    ema_rate: float,
) -> None:
    """Writes a file that the 2021 code restores, atomically; its random key is zero.

    Args:
      path: of the file.
      leaves: the network's parameters, see `match_parameters`.
      groups: a tree of them for each of GROUPS.
      step: training steps taken.
      optimizer_step: updates that Adam counts.
      lr: learning rate after the warm-up.
      ema_rate: decay of the average.
    """
    leaves, flat = list(leaves), {}
    for group in GROUPS:
        values = flatten_dict(dict(groups[group]))
        flat[group] = {leaf.original: np.asarray(values[leaf.path]).reshape(leaf.original_shape) for leaf in leaves}
    states = {f"{leaf}/{name}": value for group, name in _MOMENTS.items() for leaf, value in flat[group].items()}
    state = {"step": np.asarray(optimizer_step, np.int32), "param_states": _nested(states)}
    write_msgpack(
        path,
        {
            "step": np.asarray(step, np.int32),
            "optimizer": {"target": _nested(flat["params"]), "state": state},
            "lr": np.asarray(lr, np.float32),
            "model_state": {},
            "ema_rate": np.asarray(ema_rate, np.float32),
            "params_ema": _nested(flat["params_ema"]),
            "rng": np.zeros(2, np.uint32),
        },
    )


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Splits paths at their slashes, in alphabetical order, as Flax left them."""
    return unflatten_dict({tuple(path): flat["/".join(path)] for path in sorted(path.split("/") for path in flat)})


# --- files of score_sde_pytorch --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _TorchReader:
    """Reads the parts of a file of score_sde_pytorch.

    Its average and its optimizer list tensors without names, in the order of the model's parameters.

    Attributes:
      model: the model's tensors by name, in that order, without buffers.
      leaves: the network's parameters, by name.
    """

    model: Mapping[str, np.ndarray]
    leaves: Mapping[str, TorchLeaf]

    def _tensor(self, name: str, source: str, value: Any) -> tuple[str, Tensor]:
        """Returns the original path of a parameter, or its name if it is unknown, and one of its tensors."""
        if not isinstance(value, np.ndarray):
            raise UserError(f"{source} is {type(value).__name__}, no tensor")
        leaf = self.leaves.get(name)
        if leaf is None:
            return name, Tensor(source, value.shape, value)
        return leaf.original, Tensor(source, value.shape, leaf.from_torch(value))

    def _untrained(self, name: str) -> bool:
        return name in self.leaves and self.leaves[name].original == _UNTRAINED

    def params(self) -> dict[str, Tensor]:
        """Returns the parameters."""
        return dict(self._tensor(name, f"model.{name}", value) for name, value in self.model.items())

    def params_ema(self, shadow: Any) -> dict[str, Tensor]:
        """Returns the averaged parameters; those that are not trained are their own average."""
        names = [name for name in self.model if not self._untrained(name)]
        if not isinstance(shadow, list) or len(shadow) not in (len(names), len(self.model)):
            raise UserError(f"ema.shadow_params does not have a tensor for each of the {len(names)} parameters")
        names = list(self.model) if len(shadow) == len(self.model) else names
        averaged = [
            self._tensor(name, f"ema.shadow_params[{i}]", value)
            for i, (name, value) in enumerate(zip(names, shadow, strict=True))
        ]
        averages = set(names)
        kept = [self._tensor(name, f"model.{name}", self.model[name]) for name in self.model if name not in averages]
        return dict(averaged + kept)

    def moments(self, optimizer: Mapping[Any, Any]) -> tuple[dict[str, dict[str, Tensor]], int]:
        """Returns Adam's moments, zero where there are none, and the number of its updates."""
        groups, states = optimizer.get("param_groups"), optimizer.get("state")
        if not isinstance(groups, list) or len(groups) != 1 or not isinstance(states, Mapping):
            raise UserError("optimizer is not the state of Adam on one group of parameters")
        numbers = groups[0].get("params") if isinstance(groups[0], Mapping) else None
        if not isinstance(numbers, list) or len(numbers) != len(self.model) or any(type(n) is not int for n in numbers):
            raise UserError(f"optimizer.param_groups does not list the {len(self.model)} parameters of the model")
        tensors: dict[str, dict[str, Tensor]] = {group: {} for group in _TORCH_MOMENTS}
        steps = set()
        for number, (name, value) in zip(numbers, self.model.items(), strict=True):
            state = states.get(number)
            if isinstance(state, Mapping):
                steps.add(_number(state.get("step"), f"optimizer.state[{number}].step", int))
            for group, moment in _TORCH_MOMENTS.items():
                source = f"optimizer.state[{number}].{moment}" if number in states else "(zeros: no state)"
                found = (
                    np.zeros_like(value)
                    if number not in states
                    else state.get(moment)
                    if isinstance(state, Mapping)
                    else None
                )
                tensors[group].update([self._tensor(name, source, found)])
        if len(steps) > 1:
            raise UserError(f"optimizer.state counts different steps: {sorted(steps)}")
        return tensors, steps.pop() if steps else 0


def _from_torch(content: Mapping[Any, Any], leaves: list[TorchLeaf]) -> LegacyCheckpoint:
    model = _map(content, "model") if "model" in content else content
    if not all(isinstance(name, str) and isinstance(value, np.ndarray) for name, value in model.items()):
        raise UserError("its model is not a dictionary of tensors")
    named = {plain_name(name): value for name, value in model.items()}
    named = {name: value for name, value in named.items() if name not in _TORCH_BUFFERS}
    reader = _TorchReader(named, {leaf.name: leaf for leaf in leaves})
    if "model" not in content:
        return LegacyCheckpoint({"params": reader.params()})
    ema = _map(content, "ema")
    moments, optimizer_step = reader.moments(_map(content, "optimizer"))
    return LegacyCheckpoint(
        {"params": reader.params(), "params_ema": reader.params_ema(ema.get("shadow_params")), **moments},
        step=_number(content.get("step"), "step", int),
        optimizer_step=optimizer_step,
        ema_rate=_number(ema.get("decay"), "ema.decay", float),
    )


def read_checkpoint(path: str | Path, config: ConfigDict, leaves: list[Leaf]) -> LegacyCheckpoint:
    """Reads a checkpoint of score_sde or score_sde_pytorch; which of them, its first bytes tell.

    Args:
      path: of the file.
      config: describes the network; a PyTorch file's names follow from it.
      leaves: the network's parameters, see `match_parameters`.

    Raises:
      UserError: naming the file, if it cannot be opened, is neither or damaged.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        if is_torch_file(start):
            return _from_torch(read_torch(path), match_torch_parameters(config, leaves))
        return _from_msgpack(read_msgpack(path))
    except UserError as error:
        reason = str(error)
        raise UserError(reason if str(path) in reason else f"{path}: {reason}") from error
