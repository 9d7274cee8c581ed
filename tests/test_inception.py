"""The 2015 Inception network: equal to torch-fidelity's with the same random weights, and TensorFlow's resizing."""

import functools
import importlib.util
import itertools

import inception_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracle_runs import assert_repeated
from torch_states import inception_state

from metrics import inception
from metrics.inception import torch_layer
from metrics.pretrained import check_params, param_shapes, params_from_torch

PATH = tiny.ROOT / "tests/golden/inception.npz"
BLOCKS = {
    "InceptionA": inception.BlockA(4),
    "InceptionB": inception.BlockB(),
    "InceptionC": inception.BlockC(8),
    "InceptionD": inception.BlockD(),
    "InceptionE_1": inception.BlockE(inception._mean_pool),
    "InceptionE_2": inception.BlockE(inception._max_pool),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(PATH) as file:
        return dict(file)


def converted(shapes, state):
    return check_params("the test", params_from_torch(state, shapes, torch_layer), shapes)


def block_shapes(block, x):
    tree = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    return {f"{layer}/{name}": leaf.shape for layer, arrays in tree.items() for name, leaf in arrays.items()}


def assert_equal(found, expected):
    """To 1e-4 of each value, or of the typical one where values are near 0."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.std(expected))


# The others are all in the small network below; on its input these two have pictures of a single pixel.
@pytest.mark.parametrize(
    "name", [name if "E_" in name else pytest.param(name, marks=pytest.mark.exhaustive) for name in BLOCKS]
)
def test_a_block_computes_what_torch_fidelity_does(golden, name):
    x = oracle.normal(name, oracle.BLOCKS[name][1])
    shapes = block_shapes(BLOCKS[name], x)
    params = converted(shapes, inception_state(shapes, f"{name}."))
    found = jax.jit(BLOCKS[name].apply)({"params": params}, x)
    assert_equal(found[..., :: oracle.CHANNELS], golden[f"block/{name}"])


# --- the whole network -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network_params():
    shapes = param_shapes(inception.Inception(), inception.SIDE)
    return converted(shapes, inception_state(shapes))


@functools.partial(jax.jit, static_argnames="side")
def network_outputs(params, levels, side):
    """Features, class scores without and with bias, in the oracle's order."""
    x = (inception.resize_tf1(levels.astype(jnp.float32), side, side) - 128.0) / 128.0
    features, logits = inception.Inception().apply({"params": params}, x)
    without = inception.Inception(logits_bias=False).apply({"params": params}, x)[1]
    return jnp.concatenate([features, without, logits], axis=1)


def test_the_whole_network_computes_what_torch_fidelity_does_on_a_small_input(golden, network_params):
    levels = oracle.levels((1, 32, 32, 3))
    assert_equal(network_outputs(network_params, levels, oracle.SMALL_SIDE), golden["small"])


@pytest.mark.exhaustive
def test_the_whole_network_computes_what_torch_fidelity_does(golden, network_params):
    levels = oracle.levels((2, 32, 32, 3))
    assert_equal(network_outputs(network_params, levels, inception.SIDE), golden["full"])


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch_fidelity is not installed")
def test_the_recorded_values_are_what_torch_fidelity_computes(golden, tmp_path):
    assert_repeated("inception_oracle.py", golden, tmp_path)


# --- resizing --------------------------------------------------------------------------------------------------------


def resized_in_float64(x, height, width, steps):
    """TensorFlow 1's bilinear resizing, one new pixel after another; one in so many rows and columns."""
    result = np.zeros((len(x), height, width, x.shape[3]))
    for i, j in itertools.product(range(0, height, steps[0]), range(0, width, steps[1])):
        y_place, x_place = i * (x.shape[1] / height), j * (x.shape[2] / width)
        rows = [min(int(y_place) + step, x.shape[1] - 1) for step in (0, 1)]
        columns = [min(int(x_place) + step, x.shape[2] - 1) for step in (0, 1)]
        for row, row_share in zip(rows, (1 - y_place % 1, y_place % 1), strict=True):
            for column, share in zip(columns, (1 - x_place % 1, x_place % 1), strict=True):
                result[:, i, j] += row_share * share * x[:, row, column]
    return result[:, :: steps[0], :: steps[1]]


@pytest.mark.parametrize("name", oracle.RESIZES)
def test_resizing_is_that_of_tensorflow_1(golden, name):
    shape, size, steps = oracle.RESIZES[name]
    x = oracle.levels(shape)
    found = np.asarray(inception.resize_tf1(x.astype(np.float32), *size))[:, :: steps[0], :: steps[1]]
    # A position is a float32: it may be wrong by 2^-24 of up to 40 pixels, the value by 255 times that.
    np.testing.assert_allclose(found, resized_in_float64(x, *size, steps), atol=255 * 40 * 2.0**-24)
    np.testing.assert_allclose(found, golden[f"resize/{name}"], rtol=1e-6)


def test_an_image_of_the_right_size_is_only_scaled():
    x = oracle.levels((1, inception.SIDE, inception.SIDE, 3)).astype(np.float32)
    np.testing.assert_array_equal(inception.preprocess(x), (x - 128.0) / 128.0)
