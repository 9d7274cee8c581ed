"""Networks against the arrays of the 2021 code, and against what makes them right on their own."""

import functools
import hashlib
import importlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import by_default
from flax.traverse_util import unflatten_dict
from reference import GOLDEN, ReferenceNetwork, config_of, model_and_shape

import legacy
from models import create_model, factory, layers, ncsnpp, ncsnv2, normalization, wideresnet

# The largest of their kind, made of the same layers as the smaller ones.
LARGEST = {"ncsnpp_ve_ffhq1024", "ncsnv2_256"}

# By default few, which together use every kind of layer.
NETWORKS = by_default(
    {"ncsnv2_64_cifar10", "ncsnpp_ve_cifar10_continuous"},
    sorted({path.stem for path in (GOLDEN / "models").glob("[dn]*.npz")} - LARGEST),
)

# Compiled without optimization: half the time, the same numbers.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def _example_max(x):
    return np.abs(x).reshape(len(x), -1).max(1)


# --- networks --------------------------------------------------------------------------------------------------------


def _reference_params(network):
    leaves = legacy.match_parameters(*model_and_shape(network.config))
    flat = {leaf.original: network.parameter(leaf.original, leaf.original_shape) for leaf in leaves}
    return legacy.params_from_score_sde(network.config, flat)


# Two values in one window of its largest pooling differ by less than float32 rounding; which of them is passed on, and
# gets the gradient, depends on the order of operations. In float64 the gradient is the reference's.
NEARLY_TIED = {"ncsnv2_256"}


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in sorted(LARGEST))]
)
def test_network_equals_the_original(name):
    network = ReferenceNetwork(name)
    model, params, golden = create_model(network.config), _reference_params(network), network.arrays

    def loss(params, x):
        y = model.apply({"params": params}, x, jnp.asarray(golden["labels"]))
        return jnp.vdot(y, jnp.asarray(golden["cotangent"], y.dtype)), y

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    with jax.enable_x64(name in NEARLY_TIED):
        dtype = np.float64 if name in NEARLY_TIED else np.float32
        inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, golden["x"]))
        (_, y), gradients = jax.device_get(_jit(run)(*inputs))
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


def test_classifier_equals_the_original():
    """Logits, logits of images in [0, 1], and the gradient of log p(label | x) that guides sampling."""
    network = ReferenceNetwork("wideresnet_b1_m1")
    golden, sigmas = network.arrays, jnp.asarray(network.arrays["sigmas"])
    model = wideresnet.WideResNet(1, 1, num_classes=10)
    leaves = legacy.match_layers(model, golden["x"], sigmas)
    flat = {leaf.path: network.parameter(leaf.original, leaf.original_shape).reshape(leaf.shape) for leaf in leaves}
    params = unflatten_dict(flat)
    logit_fn = wideresnet.make_logit_fn(model, params)
    grad_fn = wideresnet.make_classifier_grad_fn(logit_fn)

    @_jit
    def run(x, sigmas, labels):
        return model.apply({"params": params}, x, sigmas), logit_fn(x, sigmas), grad_fn(x, sigmas, labels)

    names = ("output", "logit_fn_output", "grad_fn_output")
    for got, name in zip(run(golden["x"], sigmas, golden["class_labels"]), names, strict=True):
        assert (_example_max(got - golden[name]) < 1e-5 * _example_max(golden[name])).all(), name


def test_classifier_does_not_blow_up_flat_images():
    """Standardization divides by the standard deviation, but by no less than 1 / sqrt(number of values)."""
    model = wideresnet.WideResNet(1, 1, num_classes=10)
    noise = np.random.RandomState(0).standard_normal((1, 8, 8, 3))
    noise = (noise - noise.mean()) / noise.std()
    x = jnp.asarray(np.concatenate([5 + 1e-3 * noise, 5 + 0.5 * noise]), jnp.float32)
    seen = {}

    def note(call, args, kwargs, context):
        seen.setdefault(context.module.name, args[0] if args else None)
        return call(*args, **kwargs)

    @_jit
    def input_of_the_network(x):
        with nn.intercept_methods(note):
            model.init(jax.random.key(0), x, jnp.ones(2))
        return seen["input"]

    expected = np.concatenate([1e-3 * np.sqrt(192) * noise, noise])
    np.testing.assert_allclose(
        input_of_the_network(x), expected, rtol=1e-3, atol=1e-4
    )  # 5 + 1e-3 has four digits of it left


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
    names = {leaf.path[0] for leaf in legacy.match_parameters(*model_and_shape(config))}
    assert {"down1_attention0", "up1_attention", "middle_attention"} <= names
    assert not {"down0_attention0", "up0_attention"} & names


