"""Read checkpoints of score_sde and score_sde_pytorch, and write those of score_sde."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from errors import UserError
from legacy.msgpack_file import read_msgpack, write_msgpack
from legacy.parameters import Leaf
from legacy.torch_file import is_torch_file, read_torch
from legacy.torch_names import TorchLeaf, plain_name

# Parameters, their average, and the first and second moments of Adam.
GROUPS = ("params", "params_ema", "mu", "nu")
MAX_STEP = 2**31 - 1
_MOMENTS = {"mu": "grad_ema", "nu": "grad_sq_ema"}
_TORCH_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_TORCH_BUFFERS = ("sigmas",)  # noise levels, which follow from the configuration
_UNTRAINED = "GaussianFourierProjection_0/W"  # PyTorch neither averages nor optimizes it


class Tensor(NamedTuple):
    """One tensor of a file."""

    source: str  # place in the file
    shape: tuple[int, ...]  # in the file
    value: np.ndarray  # with axes in our order


class Row(NamedTuple):
    """One tensor in a file and its place here."""

    source: str
    source_shape: str
    destination: str
    shape: str
    note: str = ""  # what is wrong


@dataclasses.dataclass(frozen=True)
class LegacyCheckpoint:
    """Content of a checkpoint of another program."""

    tensors: Mapping[str, Mapping[str, Tensor]]  # of each of GROUPS, by original path; a bare file has only "params"
    unused: tuple[Tensor, ...] = ()  # without a place here
    step: int = 0  # training steps taken
    optimizer_step: int = 0  # updates counted by Adam, for the bias correction of its moments
    lr: float | None = None  # learning rate after the warm-up, if the file has it
    ema_rate: float | None = None  # decay of the average, if the file has it

    def compare(self, leaves: Iterable[Leaf]) -> list[Row]:
        """List every tensor with its place among the network's parameters `leaves`, and every empty place."""
        left_over = lambda tensor: Row(tensor.source, str(tensor.shape), "-", "-", "left over")  # noqa: E731
        leaves, rows = list(leaves), []
        known = {leaf.original for leaf in leaves}
        for group, tensors in self.tensors.items():
            rows += [_row(group, leaf, tensors.get(leaf.original)) for leaf in leaves]
            rows += [left_over(tensor) for path, tensor in tensors.items() if path not in known]
        return rows + [left_over(tensor) for tensor in self.unused]

    def trees(self, leaves: Iterable[Leaf]) -> dict[str, dict[str, Any]]:
        """Return the parameter tree of each group; requires that `compare` found nothing wrong."""
        leaves = list(leaves)
        return {
            group: unflatten_dict(
                # Copies: some are read-only views of a file's content.
                {leaf.path: np.array(tensors[leaf.original].value).reshape(leaf.shape) for leaf in leaves}
            )
            for group, tensors in self.tensors.items()
        }


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
    """Return a number, which a file may hold as an array without axes."""
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not whole):
        raise UserError(f"{name} is {type(value).__name__}, not a number")
    if kind is int and not 0 <= value <= MAX_STEP:
        raise UserError(f"{name}={value} is not a number of steps")
    return kind(value)


def _map(tree: Any, name: str) -> Mapping[Any, Any]:
    """Return the map at a slash-joined path."""
    for part in name.split("/"):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    if not isinstance(tree, Mapping):
        raise UserError(f"it has no map {name}")
    return tree


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    flat = {}
    for path, value in flatten_dict(dict(tree), sep="/").items():
        if not isinstance(value, np.ndarray):
            raise UserError(f"{prefix}{path} is {type(value).__name__}, not an array")
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


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Split paths at their slashes, in alphabetical order, as Flax does."""
    return unflatten_dict({tuple(path): flat["/".join(path)] for path in sorted(path.split("/") for path in flat)})


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
    """Write a file that the 2021 code restores, atomically; its random key is zero.

    `groups` has a tree of the network's parameters `leaves` for each of GROUPS. The numbers are those of
    `LegacyCheckpoint`.
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


