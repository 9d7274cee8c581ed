"""Latent codes through the probability-flow ODE: encoding, decoding, and ways to change a code before it is decoded.

Song et al. 2021 (arXiv 2011.13456): "Manipulating latent representations" of Section 4.3, Appendix D.4 and Figure 6.
Encoding and decoding are functions of JAX; codes are changed on the host, in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from configs.settings import check
from errors import UserError
from sde_lib import SDE, ScoreFn, State
from solvers.adaptive import integrate_flow

# Norm of the sum of two unit vectors below which they are opposite: half-way the direction is rounding error alone.
_OPPOSITE = 1e-6


@dataclasses.dataclass(frozen=True)
class Codec:
    """The probability-flow ODE (Eq. 13) as an invertible map between images at t = eps and latents at t = T.

    Attributes:
      sde: forward SDE.
      eps: time of the images: a clean image is taken for the state at eps, and decoding ends there.
      rtol: relative tolerance of a step.
      atol: absolute tolerance of a step, in units of the network's range.
    """

    sde: SDE
    eps: float
    rtol: float
    atol: float

    def encode(self, score_fn: ScoreFn, x: State) -> tuple[State, Int[Array, ""]]:
        """Integrate images in the network's range from eps to T, each with its own steps.

        Returns:
          Latents, of the prior's scale, NaN where the integration failed (see `ode.require_solved`); and the number of
          evaluations of the score, each for the whole batch.
        """
        return self._integrate(score_fn, x, t0=self.eps, t1=self.sde.T)

    def decode(self, score_fn: ScoreFn, latents: State) -> tuple[State, Int[Array, ""]]:
        """Integrate from T to eps: the inverse of `encode`, to the solver's tolerance; arguments and result alike."""
        return self._integrate(score_fn, latents, t0=self.sde.T, t1=self.eps)

    def _integrate(self, score_fn: ScoreFn, x: State, *, t0: float, t1: float) -> tuple[State, Int[Array, ""]]:
        solution = integrate_flow(score_fn, x, sde=self.sde, t0=t0, t1=t1, rtol=self.rtol, atol=self.atol)
        return solution.y, solution.nfe


def build_codec(config: ConfigDict, sde: SDE) -> Codec:
    """Build the map between images and latents, whose images lie where sampling stops, at `sde.sampling_eps`.

    Args:
      config: read here: `sampling.rtol`, `sampling.atol`.
      sde: forward SDE.

    Raises:
      UserError: if a tolerance is not positive.
    """
    check(config, "sampling")
    return Codec(sde, sde.sampling_eps, config.sampling.rtol, config.sampling.atol)


# --- changing latents ------------------------------------------------------------------------------------------------


def _rows(latents: np.ndarray) -> Float[np.ndarray, "B F"]:
    return np.asarray(latents, np.float64).reshape(len(latents), math.prod(np.shape(latents)[1:]))


def _check_directions(norms: Float[np.ndarray, "2 B"], sums: Float[np.ndarray, "B"]) -> None:
    """Refuse pairs that no shortest arc joins: `norms` of both latents, `sums` the norm of the sum of directions."""
    for pair, total in enumerate(sums):
        if not (np.isfinite(norms[:, pair]) & (norms[:, pair] > 0)).all():
            raise UserError(f"latents of pair {pair} have norms {norms[:, pair]}; expected finite ones above 0")
        if total < _OPPOSITE:
            raise UserError(
                f"latents of pair {pair} are opposite, and no arc between them is the shortest; leave the pair out, or "
                "go by way of a third"
            )


