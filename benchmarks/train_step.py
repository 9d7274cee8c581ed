"""Speed of a training step, or of a forward pass of the network, next to a matrix product: one JSON line on stdout.

  python -m benchmarks.train_step --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8 --steps 6
  python -m benchmarks.train_step --what forward --config configs/vp/cifar10_ddpmpp_continuous.py --dtype bfloat16

Runs the program of `--mode train` (`--what step`), or the score function as samplers call it (`--what forward`; a step
is then one pass), on random images and random parameters of the usual size. Calls that are not timed come first, so
that the optimizer has moments of real gradients.

  model_flops        XLA's count for a step; the body of a loop counts once, and so does a scan of `n_jitted_steps`
  contraction_flops  operations of all convolutions and matrix products of a step, also of those in loops
  gemm_flops_per_s   rate of a matrix product in the same process and dtype: the median of those before, between and
                     after the calls, because the clock of a machine drifts by a tenth within a minute
  fraction_of_gemm   contraction_flops per second over that rate
  compile_seconds    "cold": trace and compile into an empty persistent cache; "cached": read from it, None if that
                     was not possible or with `--noread_cache`
  peak_bytes         growth of the process while the steps are timed (Linux, a CPU)
  temporaries_bytes  intermediate arrays, as XLA plans them
  result             loss of the last step, or root mean square of the scores: equal in checkouts that compute the same
"""

from __future__ import annotations

import contextlib
import inspect
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

import checks
import losses
from benchmarks import contractions
from benchmarks import measure as measuring
from errors import UserError
from experiment import drawing
from experiment.build import Experiment, build_experiment, map_train_steps
from models import cpu
from modes import memory
from parallel import distributed

GEMM_REPETITIONS = 4  # each time it is timed
Call = Callable[[], Any]  # runs the program once and returns (final state, result)


# --- the programs ----------------------------------------------------------------------------------------------------


def map_forward(experiment: Experiment) -> jax.stages.Wrapped:
    """Map the score over the devices: (params, x, t, class labels or None) -> score, all with a device axis."""

    def score(params: Any, x: Any, t: Any, class_labels: Any) -> Any:
        return experiment.score_fn(params, class_labels=class_labels)(x, t)

    return distributed.pmap(score)