def _torch_moments(
    optimizer: Mapping[Any, Any], model: Mapping[str, np.ndarray], tensor: Callable[..., tuple[str, Tensor]]
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Return Adam's moments, zero for parameters without state, and the number of its updates."""
    groups, states = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(states, Mapping):
        raise UserError("optimizer is not the state of Adam on one group of parameters")
    numbers = groups[0].get("params") if isinstance(groups[0], Mapping) else None
    if not isinstance(numbers, list) or len(numbers) != len(model) or any(type(n) is not int for n in numbers):
        raise UserError(f"optimizer.param_groups does not list the {len(model)} parameters of the model")
    tensors: dict[str, dict[str, Tensor]] = {group: {} for group in _TORCH_MOMENTS}
    steps = set()
    for number, (name, value) in zip(numbers, model.items(), strict=True):
        place, state = f"optimizer.state[{number}]", states.get(number)
        if isinstance(state, Mapping):
            steps.add(_number(state.get("step"), f"{place}.step", int))
        for group, moment in _TORCH_MOMENTS.items():
            if number not in states:
                found = tensor(name, "(zeros: no state)", np.zeros_like(value))
            else:
                found = tensor(name, f"{place}.{moment}", state.get(moment) if isinstance(state, Mapping) else None)
            tensors[group].update([found])
    if len(steps) > 1:
        raise UserError(f"optimizer.state counts different steps: {sorted(steps)}")
    return tensors, steps.pop() if steps else 0


def _from_torch(content: Mapping[Any, Any], leaves: list[TorchLeaf]) -> LegacyCheckpoint:
    """Read a file of score_sde_pytorch, whose average and optimizer list tensors in the order of the parameters."""
    named, leaf_of = _map(content, "model") if "model" in content else content, {leaf.name: leaf for leaf in leaves}
    if not all(isinstance(name, str) and isinstance(value, np.ndarray) for name, value in named.items()):
        raise UserError("its model is not a dictionary of tensors")
    model = {name: value for key, value in named.items() if (name := plain_name(key)) not in _TORCH_BUFFERS}

    def tensor(name: str, source: str, value: Any) -> tuple[str, Tensor]:
        """Return one tensor of a parameter, and the parameter's original path, or its name if it is unknown."""
        if not isinstance(value, np.ndarray):
            raise UserError(f"{source} is {type(value).__name__}, not a tensor")
        leaf = leaf_of.get(name)
        if leaf is None:
            return name, Tensor(source, value.shape, value)
        return leaf.original, Tensor(source, value.shape, leaf.from_torch(value))

    params = {name: tensor(name, f"model.{name}", value) for name, value in model.items()}
    if "model" not in content:
        return LegacyCheckpoint({"params": dict(params.values())})
    ema = _map(content, "ema")
    names, shadow = [name for name in model if params[name][0] != _UNTRAINED], ema.get("shadow_params")
    if not isinstance(shadow, list) or len(shadow) not in (len(names), len(model)):
        raise UserError(f"ema.shadow_params does not have a tensor for each of the {len(names)} parameters")
    names = list(model) if len(shadow) == len(model) else names
    averaged = {name: tensor(name, f"ema.shadow_params[{i}]", shadow[i]) for i, name in enumerate(names)}
    moments, optimizer_step = _torch_moments(_map(content, "optimizer"), model, tensor)
    return LegacyCheckpoint(
        # Parameters that are not averaged are their own average.
        {"params": dict(params.values()), "params_ema": dict((params | averaged).values()), **moments},
        step=_number(content.get("step"), "step", int),
        optimizer_step=optimizer_step,
        ema_rate=_number(ema.get("decay"), "ema.decay", float),
    )


def read_checkpoint(path: str | Path, match_torch: Callable[[], list[TorchLeaf]]) -> LegacyCheckpoint:
    """Read a checkpoint of score_sde or score_sde_pytorch; its first bytes show which.

    `match_torch` is `match_torch_parameters` of the network, called for a PyTorch file alone. Every error is a
    UserError that names the file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        if is_torch_file(start):
            return _from_torch(read_torch(path), match_torch())
        return _from_msgpack(read_msgpack(path))
    except UserError as error:
        reason = str(error)
        raise UserError(reason if str(path) in reason else f"{path}: {reason}") from error
