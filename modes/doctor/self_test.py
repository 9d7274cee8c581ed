"""The self-test of --mode doctor: samplers, a likelihood, training steps, a checkpoint and the devices, in seconds.

Each result is compared with a closed form or must be equal bit for bit. The network is tiny: little to compile.
"""

from __future__ import annotations

import dataclasses
import math
import runpy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

import datasets
import losses
from experiment import smoke
from experiment.build import Experiment, build_experiment, build_train_program
from likelihood import LIKELIHOOD_EPS, build_likelihood
from parallel import distributed
from sampling import build_sampler
from sde_lib import VPSDE, ScoreFn, expand
from workdir.checkpoints import Checkpoints

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "vp" / "digits_ddpmpp_continuous.py"
MEAN, STD = 0.3, 0.5  # of Gaussian data, in every dimension
SHAPE = (4096, 2, 2, 1)  # samples, and pixels of each
NUM_IMAGES = 8  # whose likelihood is measured
STANDARD_ERRORS = 5  # of an estimate: one run in two million exceeds them
PC_BIAS = 0.03  # of the variance after 500 steps
NATS = 1e-3  # tolerance of log p(x) of 4 pixels, integrated to 1e-5 a step in float32
LR_ERROR = 0.01  # relative error of Adam's first step, which is the learning rate
MATMUL = 1e-4  # relative error of a product in float32
NUM_STEPS = 500


class Outcome(NamedTuple):
    """Result of one check; the text states what was measured and expected."""

    passed: bool
    text: str


def gaussian_score(sde: VPSDE) -> ScoreFn:
    """Return the exact score of N(MEAN, STD^2 I) data under an SDE."""

    def score_fn(x: Float[Array, "B ..."], t: Float[Array, "B"]) -> Float[Array, "B ..."]:
        mean_coeff, std = sde.mean_coeff(t), sde.std(t)
        return -(x - expand(mean_coeff, x) * MEAN) / expand((mean_coeff * STD) ** 2 + std**2, x)

    return score_fn


def _config() -> ConfigDict:
    """Return the smallest experiment on the digits; without warm-up, whose first step would have rate 0."""
    config = smoke.shrink(runpy.run_path(str(CONFIG))["get_config"]())
    config.unlock()
    config.optim.warmup = 0
    config.likelihood.update(trace="exact", rtol=1e-5, atol=1e-5)
    return config


def check_sampler(method: str) -> Outcome:
    """Sample with the exact score; mean and variance must be those of the data."""
    config, sde = _config(), VPSDE()
    config.sampling.update(method=method, num_steps=NUM_STEPS, predictor="euler_maruyama", corrector="none")
    sampler = build_sampler(config, sde, SHAPE)
    x = np.asarray(jax.jit(lambda key: sampler(key, gaussian_score(sde))[0])(jax.random.key(0)), np.float64)
    mean, variance = x.mean(), x.var()
    error_mean, error_variance = STD / math.sqrt(x.size), STD**2 * math.sqrt(2 / x.size)
    bias = PC_BIAS * STD**2 if method == "pc" else 0.0
    passed = bool(
        abs(mean - MEAN) < STANDARD_ERRORS * error_mean + bias
        and abs(variance - STD**2) < STANDARD_ERRORS * error_variance + bias
    )
    return Outcome(passed, f"{method}: mean {mean:.3f}, variance {variance:.3f}; expected {MEAN}, {STD**2}")


def check_likelihood() -> Outcome:
    """Compute log p of Gaussian images with the exact score; it must be the closed form.

    The closed form is corrected for the prior: at T the data's Gaussian is not quite N(0, I).
    """
    from scipy.stats import norm  # lazily: slow to import

    sde = VPSDE()
    likelihood = build_likelihood(_config(), sde)
    x = MEAN + STD * jax.random.normal(jax.random.key(1), (NUM_IMAGES, *SHAPE[1:]))
    result = jax.jit(lambda x: likelihood(jax.random.key(2), gaussian_score(sde), x))(x)
    times = jnp.array([LIKELIHOOD_EPS, sde.T])
    coeffs, stds = (np.asarray(f(times), np.float64) for f in (sde.mean_coeff, sde.std))
    start, end = zip(coeffs * MEAN, (coeffs * STD) ** 2 + stds**2, strict=True)
    latent = np.asarray(result.latent)
    log_normal = lambda x, mean, variance: norm.logpdf(x, mean, variance**0.5).sum(axis=(1, 2, 3))  # noqa: E731
    expected = log_normal(np.asarray(x), *start) + log_normal(latent, 0, 1) - log_normal(latent, *end)
    error = float(np.abs(np.asarray(result.nats, np.float64) - expected).max())
    return Outcome(error < NATS, f"log p off by at most {error:.1g} nats; expected less than {NATS}")