def test_dropout_is_for_training_only_and_per_example():
    of_one_level = {"model.ch_mult": (1,), "model.attn_resolutions": ()}
    model = create_model(config_of(SMALL | of_one_level | {"model.dropout": 0.3, "model.init_scale": 1.0}))
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
QUICK_TREES = {
    "classifier/wideresnet_noise_conditional",
    "ve/cifar10_ncsnpp_continuous",
    "ve/ffhq_256_ncsnpp_continuous",
    "ve/ncsn/cifar10",
    "ve/ncsnv2/bedroom",
    "vp/cifar10_ddpmpp",
    "vp/ddpm/cifar10_unconditional",
}


def _leaf_config(name):
    module = name.replace("classifier/wideresnet_noise_conditional", "classifier/cifar10_wideresnet")
    return importlib.import_module(f"configs.{module.replace('/', '.')}").get_config()


@functools.cache
def _tree(model_settings, data_settings):
    config = config_of({f"model.{key}": value for key, value in model_settings})
    config.data.update(dict(data_settings))
    config.training.continuous = True
    return legacy.match_parameters(*model_and_shape(config))


def _frozen(room):
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in room.items())


@pytest.mark.parametrize("name", by_default(QUICK_TREES, TREES))
def test_full_size_parameters_are_those_of_the_original(name):
    """The tree of each of the 39 configurations, and of the classifier; equal networks are traced once."""
    expected, config = TREES[name], _leaf_config(name)
    leaves = _tree(_frozen(config.model), _frozen(config.data))
    assert len(leaves) == expected["num_leaves"]
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == expected["num_params"]
    shapes = json.dumps({leaf.original: leaf.original_shape for leaf in leaves}, sort_keys=True)
    assert hashlib.sha256(shapes.encode()).hexdigest() == expected["sha256"]


# --- initial parameters ----------------------------------------------------------------------------------------------


INIT_STATS = json.loads((GOLDEN / "models" / "init_stats.json").read_text())
SHRUNK = {"model.ch_mult": (1, 2), "model.num_res_blocks": 1, "data.image_size": 32}
SHRUNK_NF = {"ve/ffhq_ncsnpp_continuous": 16}  # 32 otherwise


@pytest.mark.parametrize("name", by_default(["vp/ddpm/cifar10"], INIT_STATS))
def test_initial_parameters_have_the_original_statistics(name):
    config, expected = _leaf_config(name), INIT_STATS[name]
    config.update_from_flattened_dict(SHRUNK | {"model.nf": SHRUNK_NF.get(name, 32)})
    x, labels = jnp.zeros((1, 32, 32, 3)), jnp.ones(1)
    params = _jit(create_model(config).init)(jax.random.key(0), x, labels)["params"]
    flat = legacy.params_to_score_sde(config, params)
    assert flat.keys() == expected.keys()
    for path, value in flat.items():
        shape, mean, std, absmax = expected[path]
        assert list(value.shape) == shape
        if std == 0:
            np.testing.assert_array_equal(value, mean)
            continue
        # Both are samples of n numbers: 5 standard errors of the difference, of a normal law even for uniform ones. Of
        # few numbers the spread is known badly: that of a uniform law with their largest value, if that is larger.
        error = np.sqrt(2 / value.size) * (std if value.size >= 100 else max(std, absmax / np.sqrt(3)))
        assert abs(value.mean() - mean) < 5 * error, path
        assert abs(value.std() - std) < 5 * error * np.sqrt(0.5), path
        # The largest of few numbers varies by its own size, of many by little.
        assert absmax / 4 < np.abs(value).max() < 4 * absmax, path


# --- what a configuration may not say --------------------------------------------------------------------------------


