"""A likelihood pass on the device beside the same integration on the host by scipy's solve_ivp, at equal tolerance.

  python benchmarks/likelihood_on_host.py --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/digits

log p of the test images by the probability-flow ODE with one probe each, from the same dequantized images and the same
probes, by three programs in one process:

  device           `likelihood.build_likelihood`: one compiled call, each image with its own steps; drift and divergence
                   from one evaluation of the network and one product with its Jacobian.
  host, by image   solve_ivp (RK45) for each image: its own steps, as on the device. Two calls of compiled programs for
                   each evaluation, one for the drift and one for the divergence, as the 2021 code has them.
  host, by batch   solve_ivp (RK45) over all images at once, with one norm for all of them, as the 2021 code ran it: an
                   image's number then depends on the others.

Programs are called once before they are timed, so that compiling is left out. `--host_images` images go through
"host, by image"; its seconds are scaled to all of them, and the line says so.
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
import jax.numpy as jnp
import numpy as np
import scipy.integrate
from absl import app, flags, logging
from ml_collections import config_flags

import datasets
from dequantization import build_dequantization
from experiment import drawing
from experiment.build import Experiment, build_experiment
from likelihood import LIKELIHOOD_EPS, build_likelihood
from parallel import rng

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Experiment that the workdir was trained with.")
flags.DEFINE_string("workdir", None, "Folder of a trained run.")
flags.DEFINE_integer("snapshot", 0, "Number of the checkpoint; 0: the newest.")
flags.DEFINE_integer("host_images", 16, "Images that are integrated one by one on the host.", lower_bound=1)
flags.mark_flags_as_required(["config", "workdir"])


class Measured(NamedTuple):
    """What one of the programs took."""

    seconds: float  # of all images
    nfe: float  # evaluations of the right-hand side: of the batch, or the mean over images
    nats: np.ndarray  # log p(x) of each image


class Problem(NamedTuple):
    """What all programs are given."""

    experiment: Experiment
    params: Any
    x: jax.Array  # dequantized images, float32[N, H, W, C]
    probes: jax.Array  # of the same shape


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of a call and its result."""
    start = time.monotonic()
    result = fn()
    return time.monotonic() - start, result


def on_device(problem: Problem, key: jax.Array) -> Measured:
    """Measures our own program."""
    experiment = problem.experiment
    likelihood = build_likelihood(experiment.config, experiment.sde)
    run = jax.jit(lambda params, x: likelihood(key, experiment.score_fn(params, smooth=True), x))
    jax.block_until_ready(run(problem.params, problem.x))
    seconds, result = timed(lambda: jax.block_until_ready(run(problem.params, problem.x)))
    return Measured(seconds, int(result.nfe), np.asarray(result.nats))


def build_right_hand_side(problem: Problem) -> Callable[[Problem, float, np.ndarray], np.ndarray]:
    """Returns d/dt of (x, log p) on the host, by two compiled programs: drift, and divergence along the probes."""
    experiment = problem.experiment

    def drift(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return experiment.sde.reverse(experiment.score_fn(params, smooth=True), probability_flow=True).sde(x, t)[0]

    def divergence(params: Any, x: jax.Array, t: jax.Array, probes: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda x: jnp.sum(drift(params, x, t) * probes))(x)
        return jnp.sum(gradient * probes, axis=(1, 2, 3))

    drift_program, divergence_program = jax.jit(drift), jax.jit(divergence)

    def right_hand_side(of: Problem, t: float, y: np.ndarray) -> np.ndarray:
        num = len(of.x)
        x, time_of_all = jnp.asarray(y[:-num].reshape(of.x.shape), jnp.float32), jnp.full(num, t, jnp.float32)
        slope = np.asarray(drift_program(of.params, x, time_of_all), np.float64).ravel()
        return np.concatenate([slope, np.asarray(divergence_program(of.params, x, time_of_all, of.probes), np.float64)])

    return right_hand_side


def on_host(problem: Problem, right_hand_side: Callable[[Problem, float, np.ndarray], np.ndarray]) -> Measured:
    """Measures solve_ivp over all images of a problem at once."""
    sde, settings, num = problem.experiment.sde, problem.experiment.config.likelihood, len(problem.x)
    start = np.concatenate([np.asarray(problem.x, np.float64).ravel(), np.zeros(num)])
    right_hand_side(problem, 0.5, start)
    seconds, solution = timed(
        lambda: scipy.integrate.solve_ivp(
            lambda t, y: right_hand_side(problem, t, y),
            (LIKELIHOOD_EPS, sde.T),
            start,
            method="RK45",
            rtol=settings.rtol,
            atol=settings.atol,
        )
    )
    end = solution.y[:, -1]
    latent = jnp.asarray(end[:-num].reshape(problem.x.shape), jnp.float32)
    return Measured(seconds, solution.nfev, np.asarray(sde.prior_logp(latent)) + end[-num:])


def by_image(problem: Problem, num_images: int) -> Measured:
    """Measures solve_ivp for each of the first images alone, the seconds scaled to all of them."""
    right_hand_side = build_right_hand_side(problem)
    parts = [problem._replace(x=problem.x[i : i + 1], probes=problem.probes[i : i + 1]) for i in range(num_images)]
    results = [on_host(part, right_hand_side) for part in parts]
    seconds = sum(result.seconds for result in results) * len(problem.x) / num_images
    return Measured(seconds, float(np.mean([r.nfe for r in results])), np.concatenate([r.nats for r in results]))


def build_problem(key: jax.Array) -> Problem:
    """Restores the checkpoint, dequantizes the test images and draws the probes that `on_device` draws from `key`."""
    experiment = build_experiment(FLAGS.config.lock())
    config = experiment.config
    if config.likelihood.trace != "rademacher" or config.likelihood.num_probes != 1:
        raise app.UsageError("the comparison is of one Rademacher probe; leave likelihood.trace and num_probes alone")
    params = jax.device_put(drawing.restore(experiment, Path(FLAGS.workdir), FLAGS.snapshot).params)
    source = datasets.build_source(config, "test")
    levels = jnp.asarray(source.images(np.arange(len(source))))
    dequantize = build_dequantization(config, experiment.scaler, experiment.sde, eps=LIKELIHOOD_EPS)
    x = dequantize(jax.random.fold_in(experiment.keys["bpd"], 0), levels)[0]
    return Problem(experiment, params, x, rng.rademacher(key, (len(x), 1, *x.shape[1:]))[:, 0])


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    logging.set_verbosity(logging.WARNING)
    key = jax.random.key(1)
    problem = build_problem(key)
    num_host = min(FLAGS.host_images, len(problem.x))
    device = on_device(problem, key)
    rows = {
        "device": device,
        f"host, by image (from {num_host})": by_image(problem, num_host),
        "host, by batch": on_host(problem, build_right_hand_side(problem)),
    }
    settings, num_dims = problem.experiment.config.likelihood, math.prod(problem.x.shape[1:])
    print(
        f"{len(problem.x)} test images, rtol {settings.rtol:g}, atol {settings.atol:g}, {jax.devices()[0].device_kind}"
    )
    print(f"{'':<28} {'seconds':>9} {'times the device':>17} {'evaluations':>12} {'|difference|':>13} nats/dim")
    for name, row in rows.items():
        difference = np.abs(row.nats - device.nats[: len(row.nats)]).mean() / num_dims
        print(f"{name:<28} {row.seconds:9.2f} {row.seconds / device.seconds:17.2f} {row.nfe:12.0f} {difference:13.2g}")


if __name__ == "__main__":
    app.run(main)
