"""The convolution against sums written out in numpy, and its derivatives against XLA's own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cpu, initializers
from models.convolution import Conv, convolve
from models.cpu import convolution, parts, winograd
from models.window import Window, correlate, same_padding

# window, size of the images, taps of the kernel
CASES = {
    "same": (Window(padding=((1, 1), (1, 1))), (5, 4), (3, 3)),
    "same, even": (Window(padding=((1, 1), (1, 1))), (6, 4), (3, 3)),
    "even, cropped": (Window(padding=((2, -1), (0, 3))), (5, 7), (3, 3)),
    "stride 2, padding (0, 1)": (Window((2, 2), ((0, 1), (0, 1))), (6, 4), (3, 3)),
    "stride 2, valid, drops a pixel": (Window((2, 2)), (6, 8), (3, 3)),
    "dilated": (Window(padding=((2, 2), (2, 2)), window_dilation=(2, 2)), (5, 6), (3, 3)),
    "transposed": (Window(padding=((2, 2), (2, 2)), base_dilation=(2, 2)), (3, 2), (3, 3)),
    "even kernel, cropped": (Window((1, 2), ((1, 0), (-1, 2))), (5, 7), (2, 4)),
    "by pixels, cropped": (Window(padding=((2, -1), (-1, 3))), (5, 7), (2, 4)),
    "1x1": (Window(), (3, 2), (1, 1)),
    "1x1, stride 2": (Window((2, 2)), (4, 5), (1, 1)),
    "everything": (Window((3, 2), ((2, 1), (0, 3)), (2, 3), (2, 1)), (4, 5), (2, 3)),
}


def _integers(seed, *shape):
    return np.random.RandomState(seed).randint(-4, 5, shape).astype(np.float32)


def _dilate_and_pad(x, window):
    for axis in (0, 1):
        spread = np.zeros(
            (*x.shape[: axis + 1], (x.shape[axis + 1] - 1) * window.base_dilation[axis] + 1, *x.shape[axis + 2 :])
        )
        spread[(slice(None),) * (axis + 1) + (slice(None, None, window.base_dilation[axis]),)] = x
        before, after = window.padding[axis]
        size = spread.shape[axis + 1]
        spread = np.pad(spread, [(max(before, 0), max(after, 0)) if i == axis + 1 else (0, 0) for i in range(4)])
        crop = slice(max(-before, 0), max(-before, 0) + size + before + after)
        x = spread[(slice(None),) * (axis + 1) + (crop,)]
    return x


def _written_out(x, kernel, window):
    """The defining sum, in float64."""
    x, taps = _dilate_and_pad(x.astype(np.float64), window), kernel.shape[:2]
    spans = [(taps[i] - 1) * window.window_dilation[i] + 1 for i in (0, 1)]
    rows = range(0, x.shape[1] - spans[0] + 1, window.strides[0])
    columns = range(0, x.shape[2] - spans[1] + 1, window.strides[1])
    y = np.zeros((len(x), len(rows), len(columns), kernel.shape[3]))
    for p, row in enumerate(rows):
        for q, column in enumerate(columns):
            patch = x[:, row :: window.window_dilation[0], column :: window.window_dilation[1]][:, : taps[0], : taps[1]]
            y[:, p, q] = np.einsum("bijc,ijco->bo", patch, kernel)
    return y


ALL_SIZES = {(winograd, "PAYS"): True, (winograd, "LEAST_CHANNELS"): 1, (winograd, "LEAST_TILES"): 1}
LIMITS = {
    "as it comes": {},
    "in parts": {(convolution, "PART_VALUES"): 1},
    "minimal filtering": ALL_SIZES,
    "minimal filtering in parts": ALL_SIZES | {(winograd, "PART_VALUES"): 900},
    "bfloat16 in parts": {(convolution, "NARROW_PART_VALUES"): 1},
}


@pytest.fixture
def limit(monkeypatch):
    """Sets limits of the size at which a convolution is computed otherwise, of which JAX's memory knows nothing."""

    def forget():
        convolution._value.clear_cache()
        convolution._gradients.clear_cache()

    def set_limits(name):
        for (module, constant), value in LIMITS[name].items():
            monkeypatch.setattr(module, constant, value)
        forget()

    yield set_limits
    forget()


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        *((name, "as it comes") for name in CASES),
        ("same", "in parts"),
        ("by pixels, cropped", "in parts"),
        *((name, limits) for name in ("same, even", "even, cropped") for limits in LIMITS if limits.startswith("min")),
    ],
)
def test_value_and_derivatives_are_exact_on_integers(name, limits, limit):
    limit(limits)
    # Sums of small integers are exact in float32, and so are quarters: there is no tolerance to choose.
    window, size, taps = CASES[name]
    x, kernel = _integers(0, 4, *size, 3), _integers(1, *taps, 3, 2)
    expected = _written_out(x, kernel, window)
    cotangent = _integers(2, *expected.shape)
    x_direction, kernel_direction = _integers(3, *x.shape), _integers(4, *kernel.shape)

    def derivatives(fn):
        def gradients(x, kernel):
            return jax.grad(lambda *a: jnp.vdot(fn(*a, window), cotangent), (0, 1))(x, kernel)

        def second(x, kernel):  # of <gradients, directions>: the gradient rule's own gradient
            x_gradient, kernel_gradient = gradients(x, kernel)
            return jnp.vdot(x_gradient, x_direction) + jnp.vdot(kernel_gradient, kernel_direction)

        return fn(x, kernel, window), gradients(x, kernel), jax.grad(second, (0, 1))(x, kernel)

    y, gradients, second = jax.jit(lambda: derivatives(convolve))()
    np.testing.assert_array_equal(y, expected)
    # y is linear in x and in the kernel: <gradient, direction> is <y in that direction, cotangent>.
    assert np.vdot(gradients[0], x_direction) == np.vdot(_written_out(x_direction, kernel, window), cotangent)
    assert np.vdot(gradients[1], kernel_direction) == np.vdot(_written_out(x, kernel_direction, window), cotangent)
    _, native_gradients, native_second = jax.jit(lambda: derivatives(correlate))()
    jax.tree.map(np.testing.assert_array_equal, (gradients, second), (native_gradients, native_second))