def forward_shapes(experiment: Experiment, batch_size: int, devices: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """Return the shapes of the arguments of the score for so many images on each device."""
    shape = lambda dtype, *shape: jax.ShapeDtypeStruct((*devices, *shape), dtype)  # noqa: E731
    params = jax.tree.map(lambda leaf: shape(leaf.dtype, *leaf.shape), jax.eval_shape(experiment.init_state).params)
    labels = shape(jnp.int32, batch_size) if experiment.num_classes else None
    return params, shape(jnp.float32, batch_size, *experiment.image_shape), shape(jnp.float32, batch_size), labels


def compile_forward(experiment: Experiment) -> jax.stages.Compiled:
    """Compile the score of a batch of `training.batch_size` images."""
    on_device = experiment.config.training.batch_size // distributed.device_count()
    inputs = forward_shapes(experiment, on_device, (distributed.local_device_count(),))
    return map_forward(experiment).lower(*inputs).compile()


def trace_program(experiment: Experiment, what: str) -> jax.stages.Traced:
    """Trace all training steps of a call, or a forward pass, for one accelerator that has all images of the batch."""
    settings = experiment.config.training
    if what == "forward":
        mapped, inputs = map_forward(experiment), forward_shapes(experiment, settings.batch_size)
    else:
        mapped, batch = map_train_steps(experiment), (settings.n_jitted_steps, settings.batch_size)
        levels = jax.ShapeDtypeStruct((*batch, *experiment.image_shape), jnp.uint8)
        labels = jax.ShapeDtypeStruct(batch, jnp.int32)
        images = (levels, labels) if experiment.num_classes else levels
        inputs = experiment.keys["train"], jax.eval_shape(experiment.init_state), images
    with cpu.for_platform("cuda"):
        return jax.jit(inspect.unwrap(mapped)).trace(*inputs)  # without the mapping over devices


def count_contractions(experiment: Experiment, what: str) -> float:
    """Return the operations of all convolutions and matrix products of one step, for the whole batch.

    Counted in the program for a GPU, where a convolution is one operation; a CPU's may be a loop over several.
    """
    steps = 1 if what == "forward" else experiment.config.training.n_jitted_steps
    return contractions.total_flops(contractions.of_program(trace_program(experiment, what), "cuda")) / steps


def random_params(experiment: Experiment) -> Any:
    """Return parameters drawn on the host, with which features keep a size of about 1; nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: np.ndarray) -> np.ndarray:
        fan_in = math.prod(leaf.shape[:-1])  # 1 for a vector
        scale = 1.0 / math.sqrt(fan_in) if leaf.ndim > 1 else 0.1
        is_scale = getattr(path[-1], "key", "") == "scale"
        return np.asarray(rng.standard_normal(leaf.shape, np.float32) * scale + is_scale, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, experiment.state_template().params)


def choose_params(experiment: Experiment, workdir: str | None) -> tuple[Any, str]:
    """Return the parameters of a trained run, or random ones without a workdir, and what reports call them."""
    if not workdir:
        return random_params(experiment), "random"
    return drawing.restore(experiment, Path(workdir)).params, workdir


def random_images(experiment: Experiment, *shape: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return levels uint8[*shape, H, W, C] and class labels int32[*shape]; None for a network without classes."""
    classes = experiment.num_classes
    levels = np.random.default_rng(1).integers(0, 256, (*shape, *experiment.image_shape), np.uint8)
    return levels, np.random.default_rng(2).integers(0, classes, shape, np.int32) if classes else None


def training_call(experiment: Experiment, compiled: jax.stages.Compiled) -> Call:
    """Return a function that trains for one call of the program and returns the state and the loss."""
    settings = experiment.config.training
    levels, labels = random_images(experiment, settings.n_jitted_steps, settings.batch_size)
    batch = distributed.shard(levels, axis=1)
    inputs = batch if labels is None else (batch, distributed.shard(labels, axis=1))
    state = distributed.replicate(losses.init_state(random_params(experiment), experiment.optimizer))

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(experiment.keys["train"], state, inputs)
        return state, metrics["loss"]

    return call


def forward_inputs(experiment: Experiment) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return noise of the size of noisy images, float32[B, H, W, C], their times [B], and class labels or None."""
    batch_size, rng = experiment.config.training.batch_size, np.random.default_rng(1)
    t = rng.uniform(1e-3, 1.0, batch_size).astype(np.float32)
    std = np.asarray(experiment.sde.std(jnp.asarray(t)))
    x = rng.standard_normal((batch_size, *experiment.image_shape), np.float32) * std[:, None, None, None]
    return x, t, random_images(experiment, batch_size)[1]


def forward_call(experiment: Experiment, compiled: jax.stages.Compiled) -> Call:
    """Return a function that computes the scores of one batch and returns them twice."""
    batch = (array if array is None else distributed.shard(array) for array in forward_inputs(experiment))
    inputs = distributed.replicate(random_params(experiment)), *batch

    def call() -> Any:
        scores = compiled(*inputs)
        return scores, scores

    return call


# what is measured -> (compiles it, makes the call, turns the last call's result into one number)
PROGRAMS: dict[str, tuple[Callable[..., jax.stages.Compiled], Callable[..., Call], Callable[[Any], Any]]] = {
    "step": (memory.compile_training, training_call, lambda loss: loss[..., -1].mean()),
    "forward": (compile_forward, forward_call, lambda scores: jnp.sqrt(jnp.square(scores).mean())),
}


# --- what is measured of them ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_cache() -> Iterator[Path]:
    """Use a temporary, empty compilation cache; the user's is not touched."""

    def use(settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX opens the folder once

    with tempfile.TemporaryDirectory(prefix="score_sde_xla_") as folder:
        settings = {
            "jax_enable_compilation_cache": True,
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,  # the programs of tests are small
        }
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            use(settings)
            yield Path(folder)
        finally:
            use(before)


def compile_twice(
    compile_program: Callable[[], jax.stages.Compiled], *, read: bool = True
) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Compile a program into an empty persistent cache, and again from there with nothing left in JAX's memory."""

    def timed() -> tuple[jax.stages.Compiled, float]:
        jax.clear_caches()
        start = time.perf_counter()
        return compile_program(), time.perf_counter() - start

    with own_cache() as folder:
        entries = lambda: {path.name: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}  # noqa: E731
        compiled, cold = timed()
        written = entries()
        cached = timed()[1] if read else None
        is_read = written and entries() == written  # a miss would have written them again
    return compiled, {"cold": cold, "cached": cached if is_read else None}


def _temporaries_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Return the bytes of intermediate arrays and of results without a donated argument; None if unknown."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return (analysis.temp_size_in_bytes + outputs) * distributed.device_count()


def measure(config: ConfigDict, *, steps: int, what: str = "step", read_cache: bool = True) -> dict[str, Any]:
    """Compile and run training steps or forward passes on random images."""
    batch_size, jitted = config.training.batch_size, config.training.n_jitted_steps
    checks.one_of("--what", what, PROGRAMS)
    checks.positive("--steps", steps)
    distributed.check_batch_size("--batch_size", batch_size)
    if what == "forward" and jitted != 1:
        raise UserError(f"--n_jitted_steps={jitted} with --what=forward; expected 1, there are no training steps")
    if steps % jitted:
        raise UserError(f"--steps={steps}; expected a multiple of --n_jitted_steps={jitted}")
    if config.training.microbatches != 1:
        raise UserError(
            f"training.microbatches={config.training.microbatches}; expected 1, since XLA counts the operations of a "
            "loop's body once"
        )
    dtype = jnp.dtype(config.model.dtype)
    compile_program, make_call, summarize = PROGRAMS[what]
    experiment = build_experiment(config)
    measuring.progress(f"compiling ({what}, batch {batch_size}, {dtype.name})")
    compiled, compile_seconds = compile_twice(lambda: compile_program(experiment), read=read_cache)
    measuring.progress(f"compiled in {compile_seconds['cold']:.1f} s; running")
    growth = measuring.Growth()
    call = make_call(experiment, compiled)
    jax.block_until_ready(call())
    growth.forget_peak()  # drawing the parameters on the host does not count
    last: list[Any] = []

    def run() -> Any:
        last[:] = call()
        return last

    gemm = lambda: [measuring.gemm_flops_per_s(dtype, GEMM_REPETITIONS)]  # noqa: E731
    times, rates = measuring.alternate(run, gemm, steps // jitted)
    peak, result = growth.peak_bytes(), float(summarize(last[1]))
    if not math.isfinite(result):
        raise FloatingPointError(f"the result is {result}; its time is meaningless")
    rate, seconds, work = statistics.median(rates), times.summary(jitted), count_contractions(experiment, what)
    return {
        "what": what,
        **measuring.describe(config),
        "n_jitted_steps": jitted,
        "steps": steps,
        "seconds_per_step": seconds,
        "images_per_s": batch_size / seconds["median"],
        "model_flops": measuring.flops(compiled) * distributed.device_count(),
        "contraction_flops": work,
        "gemm_flops_per_s": rate,
        "gemm_flops_per_s_of_each": rates,
        "float32_gemm_flops_per_s": rate if dtype == jnp.float32 else measuring.gemm_flops_per_s(),
        "fraction_of_gemm": work / seconds["median"] / rate,
        "compile_seconds": compile_seconds,
        "peak_bytes": peak,
        "temporaries_bytes": _temporaries_bytes(compiled),
        "result": result,
    }


def main() -> dict[str, Any]:
    config = flags.FLAGS.config
    config.training.batch_size = flags.FLAGS.batch_size or config.training.batch_size
    config.training.n_jitted_steps, config.model.dtype = flags.FLAGS.n_jitted_steps, flags.FLAGS.dtype
    return measure(config.lock(), **measuring.flag_values("steps", "what", "read_cache"))


if __name__ == "__main__":
    measuring.define_flags(
        batch_size=(0, "Images of a step; 0: training.batch_size."),
        steps=(6, "Steps that are timed, a multiple of --n_jitted_steps."),
        n_jitted_steps=(1, "Training steps in one compiled call."),
    )
    flags.DEFINE_enum("what", "step", tuple(PROGRAMS), "A training step, or a forward pass of the score network.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the features.")
    flags.DEFINE_boolean("read_cache", True, "Compile a second time, with the persistent cache.")
    measuring.main(main)
