"""Layers and blocks against the arrays of the 2021 code, initializers against their laws."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from reference import GOLDEN, ReferenceLayers

import legacy
from models import blocks, convolution, cpu, initializers, layers, normalization, refinenet, resample
from models.cpu import dropout
from parallel import rng

_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)

# --- initial parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", json.loads((GOLDEN / "layers_default_init.json").read_text()), ids=str)
def test_initializer_has_the_original_law(row):
    scale = float(row["name"].removeprefix("default_init(").removesuffix(")"))
    draw = np.asarray(initializers.default_init(scale)(jax.random.key(0), tuple(row["shape"])), np.float64)
    bound, n = row["expected"], draw.size
    # Uniform on (-bound, bound): the mean and the mean square within 4 standard errors; the largest of n, 10 of its.
    assert bound * (1 - 10 / n) < np.abs(draw).max() <= bound * (1 + 1e-6)
    assert abs(draw.mean()) < 4 * bound / np.sqrt(3 * n)
    assert abs((draw**2).mean() / bound**2 - 1 / 3) < 4 * np.sqrt(4 / 45 / n)


LAWS = {  # standard deviation and largest value for a kernel [3, 3, 32, 64]; None: unbounded
    "ncsn_init": (initializers.ncsn_init, np.sqrt(1 / 3 / 288), np.sqrt(1 / 288)),
    "lecun_normal": (initializers.lecun_normal, np.sqrt(1 / 288), 2 * np.sqrt(1 / 288) / 0.87962566103423978),
    "kaiming_normal": (initializers.kaiming_normal, np.sqrt(2 / 576), None),
    "uniform_by_outputs": (initializers.uniform_by_outputs, np.sqrt(1 / 3 / 64), 1 / 8),
    "normal_init": (initializers.normal_init(0.0, 0.02), 0.02, None),
}


@pytest.mark.parametrize("name", LAWS)
def test_other_initializers_have_their_laws(name):
    init, std, largest = LAWS[name]
    draw = np.asarray(init(jax.random.key(0), (3, 3, 32, 64)), np.float64)
    assert abs(draw.mean()) < 4 * std / np.sqrt(draw.size)
    # The variance of a normal law's sample variance is the largest of these laws'.
    assert draw.std() == pytest.approx(std, rel=4 / np.sqrt(2 * draw.size))
    if largest is not None:
        assert 0.98 * largest < np.abs(draw).max() <= largest * (1 + 1e-6)


def test_biases_follow_the_law_of_their_kernel():
    bias = initializers.ncsn_bias(jax.random.key(0), (3, 3, 32, 4000))
    bound = np.sqrt(1 / 288)
    assert bias.shape == (4000,)
    assert 0.99 * bound < np.abs(bias).max() <= bound * (1 + 1e-6)
    assert abs(bias.mean()) < 4 * bound / np.sqrt(3 * 4000)
    np.testing.assert_array_equal(initializers.zero_bias(jax.random.key(0), (3, 3, 2, 5)), np.zeros(5))


def test_kernels_are_drawn_uniformly_and_independently():
    keys = jax.random.split(jax.random.key(0), 3)
    init = initializers.default_init(1.0)  # kernels [256, 512]: bound sqrt(3 / 384)
    draws = np.stack([init(key, (256, 512)) for key in keys]).astype(np.float64) / np.sqrt(3 / 384)
    n = draws[0].size
    for draw in draws:
        counts = np.histogram(draw, 64, (-1, 1))[0]
        chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum()
        assert abs(chi_square - 63) < 4 * np.sqrt(2 * 63)
    flat = draws.reshape(3, -1) * np.sqrt(3)  # unit variance: a correlation of n pairs has standard error 1 / sqrt(n)
    pairs = [
        (flat[0], flat[1]),
        (flat[1], flat[2]),
        *((flat[0], np.roll(flat[0], shift)) for shift in (1, 2, 512, 4096)),
    ]
    for a, b in pairs:
        assert abs((a * b).mean()) < 4 / np.sqrt(n)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_layers():
    return ReferenceLayers()


@pytest.fixture(scope="module")
def golden_functions():
    with np.load(GOLDEN / "layers_functions.npz") as file:
        return dict(file)


FIR = (1.0, 3.0, 3.0, 1.0)


def _block(cls, features, rescale, fir=False, **kwargs):
    options = blocks.BlockOptions(fir_kernel=FIR if fir else None, dropout=0.1, skip_rescale=bool(rescale))
    return cls(features, options, **kwargs)


def _unet_layers():
    yield "NIN", layers.NIN(7)
    yield "AttnBlock_ddpm", layers.Attention(0.0, norm=normalization.NORMS["GroupNorm"])
    yield "AttnBlockpp_C160", layers.Attention(0.1, True)
    for rescale in (0, 1):
        yield f"AttnBlockpp_skiprescale{rescale}", layers.Attention(0.1, bool(rescale))
    for method in ("sum", "cat"):
        yield f"Combine_{method}", blocks.Combine(method)
    for conv, features in ((0, None), (1, 6)):
        for fir in (0, 1):
            yield f"Upsample_pp_fir{fir}_conv{conv}", blocks.Upsample(FIR if fir else None, features)
            yield f"Downsample_pp_fir{fir}_conv{conv}", blocks.Downsample(FIR if fir else None, features)
        yield f"Upsample_ddpm_conv{conv}", blocks.Upsample(None, conv * 5 or None)
        yield f"Downsample_ddpm_conv{conv}", blocks.Downsample(None, conv * 5 or None)
    for fir in (0, 1):
        for up, down, direction in ((0, 0, "none"), (1, 0, "up"), (0, 1, "down")):
            # The cases without a filter are those that change the channels and do not rescale.
            block = _block(blocks.BigGANBlock, 16 if fir else 24, rescale=fir, fir=fir, direction=direction)
            yield f"ResnetBlockBigGANpp_up{up}_down{down}_fir{fir}", block
    plain = blocks.BlockOptions(skip_rescale=False, norm=normalization.NORMS["GroupNorm"])
    for shortcut in (0, 1):
        block = _block(blocks.DDPMBlock, 24, rescale=shortcut, conv_shortcut=bool(shortcut))
        yield f"ResnetBlockDDPMpp_convshortcut{shortcut}", block
        yield f"ResnetBlockDDPM_convshortcut{shortcut}", blocks.DDPMBlock(64, plain, conv_shortcut=bool(shortcut))
    yield "ResnetBlockDDPMpp_sameC_notemb", _block(blocks.DDPMBlock, 16, rescale=True)


def _norms():
    yield "GroupNorm_min(C//4,32)_C20", normalization.GroupNorm()
    yield "GroupNorm_32groups_C64_bigmean", normalization.NORMS["GroupNorm"]()
    yield "InstanceNorm2dPlus", normalization.InstanceNormPlus()
    yield "InstanceNorm2dPlus_nobias", normalization.InstanceNormPlus(use_bias=False)
    yield "VarianceNorm2d", normalization.VarianceNorm()
    yield "ConditionalInstanceNorm2dPlus", normalization.ConditionalInstanceNormPlus(10)
    yield "ConditionalInstanceNorm2dPlus_nobias", normalization.ConditionalInstanceNormPlus(10, use_bias=False)


def _refinenet_layers():
    for num_classes, prefix, short in ((0, "", ""), (10, "Conditional", "Cond")):
        options = refinenet.RefineOptions("elu", num_classes=num_classes)
        yield f"{short}CRPBlock", refinenet.ChainedPooling(options)
        yield f"{short}RCUBlock", refinenet.ResidualUnits(2, options)
        for resample_kind, is_down in (("None", False), ("down", True)):
            for dilation in (1, 2):
                block = refinenet.ResidualBlock(12, options, is_down, dilation)
                yield f"{prefix}ResidualBlock_{resample_kind}_dil{dilation}", block
    yield "ConvMeanPool", refinenet.ConvMeanPool(6)
    for interpolation in ("bilinear", "nearest"):
        options = refinenet.RefineOptions("elu", interpolation)
        yield f"MSFBlock_{interpolation}", refinenet.MultiResolutionFusion(6, options)
    conditional = refinenet.RefineOptions("elu", num_classes=10)
    yield "CondMSFBlock", refinenet.MultiResolutionFusion(6, conditional)
    yield "RefineBlock_end", refinenet.RefineBlock(6, refinenet.RefineOptions("elu"), is_last=True)
    yield "CondRefineBlock_start", refinenet.RefineBlock(6, conditional)


LAYERS = dict([*_unet_layers(), *_norms(), *_refinenet_layers()])
# E[x²] - E[x]² at a mean of 30 and a variance of 1 loses three digits: the reference is 9e-5 of the largest value off
# float64, ours 5e-5.
TOLERANCES = {"GroupNorm_32groups_C64_bigmean": 1e-4}
# Tested by themselves, below.
OTHER_CASES = {"MeanPoolConv", "ResnetBlockDDPMpp_train_dropout0.25"}


def _layer_params(layer, golden, name, *inputs):
    leaves = legacy.match_layers(layer, *inputs)
    params = {
        leaf.path: golden.parameter(name, leaf.original, leaf.original_shape).reshape(leaf.shape) for leaf in leaves
    }
    return {"params": unflatten_dict(params)}


def _inputs(layer, golden, name):
    inputs = golden.inputs(name)
    # Blocks of RefineNet take labels in any case; without a condition they do not count.
    needs_labels = type(layer).__module__ == refinenet.__name__ and not isinstance(layer, refinenet.ConvMeanPool)
    return [*inputs, np.zeros(2, np.int32)] if needs_labels and len(inputs) == 1 else inputs


def _assert_close(got, expected, tolerance=3e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_every_case_is_tested(golden_layers):
    assert golden_layers.cases() == {*LAYERS, *OTHER_CASES}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_original(golden_layers, name):
    layer = LAYERS[name]
    inputs = _inputs(layer, golden_layers, name)
    params = _layer_params(layer, golden_layers, name, *inputs) if name in golden_layers.seeds else {}
    _assert_close(_jit(layer.apply)(params, *inputs), golden_layers[f"{name}/out"], TOLERANCES.get(name, 3e-6))


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_instance_norm_equals_the_closed_form(shift):
    """The 2021 code's never ran, so that the oracle is the definition, in float64."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 4, 3, 5)), np.float64) * 2 + shift
    scale, bias = np.linspace(0.5, 2, 5), np.linspace(-1, 1, 5)
    expected = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5) * scale + bias
    params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    got = normalization.NORMS["InstanceNorm"]().apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_pooling_before_a_convolution_equals_the_original(golden_layers):
    """MeanPoolConv, which no network uses: the mean of 2x2 pixels, then a convolution."""
    layer, pooled = convolution.Conv(6), resample.downsample_mean(golden_layers["MeanPoolConv/x"])
    params = {
        name: golden_layers.parameter("MeanPoolConv", f"Conv_0/{name}", shape)
        for name, shape in (("kernel", (3, 3, 5, 6)), ("bias", (6,)))
    }
    _assert_close(layer.apply({"params": params}, pooled), golden_layers["MeanPoolConv/out"])


