"""Similarity of a restored image to the true one: PSNR and SSIM, by scikit-image. Images are in [0, 1]."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from errors import UserError

SSIM_WINDOW = 7  # pixels: side of the uniform window in which SSIM compares two images
SMALLEST_WINDOW = 3  # of one pixel there is no covariance


def psnr(truth: Float[np.ndarray, "H W C"], image: Float[np.ndarray, "H W C"]) -> float:
    """Return the peak signal-to-noise ratio -10 log10(mean squared error), in dB; infinite for equal images."""
    from skimage.metrics import peak_signal_noise_ratio  # lazily: half a second

    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(*_as_float64(truth, image), data_range=1.0))


def ssim_window(height: int, width: int) -> int | None:
    """Return the side of SSIM's window: 7 pixels, or the largest odd number that fits; None if that is 1."""
    side = min(height, width, SSIM_WINDOW)
    side -= 1 - side % 2
    return side if side >= SMALLEST_WINDOW else None


def ssim(truth: Float[np.ndarray, "H W C"], image: Float[np.ndarray, "H W C"]) -> float:
    """Return the structural similarity index (Wang et al. 2004), at most 1, averaged over pixels and channels.

    In a uniform window (`ssim_window`), where it fits whole, with K1 = 0.01, K2 = 0.03 and sample covariances:
    scikit-image's defaults. (Wang et al. use a Gaussian window of 11 pixels.)
    """
    from skimage.metrics import structural_similarity  # lazily: half a second

    window = ssim_window(*truth.shape[:2])
    if window is None:
        raise UserError(
            f"images of shape {truth.shape} are too small for SSIM; expected {SMALLEST_WINDOW} pixels or more"
        )
    truth, image = _as_float64(truth, image)
    return float(structural_similarity(truth, image, win_size=window, data_range=1.0, channel_axis=-1))


def _as_float64(truth: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check that the shapes are equal and convert: scikit-image would compute in float32 from float32."""
    if truth.shape != image.shape:
        raise UserError(f"truth has shape {truth.shape}, image {image.shape}; expected the same [H, W, C]")
    return truth.astype(np.float64), image.astype(np.float64)
