"""What a network evaluation costs inside the compiled samplers, next to a bare forward pass: one JSON line on stdout.

  python -m benchmarks.sampling --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8

Compiles the program that `--mode sample` runs, once for each of `--methods`, and the score function alone, jitted, for
the same batch. Calls of both alternate in one process. A call of a sampler is timed from its sample numbers to the
levels on the host: its seconds over its number of evaluations, the noise, the steps and all else included, are
`seconds_per_evaluation`, and these over the seconds of the forward passes between them `evaluation_over_forward`. Of
the predictor-corrector sampler this is `step_over_forward` as well.

`evaluations_in_loop` does not rest on what a sampler says of itself: convolutions in the loop of its compiled program,
over those of the forward pass. That of the probability-flow ODE is one stage of its solver.

Methods with a number of steps are measured with `--num_steps`, and their `seconds_per_image_calculated` is for
`usual_steps`: of "pc" those of the configuration, of the others 19, as docs/samplers.md advises. Methods that choose
their steps run to the end, `seconds_per_image_measured`; what they choose depends on the network, which is random
unless `--workdir` names a trained run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import checks
from benchmarks import loops, train_step
from benchmarks import measure as measuring
from benchmarks.measure import Seconds
from experiment import drawing
from experiment.build import Experiment, SamplingProgram, build_experiment
from parallel import distributed
from sampling import METHODS, build_sampler
from solvers import ADAPTIVE

DEFAULT_METHODS = ("pc", "ode", "heun", "dpmpp_2m")
FAST_STEPS = 19  # of methods with a number of steps but "pc", see docs/samplers.md
CALL_SECONDS = 1.0  # that a call of a sampler is to take, if --num_steps does not say how many
LONG_SECONDS = 10.0  # a first call that took so long is what is reported

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags."""
    config_flags.DEFINE_config_file("config", None, "Experiment; its data are not read.")
    flags.DEFINE_integer("batch_size", 8, "Images of a call.")
    flags.DEFINE_integer("num_steps", 0, f"Steps of a call; 0: for about {CALL_SECONDS:g} s of forward passes.")
    flags.DEFINE_list("methods", list(DEFAULT_METHODS), f"Of {', '.join(METHODS)}; or all.")
    flags.DEFINE_integer("repetitions", 3, "Calls of each sampler that are timed.")
    flags.DEFINE_string("workdir", None, "Folder of a trained run; default: random parameters.")
    flags.mark_flag_as_required("config")


class Forward(NamedTuple):
    """The score function alone, jitted."""

    call: Callable[[], Any]
    num_convolutions: int
    seconds: float  # of a call, to plan with


def build_forward(experiment: Experiment, params: Any, *, smooth: bool) -> Forward:
    """Compiles the score function for a batch of `training.batch_size` images."""
    x, t, _ = train_step.forward_inputs(experiment)
    inputs = distributed.place_copies(params), distributed.place_batch(x), distributed.place_batch(t)
    program = jax.jit(lambda params, x, t: experiment.score_fn(params, smooth=smooth)(x, t))
    compiled = program.lower(*inputs).compile()
    call = lambda: compiled(*inputs)  # noqa: E731
    return Forward(call, loops.count_convolutions(compiled).elsewhere, measuring.time_calls(call, 2).min)


def _with_method(config: ConfigDict, method: str, num_steps: int) -> ConfigDict:
    chosen = config.copy_and_resolve_references()
    chosen.sampling.update(method=method, num_steps=num_steps)
    return chosen.lock()


def usual_steps(config: ConfigDict, method: str) -> int:
    """Returns the steps that a method with a number of steps takes to draw samples of its full quality."""
    return (config.sampling.num_steps or config.model.num_scales) if method == "pc" else FAST_STEPS


def _steps_of_a_call(config: ConfigDict, method: str, forward: Forward) -> int:
    """Returns the steps whose forward passes take about CALL_SECONDS, as far as the method can take so few."""
    # DDPM's chain, which "pc" has with VP, is defined for more than beta_max steps.
    least = math.floor(config.model.beta_max) + 1 if method == "pc" and config.training.sde == "vpsde" else 2
    return min(max(least, int(CALL_SECONDS / forward.seconds)), usual_steps(config, method))


def count_evaluations(config: ConfigDict, method: str, num_steps: int) -> int:
    """Returns the evaluations of the score in that many steps, as the sampler says that draws a single number."""
    chosen = _with_method(config, method, num_steps)
    sampler = build_sampler(chosen, build_experiment(chosen).sde, (1, 1, 1, 1))
    return int(jax.jit(lambda key: sampler(key, lambda x, t: -x)[1])(jax.random.key(0)))


