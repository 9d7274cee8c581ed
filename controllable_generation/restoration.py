"""What `config.restore` describes: a measurement of images, and the method that draws the images behind it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from configs.settings import check
from controllable_generation import guidance, operators
from controllable_generation.masks import read_mask
from controllable_generation.operators import ImageShape, Operator
from controllable_generation.projection import put_in_each_step
from errors import UserError
from parallel import rng
from sampling import StepTransform, data_range
from sde_lib import SDE, ScoreFn
from solvers import ADAPTIVE


class Conditional(NamedTuple):
    """What a sampler takes to draw images behind measurements."""

    score_fn: ScoreFn
    transform: StepTransform | None
    initial_state: Callable[[PRNGKeyArray], Float[Array, "B H W C"]] | None  # at t = T; None: the prior


class Restoration(Protocol):
    """What `build_restoration` returns."""

    def __call__(self, score_fn: ScoreFn, y: Float[Array, "B ..."]) -> Conditional:
        """Conditions a score on measurements, one for each image of a batch."""


# --- operators -------------------------------------------------------------------------------------------------------


def _inpaint(settings: ConfigDict, image_shape: ImageShape, seed: int) -> Operator:
    return operators.inpainting(read_mask(settings.mask, image_shape, seed))


def _colorize(settings: ConfigDict, image_shape: ImageShape, seed: int) -> Operator:
    if image_shape[2] < 2:
        raise UserError(
            f"restore.operator='colorize': images have {image_shape[2]} channel; a grey image says all of them"
        )
    return operators.grayscale(image_shape)


def _super_resolution(settings: ConfigDict, image_shape: ImageShape, seed: int) -> Operator:
    if any(size % settings.factor for size in image_shape[:2]):
        raise UserError(
            f"restore.factor={settings.factor}: expected a divisor of both {image_shape[0]} and "
            f"{image_shape[1]}, the height and width of the images"
        )
    return operators.super_resolution(image_shape, settings.factor, settings.downsampling)


def _gaussian_blur(settings: ConfigDict, image_shape: ImageShape, seed: int) -> Operator:
    return operators.gaussian_blur(image_shape, settings.blur_std)


def _motion_blur(settings: ConfigDict, image_shape: ImageShape, seed: int) -> Operator:
    return operators.motion_blur(image_shape, settings.blur_length, settings.blur_angle)


def _fourier(settings: ConfigDict, image_shape: ImageShape, seed: int) -> Operator:
    """Measures whole lines of frequencies: the lowest, and others at random."""
    H, W, _ = image_shape
    num_lines = max(round(settings.fourier_share * W), 1)
    num_center = min(max(round(settings.fourier_center * W), 1), num_lines)
    nearest = np.argsort(np.abs(np.fft.fftfreq(W)), kind="stable")
    others = np.random.Generator(np.random.Philox(seed)).permutation(nearest[num_center:])
    sampled = np.zeros((H, W))
    sampled[:, nearest[:num_center]] = 1
    sampled[:, others[: num_lines - num_center]] = 1
    return operators.fourier(image_shape, sampled)


# Kinds of measurement by the name that `restore.operator` gives them: (settings, image shape, seed) -> Operator.
OPERATORS: dict[str, Callable[[ConfigDict, ImageShape, int], Operator]] = {
    "inpaint": _inpaint,
    "colorize": _colorize,
    "super_resolution": _super_resolution,
    "gaussian_blur": _gaussian_blur,
    "motion_blur": _motion_blur,
    "fourier": _fourier,
}


def _load_operator(setting: str, image_shape: ImageShape) -> Operator:
    """Calls the function that "FILE.py:FUNCTION" names with the shape of the images."""
    path, _, name = setting.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"restore.operator={setting!r}: {path} is not a file; expected FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"restore.operator={setting!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    operator = getattr(module, name, lambda image_shape: None)(image_shape)
    if not isinstance(operator, Operator) or operator.image_shape != image_shape:
        raise UserError(
            f"restore.operator={setting!r}: expected a function of {path} that returns an Operator for images of shape "
            f"{image_shape}, such as controllable_generation.from_functions makes"
        )
    return operator


def build_operator(config: ConfigDict, image_shape: ImageShape) -> Operator:
    """Builds the measurement that `config.restore` describes.

    Args:
      config: read here: `restore`, `seed` (what is chosen at random).
      image_shape: (H, W, C) of the images.

    Raises:
      UserError: if a setting is unknown, out of range, or does not go with the images.
      UserError: if a file that it names is missing.
    """
    check(config, "restore")
    name = config.restore.operator
    if ".py:" in name:
        return _load_operator(name, image_shape)
    return OPERATORS[name](config.restore, image_shape, config.seed)


# --- methods ---------------------------------------------------------------------------------------------------------


def noise_in_range(config: ConfigDict) -> float:
    """Returns the standard deviation of the measurement's noise in the network's range, [-1, 1] or [0, 1]."""
    return float(config.restore.noise) * (2.0 if config.data.centered else 1.0)


def _check_projection(config: ConfigDict, operator: Operator) -> None:
    settings, method = config.restore, config.sampling.method
    if method in ADAPTIVE:
        raise UserError(
            f"restore.method={settings.method!r} changes the steps of a sampler, and sampling.method={method!r} has "
            "none of its own; use 'pc' or a solver of fixed steps, or restore.method='pigdm'"
        )
    if settings.method == "projection":
        if settings.scale > 1:
            raise UserError(f"restore.scale={settings.scale}: a projection goes at most the whole way, 1")
        return
    if settings.noise or settings.scale != 1 or not operator.is_orthogonal:
        raise UserError(
            "restore.method='replacement' puts exact values in the place of others: it needs restore.noise=0, "
            f"restore.scale=1 and an operator that keeps white noise white, not noise={settings.noise}, "
            f"scale={settings.scale}, {settings.operator!r}; use 'projection', or a guidance such as 'pigdm'"
        )


def _build_projection(config: ConfigDict, sde: SDE, operator: Operator) -> Restoration:
    _check_projection(config, operator)
    noise, strength = noise_in_range(config), float(config.restore.scale)

    def restore(score_fn: ScoreFn, y: Float[Array, "B ..."]) -> Conditional:
        transform = put_in_each_step(operator, y, sde, noise=noise, strength=strength)

        def initial_state(key: PRNGKeyArray) -> Float[Array, "B H W C"]:
            key_known, key_prior = rng.split(rng.example_keys(key, len(y)))
            x = sde.prior_sampling(key_prior, (len(y), *operator.image_shape))
            return transform(key_known, x, x, jnp.full(len(y), sde.T))[0]

        return Conditional(score_fn, transform, initial_state)

    return restore


def _build_weighting(config: ConfigDict, sde: SDE, operator: Operator) -> guidance.Weighting:
    settings, noise = config.restore, noise_in_range(config)
    if settings.method == "dps":
        return guidance.dps_weighting(sde.with_steps(config.model.num_scales), settings.scale)
    if settings.method == "pigdm":
        return guidance.pigdm_weighting(
            operator, sde, noise=noise, scale=settings.scale, data_std=float(settings.data_std)
        )
    return guidance.mmps_weighting(operator, sde, noise=noise, scale=settings.scale, num_steps=settings.cg_steps)


def _build_guidance(config: ConfigDict, sde: SDE, operator: Operator) -> Restoration:
    weighting = _build_weighting(config, sde, operator)
    bounds = data_range(config) if config.restore.clip else None
    guide = functools.partial(guidance.guide, operator=operator, sde=sde, weight=weighting, bounds=bounds)
    return lambda score_fn, y: Conditional(guide(score_fn, y=y), None, None)


METHODS: dict[str, Callable[[ConfigDict, SDE, Operator], Restoration]] = {
    "replacement": _build_projection,
    "projection": _build_projection,
    "dps": _build_guidance,
    "pigdm": _build_guidance,
    "mmps": _build_guidance,
}


def build_restoration(config: ConfigDict, sde: SDE, operator: Operator) -> Restoration:
    """Builds f(score_fn, y) -> Conditional, what a sampler takes to draw images behind the measurements y.

    "replacement" and "projection" put the noised measurement into the state after each step (Song et al. 2021,
    Appendix I.2, I.3; Song et al. 2022); "dps", "pigdm" and "mmps" add the gradient of log p_t(y | x) to the score (see
    `guidance`).

    Args:
      config: read here: `restore`, `sampling.method`, `model.num_scales`, `data.centered` (the range of the data).
      sde: forward SDE.
      operator: A, from `build_operator`.

    Raises:
      UserError: if the method is unknown, a number out of range, or the method not defined for the operator, the
        noise or the sampler.
    """
    check(config, "restore")
    return METHODS[config.restore.method](config, sde, operator)


__all__ = [
    "METHODS",
    "OPERATORS",
    "Conditional",
    "Restoration",
    "build_operator",
    "build_restoration",
    "noise_in_range",
]
