"""Inputs of the mode "restore": images, whose measurements are simulated, or measurements themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

import checks
import datasets
from controllable_generation import Operator
from errors import UserError
from parallel import rng
from sources.pictures import Fit, load_pictures
from storage import files

NUM_IMAGES = 8  # of the test split, without --num_images


@dataclass(frozen=True)
class Inputs:
    """The images to restore, either true images or only their measurements."""

    names: tuple[str, ...]
    source: str  # description of their origin
    levels: UInt8[np.ndarray, "N H W C"] | None  # true images; None: only measurements are known
    pictures: Float[np.ndarray, "N h w c"] | None  # measurements in [0, 1], float32; None: to be simulated
    skipped: dict[str, str]  # {file: reason}

    def sha256(self) -> str:
        """Return the hash of the images' content, independent of file names."""
        array = self.pictures if self.levels is None else self.levels
        assert array is not None  # one of the two is there
        return files.content_hash(array)


def load_inputs(config: ConfigDict, operator: Operator, limit: int) -> Inputs:
    """Load at most `limit` of the images or measurements that `config.restore` names.

    A limit of 0 means all of restore.images, or `NUM_IMAGES` of the test split.
    """
    checks.not_negative("--num_images", limit)
    settings, data = config.restore, config.data
    is_image = settings.input == "image"
    if not is_image and not settings.images:
        raise UserError("restore.input='measurement' needs restore.images, the file or folder of the measurements")
    if not is_image and operator.picture_shape is None:
        raise UserError(
            f"restore.operator={settings.operator!r}: a measurement is no picture, so none can be read; set "
            "restore.input='image' to simulate it"
        )
    if not is_image and settings.resize != "none":
        raise UserError(
            f"restore.resize={settings.resize!r} would change what was measured; with restore.input='measurement' "
            "leave it at 'none' and give files of the right size"
        )
    if not settings.images:
        source = datasets.build_source(config, "test")
        count = limit or min(NUM_IMAGES, len(source))
        if count > len(source):
            raise UserError(
                f"--num_images={count}, but the test split of {data.dataset} has {len(source)} images; ask for at "
                "most that many"
            )
        names = tuple(f"test_{index}" for index in range(count))
        return Inputs(names, f"the test split of {data.dataset}", source.images(np.arange(count)), None, {})
    shape = operator.image_shape if is_image else operator.picture_shape
    assert shape is not None  # checked above
    fit = Fit(shape, settings.resize, settings.convert_channels)
    loaded = load_pictures(settings.images, fit, num_levels=data.num_levels, limit=limit)
    levels = loaded.to_levels(data.num_levels) if is_image else None
    return Inputs(loaded.names, loaded.source, levels, None if is_image else loaded.values, loaded.skipped)


def image_keys(key: PRNGKeyArray, image: int | Array) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Return the keys of an image's measurement noise and of its draws, from the key of the mode."""
    key_noise, key_draws = rng.split(rng.fold_in(key, image))
    return key_noise, key_draws


def build_measuring(
    inputs: Inputs, operator: Operator, scaler: datasets.Scaler, *, key: PRNGKeyArray, noise: float
) -> Callable[[int], Float[np.ndarray, "..."]]:
    """Return the function that gives the measurement of image i, float32[*measurement_shape] in the network's range.

    A simulated measurement is A x + n: x is the middle of the image's levels, n has standard deviation `noise` in the
    network's range and depends on (key, i) alone.
    """
    measured = operator.measured[None].astype(np.float32)

    def measurement(i: int) -> Float[np.ndarray, "..."]:
        if inputs.levels is None:
            assert inputs.pictures is not None
            y = scaler.middle(jnp.asarray(inputs.pictures[i : i + 1] * (scaler.num_levels - 1)))
            return np.asarray(y * measured)[0]
        y = operator.apply(scaler.middle(jnp.asarray(inputs.levels[i : i + 1])))
        key_noise, _ = image_keys(key, i)
        return np.asarray(y + noise * measured * rng.normal(key_noise[None], y.shape))[0]

    return functools.lru_cache(maxsize=1)(measurement)  # consecutive draws share an image


def brightness(x: Float[np.ndarray, "*shape"], scaler: datasets.Scaler) -> Float[np.ndarray, "*shape"]:
    """Map the network's range to [0, 1]: middle of the lowest level to 0, of the highest to 1; clip outside.

    Inverts `Scaler.middle`, also for values between levels.
    """
    y = (np.asarray(x, np.float64) + 1) / 2 if scaler.centered else np.asarray(x, np.float64)
    levels = y * scaler.num_levels - 0.5 if scaler.dequantize else y * (scaler.num_levels - 1)
    return np.clip(levels / (scaler.num_levels - 1), 0.0, 1.0)
