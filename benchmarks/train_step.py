"""Speed of a training step, or of a forward pass of the network, next to a matrix product: one JSON line on stdout.

  python -m benchmarks.train_step --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8 --steps 6
  python -m benchmarks.train_step --what forward --config configs/vp/cifar10_ddpmpp_continuous.py --dtype bfloat16

Runs the program that `--mode train` runs (`--what step`), or the score function as samplers call it (`--what
forward`; a step is then one such pass), on random images and random parameters of the usual size. The optimizer starts
as it does in training, and has moments of real gradients after the calls that are not timed.

`model_flops` is XLA's count for one step of the compiled program: the body of a loop counts once, and so does a scan of
`n_jitted_steps` steps. So it misses work that a CPU's program does in loops: `contraction_flops` are the operations of
all convolutions and matrix products of a step, however they are done, and `fraction_of_gemm` is of these.
`gemm_flops_per_s` is the rate of a matrix product in the same process and dtype, the median of
those taken before, between and after the calls: the clock of a machine drifts by a tenth within a minute.
`compile_seconds.cold` is the time to trace and compile into an empty persistent cache, as a first run does; `.cached`
the same when the cache has it, None if it was not used, or with `--noread_cache`. `peak_bytes` is by how much the
process has grown, at most, while the steps are timed (Linux, a CPU); `temporaries_bytes` are the arrays between as XLA
plans them. `result` is the loss of the last step, or the root mean square of the scores, by which two checkouts can be
seen to compute the same.

To compare with another commit, run the same command in a worktree of it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict, config_flags

import checks
import losses
from benchmarks import contractions
from benchmarks import measure as measuring
from benchmarks.process_memory import Growth
from experiment.build import Experiment, build_experiment, map_train_steps
from models import cpu
from models.factory import num_classes_of
from modes import memory
from parallel import distributed

WHAT = ("step", "forward")
GEMM_REPETITIONS = 4  # each time it is timed
Call = Callable[[], Any]  # runs the program once and returns (what it leaves, its result)

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags."""
    config_flags.DEFINE_config_file("config", None, "Experiment; its data are not read.")
    flags.DEFINE_enum("what", "step", WHAT, "A training step, or a forward pass of the score network.")
    flags.DEFINE_integer("batch_size", 0, "Images of a step; 0: training.batch_size.")
    flags.DEFINE_integer("steps", 6, "Steps that are timed, a multiple of --n_jitted_steps.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the features.")
    flags.DEFINE_integer("n_jitted_steps", 1, "Training steps in one compiled call.")
    flags.DEFINE_boolean("read_cache", True, "Compile a second time, with the persistent cache.")
    flags.mark_flag_as_required("config")


# --- the programs ----------------------------------------------------------------------------------------------------


def map_forward(experiment: Experiment) -> jax.stages.Wrapped:
    """Maps the score over the devices: (params, x, t, class labels or None) -> score, all with a device axis."""

    def score(params: Any, x: Any, t: Any, class_labels: Any) -> Any:
        return experiment.score_fn(params, class_labels=class_labels)(x, t)

    return distributed.pmap(score)


def forward_shapes(experiment: Experiment, batch_size: int) -> tuple[Any, ...]:
    """Returns the shapes of the arguments of the score on one device, for so many images there."""
    x, vector = (batch_size, *experiment.image_shape), (batch_size,)
    labels = jax.ShapeDtypeStruct(vector, jnp.int32) if num_classes_of(experiment.config) else None
    params = jax.eval_shape(experiment.init_state).params
    return params, jax.ShapeDtypeStruct(x, jnp.float32), jax.ShapeDtypeStruct(vector, jnp.float32), labels


