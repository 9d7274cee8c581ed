"""Known pixels and known grey values: the replacement of Song et al. 2021, Appendix I.2 and I.3."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

import rng
from sampling import StepResult, StepTransform
from sde_lib import SDE, expand

# Columns: the grey value, times sqrt(3), and two directions of colour orthogonal to it and to each other.
GRAY_ROTATION = np.array([[1, -2, 0], [1, 1, 1], [1, 1, -1]]) / np.sqrt([3, 6, 2])


@dataclass(frozen=True)
class Known:
    """What is known of the images: some of their values in an orthonormal basis of each pixel's channels.

    Attributes:
      images: in the network's range, float[B, H, W, C]; only what the mask marks is looked at.
      mask: 1 where a value is known and 0 where it is not, in the basis; broadcasts against the images.
      rotation: orthonormal basis, a column for each vector, [C, C]; None for the channels themselves.
    """

    images: Float[Array, "B H W C"]
    mask: Float[Array, "..."]
    rotation: np.ndarray | None = None

    def combine(self, x: Float[Array, "B H W C"], values: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Puts `values`, given in the basis, in the place of the known values of x."""
        return self._rotate(self._rotate(x) * (1 - self.mask) + values * self.mask, back=True)

    def initial_state(self, key: PRNGKeyArray, sde: SDE) -> Float[Array, "B H W C"]:
        """Draws the state at t = T: noised images where values are known, the prior elsewhere."""
        num_images = self.images.shape[0]
        key_known, key_prior = rng.split(rng.example_keys(key, num_images))
        values, _ = self.values(key_known, jnp.full(num_images, sde.T), sde)
        return self.combine(sde.prior_sampling(key_prior, self.images.shape), values)

    def replace(self, sde: SDE) -> StepTransform:
        """Returns the step transform that puts the known values, noised to the step's time, in their place.

        Song et al. 2021, Appendix I.2 (imputation) and I.3 (colorization). In the step's mean the known values take
        their mean and the unknown values keep theirs, so that removing the last step's noise denoises both.
        """

        def transform(
            key: PRNGKeyArray, x: Float[Array, "B H W C"], x_mean: Float[Array, "B H W C"], t: Float[Array, "B"]
        ) -> StepResult:
            values, mean = self.values(key, t, sde)
            return self.combine(x, values), self.combine(x_mean, mean)

        return transform

    def values(self, key: PRNGKeyArray, t: Float[Array, "B"], sde: SDE) -> StepResult:
        """Returns the images in the basis, noised to time t, and their mean then."""
        mean, std = sde.marginal_prob(self._rotate(self.images), t)
        return mean + expand(std, mean) * rng.normal(key, mean.shape), mean

    def _rotate(self, x: Float[Array, "B H W C"], back: bool = False) -> Float[Array, "B H W C"]:
        """Changes to the basis, or back again: it is orthonormal, so its transpose undoes it."""
        if self.rotation is None:
            return x
        matrix = jnp.asarray(self.rotation.T if back else self.rotation, jnp.float32)
        return jnp.einsum("bhwi,ij->bhwj", x, matrix, precision="highest")


def known_pixels(images: Float[Array, "B H W C"], mask: Num[np.ndarray, "..."]) -> Known:
    """Says which pixels are known, for in-painting.

    Args:
      images: in the network's range.
      mask: 1 where a pixel is known and 0 where it is to be drawn.

    Raises:
      ValueError: if the mask does not fit the images, or has other values.
    """
    mask = np.asarray(mask)
    try:
        np.broadcast_shapes(mask.shape, images.shape)
    except ValueError as error:
        raise ValueError(
            f"mask has shape {mask.shape}, images have {images.shape}; give it [H, W, 1] or [B, H, W, C]"
        ) from error
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("mask has values besides 0 (unknown) and 1 (known); round it first")
    return Known(images, jnp.asarray(np.broadcast_to(mask, images.shape), jnp.float32))


def known_gray(images: Float[Array, "B H W 3"]) -> Known:
    """Says that the grey values of images are known, for colorization.

    Args:
      images: RGB, in the network's range; only the mean of the three channels is looked at.

    Raises:
      ValueError: if they have another number of channels than 3.
    """
    if images.shape[-1] != 3:
        raise ValueError(f"images have {images.shape[-1]} channels; colorization needs 3 (repeat a grey channel)")
    mask = jnp.zeros(images.shape).at[..., 0].set(1.0)
    return Known(images, mask, GRAY_ROTATION)
