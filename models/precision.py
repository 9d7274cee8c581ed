"""Features in bfloat16: how the networks compute in it, and what stays float32.

A network rounds its images to the dtype of its features where they enter the first layer. From there on every layer
works in the dtype of its input and rounds its parameters, which are float32, where it uses them; so a dtype is named
once, and not to each layer. Float32 stay, whatever the features: the parameters, and so the optimizer's state and the
average; the embedding of the noise level and of classes, up to where it is added to the features; the statistics of
normalizations; the softmax of attention; filters' sums; and the images that a network puts out, and so the losses.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

# Of the features, by the name that `model.dtype` gives it; None: that of the images, which are float32.
DTYPES: dict[str, jnp.dtype | None] = {"float32": None, "bfloat16": jnp.dtype(jnp.bfloat16)}


def at_least_float32(x: Array) -> Array:
    """Return x in float32, or as it is if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def add_to_channels(x: Float[Array, "B *S C"], shift: Float[Array, "*B C"]) -> Float[Array, "B *S C"]:
    """Add a number to each channel; the result has the dtype of x.

    The sum is taken in the wider of the two dtypes: then the gradient of a float32 shift, a sum over all pixels, is one
    of float32 numbers.

    Args:
      x: features.
      shift: one for all examples, or for each its own.
    """
    shape = (*shift.shape[:-1], *(1,) * (x.ndim - shift.ndim), x.shape[-1])
    return (x + shift.reshape(shape)).astype(x.dtype)
