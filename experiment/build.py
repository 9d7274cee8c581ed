"""What a configuration builds: SDE, network, loss, optimizer, sampler, likelihood; and their compiled programs."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

import datasets
import losses
import models
import sde_lib
from configs.settings import check, image_shape, of_group
from dequantization import Dequantize, build_dequantization
from experiment import programs, smoke, startup
from likelihood import LIKELIHOOD_EPS, Likelihood, build_likelihood
from models.factory import check_labels, num_classes_of, require_score_network
from models.score import get_score_fn
from parallel import distributed, rng
from sampling import Guide, build_classifier_free, build_labels, build_sampler, compose_score, labels_of_samples
from sde_lib import SDE, ScoreFn
from solvers import ode
from solvers.interface import Sampler
from variational_bound import VariationalBound, build_variational_bound
from workdir import compatibility

PURPOSES = ("init", "train", "eval", "sample", "bpd", "grid")  # append only: the order fixes the keys


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a configuration describes, built and checked.

    Attributes:
      config: the configuration itself.
      sde: forward SDE.
      model: score network, or classifier.
      loss_fn: training objective.
      optimizer: of the parameters.
      scaler: between stored levels and the network's range.
      dequantize: levels to continuous values, for the likelihood.
      likelihood: by the probability-flow ODE.
      bound: variational bound under the reverse SDE, from the same time on; None if it is not measured.
      keys: one key for each purpose, all derived from the seed.
      group: of the settings with the training schedule: "training" for a score network, or "classifier".
    """

    config: ConfigDict
    sde: SDE
    model: nn.Module
    loss_fn: losses.LossFn
    optimizer: optax.GradientTransformation
    scaler: datasets.Scaler
    dequantize: Dequantize
    likelihood: Likelihood
    bound: VariationalBound | None
    keys: dict[str, PRNGKeyArray]
    group: str = "training"

    # --- data and schedule -------------------------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return image_shape(self.config)

    @property
    def num_classes(self) -> int:
        """Classes that the score network is conditioned on; 0: none."""
        return num_classes_of(self.config.model.name, self.config.model.num_classes)

    @property
    def takes_labels(self) -> bool:
        """Whether a training batch is (levels, class labels), not levels alone."""
        return self.group == "classifier" or self.num_classes > 0

    @property
    def schedule(self) -> ConfigDict:
        """Settings of the training: batch size, number of steps, frequencies."""
        return self.config[self.group]

    @property
    def num_steps(self) -> int:
        """Steps of the whole training: `n_iters`, rounded down to whole compiled calls."""
        return self.schedule.n_iters // self.schedule.n_jitted_steps * self.schedule.n_jitted_steps

    @property
    def skips_nonfinite(self) -> bool:
        """Whether a step whose loss or gradient is not finite is skipped."""
        return bool(self.config.training.on_nan == "skip")

    @property
    def batch_shapes(self) -> Any:
        """Shapes of the batches that a device gets for one compiled call of training."""
        sizes = self.schedule.n_jitted_steps, self.schedule.batch_size // distributed.device_count()
        levels = jax.ShapeDtypeStruct((*sizes, *self.image_shape), jnp.uint8)
        return (levels, jax.ShapeDtypeStruct(sizes, jnp.int32)) if self.takes_labels else levels

    def preparation(self, *, train: bool) -> Callable[[PRNGKeyArray, Array], Array]:
        """Return the map from stored levels to the network's input."""
        return datasets.build_preparation(self.config, train=train)

    # --- state -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _init(self) -> Callable[[PRNGKeyArray], losses.TrainState]:
        def init(key: PRNGKeyArray) -> losses.TrainState:
            x, labels = jnp.zeros((1, *self.image_shape)), jnp.ones((1,))
            variables = self.model.init({"params": key}, x, labels, train=False)
            return losses.init_state(variables["params"], self.optimizer)

        return jax.jit(init)

    @functools.cached_property
    def state_shapes(self) -> Any:
        """Shapes and dtypes of the state; nothing is compiled."""
        return jax.eval_shape(self._init, self.keys["init"])

    def init_state(self) -> losses.TrainState:
        """Return the state before the first step."""
        return self._init(self.keys["init"])

    def state_template(self) -> losses.TrainState:
        """Return a state of zeros, for the structure that a checkpoint must have; nothing is compiled."""
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.state_shapes)

    # --- score, samples, likelihood ----------------------------------------------------------------------------------

    def score_fn(self, params: Any, *, smooth: bool = False, class_labels: Int[Array, "B"] | None = None) -> ScoreFn:
        """Return the score as a function of (x, t), without dropout.

        Args:
          params: of the network.
          smooth: for solvers of the probability-flow ODE: evaluate a discretely trained VP network between its levels,
            as the 2021 code does; see `SDE.interpolates_levels`.
          class_labels: of the examples, for a class-conditional network; None: the score of images of any class.
        """
        continuous = self.config.training.continuous or (smooth and self.sde.interpolates_levels)
        return get_score_fn(self.sde, self.model, params, train=False, continuous=continuous, class_labels=class_labels)

    def sampler(self, batch_size: int) -> Sampler:
        """Build the sampler for a device's batch."""
        return build_sampler(self.config, self.sde, (batch_size, *self.image_shape))

    @property
    def steps_between_levels(self) -> bool:
        """Whether the sampler evaluates the score between the noise levels of training, as all but "pc" do."""
        return bool(self.config.sampling.method != "pc")

    def sampler_settings(self) -> dict[str, Any]:
        """Return what a sample depends on besides the network and the seed."""
        steps = self.config.sampling.num_steps or self.config.model.num_scales
        chosen = of_group(self.config, "sampling")
        network = {} if self.config.model.dtype == "float32" else {"model.dtype": self.config.model.dtype}
        return {"training.sde": self.config.training.sde, **network, **chosen, "sampling.num_steps": steps}


