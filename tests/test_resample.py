"""Resampling against the arrays of the 2021 code, zero insertion written out in numpy, and its adjoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GOLDEN

from models import resample
from models.convolution import convolve
from models.window import Window

TOLERANCE = 2e-6  # of outputs of size 1 to 10, sums of up to 100 float32 products
KERNELS = {"k1331": (1, 3, 3, 1), "k1234": (1, 2, 3, 4), "kNone": (1, 1)}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "layers_resample.npz") as file:
        return dict(file)


def _close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("name", KERNELS)
def test_equals_the_original(golden, name):
    x, weight, kernel = golden["x"], golden["w"], KERNELS[name]
    _close(resample.upsample_fir(x, kernel), golden[f"upsample_2d_{name}"])
    _close(resample.downsample_fir(x, kernel), golden[f"downsample_2d_{name}"])
    _close(resample.upsample_convolve(x, weight, kernel), golden[f"upsample_conv_2d_{name}"])
    _close(resample.convolve_downsample(x, weight, kernel), golden[f"conv_downsample_2d_{name}"])


def test_odd_kernel_with_gain_equals_the_original(golden):
    _close(resample.upsample_fir(golden["x"], (1, 2, 1), gain=2), golden["upsample_2d_k121_gain2"])
    _close(resample.downsample_fir(golden["x"], (1, 2, 1), gain=2), golden["downsample_2d_k121_gain2"])


def test_nearest_and_mean_equal_the_original(golden):
    np.testing.assert_array_equal(resample.upsample_nearest(golden["x"]), golden["naive_upsample_2d"])
    _close(resample.downsample_mean(golden["x"]), golden["naive_downsample_2d"])


def _upsampled_axis(x, kernel):
    """One axis as StyleGAN2 words it: insert zeros, pad, convolve with twice the normalized filter; in float64."""
    p = len(kernel) - 2
    padded = np.zeros(2 * len(x) + len(kernel) - 1)
    before = (p + 1) // 2 + 1
    padded[before : before + 2 * len(x) : 2] = x
    assert before + p // 2 + 2 * len(x) == len(padded)
    return np.convolve(padded, 2 * np.asarray(kernel) / np.sum(kernel), "valid")


def _downsampled_axis(x, kernel):
    p = len(kernel) - 2
    return np.convolve(np.pad(x, ((p + 1) // 2, p // 2)), np.asarray(kernel) / np.sum(kernel), "valid")[::2]


@pytest.mark.parametrize("kernel", [(1, 2), (3, 1, 2), (1, 2, 3, 4), (1, 4, 6, 4, 2), (1, -2, 5, 3, 1, 1, 2)])
def test_any_length_of_kernel_equals_zero_insertion(kernel):
    x = np.random.RandomState(0).standard_normal((6, 4))
    up = np.apply_along_axis(_upsampled_axis, 1, np.apply_along_axis(_upsampled_axis, 0, x, kernel), kernel)
    down = np.apply_along_axis(_downsampled_axis, 1, np.apply_along_axis(_downsampled_axis, 0, x, kernel), kernel)
    images = jnp.asarray(x, jnp.float32)[None, :, :, None]
    _close(resample.upsample_fir(images, kernel)[0, :, :, 0], up)
    _close(resample.downsample_fir(images, kernel)[0, :, :, 0], down)


def test_gradient_is_the_adjoint():
    # <up(x), z> = <x, up'(z)> for a linear map; on integers and with a kernel of sum 8 = 2^3, exact in float32.
    numbers = np.random.RandomState(0)
    x, z = (
        numbers.randint(-4, 5, (2, 1, 4, 6, 2)).astype(np.float32),
        numbers.randint(-4, 5, (1, 8, 12, 2)).astype(np.float32),
    )
    for up in (lambda x: resample.upsample_fir(x, (1, 3, 3, 1)), resample.upsample_nearest):
        gradient = jax.grad(lambda x, up=up: jnp.vdot(up(x), z))(x[0])
        assert np.vdot(gradient, x[1]) == np.vdot(up(x[1]), z)
    for down in (lambda x: resample.downsample_fir(x, (1, 3, 3, 1)), resample.downsample_mean):
        gradient = jax.grad(lambda z, down=down: jnp.vdot(down(z), x[0]))(z)
        assert np.vdot(gradient, z) == np.vdot(down(z), x[0])


def _upfirdn(x, kernel, up, down, padding):
    """Inserts zeros, pads, convolves with a two-dimensional kernel and skips, per channel: through `convolve`."""
    B, H, W, C = x.shape
    # Zeros are inserted after the last pixel, too; a convolution turns the kernel around.
    (top, bottom), (left, right) = padding
    window = Window(down, ((top, bottom + up[0] - 1), (left, right + up[1] - 1)), up)
    planes = x.transpose(0, 3, 1, 2).reshape(B * C, H, W, 1)
    y = convolve(jnp.asarray(planes), jnp.asarray(kernel[::-1, ::-1, None, None], jnp.float32), window)
    return y.reshape(B, C, *y.shape[1:3]).transpose(0, 2, 3, 1)


def test_general_filters_of_the_original_are_special_cases_of_the_convolution(golden):
    """The 2021 code had two-dimensional kernels, any factors, and channels first, which no network of it used."""
    x, kernel = golden["x"], golden["k2d"]
    for i in range(6):
        a = json.loads(str(golden["meta"]))["upfirdn_args"][f"upfirdn_2d_{i}"]
        padding = (a["pady0"], a["pady1"]), (a["padx0"], a["padx1"])
        got = _upfirdn(x, kernel, (a["upy"], a["upx"]), (a["downy"], a["downx"]), padding)
        _close(got, golden[f"upfirdn_2d_{i}"])
    # p = 3 - 2: (p + 1) // 2 + 1 and p // 2 zeros when upsampling with gain 4, one and none when downsampling.
    _close(_upfirdn(x, 4 * kernel, (2, 2), (1, 1), ((2, 0), (2, 0))), golden["upsample_2d_k2d"])
    _close(_upfirdn(x, kernel, (1, 1), (2, 2), ((1, 0), (1, 0))), golden["downsample_2d_k2d"])
    channels_last = lambda y: y.transpose(0, 2, 3, 1)  # noqa: E731
    _close(resample.upsample_fir(x, (1, 3, 3, 1)), channels_last(golden["upsample_2d_k1331_nchw"]))
    _close(resample.downsample_fir(x, (1, 3, 3, 1)), channels_last(golden["downsample_2d_k1331_nchw"]))


def test_averages_over_a_window_count_zeros_outside():
    x = np.random.RandomState(0).standard_normal((2, 6, 7, 3)).astype(np.float32)
    padded = np.pad(x.astype(np.float64), ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = sum(padded[:, i : i + 6, j : j + 7] for i in range(5) for j in range(5)) / 25
    _close(resample.pool_mean(jnp.asarray(x), 5), expected)
