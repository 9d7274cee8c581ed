"""Conditional samples of an unconditional network: inverse problems and classes (Song et al. 2021, Section 5).

What is known enters as a transform of a sampling step (`sampling.StepTransform`) or as a change of the score; the
sampling loop is that of `sampling` and `solvers`. The 2021 code had three near-copies of the loop instead, two of which
returned the noisy state of the unknown part where they meant the denoised one.
"""

from controllable_generation.operators import Operator, from_functions
from controllable_generation.restoration import Conditional, Restoration, build_operator, build_restoration

__all__ = [
    "Conditional",
    "Operator",
    "Restoration",
    "build_operator",
    "build_restoration",
    "from_functions",
]