def compile_forward(experiment: Experiment) -> jax.stages.Compiled:
    """Compiles the score of a batch of `training.batch_size` images."""
    devices = distributed.local_device_count()
    inputs = forward_shapes(experiment, experiment.config.training.batch_size // distributed.device_count())
    inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((devices, *leaf.shape), leaf.dtype), inputs)
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
        told = (levels, labels) if num_classes_of(experiment.config) else levels
        inputs = experiment.keys["train"], jax.eval_shape(experiment.init_state), told
    with cpu.for_platform("cuda"):
        return jax.jit(inspect.unwrap(mapped)).trace(*inputs)  # without the mapping over devices


def count_contractions(experiment: Experiment, what: str) -> float:
    """Returns the operations of all convolutions and matrix products of one step, for the whole batch.

    They are those of the program as it is lowered for a GPU, where convolutions are convolutions: however the program
    of a CPU computes them, in a loop or in more operations, the work that is done is the same.
    """
    steps = 1 if what == "forward" else experiment.config.training.n_jitted_steps
    return contractions.total_flops(contractions.of_program(trace_program(experiment, what), "cuda")) / steps


def _random_labels(experiment: Experiment, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns random class labels, int32, for a network that is told them."""
    classes = num_classes_of(experiment.config)
    return np.random.default_rng(2).integers(0, classes, shape, np.int32) if classes else None


def random_params(experiment: Experiment) -> Any:
    """Returns parameters drawn on the host, whose features stay of the size of one; nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: np.ndarray) -> np.ndarray:
        fan_in = math.prod(leaf.shape[:-1])  # 1 for a vector
        scale = 1.0 / math.sqrt(fan_in) if leaf.ndim > 1 else 0.1
        is_scale = getattr(path[-1], "key", "") == "scale"
        return np.asarray(rng.standard_normal(leaf.shape, np.float32) * scale + is_scale, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, experiment.state_template().params)


def training_call(experiment: Experiment, compiled: jax.stages.Compiled) -> Call:
    """Returns what trains once more at each call, and returns the state and the mean loss."""
    settings = experiment.config.training
    shape = settings.n_jitted_steps, settings.batch_size
    levels = np.random.default_rng(1).integers(0, 256, (*shape, *experiment.image_shape), np.uint8)
    labels = _random_labels(experiment, shape)
    batch = distributed.shard(levels, axis=1)
    inputs = batch if labels is None else (batch, distributed.shard(labels, axis=1))
    state = distributed.replicate(losses.init_state(random_params(experiment), experiment.optimizer))

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(experiment.keys["train"], state, inputs)
        return state, metrics["loss"]

    return call


def forward_inputs(experiment: Experiment) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns noise of the size of noisy images, float32[B, H, W, C], their times [B], and class labels or None."""
    batch_size = experiment.config.training.batch_size
    rng = np.random.default_rng(1)
    t = rng.uniform(1e-3, 1.0, batch_size).astype(np.float32)
    std = np.asarray(experiment.sde.std(jnp.asarray(t)))
    x = rng.standard_normal((batch_size, *experiment.image_shape), np.float32) * std[:, None, None, None]
    return x, t, _random_labels(experiment, (batch_size,))


def forward_call(experiment: Experiment, compiled: jax.stages.Compiled) -> Call:
    """Returns what computes the scores of one batch at each call, and returns them twice."""
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
    """Turns on a persistent compilation cache of our own, empty and temporary; the user's is not touched."""
    with tempfile.TemporaryDirectory(prefix="score_sde_xla_") as folder:
        settings = {
            "jax_enable_compilation_cache": True,
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,  # the programs of tests are small
        }
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            _use_cache(settings)
            yield Path(folder)
        finally:
            _use_cache(before)


