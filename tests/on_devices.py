"""Trains 50 steps, samples, and measures metrics and bits/dim, on the devices of this process; writes the numbers.

python tests/on_devices.py FILE.npz [bpd]
"""

import sys

import jax
import numpy as np
import tiny

import datasets
from evaluation import PreparedReference, sample_metrics
from experiment.build import (
    SamplingProgram,
    build_bpd_program,
    build_experiment,
    build_loss_program,
    build_train_program,
)
from parallel import distributed

STEPS = 50
BATCH = 16
IMAGES = np.arange(BATCH)


def pixel_features(levels):
    """Features that are as good as any to see whether two sets of samples have the same metrics: values of pixels."""
    flat = levels.reshape(len(levels), -1).astype(np.float64)
    return flat[:, :8], flat[:, 8:12] / 16


def measure(with_bpd):
    experiment = build_experiment(tiny.make_config(training__n_jitted_steps=5))
    source, test = (datasets.build_source(experiment.config, split) for split in ("train", "test"))
    batches = datasets.training_batches(source, seed=0, first_step=0, batch_size=BATCH, steps_per_call=5)
    steps = build_train_program(experiment)
    state, losses = distributed.replicate(experiment.init_state()), []
    for _ in range(STEPS // 5):
        state, metrics = steps(state, next(batches))
        losses.append(np.asarray(metrics["loss"].addressable_data(0)).ravel())
    params = state.params_ema
    levels, nfe = SamplingProgram(experiment, BATCH)(params, IMAGES)
    metrics = sample_metrics(
        pixel_features(levels),
        reference=PreparedReference.of(pixel_features(test.images(IMAGES))[0]),
        extractor="classifier",
    )
    measured = build_bpd_program(experiment)(params, test.images(IMAGES), IMAGES, 0) if with_bpd else {}
    measured |= {"test_loss": build_loss_program(experiment)(params, test.images(IMAGES), IMAGES)}
    measured |= {"losses": np.concatenate(losses), "levels": levels, "sampling_nfe": nfe}
    measured |= {f"metric_{each.name}": each.value for each in metrics if each.value is not None}
    return measured | {
        f"params/{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(distributed.unreplicate(state).params)
    }


if __name__ == "__main__":
    np.savez(sys.argv[1], **measure(with_bpd="bpd" in sys.argv[2:]))
