"""Networks computed in bfloat16, and with blocks computed again in the gradient, against float32 and against plain."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import by_default
from reference import ReferenceNetwork, model_and_shape
from test_models import SMALL, _jit, _reference_params, config_of

import datasets
import legacy
from experiment.build import build_experiment, map_train_steps
from models import blocks, cpu, create_model, layers, refinenet, wideresnet
from parallel import distributed
from workdir import compatibility
from workdir import folder as workdirs

ROUNDING = 2**-9 / np.sqrt(3)  # root mean square of the relative error of one rounding to bfloat16's 8 bits


# A moderate NCSN++: 16x16 pixels, attention, FIR filters, the image growing at both ends.
MODERATE = SMALL | {
    "data.image_size": 16,
    "model.nf": 16,
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (8,),
    "model.fir": True,
    "model.progressive": "output_skip",
    "model.progressive_input": "residual",
    "model.dropout": 0.2,
    "model.init_scale": 1.0,
}
# Together every kind of layer: DDPM, NCSN, NCSNv2, and NCSN++ with every kind of growing input and output.
QUICK = ("ncsnpp_ve_cifar10_continuous", "ncsnv2_64_cifar10")
NETWORKS = [
    *QUICK,
    *(
        pytest.param(name, marks=pytest.mark.exhaustive)
        for name in (
            "ddpm_ve_cifar10",
            "ncsn_cifar10",
            "ncsnpp_opt_ddpmblock_firTrue_conv",
            "ncsnpp_opt_outskip_residualin_noskiprescale",
            "ncsnpp_vp_ddpmpp_continuous",
        )
    ),
]


@functools.cache
def network_of(name):
    network = ReferenceNetwork(name)
    return network.config, _reference_params(network), network.arrays


def build(name, **settings):
    """Returns (params, x) -> the vector product of the output with the cotangent of the reference, and the output."""
    config, _, arrays = network_of(name)
    config.model.update({"dtype": "float32", "remat": False} | settings)
    model = create_model(config)

    def evaluate(params, x):
        y = model.apply({"params": params}, x, jnp.asarray(arrays["labels"]))
        return jnp.vdot(y, arrays["cotangent"]), y

    return evaluate


def differentiate(evaluate, params, x):
    """Returns the output, and the gradient in the parameters and x in one vector."""
    (_, y), gradients = jax.device_get(_jit(jax.value_and_grad(evaluate, (0, 1), has_aux=True))(params, x))
    return y, np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradients)])


def equations(jaxpr):
    """Yields every equation of a traced function, and of the functions that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def dtypes_by_primitive(function, *arguments):
    """Counts the dtypes, of inputs and outputs, with which each primitive stands in a function."""
    counts = collections.defaultdict(collections.Counter)
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        kinds = tuple(v.aval.dtype.name for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "dtype"))
        counts[equation.primitive.name][kinds] += 1
    return counts


def relative_error(found, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# --- bfloat16 --------------------------------------------------------------------------------------------------------

F32, BF16 = "float32", "bfloat16"


def check_dtypes(forward, backward, num_embeddings, nonlinearity):
    """Convolutions and linear maps of features are bfloat16, and everything else that counts is float32."""
    # On a CPU only FIR filters and the like are convolutions.
    assert set(forward["conv_general_dilated"]) == set(backward["conv_general_dilated"]) <= {(BF16, BF16, BF16)}
    assert forward["dot_general"][F32, F32, F32] == num_embeddings
    # On a CPU, the others are products of bfloat16 that are summed in float32.
    assert (BF16, BF16, F32) in forward["dot_general"]
    assert set(backward["dot_general"]) <= {(BF16, BF16, BF16), (BF16, BF16, F32), (F32, F32, F32)}
    # Sums over pixels, channels and examples: of normalizations, and the gradients of biases, scales and embeddings.
    assert set(backward["reduce_sum"]) == {(F32, F32)}
    assert set(backward["rsqrt"]) == {(F32, F32)}  # of variances
    if nonlinearity != "elu":  # which has an exponential of its own
        assert set(backward["exp"]) <= {(F32, F32)}  # the softmax


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_bfloat16_and_what_is_not(name):
    config, params, arrays = network_of(name)
    calls, _ = legacy.parameters.trace_network(*model_and_shape(config))
    num_embeddings = sum(type(layer) is layers.Dense for layer in calls.values())
    evaluate, inputs = build(name, dtype="bfloat16"), (params, arrays["x"])
    backward = functools.partial(jax.value_and_grad(evaluate, (0, 1), has_aux=True))
    counts = dtypes_by_primitive(evaluate, *inputs), dtypes_by_primitive(backward, *inputs)
    counts[0]["dot_general"][F32, F32, F32] -= 1  # that with the cotangent
    check_dtypes(*counts, num_embeddings, config.model.nonlinearity)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(backward, *inputs))} == {F32}