def test_batching_over_images_and_kernels():
    window = Window((2, 2), ((0, 1), (0, 1)))
    x, kernel, cotangent = _integers(0, 3, 2, 6, 4, 3), _integers(1, 3, 3, 3, 3, 2), _integers(2, 3, 2, 3, 2, 2)

    def pullback(x, kernel, cotangent):
        y, vjp = jax.vjp(lambda *a: convolve(*a, window), x, kernel)
        return y, vjp(cotangent)

    batched = jax.jit(jax.vmap(pullback))(x, kernel, cotangent)
    one_kernel = jax.jit(jax.vmap(pullback, (0, None, 0)))(x, kernel[1], cotangent)
    single = jax.jit(pullback)(x[1], kernel[1], cotangent[1])
    jax.tree.map(lambda many, one: np.testing.assert_array_equal(many[1], one), batched, single)
    jax.tree.map(lambda many, one: np.testing.assert_array_equal(many[1], one), one_kernel, single)


@pytest.mark.parametrize("limits", ["as it comes", "bfloat16 in parts"])
@pytest.mark.parametrize("name", ["same", "by pixels, cropped", "stride 2, padding (0, 1)", "1x1"])
def test_bfloat16_is_rounded_once(name, limits, limit):
    # Sums are exact in float32, and more than the 8 bits of bfloat16.
    limit(limits)
    window, size, taps = CASES[name]
    x, kernel = 13 * _integers(0, 4, *size, 7), 11 * _integers(1, *taps, 7, 5)
    cotangent = 7 * _integers(2, *_written_out(x, kernel, window).shape)
    narrow = lambda *arrays: (jnp.asarray(array, jnp.bfloat16) for array in arrays)  # noqa: E731

    def results(fn, x, kernel, cotangent):
        y, pullback = jax.vjp(lambda *a: fn(*a, window), x, kernel)
        return y, *pullback(cotangent)

    found = jax.jit(functools.partial(results, convolve))(*narrow(x, kernel, cotangent))
    for array, expected in zip(found, results(correlate, x, kernel, cotangent), strict=True):
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, jnp.asarray(expected, jnp.bfloat16))
        assert (np.asarray(array, np.float32) != expected).any()  # rounded, and not by luck


def test_parts_of_a_batch_are_equal_and_fit():
    assert [parts.num_parts(12, values, 100) for values in (1, 8, 9, 50, 101)] == [1, 1, 2, 6, 12]


def _layouts(fn, x, kernel, window, platform):
    """Layouts of the convolutions of the value and both gradients, as they are lowered for a platform."""
    gradient = jax.jit(jax.grad(lambda *a: (fn(*a, window) ** 2).sum(), (0, 1)))
    with cpu.for_platform(platform):
        text = gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    found = []
    for function in text.split("func.func ")[1:]:
        name = re.search(r"@(\w+)", function)[1]
        calls = 1 if name == "main" else len(re.findall(rf"call @{name}\(", text))  # one text for equal shapes
        found += calls * re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", function)
    return found


@pytest.mark.parametrize(("strides", "num_products"), [((1, 1), 3), ((2, 2), 1)])
def test_gradients_are_convolutions_in_the_fast_layout_on_a_cpu_only(strides, num_products):
    # What makes them fast in loops on a CPU; benchmarks/convolution.py measures it.
    x, kernel, window = jnp.ones((2, 6, 4, 3)), jnp.ones((3, 3, 3, 2)), Window(strides, ((1, 1), (1, 1)))
    fast = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    assert _layouts(convolve, x, kernel, window, "cpu") == [fast] * (2 + num_products)
    native = _layouts(correlate, x, kernel, window, "cuda")
    assert len(set(native)) == 3
    for platform in ("cuda", "tpu"):
        assert _layouts(convolve, x, kernel, window, platform) == native


@pytest.mark.parametrize(
    ("size", "taps", "stride", "dilation"),
    [(8, 3, 1, 1), (8, 3, 2, 1), (7, 3, 2, 1), (5, 2, 1, 1), (9, 3, 1, 4), (4, 1, 2, 1)],
)
def test_same_padding_is_that_of_xla(size, taps, stride, dilation):
    expected = jax.lax.padtype_to_pads((size,), ((taps - 1) * dilation + 1,), (stride,), "SAME")[0]
    assert same_padding(size, taps, stride, dilation) == tuple(expected)


def test_conv_layer_adds_its_bias_and_starts_as_asked():
    x = _integers(0, 1, 6, 5, 8)
    layer = Conv(64, stride=2, dilation=1, kernel_init=initializers.default_init(0.25))
    params = layer.init(jax.random.key(0), x)["params"]
    bound = np.sqrt(3 * 0.25 / (9 * (8 + 64) / 2))
    assert 0.99 * bound < np.abs(params["kernel"]).max() <= bound
    np.testing.assert_array_equal(params["bias"], 0)
    kernel, bias = _integers(1, 3, 3, 8, 64), _integers(2, 64)
    y = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_array_equal(y, _written_out(x, kernel, Window((2, 2), ((0, 1), (1, 1)))) + bias)