@pytest.mark.exhaustive
def test_block_is_differentiated_twice_and_batched():
    # What guidance and exact traces need: gradients of gradients, and many cotangents at once.
    block = _block(blocks.BigGANBlock, 4, rescale=True, fir=True, direction="down")
    x, embedding = jax.random.normal(jax.random.key(0), (2, 4, 4, 4)), jnp.ones((2, 3))
    cotangents = jax.random.normal(jax.random.key(1), (3, 2, 2, 2, 4))
    variables = block.init(jax.random.key(2), x, embedding)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.ones_like(leaf), variables)

    def derivatives():
        pullback = jax.vjp(lambda x: block.apply(variables, x, embedding), x)[1]
        many = jax.vmap(lambda cotangent: pullback(cotangent)[0])(cotangents)
        gradient = jax.grad(lambda x: (block.apply(variables, x, embedding) ** 2).sum())
        return many, jax.grad(lambda x: (gradient(x) ** 2).sum())(x), pullback(cotangents[1])[0]

    many, second, one = _jit(derivatives)()
    _assert_close(many[1], np.asarray(one))
    with cpu.for_platform("cuda"):
        native_many, native_second, _ = _jit(lambda: derivatives())()
    _assert_close(many, np.asarray(native_many))
    _assert_close(second, np.asarray(native_second), tolerance=2e-5)


