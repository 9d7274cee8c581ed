"""The mode "memory": the memory that training and evaluation need on each device, without running them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from errors import UserError
from experiment import programs, smoke
from experiment.build import Experiment, build_experiment, map_train_steps
from models.factory import require_score_network
from parallel import distributed
from training.loop import check_schedule

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes on one device while a program runs."""

    held: dict[str, int]  # inputs, by name
    temporaries: int  # peak of all other arrays, as XLA planned it
    gradients: int = 0  # part of `temporaries` for the gradients of the parameters

    @property
    def total(self) -> int:
        """Inputs and temporaries."""
        return sum(self.held.values()) + self.temporaries


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compile(program: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    return program.lower(*arguments).compile()


def _analyze(compiled: jax.stages.Compiled) -> Any:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise UserError(f"JAX does not report the memory of programs on {jax.default_backend()!r}")
    return analysis


def compile_training(experiment: Experiment) -> jax.stages.Compiled:
    """Compile the training steps of a run from the shapes of their arguments."""
    state, batch = programs.on_devices((experiment.state_shapes, experiment.batch_shapes))
    return _compile(map_train_steps(experiment), experiment.keys["train"], state, batch)


def of_training(experiment: Experiment, compiled: jax.stages.Compiled) -> Footprint:
    """Return the memory of compiled training steps."""
    state, batch, analysis = experiment.state_shapes, experiment.batch_shapes, _analyze(compiled)
    steps, images = jax.tree.leaves(batch)[0].shape[:2]
    held = {
        "parameters": _bytes(state.params),
        "their moving average": _bytes(state.params_ema),
        "state of the optimizer": _bytes(state.opt_state),
        f"{steps} batches of {images} images" if steps > 1 else f"batch of {images} images": _bytes(batch),
    }
    # Outputs that do not reuse the buffer of an input: the metrics.
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Footprint(held, analysis.temp_size_in_bytes + outputs, _bytes(state.params))


def of_evaluation(experiment: Experiment, *, pulls_back: bool = False) -> Footprint:
    """Compile one evaluation of the score for a batch of `eval.batch_size`, and return its memory.

    With `pulls_back` it includes a vector-Jacobian product in the images, as bits/dim need.
    """
    images = distributed.round_up(experiment.config.eval.batch_size) // distributed.device_count()
    params = experiment.state_shapes.params
    x = jax.ShapeDtypeStruct((images, *experiment.image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((images,), jnp.float32)

    def score(params: Any, x: Float[Array, "B H W C"], t: Float[Array, "B"]) -> Any:
        score_fn = experiment.score_fn(params, smooth=True)
        if not pulls_back:
            return score_fn(x, t)
        value, pullback = jax.vjp(lambda x: score_fn(x, t), x)
        return value, pullback(x)  # with x as the vector

    analysis = _analyze(_compile(distributed.pmap(score), *programs.on_devices((params, x, t))))
    held = {"parameters": _bytes(params), f"batch of {images} images": _bytes((x, t))}
    return Footprint(held, analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def _rows(title: str, footprint: Footprint) -> Iterator[str]:
    yield f"\n{title}"
    sizes = footprint.held | {"temporary arrays, most at one time": footprint.temporaries}
    if footprint.gradients:
        sizes["  gradients of the parameters among them"] = footprint.gradients
    for name, size in (sizes | {"all": footprint.total}).items():
        yield f"  {name:<44}{size / MIB:>12,.2f} MiB {size:>18,} bytes"


def _hints(experiment: Experiment) -> Iterator[str]:
    """Yield the settings that would need less memory, and their cost."""
    config, settings = experiment.config, experiment.config.training
    images = settings.batch_size // distributed.device_count()
    more = next((n for n in range(settings.microbatches + 1, images + 1) if images % n == 0), None)
    if more:
        parts = f"{images // more} images instead of {images // settings.microbatches}"
        yield f"training.microbatches={more}: activations of {parts} at a time, same results"
    if not config.model.remat:
        yield "model.remat=True: keeps only the inputs of each block; recomputes the rest, same results"
    if config.model.dtype == "float32":
        yield "model.dtype=bfloat16: halves the features, with 8 bits of precision"


def report(experiment: Experiment) -> Iterator[str]:
    """Yield the lines of the report while the programs compile."""
    config, device = experiment.config, jax.devices()[0]
    yield (
        f"memory on each of {distributed.device_count()} device(s), as XLA plans it for {device.device_kind!r} "
        f"({device.platform}); nothing is run"
    )
    yield (
        f"training.batch_size={config.training.batch_size}, training.microbatches={config.training.microbatches}, "
        f"model.dtype={config.model.dtype}, model.remat={config.model.remat}"
    )
    yield from _rows("a training step", of_training(experiment, compile_training(experiment)))
    yield from _rows("an evaluation of the network (sampling, loss)", of_evaluation(experiment))
    if config.eval.enable_bpd:
        yield from _rows("the same with its Jacobian (bits/dim)", of_evaluation(experiment, pulls_back=True))
    yield "\nsettings that need less:"
    yield from (f"  {hint}" for hint in _hints(experiment))


def memory(config: ConfigDict) -> None:
    """Print the memory that training and evaluation need on each device; compiles both and runs neither."""
    config = smoke.resolve(config)
    require_score_network(config.model.name)
    check_schedule("training", config.training)
    for line in report(build_experiment(config)):
        print(line, flush=True)
