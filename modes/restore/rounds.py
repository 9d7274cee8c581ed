"""Restorations of a checkpoint: one compiled program for (image, draw) pairs, and its results in rounds on disk."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from controllable_generation import Operator, build_restoration
from experiment.build import Experiment
from modes.restore.inputs import image_keys
from parallel import distributed, rng
from sampling import build_sampler
from solvers.ode import SolverError
from workdir import results

_STREAM = 2**32 - 1  # of the purpose "sample": no sample has this number


def mode_key(experiment: Experiment) -> PRNGKeyArray:
    """Returns the key from which those of every image derive."""
    return jax.random.fold_in(experiment.keys["sample"], _STREAM)


def pair_keys(key: PRNGKeyArray, images: Int[np.ndarray, "P"], draws: Int[np.ndarray, "P"]) -> PRNGKeyArray:
    """Returns the key of each draw, key[P], which follows from the numbers of its image and of the draw alone."""
    return jax.vmap(lambda i, j: rng.fold_in(image_keys(key, i)[1], j))(images, draws)


class RestorationProgram:
    """Method and sampler as one compiled program for a batch of (image, draw) pairs.

    Draw j of image i follows from (seed, i, j) and the measurement alone, whatever the batch or the device (but for a
    corrector whose step size is a batch mean). It compiles at its first call.

    Args:
      experiment: its configuration says which sampler and which method.
      operator: that measures images.
      batch_size: pairs of a call, over all devices.

    Attributes:
      batch_size: as given.
      compile_seconds: what compiling took; 0 as long as it has not been done.
    """

    def __init__(self, experiment: Experiment, operator: Operator, batch_size: int):
        config = experiment.config
        shape = (batch_size // distributed.device_count(), *experiment.image_shape)
        sampler = build_sampler(config, experiment.sde, shape)
        condition = build_restoration(config, experiment.sde, operator)
        smooth = config.sampling.method != "pc"  # every other one steps between the levels of training

        def restore(key: PRNGKeyArray, params: Any, y: Float[Array, "B ..."]) -> tuple[Array, Array]:
            key_init, key_sampler = rng.split(key)
            score_fn, transform, initial_state = condition(experiment.score_fn(params, smooth=smooth), y)
            x_init = None if initial_state is None else initial_state(key_init)
            return sampler(key_sampler, score_fn, x_init, transform)

        self.batch_size = batch_size
        self.compile_seconds = 0.0
        self._key = mode_key(experiment)
        self._mapped = distributed.pmap(restore)
        self._compiled: Callable[..., Any] | None = None

    def __call__(
        self, params: Any, y: Float[np.ndarray, "P ..."], images: Int[np.ndarray, "P"], draws: Int[np.ndarray, "P"]
    ) -> tuple[Float[np.ndarray, "P H W C"], int, float]:
        """Draws a restoration for each pair.

        Args:
          params: of the network, replicated.
          y: measurement of the image of each pair, [batch_size, *measurement_shape].
          images: number of the image of each pair.
          draws: number of the draw of each pair.

        Returns:
          Images in the network's range, the largest number of network evaluations of any device, and the seconds that
          it took without compiling.
        """
        keys = pair_keys(self._key, distributed.host_share(images), distributed.host_share(draws))
        keys = keys.reshape(jax.local_device_count(), -1)
        arguments = keys, params, distributed.shard(distributed.host_share(y))
        if self._compiled is None:
            start = time.monotonic()
            self._compiled = distributed.compile_ahead(self._mapped, *arguments)
            self.compile_seconds = time.monotonic() - start
        start = time.monotonic()
        x, nfe = self._compiled(*arguments)
        drawn = distributed.gather(x)
        return drawn, int(distributed.gather(nfe).max()), time.monotonic() - start


def require_finite(x: Float[np.ndarray, "P H W C"], pairs: Int[np.ndarray, "P"], num_draws: int) -> None:
    """Checks that no restoration has diverged.

    Raises:
      SolverError: naming the first image and draw that has.
    """
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if bad.any():
        image, draw = divmod(int(pairs[bad][0]), num_draws)
        raise SolverError(
            f"{bad.sum()} of {len(x)} restorations are not finite, the first of them draw {draw} of image {image}; "
            "take more sampling.num_steps or a smaller restore.scale, or for sampling.method='ode' larger tolerances"
        )


@dataclass(frozen=True)
class Draws:
    """Restorations of one image, and what they cost.

    Attributes:
      x: in the network's range, float32[K, H, W, C].
      nfe: network evaluations of a draw.
      seconds: of drawing them, their share of the rounds that they were in.
      compile_seconds: of compiling the program.
    """

    x: Float[np.ndarray, "K H W C"]
    nfe: int
    seconds: float
    compile_seconds: float


class Rounds:
    """All pairs of images and draws, an image's after the other's, cut into rounds that are drawn when asked for.

    A round's file is named after its first pair and used if it holds as many as wanted from there, so that a killed run
    goes on, with any batch size and number of devices.

    Args:
      program: that draws them.
      params: of the network, replicated.
      folder: of the rounds.
      measurement: of the image of this number.
      num_images: N.
      num_draws: K, of each image.
    """

    def __init__(
        self,
        program: RestorationProgram,
        params: Any,
        folder: Path,
        *,
        measurement: Callable[[int], np.ndarray],
        num_images: int,
        num_draws: int,
    ):
        self._program, self._params, self._folder = program, params, folder
        self._measurement, self._num_draws = measurement, num_draws
        self._num_pairs = num_images * num_draws
        self._round = functools.lru_cache(maxsize=2)(self._read_or_draw)  # an image may straddle two of them

    def draws(self, image: int) -> Draws:
        """Returns the restorations of an image, drawing what is not on disk."""
        size = self._program.batch_size
        pairs = range(image * self._num_draws, (image + 1) * self._num_draws)
        starts = [pair // size * size for pair in pairs]
        rounds = {start: self._round(start) for start in starts}
        return Draws(
            x=np.stack([rounds[start]["x"][pair - start] for pair, start in zip(pairs, starts, strict=True)]),
            nfe=max(int(each["nfe"]) for each in rounds.values()),
            seconds=sum(float(rounds[start]["seconds"]) / len(rounds[start]["x"]) for start in starts),
            compile_seconds=max(float(each["compile_seconds"]) for each in rounds.values()),
        )

    def _read_or_draw(self, first: int) -> dict[str, np.ndarray]:
        wanted = min(self._program.batch_size, self._num_pairs - first)
        return results.cached(
            self._folder / f"restorations_from_{first}.npz",
            functools.partial(self._draw, first, wanted),
            is_enough=lambda stored: len(stored["x"]) == wanted,
        )

    def _draw(self, first: int, wanted: int) -> dict[str, Any]:
        # The last round is filled up with its last pair.
        pairs = np.minimum(np.arange(first, first + self._program.batch_size), self._num_pairs - 1)
        images, draws = np.divmod(pairs, self._num_draws)
        y = np.stack([self._measurement(int(image)) for image in images])
        x, nfe, seconds = self._program(self._params, y, images, draws)
        require_finite(x, pairs, self._num_draws)
        return {"x": x[:wanted], "nfe": nfe, "seconds": seconds, "compile_seconds": self._program.compile_seconds}
