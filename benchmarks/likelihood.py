"""What a stage of the likelihood's solver costs, next to the parts that it is made of: one JSON line on stdout.

  python -m benchmarks.likelihood --config configs/ve/cifar10_ncsnpp_continuous.py --batch_size 8

A stage needs the score of a batch and one vector-Jacobian product of it, and nothing else that takes time: so only one
random probe is accepted. The integration stops after `--num_steps` attempted steps of six stages each, wherever it is
then, because only time is measured; `--num_steps 0` runs it to the end.

  parts_seconds      jitted `jax.vjp` of the score with one product, outside of any loop
  seconds_per_stage  the whole likelihood, mapped over the devices, over its evaluations; both take turns
  step_over_parts    the second over the first
  stages_in_loop     convolutions in the loop of the compiled likelihood over those of the parts: does not rest on the
                     number of evaluations that the program reports; 1: a stage is one evaluation and one pullback

benchmarks/likelihood_on_host.py compares with SciPy on the host.
"""

from __future__ import annotations

from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

import checks
from benchmarks import loops, train_step
from benchmarks import measure as measuring
from errors import UserError
from experiment.build import Experiment, build_experiment
from likelihood import LikelihoodResult, build_likelihood
from parallel import distributed
from solvers import ode

PASSES = 3  # evaluations of the parts, before each call of the likelihood and after the last


def compile_likelihood(experiment: Experiment, inputs: tuple[Any, ...], num_steps: int) -> jax.stages.Compiled:
    """Compile the likelihood of a batch, mapped over the devices: (params, x) -> result, all with a device axis."""
    likelihood = build_likelihood(experiment.config, experiment.sde, max_steps=num_steps or ode.MAX_STEPS)
    key = experiment.keys["bpd"]

    def run(params: Any, x: Any) -> LikelihoodResult:
        return likelihood(key, experiment.score_fn(params, smooth=True), x)

    return distributed.pmap(run).lower(*inputs).compile()


def compile_parts(experiment: Experiment, inputs: tuple[Any, ...], *, pulls_back: bool = True) -> jax.stages.Compiled:
    """Compile the score of a batch, with its product with a vector if it `pulls_back`: (params, x, t) -> arrays."""

    def parts(params: Any, x: Any, t: Any) -> Any:
        score_fn = experiment.score_fn(params, smooth=True)
        if not pulls_back:
            return score_fn(x, t)
        score, pullback = jax.vjp(lambda x: score_fn(x, t), x)
        return score, pullback(x)[0]  # x in the place of a vector of its shape

    return jax.jit(parts).lower(*inputs).compile()


def measure(
    config: ConfigDict, *, num_steps: int = 1, repetitions: int = 2, workdir: str | None = None
) -> dict[str, Any]:
    """Measure the likelihood next to the score and its vector-Jacobian product."""
    checks.not_negative("--num_steps", num_steps)
    checks.positive("--repetitions", repetitions)
    distributed.check_batch_size("--batch_size", config.training.batch_size)
    settings = config.likelihood
    if settings.trace == "exact" or settings.num_probes != 1:
        raise UserError(
            f"likelihood.trace={settings.trace!r}, likelihood.num_probes={settings.num_probes}; expected one random "
            "probe, with which a stage has one product with the Jacobian: set likelihood.num_probes=1, and "
            "likelihood.trace=rademacher"
        )
    experiment = build_experiment(config)
    params, name = train_step.choose_params(experiment, workdir)
    x, t, _ = train_step.forward_inputs(experiment)
    mapped = distributed.replicate(params), distributed.shard(x)
    placed = distributed.place_copies(params), distributed.place_batch(x), distributed.place_batch(t)
    measuring.progress("compiling the likelihood")
    likelihood = compile_likelihood(experiment, mapped, num_steps)
    measuring.progress("compiling its parts")
    parts, forward = compile_parts(experiment, placed), compile_parts(experiment, placed, pulls_back=False)
    measuring.progress("running")
    nfe = int(likelihood(*mapped).nfe.max())
    jax.block_until_ready(parts(*placed))
    parts_times = lambda: measuring.time_calls(lambda: parts(*placed), PASSES, warm_up=0).all  # noqa: E731
    times, all_parts = measuring.alternate(lambda: likelihood(*mapped), parts_times, repetitions)
    alone, per_stage = measuring.Seconds(tuple(all_parts)), times.summary(nfe)
    in_likelihood = loops.count_convolutions(likelihood)
    convolutions = {
        "likelihood_in_loop": in_likelihood.in_loops,
        "likelihood_elsewhere": in_likelihood.elsewhere,
        "parts": loops.count_convolutions(parts).elsewhere,
        "forward": loops.count_convolutions(forward).elsewhere,
    }
    return {
        **measuring.describe(config),
        "parameters": name,
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


def main() -> dict[str, Any]:
    flags.FLAGS.config.training.batch_size = flags.FLAGS.batch_size
    return measure(flags.FLAGS.config.lock(), **measuring.flag_values("num_steps", "repetitions", "workdir"))


if __name__ == "__main__":
    measuring.define_flags(
        batch_size=(8, "Images of a call."),
        num_steps=(1, "Steps that the solver attempts; 0: to the end."),
        repetitions=(2, "Calls of the likelihood that are timed."),
    )
    flags.DEFINE_string("workdir", None, "Folder of a trained run; default: random parameters.")
    measuring.main(main)