def test_the_classifier_is_bfloat16_where_a_score_network_is():
    model = wideresnet.WideResNet(1, 1, num_classes=4, dtype=jnp.dtype(jnp.bfloat16))
    x, sigmas = jnp.zeros((2, 8, 8, 1)), jnp.ones(2)
    params = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), x, sigmas)["params"]
    evaluate = lambda params, x: model.apply({"params": params}, x, sigmas).sum()  # noqa: E731
    backward = jax.value_and_grad(evaluate, (0, 1))
    linear = sum(
        len(path) > 1
        and path[-2].key in ("embedding", "embedding1", "embedding2", "output")
        and path[-1].key == "kernel"
        for path, _ in jax.tree.leaves_with_path(params)
    )
    check_dtypes(dtypes_by_primitive(evaluate, params, x), dtypes_by_primitive(backward, params, x), linear, "relu")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(backward, params, x))} == {F32}


# Two values of a pooled window that are closer than the rounding change places, and the gradient goes the other way.
HAS_MAXIMA = {"ncsnv2_64_cifar10"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_float32_up_to_its_rounding(name):
    """The error is that of as many independent roundings, one after the other, as there are bfloat16 results.

    That bounds it, since what is rounded in a branch does not pass through all others; and it is not far from it, or
    something would not be bfloat16.
    """
    config, params, arrays = network_of(name)
    narrow, wide = (build(name, dtype=dtype) for dtype in ("bfloat16", "float32"))
    counts = dtypes_by_primitive(narrow, params, arrays["x"])
    num_roundings = sum(n for kinds in counts.values() for dtypes, n in kinds.items() if dtypes[-1] == BF16)
    bound = ROUNDING * np.sqrt(num_roundings)
    y, gradient = differentiate(narrow, params, arrays["x"])
    expected_y, expected_gradient = differentiate(wide, params, arrays["x"])
    # Without 1 / sqrt(2) in every residual sum the features grow, and the roundings of each branch weigh less: 5.9
    # instead of 3.6 for one of the networks.
    least = bound / 5 if config.model.skip_rescale else bound / 8
    for image, expected in zip(y, expected_y, strict=True):
        assert least < relative_error(image, expected) < bound
    if name not in HAS_MAXIMA:
        assert relative_error(gradient, expected_gradient) < 1.5 * bound  # there and back


def bytes_kept(**settings):
    """Bytes that the gradient of the moderate network keeps beside the parameters, whatever a backend makes of them."""
    x, labels = jnp.zeros((8, 16, 16, 1)), jnp.ones(8)
    model = create_model(config_of(MODERATE | {f"model.{key}": value for key, value in settings.items()}))
    params = jax.eval_shape(model.init, jax.random.key(0), x, labels)

    def backward(x, params):
        evaluate = lambda x: model.apply(params, x, labels, train=True, rngs={"dropout": jax.random.key(0)})  # noqa: E731
        return jax.vjp(evaluate, x)[1]

    count = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if is_float(leaf))  # noqa: E731
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return count(jax.eval_shape(backward, x, params)) - count(params)


