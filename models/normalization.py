"""Normalization of feature maps: by groups, by instances with and without their means, and by label.

All work on float[B, H, W, C] and keep shape and dtype; they compute in float32 or better. `NORMS` has their names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from errors import UserError
from models import cpu, initializers
from models.precision import at_least_float32

NormFactory = Callable[..., nn.Module]  # (name=...) -> module of x, as the networks call it

GROUP_NORM_EPSILON = 1e-6
INSTANCE_NORM_EPSILON = 1e-5
_near_one = initializers.normal_init(1.0, 0.02)  # law of initial scales, as NCSN's
DDPM_GROUPS = 32  # groups of DDPM's group normalization, whatever the channels


def num_groups(channels: int, groups: int | None = None) -> int:
    """Return the groups of a group normalization: `groups`, or NCSN++'s 4 channels each, but at most 32 groups.

    Raises:
      UserError: if there is no group, or the groups do not divide the channels.
    """
    wanted = min(channels // 4, 32) if groups is None else groups
    if wanted == 0 or channels % wanted:
        rule = f"min({channels} // 4, 32) = {wanted}" if groups is None else f"{wanted}"
        multiple = "4 channels, of 32 above 128" if groups is None else f"{wanted} channels"
        raise UserError(
            f"group normalization of {channels} channels: {rule} groups do not divide them; choose model.nf and "
            f"model.ch_mult so that every level has a multiple of {multiple}"
        )
    return wanted


def _widened(normalize: Callable[..., Array]) -> Callable[..., Array]:
    """Make a normalization compute in float32 or better; the result has the dtype of its input again."""

    @functools.wraps(normalize)
    def call(self: nn.Module, x: Array, *labels: Array) -> Array:
        return normalize(self, at_least_float32(x), *labels).astype(x.dtype)

    return call


class GroupNorm(nn.Module):
    """Group normalization (Wu & He 2018) over the pixels and the channels of a group, with scale and bias.

    Statistics are E[x] and E[x²] - E[x]² as in the original networks, the latter not below 0. Sums run over pixels
    first and over the channels of a group second, and the result is one multiplication and one addition a value.
    """

    groups: int | None = None  # number of groups; None for `num_groups`' rule
    epsilon: float = GROUP_NORM_EPSILON  # added to the variance

    @nn.compact
    @_widened
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, _, _, C = x.shape
        groups = num_groups(C, self.groups)
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))

        moments = jnp.stack([x.mean((1, 2)), (x * x).mean((1, 2))])
        mean, mean_square = cpu.keep(moments.reshape(2, B, groups, C // groups).mean(3))
        variance = jnp.maximum(mean_square - mean * mean, 0.0)
        inverse_std = jax.lax.rsqrt(variance + self.epsilon)
        factor = jnp.repeat(inverse_std, C // groups, 1) * scale[None, :]
        offset = bias[None, :] - jnp.repeat(mean, C // groups, 1) * factor
        return x * factor[:, None, None, :] + offset[:, None, None, :]


def _standardize(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Return x with mean 0 and variance 1 over `axes`, and the means that were taken off."""
    mean = x.mean(axes, keepdims=True)
    centered = x - mean
    return centered * jax.lax.rsqrt((centered**2).mean(axes, keepdims=True) + INSTANCE_NORM_EPSILON), mean


def _instance_norm_plus(x: Array) -> tuple[Array, Array]:
    """Return x standardized over each channel's pixels, and the channels' means standardized over the channels."""
    h, means = _standardize(x, (1, 2))
    return h, _standardize(means, (3,))[0]


class InstanceNorm(nn.Module):
    """Instance normalization (Ulyanov et al. 2016): each channel of each image by itself, with scale and bias."""

    @nn.compact
    @_widened
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _standardize(x, (1, 2))[0] * scale[None, None, None, :] + bias[None, None, None, :]


class VarianceNorm(nn.Module):
    """Division of each channel of each image by its standard deviation; the mean stays. With a scale, no bias."""

    @nn.compact
    @_widened
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        scale = self.param("scale", _near_one, x.shape[-1:])
        return x * jax.lax.rsqrt(x.var((1, 2), keepdims=True) + INSTANCE_NORM_EPSILON) * scale[None, None, None, :]


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ (Song & Ermon 2019, Appendix A): gamma (instance norm + alpha × standardized means) + beta."""

    use_bias: bool = True

    @nn.compact
    @_widened
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        alpha = self.param("alpha", _near_one, x.shape[-1:])
        gamma = self.param("gamma", _near_one, x.shape[-1:])
        h, means = _instance_norm_plus(x)
        h = (h + means * alpha[None, None, None, :]) * gamma[None, None, None, :]
        if not self.use_bias:
            return h
        return h + self.param("beta", nn.initializers.zeros, x.shape[-1:])[None, None, None, :]


class ConditionalInstanceNormPlus(nn.Module):
    """InstanceNorm++ whose gamma, alpha and beta belong to one of `num_classes` labels of noise levels."""

    num_classes: int
    use_bias: bool = True

    @nn.compact
    @_widened
    def __call__(self, x: Float[Array, "B H W C"], labels: Array) -> Float[Array, "B H W C"]:
        """Normalize x; `labels` [B] count from 0, and a fraction is dropped."""
        C, num_parts = x.shape[-1], 3 if self.use_bias else 2

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            scales = _near_one(key, (shape[0], 2 * C))
            return jnp.concatenate([scales, jnp.zeros((shape[0], shape[1] - 2 * C))], 1)

        embedding = self.param("embedding", init, (self.num_classes, num_parts * C))
        gamma, alpha, *beta = jnp.split(embedding[labels.astype(jnp.int32)][:, None, None, :], num_parts, -1)
        h, means = _instance_norm_plus(x)
        h = gamma * (h + means * alpha)
        return h + beta[0] if self.use_bias else h


# Every normalization by the name that `model.normalization` gives it.
NORMS: dict[str, NormFactory] = {
    "GroupNorm": functools.partial(GroupNorm, DDPM_GROUPS),
    "InstanceNorm": InstanceNorm,
    "InstanceNorm++": InstanceNormPlus,
    "VarianceNorm": VarianceNorm,
}
