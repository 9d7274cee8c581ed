"""Variational bound on -log p(x): a second number beside the ODE's, by the reverse-time SDE instead of the flow.

Song, Durkan, Murray and Ermon 2021 (arXiv 2101.09258), Theorem 3, from a time eps > 0 on; the same as the bound of
Kingma et al. 2021 (VDM, arXiv 2107.00630) in continuous time. With the kernel N(m x, s^2 I) of the forward process,
the prior N(0, p^2 I), sigma = s / m, and x decoded from x(eps) by N(x(eps) / m, sigma(eps)^2 I):

  -log p(x) <= D/2 (1 + log(2 pi sigma(eps)^2)) + KL(N(m(T) x, s(T)^2 I) || N(0, p^2 I))
               + ∫ E_z ||s(t) score(m(t) x + s(t) z, t) + z||^2 d log sigma(t)

The last term is 1/2 ∫ (g^2 / s^2) E_z ||.||^2 dt, since g^2 = m^2 d(sigma^2)/dt for every SDE with such a kernel. The
bound holds for any score. For the exact score of the data it is -E_z log p_eps(m x + s z) - D log m at eps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

import checks
from configs.settings import check
from errors import UserError
from parallel import rng
from sde_lib import SDE, Scalars, ScoreFn, State, expand
from solvers.noise_levels import NoiseLevels, noise_levels, time_of_log_snr

# Times of a stratum that are drawn from: the midpoint rule on them is exact to 1e-6 of the integral, and the times can
# be inverted from log sigma in float64 before anything is compiled.
_TIMES_OF_STRATUM = 64


@struct.dataclass
class BoundResult:
    """Variational bound of each example."""

    nats: Scalars  # upper bound on -log p(x), a density in the network's range
    bpd: Scalars  # upper bound on the bits per dimension of the data, if log_q is that of their noise
    stderr: Scalars  # standard error of `bpd` over the times and noises that were drawn
    nfe: Int[Array, ""]  # evaluations of the score, each for the whole batch


@struct.dataclass
class _Strata:
    """The times that can be drawn, their kernel, and the coefficient of the control variate; float[K, J] each."""

    t: Float[Array, "K J"]
    mean_coeff: Float[Array, "K J"]
    std: Float[Array, "K J"]
    control: Float[Array, "K J"]


# (key, score_fn, x, log_q) -> result
VariationalBound = Callable[[PRNGKeyArray, ScoreFn, State, Scalars], BoundResult]


def _build_strata(sde: SDE, log_sigma: Float[np.ndarray, "2"], num_times: int, white_std: float) -> _Strata:
    """Divide [log sigma(eps), log sigma(T)] into `num_times` equal strata of `_TIMES_OF_STRATUM` times each."""
    shape = (num_times, _TIMES_OF_STRATUM)
    place = (np.arange(math.prod(shape)) + 0.5) / math.prod(shape)
    grid = noise_levels(sde, time_of_log_snr(sde, -(log_sigma[0] + place * (log_sigma[1] - log_sigma[0]))))
    control = (white_std**2 / (white_std**2 + grid.sigma**2)) ** 2
    return _Strata(*(jnp.asarray(a.reshape(shape)) for a in (grid.t, grid.mean_coeff, grid.std, control)))


def _squared_error(key: PRNGKeyArray, score_fn: ScoreFn, x: State, stratum: _Strata) -> Scalars:
    """Return ||s score(m x + s z, t) + z||^2 at one time t of the stratum and one noise z for each example.

    Where the noise is weak against what is white in the data, no score can tell the two apart: the error is about
    (1 - w)^2 ||z||^2 with w the fraction that the noise is of the sum of both. The part of it whose mean is known,
    (1 - w)^2 (||z||^2 - D), is subtracted.
    """
    key_t, key_z = rng.split(key)
    index = rng.randint(key_t, x.shape[0], _TIMES_OF_STRATUM)
    z = rng.normal(key_z, x.shape)
    t, mean_coeff, std, control = (a[index] for a in (stratum.t, stratum.mean_coeff, stratum.std, stratum.control))
    error = expand(std, x) * score_fn(expand(mean_coeff, x) * x + expand(std, x) * z, t) + z
    axes = tuple(range(1, x.ndim))
    return jnp.sum(error**2, axis=axes) - control * (jnp.sum(z**2, axis=axes) - math.prod(x.shape[1:]))


def _variational_bound(
    key: PRNGKeyArray,
    score_fn: ScoreFn,
    x: State,
    log_q: Scalars,
    *,
    strata: _Strata,
    ends: NoiseLevels,
    prior_std: float,
) -> BoundResult:
    """Sum decoder, prior and integral; `ends` are the noise levels at eps and T."""
    num_times, num_dims = strata.t.shape[0], math.prod(x.shape[1:])
    keys = rng.example_keys(key, x.shape[0])
    log_sigma = -ends.log_snr

    def of_stratum(inputs: tuple[Int[Array, ""], _Strata]) -> Scalars:
        return _squared_error(rng.fold_in(keys, inputs[0]), score_fn, x, inputs[1])

    errors = jax.lax.map(of_stratum, (jnp.arange(num_times), strata)) * float(log_sigma[1] - log_sigma[0])
    decoder = 0.5 * num_dims * (1 + math.log(2 * math.pi) + 2 * log_sigma[0])
    ratio = (ends.std[1] / prior_std) ** 2  # of the variances at T
    squares = jnp.sum(x**2, axis=tuple(range(1, x.ndim)))
    divergence = 0.5 * num_dims * (ratio - 1 - math.log(ratio)) + (ends.mean_coeff[1] / prior_std) ** 2 / 2 * squares
    nats = float(decoder) + divergence + jnp.mean(errors, axis=0)
    # Neighbouring strata in pairs ("collapsed strata", Cochran 1977, Section 5A.12): the squared difference of two
    # draws has the sum of their variances for its mean, plus the square of how much the strata's means differ. So the
    # error is on average not too small, and hardly too large, since neighbours of many strata are alike.
    difference = errors[0::2] - errors[1::2]
    in_bits = 1 / (math.log(2) * num_dims)
    return BoundResult(
        nats=nats,
        bpd=(log_q + nats) * in_bits,
        stderr=jnp.sqrt(jnp.sum(difference**2, axis=0)) / num_times * in_bits,
        nfe=jnp.asarray(num_times),
    )


def build_variational_bound(config: ConfigDict, sde: SDE, *, eps: float) -> VariationalBound:
    """Build f(key, score_fn, x, log_q) -> BoundResult, to be run under `jax.jit` or inside `distributed.pmap`.

    The integral is estimated from `likelihood.bound_num_times` evaluations of the score for each example, each at a
    time of its own, one from each of as many strata that are equal in log sigma, the log-SNR with the other sign.

    Args:
      config: read here: `likelihood.bound_num_times`; `data.num_levels` and `data.centered`, on whose bins the variance
        of the estimate depends, but not its mean.
      sde: forward SDE.
      eps: time at which the integral starts.

    Returns:
      f, of `key`, one key or one for each example; `score_fn`, any function; `x`, float[B, ...] in the network's range;
      `log_q`, float[B], log-density in nats of the noise in x (see dequantization.py), 0 for data that are real values.

    Raises:
      UserError: if the number of times is not even and positive, or `eps` not between 0 and T.
    """
    check(config, "likelihood")
    num_times = config.likelihood.bound_num_times
    if num_times == 0:
        raise UserError("likelihood.bound_num_times=0 stands for no bound; set an even number of network evaluations")
    checks.inner_time("eps", eps, sde.T)
    ends = noise_levels(sde, np.array([eps, sde.T]))
    bin_width = (2.0 if config.data.centered else 1.0) / config.data.num_levels
    return functools.partial(
        _variational_bound,
        strata=_build_strata(sde, -ends.log_snr, num_times, white_std=bin_width / math.sqrt(12)),
        ends=ends,
        prior_std=float(sde.prior_std),
    )
