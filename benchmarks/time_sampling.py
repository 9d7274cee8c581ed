"""Variance of the likelihood-weighted loss with uniform and with importance-sampled times, on a trained network.

  python -m benchmarks.time_sampling --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/digits_vp

Draws (t, z) many times for every test image, without dropout and with the averaged parameters of a checkpoint, and
prints the mean of the loss and its variance over (t, z), averaged over the images, with standard errors.
`--config.training.objective=sliced_vr` measures that objective, whose loss depends on its direction v as well.

With uniform t a few draws near eps dominate the variance, so that its direct estimate is poor. It is therefore also
computed from importance-sampled t: with p their density and w = 1 / (p (T - eps)), the mean of w h(t, z)² under p is
the mean of h(t, z)² under uniform t, and a loss with weights √w instead of w has that as its mean square.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import datasets
import losses
from benchmarks import measure as measuring
from experiment import drawing
from experiment.build import Experiment, build_experiment

NUM_BLOCKS = 20  # of the repetitions, for standard errors


def square_root_weights(draw_times: losses.DrawTimes) -> losses.DrawTimes:
    """Return the same times with the roots of their weights."""

    def draw(key: jax.Array, num_examples: int) -> tuple[jax.Array, jax.Array]:
        t, weight = draw_times(key, num_examples)
        return t, jnp.sqrt(weight)

    return draw


def moments(experiment: Experiment, params: Any, draw_times: losses.DrawTimes) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and mean square of each test image's loss in each block of repetitions, float64[blocks, N]."""
    config = experiment.config
    loss_fn = losses.make_continuous_loss(
        experiment.sde,
        experiment.model,
        reduce_mean=config.training.reduce_mean,
        likelihood_weighting=True,
        objective=config.training.objective,
        draw_times=draw_times,
    )
    source = datasets.build_source(config, "test")
    key_data, key_loss = jax.random.split(experiment.keys["eval"])
    x = datasets.build_preparation(config, train=False)(key_data, jnp.asarray(source.images(np.arange(len(source)))))
    in_block = flags.FLAGS.repetitions // NUM_BLOCKS

    @jax.jit
    def block(key: jax.Array) -> jax.Array:
        return jax.lax.map(lambda k: loss_fn(k, params, x, train=False), jax.random.split(key, in_block))

    blocks = [np.asarray(block(key), np.float64) for key in jax.random.split(key_loss, NUM_BLOCKS)]
    return np.stack([b.mean(axis=0) for b in blocks]), np.stack([np.square(b).mean(axis=0) for b in blocks])


def jackknife(statistic: Any, *of_blocks: np.ndarray) -> tuple[float, float]:
    """Return a statistic of the blocks' averages and its standard error from leaving out each block in turn."""
    left_out = [statistic(*(np.delete(b, i, axis=0).mean(axis=0) for b in of_blocks)) for i in range(NUM_BLOCKS)]
    spread = np.std(left_out) * np.sqrt(NUM_BLOCKS - 1)
    return float(statistic(*(b.mean(axis=0) for b in of_blocks))), float(spread)


def variance(mean: np.ndarray, square: np.ndarray) -> float:
    """Return the variance over (t, z) from the moments of each image's loss, averaged over the images."""
    return float((square - mean**2).mean())


def main() -> None:
    experiment = build_experiment(flags.FLAGS.config.lock())
    snapshot = drawing.restore(experiment, Path(flags.FLAGS.workdir), flags.FLAGS.snapshot)
    importance = losses.make_importance_times(experiment.sde)
    laws = losses.make_uniform_times(experiment.sde), importance, square_root_weights(importance)
    (mean_u, square_u), (mean_i, square_i), (_, square) = (moments(experiment, snapshot.params, law) for law in laws)
    average = lambda mean: float(mean.mean())  # noqa: E731
    ratio = lambda mean, uniform, sampled: variance(mean, uniform) / variance(mean, sampled)  # noqa: E731
    images, draws = mean_u.shape[1], flags.FLAGS.repetitions // NUM_BLOCKS * NUM_BLOCKS
    # The spread of draws that missed the smallest t would be too small.
    error_u = np.sqrt(jackknife(variance, mean_i, square)[0] / (images * draws))
    rows = {
        "mean, uniform t": (average(mean_u.mean(axis=0)), error_u),
        "mean, importance-sampled t": jackknife(average, mean_i),
        "variance, uniform t": jackknife(variance, mean_u, square_u),
        "the same, from importance-sampled t": jackknife(variance, mean_i, square),
        "variance, importance-sampled t": jackknife(variance, mean_i, square_i),
        "ratio of the last two": jackknife(ratio, mean_i, square, square_i),
    }
    print(f"checkpoint {snapshot.number}, {images} test images, {draws} draws each, seed {experiment.config.seed}")
    for name, (value, stderr) in rows.items():
        print(f"{name:<36} {value:12.5g} ± {stderr:.2g}")


if __name__ == "__main__":
    measuring.define_flags("are read", snapshot=(0, "Number of the checkpoint; 0: the newest."))
    flags.DEFINE_string("workdir", None, "Folder of a trained run.", required=True)
    draws = "Draws of (t, z) for each image, rounded down to a multiple of 20."
    flags.DEFINE_integer("repetitions", 400, draws, lower_bound=NUM_BLOCKS)
    measuring.main(main)