def test_block_in_training_drops_what_the_mask_says(golden_layers, monkeypatch):
    name = "ResnetBlockDDPMpp_train_dropout0.25"
    layer = blocks.DDPMBlock(16, blocks.BlockOptions(dropout=0.25))
    inputs = golden_layers.inputs(name)
    params = _layer_params(layer, golden_layers, name, *inputs)
    asked = []

    def bernoulli(key, probability, shape):
        asked.append((probability, shape))
        return golden_layers[f"{name}/keep_mask"].astype(bool)

    monkeypatch.setattr(dropout, "bernoulli", bernoulli)
    y = layer.apply(params, *inputs, train=True, rngs={"dropout": jax.random.key(0)})
    _assert_close(y, golden_layers[f"{name}/out"])
    assert asked == [(0.75, inputs[0].shape)]


def test_dropped_values_depend_on_the_example_alone():
    x, key = jnp.ones((4, 1000)), jax.random.key(0)
    whole = layers.drop(key, x, 0.25)
    np.testing.assert_array_equal(layers.drop(rng.example_keys(key, 4)[1:3], x[1:3], 0.25), whole[1:3])
    assert set(np.unique(whole)) == {0.0, np.float32(1 / 0.75)}
    assert abs((np.asarray(whole) > 0).mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)


def test_group_norm_with_a_large_mean_stays_finite():
    # E[x²] - E[x]² in float32 comes out negative here; the original's square root of it is nan.
    x = 3000 + 1e-3 * jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    y = normalization.GroupNorm().init_with_output(jax.random.key(0), x)[0]
    assert np.isfinite(y).all()


@pytest.mark.parametrize("dimension", [8, 9, 16, 128])
def test_timestep_embedding_equals_the_original(golden_functions, dimension):
    for kind in ("int", "float"):
        got = layers.timestep_embedding(jnp.asarray(golden_functions[f"t_{kind}"]), dimension)
        # Angles reach 1000, where float32 numbers are 6e-5 apart.
        np.testing.assert_allclose(got, golden_functions[f"temb_{kind}_{dimension}"], atol=1e-4)


def test_fourier_features_equal_the_original(golden_functions):
    params = {"frequencies": golden_functions["fourier_W"]}
    layer = layers.FourierFeatures(16, 16.0)
    got = layer.apply({"params": params}, jnp.log(golden_functions["sigma"]))
    np.testing.assert_allclose(got, golden_functions["fourier_of_log_sigma"], atol=1e-4)  # angles reach 1000


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activation_equals_the_original(golden_functions, name):
    np.testing.assert_allclose(
        layers.ACTIVATIONS[name](golden_functions["x"]), golden_functions[name], rtol=1e-6, atol=1e-7
    )
