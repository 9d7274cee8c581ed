"""A likelihood pass on the device beside the same integration on the host by SciPy's solve_ivp, at equal tolerance.

  python -m benchmarks.likelihood_on_host --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/digits

log p of the test images by the probability-flow ODE with one probe each, from the same dequantized images and probes:

  device          `likelihood.build_likelihood`: one compiled call, each image with its own steps
  host, by image  solve_ivp (RK45) for each of `--host_images` images, its seconds scaled to all of them; drift and
                  divergence by two compiled programs, as in the 2021 code
  host, by batch  solve_ivp (RK45) over all images with one norm, as the 2021 code ran it: an image's number then
                  depends on the others

Compiling is not timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
from absl import flags

import datasets
from benchmarks import measure as measuring
from dequantization import build_dequantization
from errors import UserError
from experiment import drawing
from experiment.build import Experiment, build_experiment
from likelihood import LIKELIHOOD_EPS, build_likelihood
from parallel import rng


class Measured(NamedTuple):
    """What one of the programs took."""

    seconds: float  # of all images
    nfe: float  # evaluations of the right-hand side: of the batch, or the mean over images
    nats: np.ndarray  # log p(x) of each image


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call and its result."""
    start = time.monotonic()
    result = fn()
    return time.monotonic() - start, result


def on_device(experiment: Experiment, params: Any, x: jax.Array, key: jax.Array) -> Measured:
    """Measure our own program."""
    likelihood = build_likelihood(experiment.config, experiment.sde)
    run = jax.jit(lambda params, x: likelihood(key, experiment.score_fn(params, smooth=True), x))
    jax.block_until_ready(run(params, x))
    seconds, result = timed(lambda: jax.block_until_ready(run(params, x)))
    return Measured(seconds, int(result.nfe), np.asarray(result.nats))


def build_on_host(experiment: Experiment, params: Any) -> Callable[[jax.Array, jax.Array], Measured]:
    """Return (x, probes) -> what solve_ivp took for these images at once."""
    sde, settings = experiment.sde, experiment.config.likelihood

    def drift(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return sde.reverse(experiment.score_fn(params, smooth=True), probability_flow=True).sde(x, t)[0]

    def divergence(params: Any, x: jax.Array, t: jax.Array, probes: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda x: jnp.sum(drift(params, x, t) * probes))(x)
        return jnp.sum(gradient * probes, axis=(1, 2, 3))

    drift_program, divergence_program = jax.jit(drift), jax.jit(divergence)

    def on_host(x: jax.Array, probes: jax.Array) -> Measured:
        num = len(x)

        def slope(t: float, y: np.ndarray) -> np.ndarray:
            """Return d/dt of (x, log p)."""
            inputs = params, jnp.asarray(y[:-num].reshape(x.shape), jnp.float32), jnp.full(num, t, jnp.float32)
            of_x = np.asarray(drift_program(*inputs), np.float64).ravel()
            return np.concatenate([of_x, np.asarray(divergence_program(*inputs, probes), np.float64)])

        start = np.concatenate([np.asarray(x, np.float64).ravel(), np.zeros(num)])
        tolerances = {"rtol": settings.rtol, "atol": settings.atol}
        slope(0.5, start)  # compiles
        seconds, solution = timed(
            lambda: scipy.integrate.solve_ivp(slope, (LIKELIHOOD_EPS, sde.T), start, method="RK45", **tolerances)
        )
        latent = jnp.asarray(solution.y[:-num, -1].reshape(x.shape), jnp.float32)
        return Measured(seconds, solution.nfev, np.asarray(sde.prior_logp(latent)) + solution.y[-num:, -1])

    return on_host


def main() -> None:
    experiment, key = build_experiment(flags.FLAGS.config.lock()), jax.random.key(1)
    config, settings = experiment.config, experiment.config.likelihood
    if settings.trace != "rademacher" or settings.num_probes != 1:
        raise UserError("the comparison is of one Rademacher probe; leave likelihood.trace and num_probes alone")
    params = jax.device_put(drawing.restore(experiment, Path(flags.FLAGS.workdir), flags.FLAGS.snapshot).params)
    source = datasets.build_source(config, "test")
    levels = jnp.asarray(source.images(np.arange(len(source))))
    dequantize = build_dequantization(config, experiment.scaler, experiment.sde, eps=LIKELIHOOD_EPS)
    x = dequantize(jax.random.fold_in(experiment.keys["bpd"], 0), levels)[0]
    probes = rng.rademacher(key, (len(x), 1, *x.shape[1:]))[:, 0]  # those that `on_device` draws
    device, on_host = on_device(experiment, params, x, key), build_on_host(experiment, params)
    num_host = min(flags.FLAGS.host_images, len(x))
    single = [on_host(x[i : i + 1], probes[i : i + 1]) for i in range(num_host)]
    by_image = Measured(
        sum(each.seconds for each in single) * len(x) / num_host,
        float(np.mean([each.nfe for each in single])),
        np.concatenate([each.nats for each in single]),
    )
    rows = {"device": device, f"host, by image (from {num_host})": by_image, "host, by batch": on_host(x, probes)}
    print(f"{len(x)} test images, rtol {settings.rtol:g}, atol {settings.atol:g}, {jax.devices()[0].device_kind}")
    print(f"{'':<28} {'seconds':>9} {'times the device':>17} {'evaluations':>12} {'|difference|':>13} nats/dim")
    for name, row in rows.items():
        difference = np.abs(row.nats - device.nats[: len(row.nats)]).mean() / math.prod(x.shape[1:])
        print(f"{name:<28} {row.seconds:9.2f} {row.seconds / device.seconds:17.2f} {row.nfe:12.0f} {difference:13.2g}")


if __name__ == "__main__":
    measuring.define_flags("are read", snapshot=(0, "Number of the checkpoint; 0: the newest."))
    flags.DEFINE_string("workdir", None, "Folder of a trained run.", required=True)
    flags.DEFINE_integer("host_images", 16, "Images that are integrated one by one on the host.", lower_bound=1)
    measuring.main(main)