def _alternate(call: Callable[[], Any], forward: Forward, passes: int, repetitions: int) -> tuple[Seconds, Seconds]:
    """Times calls of a sampler, and that many forward passes before each and after the last."""
    times, alone = [], list(measuring.time_calls(forward.call, passes).all)
    for _ in range(1 + repetitions):  # the first is the warm-up
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        alone += measuring.time_calls(forward.call, passes, warm_up=0).all
        if times[0] > LONG_SECONDS:
            return Seconds(tuple(times)), Seconds(tuple(alone))
    return Seconds(tuple(times[1:])), Seconds(tuple(alone))


def measure_method(
    config: ConfigDict, params: Any, forward: Forward, *, method: str, num_steps: int, repetitions: int
) -> dict[str, Any]:
    """Compiles a sampler and times calls of it between forward passes."""
    batch_size, is_adaptive = config.training.batch_size, method in ADAPTIVE
    # What is not a number of steps of this method stays as it is.
    chosen = _with_method(config, method, config.sampling.num_steps if is_adaptive else num_steps)
    program, replicated = SamplingProgram(build_experiment(chosen), batch_size), distributed.replicate(params)
    compiled = program.compile(replicated)
    indices, evaluations = np.arange(batch_size), set()

    def call() -> None:
        evaluations.add(program(replicated, indices)[1])

    passes = max(3, min(200, int(CALL_SECONDS / forward.seconds)))
    times, alone = _alternate(call, forward, passes, repetitions)
    (nfe,) = evaluations  # the same samples each time
    convolutions = loops.count_convolutions(compiled) if isinstance(compiled, jax.stages.Compiled) else None
    per_evaluation = times.summary(nfe)
    result = {
        "num_steps": None if is_adaptive else num_steps,
        "nfe": nfe,
        "calls": len(times.all),
        "compile_seconds": program.compile_seconds,
        "seconds_per_evaluation": per_evaluation,
        "forward_passes": len(alone.all),
        "forward_seconds": alone.summary(),
        "evaluation_over_forward": per_evaluation["median"] / alone.median,
        "evaluations_in_loop": convolutions.in_loops / forward.num_convolutions
        if convolutions and forward.num_convolutions
        else None,
    }
    if is_adaptive:
        return {**result, "seconds_per_image_measured": times.median / batch_size}
    usual = usual_steps(config, method)
    # Of each evaluation of the score there may be two of the network: guidance without a classifier.
    usual_nfe = count_evaluations(config, method, usual) * nfe // count_evaluations(config, method, num_steps)
    calculated = per_evaluation["median"] * usual_nfe / batch_size
    return {**result, "usual_steps": usual, "usual_nfe": usual_nfe, "seconds_per_image_calculated": calculated}


def measure(
    config: ConfigDict,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    num_steps: int = 0,
    repetitions: int = 3,
    workdir: str | None = None,
) -> dict[str, Any]:
    """Measures samplers next to the score function alone."""
    for method in methods:
        checks.one_of("--methods", method, METHODS)
    checks.not_negative("--num_steps", num_steps)
    checks.positive("--repetitions", repetitions)
    distributed.check_batch_size("--batch_size", config.training.batch_size)
    experiment = build_experiment(config)
    params = drawing.restore(experiment, Path(workdir)).params if workdir else train_step.random_params(experiment)
    forwards: dict[bool, Forward] = {}
    results = {}
    for method in methods:
        measuring.progress(f"{method}: compiling")
        smooth = method != "pc" and not config.training.continuous  # continuous networks have one score for all
        if smooth not in forwards:
            forwards[smooth] = build_forward(experiment, params, smooth=smooth)
        forward = forwards[smooth]
        steps = num_steps or _steps_of_a_call(config, method, forward)
        results[method] = measure_method(
            config, params, forward, method=method, num_steps=steps, repetitions=repetitions
        )
        measuring.progress(f"{method}: {results[method]['evaluation_over_forward']:.3f} forward passes an evaluation")
    return {
        "network": config.model.name,
        "dtype": config.model.dtype,
        "batch_size": config.training.batch_size,
        "parameters": workdir or "random",
        **({"step_over_forward": results["pc"]["evaluation_over_forward"]} if "pc" in results else {}),
        "samplers": results,
    }


def main(argv: Sequence[str]) -> None:
    """Prints the JSON line."""
    logging.set_verbosity(logging.WARNING)
    config, methods = FLAGS.config, tuple(METHODS) if FLAGS.methods == ["all"] else FLAGS.methods
    config.training.batch_size = FLAGS.batch_size
    numbers: dict[str, Any] = {name: FLAGS[name].value for name in ("num_steps", "repetitions", "workdir")}
    try:
        result = measure(config.lock(), methods=methods, **numbers)
    except ValueError as error:
        sys.exit(f"benchmarks.sampling: {error}")
    measuring.report(result)


if __name__ == "__main__":
    define_flags()
    app.run(main)