def slerp(
    first: Float[np.ndarray, "B ..."], second: Float[np.ndarray, "B ..."], weights: Sequence[float] | np.ndarray
) -> Float[np.ndarray, "B S ..."]:
    """Interpolate between two latents along the shortest arc, the norm growing linearly.

    With directions u = z / |z| of the flattened latents and the angle w between them, at weight a:

        ((1 - a) |z0| + a |z1|) (sin((1 - a) w) u0 + sin(a w) u1) / sin(w)

    which is the spherical interpolation of Shoemake (1985) where the norms are equal, and linear interpolation in the
    limit of parallel latents. Latents of the prior have nearly one norm, its std times sqrt(D), and so has the result;
    the norm of a linear interpolation would dip to 0.7 of it half-way. At 0 and 1 it is the very latent.

    Args:
      first: latents z0.
      second: latents z1, of the same shape.
      weights: a, from 0 for z0 to 1 for z1.

    Returns:
      float32, S latents for each pair.

    Raises:
      UserError: if the shapes differ, a latent is zero or not finite, or the two of a pair are opposite.
    """
    if np.shape(first) != np.shape(second):
        raise UserError(f"latents have shapes {np.shape(first)} and {np.shape(second)}; expected the same")
    a = np.asarray(weights, np.float64)[None, :, None]
    z = np.stack([_rows(first), _rows(second)])
    norms = np.linalg.norm(z, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):  # refused in the next lines
        u = z / norms[:, :, None]
    sums = np.linalg.norm(u[0] + u[1], axis=1)
    _check_directions(norms, sums)
    # Well conditioned at every angle, unlike the arc cosine; and a sinc(a w) / sinc(w) is also right at w = 0.
    angle = 2 * np.arctan2(np.linalg.norm(u[0] - u[1], axis=1), sums)[:, None, None] / np.pi
    n0, n1 = norms[:, :, None, None]
    norm = (1 - a) * n0 + a * n1
    share0, share1 = (b * np.sinc(b * angle) / np.sinc(angle) for b in (1 - a, a))
    arc = norm / n0 * share0 * z[0][:, None] + norm / n1 * share1 * z[1][:, None]
    return arc.astype(np.float32).reshape(len(arc), a.size, *np.shape(first)[1:])


def scale_temperature(
    latents: Float[np.ndarray, "B ..."], temperatures: Sequence[float] | np.ndarray
) -> Float[np.ndarray, "B S ..."]:
    """Scale latents about the prior's mean, which is 0: below 1, the paper's "reducing norm of embedding" (Figure 6).

    Returns:
      float32, S latents for each of the B.

    Raises:
      UserError: if a factor is negative or not finite.
    """
    factors = np.asarray(temperatures, np.float64)
    if not (np.isfinite(factors) & (factors >= 0)).all():
        raise UserError(f"temperatures={list(temperatures)}: expected factors of 0 or more")
    latents = np.asarray(latents, np.float64)
    return (factors.reshape(1, -1, *[1] * (latents.ndim - 1)) * latents[:, None]).astype(np.float32)


# --- latents and the prior -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A statistic of latents beside what it would be if they were draws of the prior.

    Attributes:
      value: of the latents, in units of the prior's standard deviation.
      expected: of draws of the prior.
      stderr: standard deviation of the statistic over such draws.
    """

    value: float
    expected: float
    stderr: float


def compare_with_prior(latents: Float[np.ndarray, "N ..."], prior_std: float) -> dict[str, Comparison]:
    """Compare latents with the prior N(0, prior_std^2 I), the data's own law at T if the score is right.

    Args:
      latents: one for each image.
      prior_std: `SDE.prior_std`.

    Returns:
      "mean" and "std" of all the values; "dimension_means" and, of two images or more, "dimension_stds": root mean
      square over the dimensions of the mean and of the standard deviation that a dimension has over the images. The
      standard errors are those of the prior's draws, to first order in one over the number of values.
    """
    u = _rows(latents) / prior_std
    N, D = u.shape
    comparisons = {
        "mean": Comparison(float(u.mean()), 0.0, 1 / math.sqrt(N * D)),
        "std": Comparison(float(u.std()), 1.0, 1 / math.sqrt(2 * N * D)),
        "dimension_means": Comparison(_rms(u.mean(axis=0)), 1 / math.sqrt(N), 1 / math.sqrt(2 * N * D)),
    }
    if N > 1:
        of_dimensions = _rms(u.std(axis=0, ddof=1))
        comparisons["dimension_stds"] = Comparison(of_dimensions, 1.0, 1 / math.sqrt(2 * (N - 1) * D))
    return comparisons


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
