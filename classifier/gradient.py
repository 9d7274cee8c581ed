"""Samples of a class: guidance by a classifier of noisy images (Song et al. 2021, Appendix I.1)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from sde_lib import SDE, ScoreFn, expand


def condition_on_class(
    score_fn: ScoreFn,
    classifier_grad_fn: Callable[[Array, Array, Array], Array],
    sde: SDE,
    labels: Int[Array, "B"],
    *,
    scale: float = 1.0,
) -> ScoreFn:
    """Returns the score of p_t(x | label) = the score of p_t(x) + grad log p_t(label | x) (Song et al. 2021, Eq. 14).

    The classifier knows images plus noise. Under an SDE whose mean shrinks by m(t), x / m is such an image, with noise
    of std / m; the 2021 code gave it x and std, which is the same for VE only.

    Args:
      score_fn: unconditional score.
      classifier_grad_fn: (x, sigma, labels) -> grad_x log p(label | x), x in the network's range with noise of sigma.
      sde: forward SDE.
      labels: class of each example.
      scale: factor on the classifier's gradient; 1 is Bayes' rule.
    """

    def conditional(x: Float[Array, "B ..."], t: Float[Array, "B"]) -> Float[Array, "B ..."]:
        m = sde.mean_coeff(t)
        gradient = classifier_grad_fn(x / expand(m, x), sde.std(t) / m, labels) / expand(m, x)
        return score_fn(x, t) + scale * gradient

    return conditional