def check_sampling(config: ConfigDict, sde: SDE) -> None:
    """Check how samples are drawn, and of which classes if the network knows any; a guide may know others."""
    build_sampler(config, sde, (1, *image_shape(config)))
    if num_classes_of(config.model.name, config.model.num_classes):
        build_classifier_free(config, sde, build_labels(config))


def build_experiment(config: ConfigDict) -> Experiment:
    """Build and check everything that a configuration describes; nothing is compiled.

    Raises:
      UserError: naming the first setting that is wrong and what is expected.
    """
    check(config)
    sde = sde_lib.build_sde(config)
    model = models.create_model(config)
    check_labels(model, continuous=config.training.continuous)
    check_sampling(config, sde)  # a bad sampler must not come to light after days of training
    scaler = datasets.build_scaler(config)
    is_bounded, eps = config.likelihood.bound_num_times != 0, LIKELIHOOD_EPS
    keys = jax.random.split(jax.random.key(config.seed), len(PURPOSES))
    return Experiment(
        config=config,
        sde=sde,
        model=model,
        scaler=scaler,
        dequantize=build_dequantization(config, scaler, sde, eps=eps),
        likelihood=build_likelihood(config, sde, eps=eps),
        bound=build_variational_bound(config, sde, eps=eps) if is_bounded else None,
        loss_fn=losses.build_loss(config, sde, model),
        optimizer=losses.build_optimizer(config),
        keys=dict(zip(PURPOSES, keys, strict=True)),
    )


def open_experiment(config: ConfigDict, workdir: str | Path) -> Experiment:
    """Build the experiment of a workdir that holds a training run of it.

    Raises:
      UserError: if a setting is wrong, or the workdir holds another experiment.
    """
    config = smoke.resolve(config)
    require_score_network(config.model.name)
    experiment = build_experiment(config)
    compatibility.check_same_experiment(workdir, config)
    describe(experiment)
    return experiment


def describe(experiment: Experiment) -> None:
    """Log the size of the network and the devices."""
    sizes = [leaf.size for leaf in jax.tree.leaves(experiment.state_shapes.params)]
    devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s) of {jax.process_count()} process(es)"
    logging.info("network %s: %s parameters; %s", experiment.config.model.name, f"{sum(sizes):,}", devices)


# --- compiled programs -----------------------------------------------------------------------------------------------