class TinyNetwork(nn.Module):
    """Two convolutions conditioned on the noise level, with the interface of a score network; compiles fast."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], labels: Float[Array, "B"], train: bool) -> Float[Array, "B H W C"]:
        """Apply the network."""
        h = nn.Conv(8, (3, 3))(x) + nn.Dense(8)(labels[:, None] / 1000)[:, None, None]
        return nn.Conv(x.shape[-1], (3, 3))(nn.swish(h))


def _tiny_experiment() -> Experiment:
    experiment = build_experiment(_config().lock())
    model = TinyNetwork()
    loss_fn = losses.build_loss(experiment.config, experiment.sde, model)
    return dataclasses.replace(experiment, model=model, loss_fn=loss_fn)


def _store_and_restore(state: Any, experiment: Experiment) -> Any:
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(folder, snapshot_freq=1, template=experiment.state_template()) as checkpoints,
    ):
        checkpoints.save(state)
        checkpoints.wait()
        return checkpoints.restore_newest()


def check_training() -> Outcome:
    """Take two training steps on the digits, with a checkpoint in between.

    Adam's first step moves a parameter by the learning rate, whatever the gradient. The second step from the restored
    checkpoint must equal, bit for bit, that of a run without one.
    """
    experiment = _tiny_experiment()
    source = datasets.build_source(experiment.config, "train")
    batches = datasets.training_batches(
        source, seed=0, first_step=0, batch_size=experiment.config.training.batch_size, steps_per_call=1
    )
    train = build_train_program(experiment)
    state, first, second = experiment.init_state(), next(batches), next(batches)
    before = jax.tree.map(np.asarray, state.params)
    unbroken, metrics = train(distributed.replicate(state), first)
    stored = distributed.unreplicate(unbroken)
    moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), stored.params, before)))
    unbroken, _ = train(unbroken, second)
    resumed, _ = train(distributed.replicate(_store_and_restore(stored, experiment)), second)
    ends = (jax.tree.leaves(distributed.unreplicate(each)) for each in (unbroken, resumed))
    is_same = all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))
    loss, rate = float(np.mean(distributed.gather(metrics["loss"]))), experiment.config.optim.lr
    passed = bool(np.isfinite(loss)) and abs(moved - rate) < LR_ERROR * rate and is_same
    resuming = f"resumed from a checkpoint {'equals' if is_same else 'DIFFERS FROM'} unbroken"
    moving = f"the first step moves parameters by {moved:.3g}, expected {rate:g}"
    return Outcome(passed, f"loss {loss:.3f}; {moving}; {resuming}")


def check_devices() -> Outcome:
    """Average numbers over all devices, and multiply matrices on each."""
    local = distributed.local_device_count()
    a = np.random.default_rng(0).normal(size=(local, 64, 64)).astype(np.float32)
    number = np.arange(1, local + 1, dtype=np.float32)

    def work(a: Array, number: Array) -> tuple[Array, Array]:
        return jnp.matmul(a, a, precision="highest"), distributed.mean(number)

    product, mean = (np.asarray(each) for each in distributed.pmap(work)(a, number))
    expected = a.astype(np.float64) @ a.astype(np.float64)
    error = float(np.abs(product - expected).max() / np.abs(expected).max())
    means = f"mean over {distributed.device_count()} device(s) {mean[0]:g}, expected {number.mean():g}"
    passed = bool(np.allclose(mean, number.mean())) and error < MATMUL
    return Outcome(passed, f"{means}; matrix product off by {error:.1g}")


CHECKS: dict[str, Callable[[], Outcome]] = {
    "sampler of the ODE": lambda: check_sampler("ode"),
    "sampler of the SDE": lambda: check_sampler("pc"),
    "likelihood": check_likelihood,
    "training": check_training,
    "devices": check_devices,
}


def run_check(name: str) -> Outcome:
    """Run one check; an exception is its outcome."""
    start = time.monotonic()
    try:
        outcome = CHECKS[name]()
    except Exception as error:  # whatever is wrong with an installation; the other checks still have to run
        reason = (str(error).strip().splitlines() or [""])[0]
        outcome = Outcome(False, f"{type(error).__name__}: {reason}")
    return outcome._replace(text=f"{outcome.text} ({time.monotonic() - start:.1f} s)")
