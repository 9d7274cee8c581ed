"""What the mode "restore" starts from: images, whose measurements are simulated, or measurements themselves."""

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
from sources.pictures import Fit, Pictures, load_pictures
from storage import files

NUM_IMAGES = 8  # of the test split, without --num_images


@dataclass(frozen=True)
class Inputs:
    """What is restored.

    Attributes:
      names: of the images.
      source: where they are from, in words.
      levels: of the true images, uint8[N, H, W, C]; None if only their measurements are known.
      pictures: of the measurements, in [0, 1], float32[N, h, w, c]; None if they are to be simulated.
      skipped: {file: why it was left out}.
    """

    names: tuple[str, ...]
    source: str
    levels: UInt8[np.ndarray, "N H W C"] | None
    pictures: Float[np.ndarray, "N h w c"] | None
    skipped: dict[str, str]

    def sha256(self) -> str:
        """Returns the hash of the images' content, whatever their files are called."""
        array = self.pictures if self.levels is None else self.levels
        assert array is not None  # one of the two is there
        return files.content_hash(array)


# --- reading ---------------------------------------------------------------------------------------------------------


def check_inputs(config: ConfigDict, operator: Operator) -> None:
    """Checks the settings of the mode that are about images, before any is read.

    Raises:
      UserError: naming the first one that is wrong and what is expected.
    """
    settings = config.restore
    if settings.input == "image":
        return
    if not settings.images:
        raise UserError("restore.input='measurement' needs restore.images, the file or folder of the measurements")
    if operator.picture_shape is None:
        raise UserError(
            f"restore.operator={settings.operator!r}: a measurement is no picture, so none can be read; set "
            "restore.input='image' to simulate it"
        )
    if settings.resize != "none":
        raise UserError(
            f"restore.resize={settings.resize!r} would change what was measured; with restore.input='measurement' "
            "leave it at 'none' and give files of the right size"
        )


def _load_test_split(config: ConfigDict, limit: int) -> Inputs:
    source = datasets.build_source(config, "test")
    count = limit or min(NUM_IMAGES, len(source))
    if count > len(source):
        raise UserError(
            f"--num_images={count}, but the test split of {config.data.dataset} has {len(source)} images; ask for at "
            "most that many"
        )
    names = tuple(f"test_{index}" for index in range(count))
    return Inputs(names, f"the test split of {config.data.dataset}", source.images(np.arange(count)), None, {})


def load_inputs(config: ConfigDict, operator: Operator, limit: int) -> Inputs:
    """Loads the images, or the measurements, that `config.restore` names.

    Args:
      config: experiment configuration; reads `restore` and `data`.
      operator: says what a measurement is.
      limit: images, at the most; 0: all of restore.images, or `NUM_IMAGES` of the test split.

    Raises:
      UserError: if a setting is wrong, or there is no image that can be used.
      UserError: if there is no such path.
    """
    checks.not_negative("--num_images", limit)
    check_inputs(config, operator)
    settings = config.restore
    if not settings.images:
        return _load_test_split(config, limit)
    is_image = settings.input == "image"
    shape = datasets.image_shape(config) if is_image else operator.picture_shape
    assert shape is not None  # check_inputs has refused it
    fit = Fit(shape, settings.resize, settings.convert_channels)
    loaded: Pictures = load_pictures(settings.images, fit, num_levels=config.data.num_levels, limit=limit)
    levels = loaded.to_levels(config.data.num_levels) if is_image else None
    return Inputs(loaded.names, loaded.source, levels, None if is_image else loaded.values, loaded.skipped)


# --- measurements ----------------------------------------------------------------------------------------------------


def image_keys(key: PRNGKeyArray, image: int | Array) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Returns the keys of an image's measurement noise and of its draws, from the key of the mode."""
    key_noise, key_draws = rng.split(rng.fold_in(key, image))
    return key_noise, key_draws


def build_measuring(
    inputs: Inputs, operator: Operator, scaler: datasets.Scaler, *, key: PRNGKeyArray, noise: float
) -> Callable[[int], Float[np.ndarray, "..."]]:
    """Returns the function that gives the measurement of image i, float32[*measurement_shape] in the network's range.

    A simulated one is A x + n, x being the middle of the image's levels and n noise that follows from (key, i) alone.

    Args:
      inputs: images or measurements.
      operator: A.
      scaler: between levels and the network's range.
      key: of the mode.
      noise: standard deviation of n, in the network's range.
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

    return functools.lru_cache(maxsize=1)(measurement)  # the draws of an image come one after the other


def brightness(x: Float[np.ndarray, "*shape"], scaler: datasets.Scaler) -> Float[np.ndarray, "*shape"]:
    """Maps the network's range to [0, 1], the middle of the lowest level to 0 and of the highest to 1; clips the rest.

    The inverse of `Scaler.middle`, for values between levels, too.
    """
    y = (np.asarray(x, np.float64) + 1) / 2 if scaler.centered else np.asarray(x, np.float64)
    levels = y * scaler.num_levels - 0.5 if scaler.dequantize else y * (scaler.num_levels - 1)
    return np.clip(levels / (scaler.num_levels - 1), 0.0, 1.0)
