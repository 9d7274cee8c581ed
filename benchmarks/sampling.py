"""What a network evaluation costs inside the compiled samplers, next to a bare forward pass: one JSON line on stdout.

  python -m benchmarks.sampling --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8

Compiles the program of `--mode sample` for each of `--methods`, and the jitted score function for the same batch; calls
of both alternate in one process. A sampler is timed from its sample numbers to the levels on the host, noise, steps and
all else included.

  evaluation_over_forward     seconds of a call over its evaluations, over the seconds of the forward passes between
  step_over_forward           the same, for "pc"
  evaluations_in_loop         convolutions in the loop of the compiled sampler, over those of a forward pass: does not
                              rest on the number of evaluations that the sampler reports; for "ode" one solver stage
  seconds_per_image_calculated  for `usual_steps`: of "pc" those of the configuration, otherwise 19 (docs/samplers.md)
  seconds_per_image_measured  of methods that choose their steps, which run to the end; their number depends on the
                              network, which is random unless `--workdir` names a trained run
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import checks
from benchmarks import loops, train_step
from benchmarks import measure as measuring
from experiment.build import Experiment, SamplingProgram, build_experiment
from parallel import distributed
from sampling import METHODS, build_sampler
from solvers import ADAPTIVE

DEFAULT_METHODS = ("pc", "ode", "heun", "dpmpp_2m")
FAST_STEPS = 19  # of methods with a number of steps but "pc", see docs/samplers.md
CALL_SECONDS = 1.0  # of forward passes in a call of a sampler, if --num_steps does not say how many
LONG_SECONDS = 10.0  # a first call that took longer is what is reported


class Forward(NamedTuple):
    """The score function alone, jitted."""

    call: Callable[[], Any]
    num_convolutions: int
    seconds: float  # of a call, to plan with


def build_forward(experiment: Experiment, params: Any, *, smooth: bool) -> Forward:
    """Compile the score function for a batch of `training.batch_size` images."""
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


def _steps_of_a_call(config: ConfigDict, method: str, forward: Forward, usual: int) -> int:
    """Return the steps whose forward passes take about CALL_SECONDS, as far as the method can take so few."""
    # DDPM's chain, which "pc" has with VP, is defined for more than beta_max steps.
    least = math.floor(config.model.beta_max) + 1 if method == "pc" and config.training.sde == "vpsde" else 2
    return min(max(least, int(CALL_SECONDS / forward.seconds)), usual)


def count_evaluations(config: ConfigDict, method: str, num_steps: int) -> int:
    """Return the evaluations of the score in that many steps, as the sampler reports them for a single number."""
    chosen = _with_method(config, method, num_steps)
    sampler = build_sampler(chosen, build_experiment(chosen).sde, (1, 1, 1, 1))
    return int(jax.jit(lambda key: sampler(key, lambda x, t: -x)[1])(jax.random.key(0)))


def measure_method(
    config: ConfigDict, params: Any, forward: Forward, *, method: str, num_steps: int, repetitions: int
) -> dict[str, Any]:
    """Compile a sampler and time calls of it between forward passes; num_steps 0: for about CALL_SECONDS."""
    batch_size, is_adaptive = config.training.batch_size, method in ADAPTIVE
    # Steps that give samples of full quality.
    usual = (config.sampling.num_steps or config.model.num_scales) if method == "pc" else FAST_STEPS
    num_steps = num_steps or _steps_of_a_call(config, method, forward, usual)
    chosen = _with_method(config, method, config.sampling.num_steps if is_adaptive else num_steps)
    program, replicated = SamplingProgram(build_experiment(chosen), batch_size), distributed.replicate(params)
    compiled = program.compile(replicated)
    indices, evaluations = np.arange(batch_size), set()

    def call() -> None:
        evaluations.add(program(replicated, indices)[1])

    passes = max(3, min(200, int(CALL_SECONDS / forward.seconds)))
    pass_times = lambda: measuring.time_calls(forward.call, passes, warm_up=0).all  # noqa: E731
    jax.block_until_ready(forward.call())
    times, all_passes = measuring.alternate(call, pass_times, repetitions, warm_up=1, enough=LONG_SECONDS)
    (nfe,) = evaluations  # the same samples each time
    alone, per_evaluation = measuring.Seconds(tuple(all_passes)), times.summary(nfe)
    convolutions = loops.count_convolutions(compiled) if isinstance(compiled, jax.stages.Compiled) else None
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
    """Measure samplers next to the score function alone."""
    for method in methods:
        checks.one_of("--methods", method, METHODS)
    checks.not_negative("--num_steps", num_steps)
    checks.positive("--repetitions", repetitions)
    distributed.check_batch_size("--batch_size", config.training.batch_size)
    experiment = build_experiment(config)
    params, name = train_step.choose_params(experiment, workdir)
    forwards: dict[bool, Forward] = {}
    results = {}
    for method in methods:
        measuring.progress(f"{method}: compiling")
        smooth = method != "pc" and not config.training.continuous  # continuous networks have one score for all
        if smooth not in forwards:
            forwards[smooth] = build_forward(experiment, params, smooth=smooth)
        results[method] = measure_method(
            config, params, forwards[smooth], method=method, num_steps=num_steps, repetitions=repetitions
        )
        measuring.progress(f"{method}: {results[method]['evaluation_over_forward']:.3f} forward passes an evaluation")
    return {
        **measuring.describe(config),
        "parameters": name,
        **({"step_over_forward": results["pc"]["evaluation_over_forward"]} if "pc" in results else {}),
        "samplers": results,
    }


def main() -> dict[str, Any]:
    config, methods = flags.FLAGS.config, flags.FLAGS.methods
    config.training.batch_size = flags.FLAGS.batch_size
    numbers = measuring.flag_values("num_steps", "repetitions", "workdir")
    return measure(config.lock(), methods=tuple(METHODS) if methods == ["all"] else methods, **numbers)


if __name__ == "__main__":
    measuring.define_flags(
        batch_size=(8, "Images of a call."),
        num_steps=(0, f"Steps of a call; 0: for about {CALL_SECONDS:g} s of forward passes."),
        repetitions=(3, "Calls of each sampler that are timed."),
    )
    flags.DEFINE_list("methods", list(DEFAULT_METHODS), f"Of {', '.join(METHODS)}; or all.")
    flags.DEFINE_string("workdir", None, "Folder of a trained run; default: random parameters.")
    measuring.main(main)