def _device_keys(key: PRNGKeyArray, indices: np.ndarray) -> PRNGKeyArray:
    """Return one key for each example of this host, key[devices, B]."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, distributed.host_share(indices))
    return keys.reshape(jax.local_device_count(), -1)


def map_train_steps(experiment: Experiment) -> jax.stages.Wrapped:
    """Map training steps over the devices: (key, state, batches) -> (state, metrics), all but key with a device axis.

    The state is donated: its buffers are reused for the new one.
    """
    step = losses.make_train_step(
        experiment.loss_fn,
        experiment.optimizer,
        ema_rate=experiment.config.model.ema_rate,
        prepare=experiment.preparation(train=True),
        microbatches=experiment.schedule.microbatches,
    )
    if experiment.skips_nonfinite:
        step = losses.skip_nonfinite(step)
    return distributed.pmap(losses.make_train_steps(step), donate_argnums=(1,), in_axes=(None, 0, 0))


def build_train_program(experiment: Experiment) -> Callable[..., Any]:
    """Compile `n_jitted_steps` training steps: (state, batches) -> (state, metrics); see `map_train_steps`.

    They compile in the background from now on, or load from where an earlier run of the same configuration left them;
    the first call waits for it. With several processes they compile at the first call.
    """
    steps, key = map_train_steps(experiment), experiment.keys["train"]
    if not distributed.is_alone():
        return functools.partial(steps, key)
    batch = experiment.batch_shapes
    settings = json.dumps(experiment.config.to_dict(), sort_keys=True, default=str)
    # A classifier's steps follow from its data, too, by which it normalizes.
    is_kept = experiment.group == "training"
    path = programs.file_of(f"training steps of batches {batch} for {settings}") if is_kept else None
    shapes = lambda: (key, *programs.on_devices((experiment.state_shapes, batch)))  # noqa: E731
    # Traced here unless it is on disk: Python runs one thread at a time, while XLA compiles without Python.
    lowered = None if path and path.exists() else steps.lower(*shapes())
    startup.mark("trace")
    call = programs.compile_in_background(lowered, path, lower=lambda: steps.lower(*shapes()))
    return functools.partial(call, key)


def build_loss_program(experiment: Experiment) -> Callable[[Any, np.ndarray, np.ndarray], np.ndarray]:
    """Compile the loss of test images: (replicated params, levels, example indices) -> float32[B]."""
    prepare = experiment.preparation(train=False)

    def loss(key: PRNGKeyArray, params: Any, levels: UInt8[Array, "B H W C"]) -> Float[Array, "B"]:
        key_data, key_loss = rng.split(key)
        return experiment.loss_fn(key_loss, params, prepare(key_data, levels), train=False)

    program = distributed.pmap(loss)

    def evaluate(params: Any, levels: np.ndarray, indices: np.ndarray) -> np.ndarray:
        keys = _device_keys(experiment.keys["eval"], indices)
        return distributed.gather(program(keys, params, distributed.shard(distributed.host_share(levels))))

    return evaluate


class SamplingProgram:
    """The sampler as one compiled program: (replicated params, sample indices int[batch_size]) -> (levels, nfe).

    Sample i follows from (seed, i) alone, its label too, whatever the batch or the device (except with a corrector
    whose step size is a batch mean). It compiles at its first call, or before in `compile`.

    Args:
      experiment: whose sampler, labels and classifier-free guidance are used.
      batch_size: samples of a call, over all devices.
      purpose: whose key the samples derive theirs from, one of `PURPOSES`.
      guide: applied to the network's score if there are labels; copied to all devices.

    Attributes:
      batch_size: as given.
      labels: of the samples, in turn; empty: none.
      compile_seconds: time to compile; 0 before.

    Raises:
      UserError: if `sampling.labels` asks for what neither the network nor the guide knows.
    """

    def __init__(self, experiment: Experiment, batch_size: int, purpose: str = "sample", *, guide: Guide | None = None):
        config = experiment.config
        sampler = experiment.sampler(batch_size // distributed.device_count())
        self.batch_size, self.compile_seconds = batch_size, 0.0
        self.labels = build_labels(config, guide_classes=guide.num_classes if guide else 0)
        self._key = experiment.keys[purpose]
        self._guide = distributed.replicate(guide) if guide and self.labels else None
        classifier_free = build_classifier_free(config, experiment.sde, self.labels)
        evaluations = 1 if config.sampling.guidance_scale == 1 else 2  # of the network, for one of the score

        def sample(key: PRNGKeyArray, params: Any, labels: Any, guide: Guide | None) -> tuple[Array, Array, Array]:
            score_of = lambda labels: experiment.score_fn(  # noqa: E731
                params, smooth=experiment.steps_between_levels, class_labels=labels
            )
            guided = guide.guide if guide else None
            x, nfe = sampler(key, compose_score(score_of, labels, classifier_free=classifier_free, guide=guided))
            return experiment.scaler.to_levels(x), nfe * evaluations, x.sum(axis=(1, 2, 3))

        self._mapped = distributed.pmap(sample)
        self._compiled: Callable[..., Any] | None = None

    def _inputs(self, params: Any, indices: np.ndarray) -> tuple[Any, ...]:
        labels = None
        if self.labels:
            labels = distributed.shard(distributed.host_share(labels_of_samples(self.labels, indices)))
        return _device_keys(self._key, indices), params, labels, self._guide

    def compile(self, params: Any) -> Callable[..., Any]:
        """Compile the program unless that is done, and return it."""
        if self._compiled is None:
            start = time.monotonic()
            self._compiled = distributed.compile_ahead(self._mapped, *self._inputs(params, np.arange(self.batch_size)))
            self.compile_seconds = time.monotonic() - start
        return self._compiled

    def __call__(self, params: Any, indices: np.ndarray) -> tuple[np.ndarray, int]:
        """Draw the samples of these indices, with replicated parameters.

        Returns:
          Levels, uint8[batch_size, H, W, C], and the largest number of network evaluations of any device.

        Raises:
          SolverError: if a sample is NaN.
        """
        levels, nfe, sums = self.compile(params)(*self._inputs(params, indices))
        ode.require_solved(distributed.gather(sums), "samples")  # levels cannot be NaN
        return distributed.gather(levels), int(distributed.gather(nfe).max())


def build_bpd_program(experiment: Experiment) -> Callable[[Any, np.ndarray, np.ndarray, int], dict[str, np.ndarray]]:
    """Compile bits/dim: (replicated params, levels, example indices, draw) -> arrays float[B].

    Each draw dequantizes the levels again. The arrays are "nats", log p(x), and "bpd" by the ODE, its "stderr" over the
    probes and the "nfe" of its batch; and if `likelihood.bound_num_times` is set, of the same x by the SDE,
    "bound_nats", a lower bound of log p(x), "bound" in bits/dim and its "bound_stderr".
    """
    dequantize, likelihood, bound = experiment.dequantize, experiment.likelihood, experiment.bound

    def bpd(key: PRNGKeyArray, params: Any, levels: UInt8[Array, "B H W C"]) -> dict[str, Array]:
        key_data, key_probe, key_bound = rng.split(key, 3)
        score_fn = experiment.score_fn(params, smooth=True)
        x, log_q = dequantize(key_data, levels)
        result = likelihood(key_probe, score_fn, x, log_q)
        measured = {"nats": result.nats, "bpd": result.bpd, "stderr": result.stderr}
        measured["nfe"] = jnp.broadcast_to(result.nfe, result.bpd.shape)
        if bound is not None:
            upper = bound(key_bound, score_fn, x, log_q)
            measured |= {"bound_nats": -upper.nats, "bound": upper.bpd, "bound_stderr": upper.stderr}
        return measured

    program = distributed.pmap(bpd)

    def measure(params: Any, levels: np.ndarray, indices: np.ndarray, draw: int) -> dict[str, np.ndarray]:
        keys = _device_keys(jax.random.fold_in(experiment.keys["bpd"], draw), indices)
        outputs = program(keys, params, distributed.shard(distributed.host_share(levels)))
        return {name: distributed.gather(array) for name, array in outputs.items()}

    return measure
