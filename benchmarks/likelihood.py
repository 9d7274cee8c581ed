"""What a stage of the likelihood's solver costs, next to the parts that it is made of: one JSON line on stdout.

  python -m benchmarks.likelihood --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8

A stage needs the score of a batch and one product of a vector with its Jacobian, and nothing else that takes time.
`parts_seconds` are those of a jitted `jax.vjp` of the score with one product, outside of any loop. `seconds_per_stage`
is the whole likelihood, mapped over the devices as bits/dim are, by its number of evaluations; both take turns.
`step_over_parts` is the one over the other. More probes than one are refused, as is the exact trace.

The integration ends after `--num_steps` attempted steps, each of six stages, wherever it is then: time is all that is
measured. `--num_steps 0` lets it go on to its end.

`stages_in_loop` does not rest on the program's own count: convolutions in the loop of the compiled likelihood, over
those of the parts. 1: each stage evaluates the network once and pulls back once. `convolutions` has these numbers, and
those of a forward pass alone.

The comparison with SciPy on the host is benchmarks/likelihood_on_host.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import checks
from benchmarks import loops, train_step
from benchmarks import measure as measuring
from benchmarks.measure import Seconds
from experiment import drawing
from experiment.build import Experiment, build_experiment
from likelihood import LikelihoodResult, build_likelihood
from parallel import distributed
from solvers import ode

PASSES = 3  # evaluations of the parts, before each call of the likelihood and after the last

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags."""
    config_flags.DEFINE_config_file("config", None, "Experiment; its data are not read.")
    flags.DEFINE_integer("batch_size", 8, "Images of a call.")
    flags.DEFINE_integer("num_steps", 1, "Steps that the solver attempts; 0: to the end.")
    flags.DEFINE_integer("repetitions", 2, "Calls of the likelihood that are timed.")
    flags.DEFINE_string("workdir", None, "Folder of a trained run; default: random parameters.")
    flags.mark_flag_as_required("config")


def compile_likelihood(experiment: Experiment, inputs: tuple[Any, ...], num_steps: int) -> jax.stages.Compiled:
    """Compiles the likelihood of a batch, mapped over the devices: (params, x) -> result, all with a device axis."""
    likelihood = build_likelihood(experiment.config, experiment.sde, max_steps=num_steps or ode.MAX_STEPS)
    key = experiment.keys["bpd"]

    def run(params: Any, x: Any) -> LikelihoodResult:
        return likelihood(key, experiment.score_fn(params, smooth=True), x)

    return distributed.pmap(run).lower(*inputs).compile()


def compile_parts(experiment: Experiment, inputs: tuple[Any, ...], *, pulls_back: bool = True) -> jax.stages.Compiled:
    """Compiles the score of a batch, with its product with a vector if it `pulls_back`: (params, x, t) -> arrays."""

    def parts(params: Any, x: Any, t: Any) -> Any:
        score_fn = experiment.score_fn(params, smooth=True)
        if not pulls_back:
            return score_fn(x, t)
        score, pullback = jax.vjp(lambda x: score_fn(x, t), x)
        return score, pullback(x)[0]  # x in the place of a vector of its shape

    return jax.jit(parts).lower(*inputs).compile()


def _alternate(call: Callable[[], Any], parts: Callable[[], Any], repetitions: int) -> tuple[Seconds, Seconds]:
    """Times calls of the likelihood, and evaluations of its parts before each and after the last."""
    times: list[float] = []
    alone = list(measuring.time_calls(parts, PASSES).all)
    for i in range(repetitions):
        times += measuring.time_calls(call, 1, warm_up=int(i == 0)).all
        alone += measuring.time_calls(parts, PASSES, warm_up=0).all
    return Seconds(tuple(times)), Seconds(tuple(alone))


def measure(
    config: ConfigDict, *, num_steps: int = 1, repetitions: int = 2, workdir: str | None = None
) -> dict[str, Any]:
    """Measures the likelihood next to the score and its vector-Jacobian product."""
    checks.not_negative("--num_steps", num_steps)
    checks.positive("--repetitions", repetitions)
    distributed.check_batch_size("--batch_size", config.training.batch_size)
    settings = config.likelihood
    if settings.trace == "exact" or settings.num_probes != 1:
        raise ValueError(
            f"likelihood.trace={settings.trace!r}, likelihood.num_probes={settings.num_probes}; expected one random "
            "probe, with which a stage has one product with the Jacobian: set likelihood.num_probes=1, and "
            "likelihood.trace=rademacher"
        )
    experiment = build_experiment(config)
    params = drawing.restore(experiment, Path(workdir)).params if workdir else train_step.random_params(experiment)
    x, t, _ = train_step.forward_inputs(experiment)
    mapped = distributed.replicate(params), distributed.shard(x)
    placed = distributed.place_copies(params), distributed.place_batch(x), distributed.place_batch(t)
    measuring.progress("compiling the likelihood")
    likelihood = compile_likelihood(experiment, mapped, num_steps)
    measuring.progress("compiling its parts")
    parts, forward = compile_parts(experiment, placed), compile_parts(experiment, placed, pulls_back=False)
    measuring.progress("running")
    last: list[LikelihoodResult] = []

    def call() -> LikelihoodResult:
        last[:] = [likelihood(*mapped)]
        return last[0]

    times, alone = _alternate(call, lambda: parts(*placed), repetitions)
    nfe = int(last[0].nfe.max())
    per_stage = times.summary(nfe)
    in_likelihood = loops.count_convolutions(likelihood)
    convolutions = {
        "likelihood_in_loop": in_likelihood.in_loops,
        "likelihood_elsewhere": in_likelihood.elsewhere,
        "parts": loops.count_convolutions(parts).elsewhere,
        "forward": loops.count_convolutions(forward).elsewhere,
    }
    return {
        "network": config.model.name,
        "dtype": config.model.dtype,
        "batch_size": config.training.batch_size,
        "parameters": workdir or "random",
        "num_steps": num_steps,
        "nfe": nfe,
        "calls": len(times.all),
        "seconds_per_stage": per_stage,
        "parts_calls": len(alone.all),
        "parts_seconds": alone.summary(),
        "step_over_parts": per_stage["median"] / alone.median,
        "convolutions": convolutions,
        "stages_in_loop": convolutions["likelihood_in_loop"] / convolutions["parts"] if convolutions["parts"] else None,
    }


def main(argv: Sequence[str]) -> None:
    """Prints the JSON line."""
    logging.set_verbosity(logging.WARNING)
    config = FLAGS.config
    config.training.batch_size = FLAGS.batch_size
    numbers: dict[str, Any] = {name: FLAGS[name].value for name in ("num_steps", "repetitions", "workdir")}
    try:
        result = measure(config.lock(), **numbers)
    except ValueError as error:
        sys.exit(f"benchmarks.likelihood: {error}")
    measuring.report(result)


if __name__ == "__main__":
    define_flags()
    app.run(main)