@pytest.mark.exhaustive
def test_bfloat16_keeps_half_for_the_gradient():
    """Also of normalizations, which widen what they get: the widened features are not kept."""
    assert bytes_kept(dtype="bfloat16") < 0.55 * bytes_kept(dtype="float32")


def losses_on_digits(**changes):
    """The losses of 200 steps, at one seed, and the last state."""
    settings = {"training__batch_size": 32, "training__n_jitted_steps": 50, "optim__warmup": 20, "optim__lr": 2e-3}
    config = tiny.make_config(**settings, **changes)
    experiment, source = build_experiment(config), datasets.build_source(config, "train")
    state, steps = distributed.replicate(jax.device_get(experiment.init_state())), map_train_steps(experiment)
    losses = []
    batches = datasets.training_batches(source, seed=config.seed, first_step=0, batch_size=32, steps_per_call=50)
    for batch in itertools.islice(batches, 4):
        state, metrics = steps(experiment.keys["train"], state, batch)
        losses.append(np.asarray(metrics["loss"])[0])
    return np.concatenate(losses), state


@pytest.mark.exhaustive
def test_the_loss_curve_of_digits_is_that_of_float32():
    """Means of 50 steps within 1 % (measured: 0.2 %; another seed's differ by 1 to 10 %), every step within 4 %."""
    wide, wide_state = losses_on_digits()
    narrow, state = losses_on_digits(model__dtype="bfloat16")
    assert wide[-50:].mean() < 0.25 * wide[0]  # it has learned
    assert (narrow != wide).any()
    np.testing.assert_allclose(narrow.reshape(-1, 50).mean(1), wide.reshape(-1, 50).mean(1), rtol=1e-2)
    np.testing.assert_allclose(narrow, wide, rtol=4e-2)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, state, wide_state))  # checkpoints of one are those of the other


# --- blocks that are computed again ----------------------------------------------------------------------------------

LEAST_SAVING = 1.5  # factor by which what a gradient keeps shrinks at the least
# On a CPU the XLA of JAX 0.10 merges what jax.checkpoint computes again with the first computation: nothing is saved.
MERGES = jax.__version_info__ < (0, 12)


@pytest.mark.exhaustive
def test_a_gradient_keeps_what_is_dear_and_with_remat_only_what_goes_into_blocks():
    marked, remat = bytes_kept(dtype="float32"), bytes_kept(dtype="float32", remat=True)
    assert marked > LEAST_SAVING * remat
    with cpu.for_platform("cuda"):
        assert bytes_kept(dtype="float32") > LEAST_SAVING * marked
        assert bytes_kept(dtype="float32", remat=True) <= remat


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_cpu", [True, False])
def test_remat_saves_memory_and_changes_nothing(monkeypatch, is_cpu):
    """Of loss and gradients in training, dropout and all; the memory is that of the program for an accelerator.

    Not bit for bit: XLA fuses other operations with one another where a block is computed again. On a CPU what is cheap
    is computed again anyway, and the workspaces of convolutions count.
    """
    monkeypatch.setattr(cpu, "is_target", lambda: is_cpu)
    x, labels = jax.random.normal(jax.random.key(1), (8, 16, 16, 1)), jnp.linspace(1.0, 900.0, 8)
    results, temporary_bytes = [], []
    params = _jit(create_model(config_of(MODERATE)).init)(jax.random.key(0), x, labels)["params"]
    for remat in (False, True):
        model = create_model(config_of(MODERATE | {"model.remat": remat}))

        def loss(params, x, model=model):
            y = model.apply({"params": params}, x, labels, train=True, rngs={"dropout": jax.random.key(2)})
            return jnp.square(y).mean()

        program = _jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile()
        value, gradients = jax.device_get(program(params, x))
        results.append((value, np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradients)])))
        temporary_bytes.append(program.memory_analysis().temp_size_in_bytes)
    (loss_plain, gradient_plain), (loss_again, gradient_again) = results
    np.testing.assert_allclose(loss_again, loss_plain, rtol=1e-6)
    assert relative_error(gradient_again, gradient_plain) < 2e-6
    assert MERGES or is_cpu or temporary_bytes[0] > LEAST_SAVING * temporary_bytes[1]


