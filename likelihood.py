"""Log-likelihood, bits/dim and latent codes through the probability-flow ODE (Song et al. 2021, Section 4.3)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

import checks
from configs.settings import check
from parallel import rng
from sde_lib import SDE, Scalars, ScoreFn, State
from solvers import ode

# Time at which the integration starts: earlier than sampling stops, since with VP at t = 1e-3 the noise is as wide as
# a grey level of 256; the value the published bits/dim were computed with.
LIKELIHOOD_EPS = 1e-5

# Basis vectors whose vector-Jacobian products are held in memory at once by the exact trace.
_EXACT_CHUNK = 64

DrawProbes = Callable[[PRNGKeyArray, tuple[int, ...]], Float[Array, "B K ..."]]
VJP = Callable[[State], tuple[State]]


@struct.dataclass
class LikelihoodResult:
    """Likelihood of each example; NaN where the integration failed (see `ode.require_solved`)."""

    nats: Scalars  # log p(x), a density in the network's range
    bpd: Scalars  # bits per dimension of the data with `data.num_levels` levels
    stderr: Scalars  # standard error of `bpd` over the probes; 0 if exact, NaN for a single probe
    latent: State  # state at t = T
    nfe: Int[Array, ""]  # evaluations of the score, each for the whole batch


# (key, score_fn, x, log_q or None) -> result, see `build_likelihood`
Likelihood = Callable[..., LikelihoodResult]


def _probed_trace(vjp: VJP, probes: Float[Array, "B K ..."]) -> Float[Array, "B K"]:
    """Return e^T J e for each probe e (Skilling-Hutchinson)."""
    estimate = lambda e: jnp.sum(e * vjp(e)[0], axis=tuple(range(1, e.ndim)))  # noqa: E731
    if probes.shape[1] == 1:  # without vmap, whose axis of one would lead through the whole network
        return estimate(probes[:, 0])[:, None]
    return jax.vmap(estimate, in_axes=1, out_axes=1)(probes)


def _exact_trace(vjp: VJP, shape: tuple[int, ...]) -> Float[Array, "B 1"]:
    """Return the trace of J from its products with all the D basis vectors."""
    num_dims = math.prod(shape[1:])

    def diagonal_element(i: Int[Array, ""]) -> Scalars:
        e = jax.nn.one_hot(i, num_dims).reshape(1, *shape[1:])
        return jnp.sum(e * vjp(jnp.broadcast_to(e, shape))[0], axis=tuple(range(1, len(shape))))

    return jnp.sum(jax.lax.map(diagonal_element, jnp.arange(num_dims), batch_size=_EXACT_CHUNK), axis=0)[:, None]


def _log_likelihood(
    key: PRNGKeyArray,
    score_fn: ScoreFn,
    x: State,
    log_q: Scalars | None = None,
    *,
    sde: SDE,
    draw_probes: DrawProbes | None,
    num_probes: int,
    offset: float,
    eps: float,
    rtol: float,
    atol: float,
    max_steps: int,
) -> LikelihoodResult:
    """Integrate (x, ∫ div f) from eps to T; `draw_probes` None stands for the exact trace."""
    B, num_dims = x.shape[0], math.prod(x.shape[1:])
    probes = draw_probes(key, (B, num_probes, *x.shape[1:])) if draw_probes else None
    flow = sde.reverse(score_fn, probability_flow=True)

    def dynamics(t: Scalars, y: Float[Array, "B F"]) -> Float[Array, "B F"]:
        drift, vjp = jax.vjp(lambda x: flow.sde(x, t)[0], y[:, :num_dims].reshape(x.shape))
        divergence = _exact_trace(vjp, x.shape) if probes is None else _probed_trace(vjp, probes)
        return jnp.concatenate([drift.reshape(B, num_dims), divergence], axis=1)

    start = jnp.concatenate([x.reshape(B, num_dims), jnp.zeros((B, num_probes))], axis=1)
    solution = ode.integrate(dynamics, start, t0=eps, t1=sde.T, rtol=rtol, atol=atol, max_steps=max_steps)
    latent = solution.y[:, :num_dims].reshape(x.shape)
    nats = sde.prior_logp(latent)[:, None] + solution.y[:, num_dims:]
    in_bits = 1 / (math.log(2) * num_dims)
    bpd = (offset if log_q is None else log_q[:, None] * in_bits) - nats * in_bits
    spread = jnp.std(bpd, axis=1) / math.sqrt(num_probes - 1) if num_probes > 1 else jnp.full(B, jnp.nan)
    return LikelihoodResult(
        nats=jnp.mean(nats, axis=1),
        bpd=jnp.mean(bpd, axis=1),
        stderr=jnp.zeros(B) if probes is None else spread,
        latent=latent,
        nfe=solution.nfe,
    )


TRACES: dict[str, DrawProbes | None] = {"exact": None, "gaussian": rng.normal, "rademacher": rng.rademacher}


def build_likelihood(
    config: ConfigDict, sde: SDE, *, eps: float = LIKELIHOOD_EPS, max_steps: int = ode.MAX_STEPS
) -> Likelihood:
    """Build f(key, score_fn, x) -> LikelihoodResult, to be run under `jax.jit` or inside `distributed.pmap`.

    log p(x) = log p_T(x(T)) + ∫ div f dt along the probability-flow ODE dx = f dt (Eq. 13 and Appendix D.2), in one
    adaptive integration from `eps` to T in which each example takes its own steps. Drift and divergence come from one
    evaluation of the score and `likelihood.num_probes` vector-Jacobian products of it. bpd = -log2 p(x) / D +
    log2(num_levels) + log2 |dy/dx|, y being the data in [0, 1] and x = 2 y - 1 if `data.centered`, so that x must be
    data to which uniform noise as wide as one level was added, or the number is no bound. With `log_q`, the log-density
    of other noise in nats and in the units of x, bpd = (log_q - log p(x)) / (D ln 2) (see dequantization.py).

    Args:
      config: read here: `likelihood`, `data.num_levels`, `data.centered`.
      sde: forward SDE.
      eps: time at which the integration starts.
      max_steps: attempted steps after which an example is given up.

    Raises:
      UserError: if the trace's name is unknown or a number out of range.
    """
    settings = config.likelihood
    check(config, "likelihood")
    checks.inner_time("eps", eps, sde.T)
    draw_probes = TRACES[settings.trace]
    return functools.partial(
        _log_likelihood,
        sde=sde,
        draw_probes=draw_probes,
        num_probes=settings.num_probes if draw_probes else 1,
        offset=math.log2(config.data.num_levels) - (1.0 if config.data.centered else 0.0),
        eps=eps,
        rtol=settings.rtol,
        atol=settings.atol,
        max_steps=max_steps,
    )
