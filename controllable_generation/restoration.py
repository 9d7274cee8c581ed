"""Build from `config.restore` a measurement of images, and the method that draws images given a measurement."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from ml_collections import ConfigDict

from configs.settings import check
from controllable_generation import guidance, operators
from controllable_generation.masks import read_mask
from controllable_generation.operators import ImageShape, Operator
from controllable_generation.projection import put_in_each_step
from errors import UserError
from parallel import rng
from sampling import StepTransform, data_range
from sde_lib import SDE, Images, ScoreFn, State
from solvers import ADAPTIVE


class Conditional(NamedTuple):
    """Arguments of a sampler that draws images given measurements."""

    score_fn: ScoreFn
    transform: StepTransform | None
    initial_state: Callable[[PRNGKeyArray], Images] | None  # at t = T; None: the prior


# (score_fn, y) -> the score conditioned on measurements, one for each image of a batch
Restoration = Callable[[ScoreFn, State], Conditional]


def _colorize(image_shape: ImageShape) -> Operator:
    if image_shape[2] < 2:
        raise UserError(f"restore.operator='colorize': images have {image_shape[2]} channel and are grey already")
    return operators.grayscale(image_shape)


def _super_resolution(image_shape: ImageShape, factor: int, downsampling: str) -> Operator:
    if any(size % factor for size in image_shape[:2]):
        raise UserError(
            f"restore.factor={factor}: expected a divisor of both {image_shape[0]} and "
            f"{image_shape[1]}, the height and width of the images"
        )
    return operators.super_resolution(image_shape, factor, downsampling)


def _fourier(image_shape: ImageShape, center: float, share: float, seed: int) -> Operator:
    """Measure whole lines of frequencies: the lowest, and others at random; `center` and `share` of all lines."""
    H, W, _ = image_shape
    num_lines = max(round(share * W), 1)
    num_center = min(max(round(center * W), 1), num_lines)
    nearest = np.argsort(np.abs(np.fft.fftfreq(W)), kind="stable")
    others = np.random.Generator(np.random.Philox(seed)).permutation(nearest[num_center:])
    sampled = np.zeros((H, W))
    sampled[:, nearest[:num_center]] = 1
    sampled[:, others[: num_lines - num_center]] = 1
    return operators.fourier(image_shape, sampled)


# Kinds of measurement by the name that `restore.operator` gives them: (settings, image shape, seed) -> Operator.
OPERATORS: dict[str, Callable[[ConfigDict, ImageShape, int], Operator]] = {
    "inpaint": lambda settings, shape, seed: operators.inpainting(read_mask(settings.mask, shape, seed)),
    "colorize": lambda settings, shape, seed: _colorize(shape),
    "super_resolution": lambda settings, shape, seed: _super_resolution(shape, settings.factor, settings.downsampling),
    "gaussian_blur": lambda settings, shape, seed: operators.gaussian_blur(shape, settings.blur_std),
    "motion_blur": lambda settings, shape, seed: operators.motion_blur(
        shape, settings.blur_length, settings.blur_angle
    ),
    "fourier": lambda settings, shape, seed: _fourier(shape, settings.fourier_center, settings.fourier_share, seed),
}


def _load_operator(setting: str, image_shape: ImageShape) -> Operator:
    """Call the function that "FILE.py:FUNCTION" names with the shape of the images."""
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
    """Build the measurement that `config.restore` describes, for images of shape (H, W, C).

    Raises:
      UserError: if a setting is unknown, out of range, or does not fit the images, or a file that it names is missing.
    """
    check(config, "restore")
    name = config.restore.operator
    if ".py:" in name:
        return _load_operator(name, image_shape)
    return OPERATORS[name](config.restore, image_shape, config.seed)


def noise_in_range(noise: float, *, centered: bool) -> float:
    """Return the standard deviation of the measurement's noise in the network's range, [-1, 1] or [0, 1]."""
    return float(noise) * (2.0 if centered else 1.0)


def _build_projection(config: ConfigDict, sde: SDE, operator: Operator) -> Restoration:
    settings, method = config.restore, config.sampling.method
    noise = noise_in_range(settings.noise, centered=config.data.centered)
    if method in ADAPTIVE:
        raise UserError(
            f"restore.method={settings.method!r} changes the steps of a sampler, and sampling.method={method!r} has "
            "none of its own; use 'pc' or a solver of fixed steps, or restore.method='pigdm'"
        )
    if settings.method == "projection" and settings.scale > 1:
        raise UserError(f"restore.scale={settings.scale}: a projection goes at most the whole way, 1")
    is_exact = not settings.noise and settings.scale == 1 and operator.is_orthogonal
    if settings.method == "replacement" and not is_exact:
        raise UserError(
            "restore.method='replacement' puts exact values in the place of others: it needs restore.noise=0, "
            f"restore.scale=1 and an operator that keeps white noise white, not noise={settings.noise}, "
            f"scale={settings.scale}, {settings.operator!r}; use 'projection', or a guidance such as 'pigdm'"
        )

    def restore(score_fn: ScoreFn, y: State) -> Conditional:
        transform = put_in_each_step(operator, y, sde, noise=noise, strength=float(settings.scale))

        def initial_state(key: PRNGKeyArray) -> Images:
            key_known, key_prior = rng.split(rng.example_keys(key, len(y)))
            x = sde.prior_sampling(key_prior, (len(y), *operator.image_shape))
            return transform(key_known, x, x, jnp.full(len(y), sde.T))[0]

        return Conditional(score_fn, transform, initial_state)

    return restore


def _build_guidance(config: ConfigDict, sde: SDE, operator: Operator) -> Restoration:
    settings, scale, centered = config.restore, config.restore.scale, config.data.centered
    noise = noise_in_range(settings.noise, centered=centered)
    if settings.method == "dps":
        weight = guidance.dps_weighting(sde, scale=scale, num_steps=config.model.num_scales)
    elif settings.method == "pigdm":
        data_std = float(settings.data_std)
        weight = guidance.pigdm_weighting(operator, sde, noise=noise, scale=scale, data_std=data_std)
    else:
        weight = guidance.mmps_weighting(operator, sde, noise=noise, scale=scale, num_steps=settings.cg_steps)
    bounds = data_range(centered=centered) if settings.clip else None
    return lambda score_fn, y: Conditional(
        guidance.guide(score_fn, operator, y, sde, weight, bounds=bounds), None, None
    )


METHODS: dict[str, Callable[[ConfigDict, SDE, Operator], Restoration]] = {
    "replacement": _build_projection,
    "projection": _build_projection,
    "dps": _build_guidance,
    "pigdm": _build_guidance,
    "mmps": _build_guidance,
}


def build_restoration(config: ConfigDict, sde: SDE, operator: Operator) -> Restoration:
    """Build f(score_fn, y) -> Conditional: arguments of a sampler that draws images given measurements y.

    "replacement" and "projection" put the noised measurement into the state after each step (Song et al. 2021,
    Appendix I.2, I.3; Song et al. 2022); "dps", "pigdm" and "mmps" add the gradient of log p_t(y | x) to the score (see
    `guidance`).

    Raises:
      UserError: if a setting is wrong, or the method is not defined for the operator, the noise or the sampler.
    """
    check(config, "restore")
    return METHODS[config.restore.method](config, sde, operator)