BLOCKS = (blocks.DDPMBlock, blocks.BigGANBlock, layers.Attention, refinenet.ResidualBlock, refinenet.ResidualUnits)
BLOCKS += (refinenet.MultiResolutionFusion, refinenet.ChainedPooling, wideresnet.WideBlock)


def small(name, **settings):
    """A small network of a kind: its configuration, its layers, and the shapes of its parameters."""
    of_kind = {"model.name": name, "model.nf": 32, "model.num_scales": 10}
    of_kind |= {"model.num_classes": 3} if name.startswith("wide") else {}
    of_kind |= {"model.normalization": "InstanceNorm++"} if name.startswith("ncsnv2") or name == "ncsn" else {}
    of_kind |= {"model.blocks_per_group": 1, "model.channel_multiplier": 1}
    config = config_of(SMALL | of_kind | {f"model.{key}": value for key, value in settings.items()})
    calls, shapes = legacy.parameters.trace_network(*model_and_shape(config))
    return config, [(path, type(layer)) for path, layer in calls.items()], shapes


def evaluate_small(config, params):
    return create_model(config).apply({"params": params}, jnp.zeros((2, 8, 8, 1)), jnp.ones(2))


@pytest.mark.parametrize(
    "name",
    by_default(
        ["ncsnpp", "ncsnv2_64"], ["ddpm", "ncsn", "ncsnpp", "ncsnv2_64", "ncsnv2_128", "wideresnet_noise_conditional"]
    ),
)
def test_every_block_of_every_network_is_computed_again(name):
    config, calls, shapes = small(name, remat=True)
    assert small(name)[1:] == (calls, shapes)  # so that checkpoints of the 2021 code are read alike
    jaxpr = jax.make_jaxpr(functools.partial(evaluate_small, config))(shapes).jaxpr
    num_remat = sum(each.primitive.name.startswith(("remat", "checkpoint")) for each in equations(jaxpr))
    assert num_remat == sum(layer in BLOCKS for _, layer in calls) > 0


@pytest.mark.parametrize(
    "name", by_default(["ncsnpp"], ["ddpm", "ncsn", "ncsnpp", "ncsnv2_64", "wideresnet_noise_conditional"])
)
def test_outputs_are_float32_even_if_nothing_divides_them(name):
    config, calls, shapes = small(name, dtype="bfloat16")
    assert small(name)[1:] == (calls, shapes)  # the tree is that of float32
    assert jax.eval_shape(functools.partial(evaluate_small, config), shapes).dtype == np.float32


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [getattr(name, "values", [name])[0] for name in NETWORKS])
def test_remat_changes_nothing_in_any_network(name):
    _, params, arrays = network_of(name)
    plain, again = (differentiate(build(name, remat=remat), params, arrays["x"]) for remat in (False, True))
    for found, expected in zip(again, plain, strict=True):
        assert relative_error(found, expected) < 2e-6


# --- settings --------------------------------------------------------------------------------------------------------


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"model.dtype='float16' is unknown; known: bfloat16, float32"):
        create_model(config_of(SMALL | {"model.dtype": "float16"}))


def test_a_run_can_be_resumed_in_another_dtype_and_with_remat(tmp_path):
    workdirs.record_config(tmp_path, tiny.make_config())
    compatibility.check_same_experiment(tmp_path, tiny.make_config(model__dtype="bfloat16", model__remat=True))
    with pytest.raises(workdirs.WorkdirError, match=r"model.nf: 8 there, 16 now"):
        compatibility.check_same_experiment(tmp_path, tiny.make_config(model__nf=16, model__remat=True))


def test_reports_tell_samples_in_bfloat16():
    settings = build_experiment(tiny.make_config(model__dtype="bfloat16")).sampler_settings()
    assert settings["model.dtype"] == "bfloat16"
    assert "model.dtype" not in build_experiment(tiny.make_config()).sampler_settings()
