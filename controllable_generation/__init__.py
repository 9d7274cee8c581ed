"""Conditional samples of an unconditional network: inverse problems and classes (Song et al. 2021, Section 5).

What is known enters as a transform of a sampling step (`sampling.StepTransform`) or as a change of the score; the
sampling loop is that of `sampling` and `solvers`. The 2021 code had three near-copies of the loop instead, two of which
returned the noisy state of the unknown part where they meant the denoised one.
"""

from controllable_generation.classes import condition_on_class
from controllable_generation.known import GRAY_ROTATION, Known, known_gray, known_pixels

__all__ = ["GRAY_ROTATION", "Known", "condition_on_class", "known_gray", "known_pixels"]