NCSN = {"model.name": "ncsn", "model.normalization": "InstanceNorm++"}
CLASSIFIER = {"model.name": "wideresnet_noise_conditional", "model.num_classes": 10}


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
        ({"model.dropout": 1.0}, r"model.dropout=1.0: expected 0 or more and less than 1"),
        ({"model.init_scale": -1.0}, "model.init_scale=-1.0: expected 0"),
        ({"model.nf": 2}, "model.nf=2: expected 4 or more"),
        ({"model.num_res_blocks": -1}, "model.num_res_blocks=-1: expected 0 or more"),
        ({"model.normalization": "InstanceNorm"}, "model.normalization='InstanceNorm': this network has 'GroupNorm'"),
        ({"model.name": "ddpm"}, "group normalization of 8 channels: 32 groups do not divide them; .* 32 channels"),
        (NCSN | {"model.normalization": "VarianceNorm"}, "this network has 'InstanceNorm..' only"),
        (NCSN | {"model.interpolation": "cubic"}, "model.interpolation='cubic' is unknown; known: bilinear, nearest"),
        (NCSN | {"data.image_size": 5}, "images of 5x5 pixels .* cannot be halved 1 times"),
        (NCSN | {"model.name": "ncsnv2_256", "data.image_size": 12}, "of 12x12 pixels .* 3 times, .* multiples of 8"),
        ({"model.name": "ncsnv2_64"}, "group normalization of 8 channels: 32 groups do not divide them"),
        (
            NCSN | {"model.num_classes": 10},
            "model.name='ncsn' cannot be conditioned on classes; .*: ddpm, ncsnpp",
        ),
        ({"model.num_classes": -1}, "model.num_classes=-1: expected 0 or more"),
        ({"model.num_classes": 3, "model.conditional": False}, "leaves out; set model.conditional=True"),
        (CLASSIFIER | {"model.num_classes": 1}, "model.num_classes=1: a classifier needs 2 or more"),
        (CLASSIFIER | {"data.image_size": 6}, "images of 6x6 pixels .* cannot be halved twice, .* multiples of 4"),
        (CLASSIFIER | {"model.blocks_per_group": 0}, "model.blocks_per_group=0: expected 1 or more"),
        ({"model.ch_mult": ()}, r"model.ch_mult=\(\): expected a positive multiple"),
        ({"model.ch_mult": (1, 0)}, r"model.ch_mult=\(1, 0\): expected a positive multiple"),
        ({"data.image_size": 9}, r"data.image_size=9 cannot be halved 1 times .* choose a multiple of 2"),
        ({"data.image_width": 5}, "data.image_width=5 cannot be halved 1 times"),
        (
            {"model.fir": True, "model.fir_kernel": [1, -1]},
            "model.fir_kernel=.* at least 2 taps with a positive sum",
        ),
        ({"model.fir": True, "model.fir_kernel": [1]}, "model.fir_kernel=.* at least 2 taps"),
        ({"model.fir": True, "model.fir_kernel": [[1, 2], [3, 4]]}, "model.fir_kernel=.* a list of numbers"),
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
        if isinstance(context.module, normalization.GroupNorm):
            seen.add(args[0].shape[-1])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        legacy.match_parameters(*model_and_shape(config))
    assert seen == ncsnpp.normalized_widths(8, (1, 3, 2), 2, combine == "cat")


@pytest.mark.parametrize(
    "settings",
    [
        {"model.name": "ddpm", "model.scale_by_sigma": True, "model.nf": 32},
        {"model.name": "ncsnv2_64", "model.scale_by_sigma": True, "model.normalization": "InstanceNorm++"},
        {"model.scale_by_sigma": True},
        NCSN,
    ],
    ids=str,
)
def test_labels_that_training_does_not_give_are_refused(settings):
    config = config_of(SMALL | settings)
    model = create_model(config)
    factory.check_labels(model, continuous=False)
    with pytest.raises(ValueError, match=r"takes the label for the index of a level .* set training.continuous=False"):
        factory.check_labels(model, continuous=True)


def test_a_network_that_is_told_sigma_needs_no_levels():
    config = config_of(SMALL | {"model.scale_by_sigma": True, "model.embedding_type": "fourier"})
    config.training.continuous = True
    factory.check_labels(create_model(config), continuous=True)


class Constant(nn.Module):
    """A network of one's own: the same image for every input."""

    nf: int

    @nn.compact
    def __call__(self, x, time_cond, train=False):
        return x * 0 + self.param("value", nn.initializers.constant(self.nf), ())


def test_a_new_network_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(factory.NETWORKS, "constant", lambda config: Constant(config.model.nf))
    config = config_of(SMALL | {"model.name": "constant"})
    model = create_model(config)
    factory.check_labels(model, continuous=config.training.continuous)
    x = jnp.ones((2, 8, 8, 1))
    np.testing.assert_array_equal(model.init_with_output(jax.random.key(0), x, jnp.ones(2))[0], 8 * np.ones(x.shape))


def test_a_classifier_is_no_score_network():
    config = config_of({"training.continuous": True, "data.image_size": 8} | CLASSIFIER)
    factory.check_labels(create_model(config), continuous=True)  # it is told sigma in any case
    with pytest.raises(ValueError, match=r"'wideresnet_noise_conditional' is a classifier, .*networks: ddpm, ncsn, "):
        factory.require_score_network(config.model.name)


def test_depths_of_ncsnv2_are_those_of_their_resolutions():
    """At the resolution it was made for, each layout comes down to 32 pixels a side, where it dilates instead."""
    for resolution, layout in ncsnv2.LAYOUTS.items():
        assert resolution >> layout.num_halvings == 32
        assert len(layout.decoder) == len(layout.stages)
