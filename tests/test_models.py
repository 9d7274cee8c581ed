"""Networks and their layers against the arrays of the 2021 code, and against what makes them right on their own."""

import functools
import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from reference import GOLDEN, ReferenceNetwork, config_of

import legacy
import rng
from models import blocks, convolution, create_model, initializers, layers, ncsnpp


def _quick_first(names, quick):
    """Marks all but a few as slow; together the quick ones use every kind of layer."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


NETWORKS = _quick_first(
    sorted(path.stem for path in (GOLDEN / "models").glob("ncsnpp_*.npz")),
    {
        "ncsnpp_opt_ddpmblock_firTrue_conv",
        "ncsnpp_opt_outskip_residualin_noskiprescale",
        "ncsnpp_ve_cifar10_discrete",
        "ncsnpp_vp_ddpmpp_continuous",
    },
)

# Compiled without optimization: half the time, the same numbers.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def _example_max(x):
    return np.abs(x).reshape(len(x), -1).max(1)


# --- networks --------------------------------------------------------------------------------------------------------


def _reference_params(network):
    leaves = legacy.match_parameters(network.config)
    flat = {leaf.original: network.parameter(leaf.original, leaf.original_shape) for leaf in leaves}
    return legacy.params_from_score_sde(network.config, flat)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_the_original(name):
    network = ReferenceNetwork(name)
    model, params, golden = create_model(network.config), _reference_params(network), network.arrays

    def loss(params, x):
        y = model.apply({"params": params}, x, jnp.asarray(golden["labels"]))
        return jnp.vdot(y, golden["cotangent"]), y

    (_, y), gradients = _jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, golden["x"])
    # Of each example's maximum: scale_by_sigma makes one of the two much larger than the other.
    assert (_example_max(y - golden["output"]) < 1e-5 * _example_max(golden["output"])).all()
    assert (_example_max(gradients[1] - golden["grad_x"]) < 1e-5 * _example_max(golden["grad_x"])).all()
    got, expected = legacy.params_to_score_sde(network.config, gradients[0]), network.gradient_norms()
    assert got.keys() == expected.keys()
    # The keys' bias in an attention has no effect and its gradient is rounding: hence the absolute term.
    atol = 1e-6 * max(expected.values())
    for path, norm in expected.items():
        np.testing.assert_allclose(
            np.linalg.norm(got[path].astype(np.float64)), norm, rtol=1e-5, atol=atol, err_msg=path
        )


def test_fourier_frequencies_are_not_trained():
    network = ReferenceNetwork("ncsnpp_ve_cifar10_continuous")
    assert network.gradient_norms()["GaussianFourierProjection_0/W"] == 0
    layer = layers.FourierFeatures(4, 16.0)
    variables = layer.init(jax.random.key(0), jnp.ones(2))
    gradient = jax.grad(lambda v: layer.apply(v, jnp.ones(2)).sum())(variables)
    np.testing.assert_array_equal(gradient["params"]["frequencies"], 0)


SMALL = {
    "data.image_size": 8,
    "data.num_channels": 1,
    "model.nf": 8,
    "model.ch_mult": (1, 2),
    "model.num_res_blocks": 1,
}
SMALL |= {"model.attn_resolutions": (4,)}


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels):
    config = config_of(SMALL | {"data.num_channels": channels})
    x, labels = jax.ShapeDtypeStruct((2, 8, 4, channels), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    y, variables = jax.eval_shape(
        functools.partial(create_model(config).init_with_output, jax.random.key(0)), x, labels
    )
    assert y.shape == x.shape
    assert variables["params"]["input"]["kernel"].shape == (3, 3, channels, 8)
    assert variables["params"]["output_conv"]["kernel"].shape == (3, 3, 8, channels)


def test_attention_compares_the_height():
    # Images of 16x8: the levels are 16x8 and 8x4, and only the first has width 8.
    config = config_of(SMALL | {"data.image_size": 16, "data.image_width": 8, "model.attn_resolutions": (8,)})
    names = {leaf.path[0] for leaf in legacy.match_parameters(config)}
    assert {"down1_attention0", "up1_attention", "middle_attention"} <= names
    assert not {"down0_attention0", "up0_attention"} & names


def test_dropout_is_for_training_only_and_per_example():
    model = create_model(config_of(SMALL | {"model.dropout": 0.3, "model.init_scale": 1.0}))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    labels = jnp.linspace(1.0, 900.0, 4)
    variables = _jit(model.init)(jax.random.key(0), x, labels)

    @_jit
    def run(x, labels):
        plain = model.apply(variables, x, labels)
        return plain, model.apply(variables, x, labels, train=True, rngs={"dropout": jax.random.key(2)})

    plain, dropped = run(x, labels)
    _, dropped_again = run(x.at[2:].set(0.0), labels)
    assert np.abs(plain - dropped).max() > 0.01
    np.testing.assert_allclose(dropped[:2], dropped_again[:2], rtol=1e-5, atol=1e-6)


# --- full-size trees -------------------------------------------------------------------------------------------------

TREES = json.loads((GOLDEN / "models" / "trees.json").read_text())
QUICK_TREES = {"ve/cifar10_ncsnpp_continuous", "vp/cifar10_ddpmpp", "ve/ffhq_256_ncsnpp_continuous"}


@functools.cache
def _tree(model, size, channels):
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return legacy.match_layers(model, x, jax.ShapeDtypeStruct((1,), jnp.float32))


@pytest.mark.parametrize("name", _quick_first(TREES, QUICK_TREES))
def test_full_size_parameters_are_those_of_the_original(name):
    expected = TREES[name]
    config = config_of(expected["config"])
    leaves = _tree(create_model(config), config.data.image_size, config.data.num_channels)
    assert len(leaves) == expected["num_leaves"]
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == expected["num_params"]
    shapes = json.dumps({leaf.original: leaf.original_shape for leaf in leaves}, sort_keys=True)
    assert hashlib.sha256(shapes.encode()).hexdigest() == expected["sha256"]


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


def test_initial_parameters_have_the_original_statistics():
    (name, expected), *_ = json.loads((GOLDEN / "models" / "init_stats.json").read_text()).items()
    shrunk = {"model.nf": 32, "model.ch_mult": (1, 2), "model.num_res_blocks": 1}
    config = config_of(TREES[name]["config"] | shrunk)
    x, labels = jnp.zeros((1, 32, 32, 3)), jnp.ones(1)
    params = _jit(create_model(config).init)(jax.random.key(0), x, labels)["params"]
    flat = legacy.params_to_score_sde(config, params)
    assert flat.keys() == expected.keys()
    for path, value in flat.items():
        law = expected[path]
        assert list(value.shape) == law["shape"]
        if law["std"] == 0:
            np.testing.assert_array_equal(value, law["mean"])
            continue
        # Both are samples of n numbers: 5 standard errors of the difference, of a normal law even for uniform ones.
        error = np.sqrt(2 / value.size) * law["std"]
        assert abs(value.mean() - law["mean"]) < 5 * error
        assert abs(value.std() - law["std"]) < 5 * error * np.sqrt(0.5)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_layers():
    with np.load(GOLDEN / "layers_modules.npz") as file:
        return {key: array.astype(np.float32) for key, array in file.items()}


@pytest.fixture(scope="module")
def golden_functions():
    with np.load(GOLDEN / "layers_functions.npz") as file:
        return dict(file)


FIR = (1.0, 3.0, 3.0, 1.0)


def _block(cls, features, rescale, fir=False, **kwargs):
    options = blocks.BlockOptions(fir_kernel=FIR if fir else None, dropout=0.1, skip_rescale=bool(rescale))
    return cls(features, options, **kwargs)


def _layers():
    yield "NIN", layers.NIN(7)
    yield "GroupNorm_min(C//4,32)_C20", layers.GroupNorm()
    for rescale in (0, 1):
        yield f"AttnBlockpp_skiprescale{rescale}", layers.Attention(0.1, bool(rescale))
    for method in ("sum", "cat"):
        yield f"Combine_{method}", blocks.Combine(method)
    for fir in (0, 1):
        kernel = FIR if fir else None
        for conv, features in ((0, None), (1, 6)):
            yield f"Upsample_pp_fir{fir}_conv{conv}", blocks.Upsample(kernel, features)
            yield f"Downsample_pp_fir{fir}_conv{conv}", blocks.Downsample(kernel, features)
        for up, down, direction in ((0, 0, "none"), (1, 0, "up"), (0, 1, "down")):
            # The cases without a filter are those that change the channels and do not rescale.
            block = _block(blocks.BigGANBlock, 16 if fir else 24, rescale=fir, fir=fir, direction=direction)
            yield f"ResnetBlockBigGANpp_up{up}_down{down}_fir{fir}", block
    for shortcut in (0, 1):
        block = _block(blocks.DDPMBlock, 24, rescale=shortcut, conv_shortcut=bool(shortcut))
        yield f"ResnetBlockDDPMpp_convshortcut{shortcut}", block
    yield "ResnetBlockDDPMpp_sameC_notemb", _block(blocks.DDPMBlock, 16, rescale=True)


LAYERS = dict(_layers())


def _layer_params(layer, golden, name, *inputs):
    params = {}
    for leaf in legacy.match_layers(layer, *inputs):
        params[leaf.path] = golden[f"{name}/params/{leaf.original}"].reshape(leaf.shape)
    used = {key for key in golden if key.startswith(f"{name}/params/")}
    assert len(used) == len(params)
    return {"params": unflatten_dict(params)}


def _inputs(golden, name):
    return [golden[f"{name}/{key}"] for key in ("x", "arg1") if f"{name}/{key}" in golden]


def _assert_close(got, expected, tolerance=3e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_original(golden_layers, name):
    layer, inputs = LAYERS[name], _inputs(golden_layers, name)
    params = _layer_params(layer, golden_layers, name, *inputs) if f"{name}/params" in " ".join(golden_layers) else {}
    _assert_close(_jit(layer.apply)(params, *inputs), golden_layers[f"{name}/out"])


@pytest.mark.slow
def test_block_is_differentiated_twice_and_batched(monkeypatch):
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
    monkeypatch.setattr(convolution, "_has_own_gradient", lambda: False)
    native_many, native_second, _ = _jit(lambda: derivatives())()
    _assert_close(many, np.asarray(native_many))
    _assert_close(second, np.asarray(native_second), tolerance=2e-5)


def test_block_in_training_drops_what_the_mask_says(golden_layers, monkeypatch):
    name = "ResnetBlockDDPMpp_train_dropout0.25"
    layer = blocks.DDPMBlock(16, blocks.BlockOptions(dropout=0.25))
    inputs = _inputs(golden_layers, name)
    params = _layer_params(layer, golden_layers, name, *inputs)
    asked = []

    def bernoulli(key, probability, shape):
        asked.append((probability, shape))
        return golden_layers[f"{name}/keep_mask"].astype(bool)

    monkeypatch.setattr(rng, "bernoulli", bernoulli)
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
    y = layers.GroupNorm().init_with_output(jax.random.key(0), x)[0]
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


# --- what a configuration may not say --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.name": "unet"}, r"model.name='unet' is unknown; known: .*ncsnpp"),
        ({"model.nonlinearity": "gelu"}, "model.nonlinearity='gelu' is unknown; known: elu, lrelu, relu, swish"),
        ({"model.resblock_type": "resnet"}, "model.resblock_type='resnet' is unknown; known: biggan, ddpm"),
        ({"model.progressive": "skip"}, "model.progressive='skip' is unknown; known: none, output_skip, residual"),
        ({"model.progressive_input": "x"}, "model.progressive_input='x' is unknown; known: input_skip, none, residual"),
        ({"model.progressive_combine": "x"}, "model.progressive_combine='x' is unknown; known: cat, sum"),
        ({"model.embedding_type": "x"}, "model.embedding_type='x' is unknown; known: fourier, positional"),
        ({"model.normalization": "BatchNorm"}, "model.normalization='BatchNorm' is unknown; known: GroupNorm"),
        (
            {"model.embedding_type": "fourier", "training.continuous": False},
            "training.continuous=False labels noise levels by index; set model.embedding_type='positional'",
        ),
        ({"model.dropout": 1.0}, r"model.dropout=1.0: expected a probability in \[0, 1\)"),
        ({"model.init_scale": -1.0}, "model.init_scale=-1.0: expected 0"),
        ({"model.nf": 2}, "model.nf=2: expected a whole number of at least 4"),
        ({"model.num_res_blocks": 0}, "model.num_res_blocks=0: expected a whole number of at least 1"),
        ({"model.ch_mult": ()}, r"model.ch_mult=\(\): expected a positive multiple"),
        ({"model.ch_mult": (1, 0)}, r"model.ch_mult=\(1, 0\): expected a positive multiple"),
        ({"data.image_size": 9}, r"data.image_size=9 cannot be halved 1 times .* choose a multiple of 2"),
        ({"data.image_width": 5}, "data.image_width=5 cannot be halved 1 times"),
        (
            {"model.fir": True, "model.fir_kernel": [1, -1]},
            "model.fir_kernel=.* expected at least 2 taps with a positive sum",
        ),
        ({"model.fir": True, "model.fir_kernel": [1]}, "model.fir_kernel=.* expected at least 2 taps"),
        ({"model.nf": 18}, "group normalization of 18 channels: .* 4 groups do not divide them; choose model.nf"),
        (
            {"model.nf": 36, "model.ch_mult": (1, 2)},
            "group normalization of 108 channels: .* 27 groups|of 144 channels",
        ),
    ],
    ids=str,
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        create_model(config_of(SMALL | settings))


@pytest.mark.parametrize("combine", ["sum", "cat"])
@pytest.mark.parametrize("kind", ["biggan", "ddpm"])
def test_widths_are_checked_where_the_network_normalizes(combine, kind):
    settings = {
        "model.progressive_input": "input_skip",
        "model.progressive_combine": combine,
        "model.resblock_type": kind,
    }
    settings |= {"model.ch_mult": (1, 3, 2), "model.num_res_blocks": 2}
    config = config_of(SMALL | settings)
    seen = set()

    def note(call, args, kwargs, context):
        if isinstance(context.module, layers.GroupNorm):
            seen.add(args[0].shape[-1])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        legacy.match_parameters(config)
    assert seen == ncsnpp.normalized_widths(8, (1, 3, 2), 2, combine == "cat")
