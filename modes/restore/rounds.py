"""Restorations of a checkpoint: one compiled program for (image, draw) pairs, and its results in rounds on disk."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from controllable_generation import Operator, build_restoration
from experiment.build import Experiment
from modes.restore.inputs import image_keys
from parallel import distributed, rng
from solvers.ode import SolverError
from workdir import results

_STREAM = 2**32 - 1  # of the purpose "sample": no sample has this number


def mode_key(experiment: Experiment) -> PRNGKeyArray:
    """Return the key that the keys of all images derive from."""
    return jax.random.fold_in(experiment.keys["sample"], _STREAM)


class RestorationProgram:
    """Method and sampler, compiled at the first call for `batch_size` (image, draw) pairs over all devices.

    Draw j of image i depends on (seed, i, j) and the measurement alone, not on batch or device (except for a corrector
    whose step size is a batch mean).
    """

    def __init__(self, experiment: Experiment, operator: Operator, batch_size: int):
        sampler = experiment.sampler(batch_size // distributed.device_count())
        condition = build_restoration(experiment.config, experiment.sde, operator)
        smooth = experiment.steps_between_levels

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
        """Draw `draws[p]` of the image with number `images[p]` and measurement `y[p]`, for each pair p.

        Returns images in the network's range, the largest nfe of any device, and the seconds without compiling.
        `params` are replicated.
        """
        pair_key = lambda i, j: rng.fold_in(image_keys(self._key, i)[1], j)  # noqa: E731
        keys = jax.vmap(pair_key)(distributed.host_share(images), distributed.host_share(draws))
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
    """Raise a SolverError that names the first image and draw that diverged, if any."""
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if bad.any():
        image, draw = divmod(int(pairs[bad][0]), num_draws)
        raise SolverError(
            f"{bad.sum()} of {len(x)} restorations are not finite, the first of them draw {draw} of image {image}; "
            "take more sampling.num_steps or a smaller restore.scale, or for sampling.method='ode' larger tolerances"
        )


def build_draws(
    program: RestorationProgram,
    params: Any,
    folder: Path,
    *,
    measurement: Callable[[int], np.ndarray],
    num_images: int,
    num_draws: int,
) -> Callable[[int], dict[str, Any]]:
    """Return the function that gives the restorations of an image, x float32[num_draws, H, W, C], and their cost.

    All (image, draw) pairs, ordered by image, are split into rounds, one call of the program each, on demand. A round's
    file is named after its first pair. It is reused if it holds as many pairs as needed from there, so a killed run
    resumes with any batch size and number of devices. `params` are replicated.
    """
    size, num_pairs = program.batch_size, num_images * num_draws

    @functools.lru_cache(maxsize=2)  # an image may straddle two rounds
    def round_from(first: int) -> dict[str, np.ndarray]:
        wanted = min(size, num_pairs - first)

        def draw() -> dict[str, Any]:
            pairs = np.minimum(np.arange(first, first + size), num_pairs - 1)  # the last pair pads the last round
            images, draws = np.divmod(pairs, num_draws)
            y = np.stack([measurement(int(image)) for image in images])
            x, nfe, seconds = program(params, y, images, draws)
            require_finite(x, pairs, num_draws)
            return {"x": x[:wanted], "nfe": nfe, "seconds": seconds, "compile_seconds": program.compile_seconds}

        return results.cached(
            folder / f"restorations_from_{first}.npz", draw, is_enough=lambda stored: len(stored["x"]) == wanted
        )

    def draws_of(image: int) -> dict[str, Any]:
        pairs = range(image * num_draws, (image + 1) * num_draws)
        starts = [pair // size * size for pair in pairs]
        rounds = {start: round_from(start) for start in starts}
        return {
            "x": np.stack([rounds[start]["x"][pair - start] for pair, start in zip(pairs, starts, strict=True)]),
            "nfe": max(int(each["nfe"]) for each in rounds.values()),
            "seconds": sum(float(rounds[start]["seconds"]) / len(rounds[start]["x"]) for start in starts),
            "compile_seconds": max(float(each["compile_seconds"]) for each in rounds.values()),
        }

    return draws_of
