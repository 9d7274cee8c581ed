"""Dequantization: real values drawn for the levels of an image, and the density of the noise that made them.

A model of real values gives level v the probability P(v) = ∫ p(x) dx over the bin of v. With noise of density q(x | v)
that stays in the bin, P(v) >= exp E_q[log p(x) - log q(x | v)]: (log q - log p) / (D ln 2) is, on average, an upper
bound on the bits/dim of the levels (Theis, van den Oord and Bethge 2016; Ho et al. 2019, Flow++).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from configs.settings import check
from datasets import Scaler
from parallel import rng
from sde_lib import SDE, Images, Scalars
from solvers.noise_levels import noise_levels

# (key, levels) -> (x in the network's range, log-density of the noise in nats and in the network's units)
Dequantize = Callable[[PRNGKeyArray, UInt8[Array, "B H W C"]], tuple[Images, Scalars]]

_BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1


def _build_uniform(scaler: Scaler, noise_std: float) -> Dequantize:
    """Uniform on [v, v + 1) / num_levels, whether or not the network was trained so (Song et al. 2021; all SDEs)."""
    intervals = dataclasses.replace(scaler, dequantize=True)

    def dequantize(key: PRNGKeyArray, levels: UInt8[Array, "B H W C"]) -> tuple[Images, Scalars]:
        return intervals.to_network(key, levels), _log_uniform(levels, intervals.bin_width)

    return dequantize


def _build_truncated_normal(scaler: Scaler, noise_std: float) -> Dequantize:
    """Normal around the middle of the bin, of the std that the process has where the ODE starts, cut off at the bin.

    Zheng, Lu, Chen and Zhu 2023 (arXiv 2305.03935), "training-free truncated-normal dequantization": for a network
    trained on levels without noise, which at the ODE's starting time knows them with noise of this law.
    """
    half_bins = scaler.bin_width / 2 / noise_std  # half a bin in standard deviations
    inside = math.erf(half_bins / math.sqrt(2))  # probability of a normal draw to stay in the bin
    log_peak = -math.log(inside * noise_std * math.sqrt(2 * math.pi))

    def dequantize(key: PRNGKeyArray, levels: UInt8[Array, "B H W C"]) -> tuple[Images, Scalars]:
        u = rng.uniform(key, levels.shape, -1.0, 1.0)
        # The inverse of the distribution function, as an odd function of u: float32 is as good for a bin far narrower
        # than the normal as for a wide one. It is infinite at -1, which a uniform draw takes once in 2^24.
        z = math.sqrt(2) * jax.lax.erf_inv(jnp.clip(inside * u, -_BELOW_ONE, _BELOW_ONE))
        z = jnp.clip(z, -half_bins, half_bins)  # where rounding would leave the bin
        x = scaler.middle(levels) + noise_std * z
        return x, jnp.sum(log_peak - z**2 / 2, axis=(1, 2, 3))

    return dequantize


def _build_none(scaler: Scaler, noise_std: float) -> Dequantize:
    """The middle of the bin, without noise; by convention the log-density is that of uniform noise in the bin."""
    return lambda key, levels: (scaler.middle(levels), _log_uniform(levels, scaler.bin_width))


def _log_uniform(levels: UInt8[Array, "B H W C"], bin_width: float) -> Scalars:
    return jnp.full(levels.shape[0], -math.prod(levels.shape[1:]) * math.log(bin_width))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to dequantize.

    Attributes:
      build: makes it of the scaling of the data and the std of the noise, in the network's range.
      is_bound: bits/dim are then, on average, an upper bound on those of the levels.
    """

    build: Callable[[Scaler, float], Dequantize]
    is_bound: bool


PROTOCOLS = {
    "none": Protocol(_build_none, is_bound=False),
    "truncated_normal": Protocol(_build_truncated_normal, is_bound=True),
    "uniform": Protocol(_build_uniform, is_bound=True),
}


def build_dequantization(config: ConfigDict, scaler: Scaler, sde: SDE, *, eps: float) -> Dequantize:
    """Build the protocol that `likelihood.dequantization` names.

    Args:
      config: read here: `likelihood.dequantization`.
      scaler: of the data that the network was trained on; its bins are those of "truncated_normal" and "none".
      sde: forward SDE; "truncated_normal" has the std of its noise at `eps`, relative to the data.
      eps: time at which the likelihood starts.

    Returns:
      f(key, levels uint8[B, H, W, C]) -> (x float[B, H, W, C] in the network's range, log q float[B]): `key` is one key
      or one for each example; log q is the log-density in nats of the noise that was drawn, in the units of x.

    Raises:
      UserError: if the name is unknown.
    """
    name = config.likelihood.dequantization
    check(config, "likelihood")
    return PROTOCOLS[name].build(scaler, float(noise_levels(sde, np.array([eps])).sigma[0]))
