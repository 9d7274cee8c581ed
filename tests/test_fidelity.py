"""PSNR and SSIM against their definitions, written out."""

import numpy as np
import pytest

from metrics.fidelity import psnr, ssim, ssim_window

GENERATOR = np.random.default_rng(0)


def test_psnr_is_that_of_the_definition():
    truth = np.full((4, 6, 3), 0.5)
    assert psnr(truth, truth + 0.1) == pytest.approx(20.0)
    a, b = GENERATOR.random((2, 5, 4, 3)).astype(np.float32)
    assert psnr(a, b) == pytest.approx(-10 * np.log10(np.mean((a.astype(np.float64) - b) ** 2)))
    assert psnr(a, a) == np.inf  # and no warning


def by_definition(a, b, side):
    """Wang et al. 2004, Eq. 13 of each window and channel, with the covariances of a sample; the mean of them."""
    values = []
    for top in range(a.shape[0] - side + 1):
        for left in range(a.shape[1] - side + 1):
            for channel in range(a.shape[2]):
                x, y = (image[top : top + side, left : left + side, channel].ravel() for image in (a, b))
                covariance = np.cov(x, y, ddof=1)
                means = (2 * x.mean() * y.mean() + 0.01**2) / (x.mean() ** 2 + y.mean() ** 2 + 0.01**2)
                values.append(means * (2 * covariance[0, 1] + 0.03**2) / (np.trace(covariance) + 0.03**2))
    return np.mean(values)


@pytest.mark.parametrize(("shape", "side"), [((12, 9, 3), 7), ((8, 8, 1), 7), ((6, 9, 1), 5), ((3, 4, 2), 3)])
def test_ssim_is_that_of_the_definition(shape, side):
    a, b = GENERATOR.random((2, *shape))
    assert ssim_window(*shape[:2]) == side
    assert ssim(a, b) == pytest.approx(by_definition(a, b, side))
    assert ssim(a, a) == pytest.approx(1.0)


def test_images_without_a_window_have_no_ssim():
    assert ssim_window(2, 9) is None
    with pytest.raises(ValueError, match=r"shape \(2, 9, 1\) are too small for SSIM; expected 3 pixels or more"):
        ssim(np.zeros((2, 9, 1)), np.zeros((2, 9, 1)))


def test_images_of_two_shapes_are_not_compared():
    with pytest.raises(ValueError, match=r"truth has shape \(2, 2, 1\), image \(2, 3, 1\); expected the same"):
        psnr(np.zeros((2, 2, 1)), np.zeros((2, 3, 1)))