def _use_cache(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX opens the folder once


def compile_twice(
    compile_program: Callable[[], jax.stages.Compiled], *, read: bool = True
) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Compiles a program into an empty persistent cache, and again from there with nothing left in JAX's memory."""

    def timed() -> tuple[jax.stages.Compiled, float]:
        jax.clear_caches()
        start = time.perf_counter()
        return compile_program(), time.perf_counter() - start

    with own_cache() as folder:
        entries = lambda: {path.name: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}  # noqa: E731
        compiled, cold = timed()
        written = entries()
        _, cached = timed() if read else (None, None)
        is_read = written and entries() == written  # a miss would have written them again
    return compiled, {"cold": cold, "cached": cached if is_read else None}


def _temporaries_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the bytes of arrays that come and go, and of results that take no argument's place; None: not told."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return (analysis.temp_size_in_bytes + outputs) * distributed.device_count()


def time_next_to_gemm(call: Call, repetitions: int, dtype: Any) -> tuple[measuring.Seconds, list[float], Any]:
    """Times calls, and a matrix product before each of them and after the last."""
    times: list[float] = []
    last: list[Any] = []

    def run() -> Any:
        last[:] = call()
        return last

    rates = [measuring.gemm_flops_per_s(dtype, GEMM_REPETITIONS)]
    for _ in range(repetitions):
        times += measuring.time_calls(run, 1, warm_up=0).all
        rates.append(measuring.gemm_flops_per_s(dtype, GEMM_REPETITIONS))
    return measuring.Seconds(tuple(times)), rates, last[1]


def _check(config: ConfigDict, steps: int, what: str) -> None:
    """Checks what `build_experiment` does not."""
    checks.one_of("--what", what, WHAT)
    checks.positive("--steps", steps)
    distributed.check_batch_size("--batch_size", config.training.batch_size)
    jitted = config.training.n_jitted_steps
    if what == "forward" and jitted != 1:
        raise ValueError(f"--n_jitted_steps={jitted} with --what=forward; expected 1, there are no training steps")
    if steps % jitted:
        raise ValueError(f"--steps={steps}; expected a multiple of --n_jitted_steps={jitted}")
    if config.training.microbatches != 1:
        raise ValueError(
            f"training.microbatches={config.training.microbatches}; expected 1, since XLA counts the operations of a "
            "loop's body once"
        )


def measure(config: ConfigDict, *, steps: int, what: str = "step", read_cache: bool = True) -> dict[str, Any]:
    """Compiles and runs training steps or forward passes on random images."""
    _check(config, steps, what)
    jitted, dtype = config.training.n_jitted_steps, jnp.dtype(config.model.dtype)
    compile_program, make_call, summarize = PROGRAMS[what]
    experiment = build_experiment(config)
    measuring.progress(f"compiling ({what}, batch {config.training.batch_size}, {dtype.name})")
    compiled, compile_seconds = compile_twice(lambda: compile_program(experiment), read=read_cache)
    measuring.progress(f"compiled in {compile_seconds['cold']:.1f} s; running")
    growth = Growth()
    call = make_call(experiment, compiled)
    jax.block_until_ready(call())
    growth.forget_peak()  # what the host held to draw the parameters has gone
    times, rates, result = time_next_to_gemm(call, steps // jitted, dtype)
    peak, result = growth.peak_bytes(), float(summarize(result))
    if not math.isfinite(result):
        raise FloatingPointError(f"the result is {result}, whose time says nothing")
    rate = statistics.median(rates)
    work = count_contractions(experiment, what)
    seconds = times.summary(jitted)
    return {
        "what": what,
        "network": config.model.name,
        "batch_size": config.training.batch_size,
        "dtype": dtype.name,
        "n_jitted_steps": jitted,
        "steps": steps,
        "seconds_per_step": seconds,
        "images_per_s": config.training.batch_size / seconds["median"],
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


def main(argv: Sequence[str]) -> None:
    """Prints the JSON line."""
    logging.set_verbosity(logging.WARNING)
    config = FLAGS.config
    config.training.batch_size = FLAGS.batch_size or config.training.batch_size
    config.training.n_jitted_steps, config.model.dtype = FLAGS.n_jitted_steps, FLAGS.dtype
    try:
        result = measure(config.lock(), steps=FLAGS.steps, what=FLAGS.what, read_cache=FLAGS.read_cache)
    except ValueError as error:
        sys.exit(f"benchmarks.train_step: {error}")
    measuring.report(result)


if __name__ == "__main__":
    define_flags()
    app.run(main)
