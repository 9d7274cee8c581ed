"""Minimal filtering against sums in float64, and where it is used. test_convolution.py has it exact on integers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cpu
from models.convolution import convolve
from models.cpu import winograd
from models.window import Window, correlate

SAME = ((1, 1), (1, 1))


def _shapes(text, operation):
    """The shapes that operations of a lowered program put out."""
    return re.findall(rf"stablehlo\.{operation}.*-> tensor<(\S+)xf32>", text)


@pytest.mark.parametrize(("C", "features"), [(64, 96), (96, 64)])
def test_rounding_is_that_of_a_convolution(C, features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, C)).astype(np.float32)
    kernel = (rng.normal(size=(3, 3, C, features)) / np.sqrt(9 * C)).astype(np.float32)
    cotangent = rng.normal(size=(2, 8, 8, features)).astype(np.float32)

    padded = np.pad(x.astype(np.float64), ((0, 0), *SAME, (0, 0)))
    shifted = [[padded[:, i : i + 8, j : j + 8].reshape(-1, C) for j in range(3)] for i in range(3)]
    value = sum(shifted[i][j] @ kernel[i, j].astype(np.float64) for i in range(3) for j in range(3))
    pixels = cotangent.reshape(-1, features).astype(np.float64)
    gradient = np.stack([np.stack([shift.T @ pixels for shift in row]) for row in shifted])

    def error(found, expected):
        return np.sqrt(np.mean((np.asarray(found, np.float64).ravel() - expected.ravel()) ** 2) / np.mean(expected**2))

    y, found_gradient = jax.jit(
        lambda: (winograd.convolve(x, kernel, SAME), winograd.kernel_gradient(x, cotangent, SAME))
    )()
    native, pullback = jax.vjp(lambda kernel: correlate(x, kernel, Window(padding=SAME)), kernel)
    (native_gradient,) = pullback(cotangent)
    assert 0 < error(y, value) < 2 * error(native, value) < 2e-6
    assert 0 < error(found_gradient, gradient) < 2 * error(native_gradient, gradient) < 2e-6


def test_convolutions_that_it_fits_use_it_on_a_cpu_only(monkeypatch):
    monkeypatch.setattr(winograd, "PAYS", True)
    x, kernel = jnp.ones((2, 8, 8, 64)), jnp.ones((3, 3, 64, 96))
    gradients = jax.jit(jax.grad(lambda x, kernel: (convolve(x, kernel, Window(padding=SAME)) ** 2).sum(), (0, 1)))
    text = {}
    for name in ("cpu", "cuda"):
        with cpu.for_platform(name):
            text[name] = gradients.trace(x, kernel).lower(lowering_platforms=(name,)).as_text()
    assert _shapes(text["cpu"], "dot_general") == ["16x32x96", "16x64x96", "16x32x64"]
    assert _shapes(text["cpu"], "convolution") == []
    assert _shapes(text["cuda"], "dot_general") == []
    assert len(_shapes(text["cuda"], "convolution")) == 3


@pytest.mark.parametrize(
    ("x", "taps", "padding", "fits"),
    [
        ((2, 8, 8, 64), (3, 3, 64, 96), SAME, True),
        ((4, 8, 8, 64), (3, 3, 64, 96), ((1, 1), (1, 0)), False),
        ((4, 8, 8, 64), (3, 3, 64, 96), ((0, 1), (1, 1)), False),
        ((2, 8, 8, 64), (5, 5, 64, 96), SAME, False),
        ((2, 8, 8, 63), (3, 3, 63, 96), SAME, False),
        ((2, 8, 8, 64), (3, 3, 64, 63), SAME, False),
        ((1, 8, 8, 64), (3, 3, 64, 64), SAME, False),  # 16 tiles
        ((1, 64, 64, 128), (3, 3, 128, 64), SAME, True),  # 2**21 values after the transformation
        ((1, 64, 66, 128), (3, 3, 128, 64), SAME, False),
    ],
)
def test_what_it_fits(x, taps, padding, fits, monkeypatch):
    monkeypatch.setattr(winograd, "PAYS", True)
    assert winograd.is_faster(jax.ShapeDtypeStruct(x, jnp.float32), taps, padding) is fits
    assert not winograd.is_faster(jax.ShapeDtypeStruct(x, jnp.bfloat16), taps, padding)
    monkeypatch.setattr(winograd, "PAYS", False)
    assert not winograd.is_faster(jax.ShapeDtypeStruct(x, jnp.float32), taps, padding)
