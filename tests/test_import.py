"""Checkpoints of the 2021 programs: what they computed is computed here, and training goes on as theirs would."""

import collections

import jax
import jax.numpy as jnp
import legacy_writers
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict
from reference import ReferenceNetwork, model_and_shape

import legacy
import run_lib
from configs.classifier import cifar10_wideresnet
from experiment.build import build_experiment
from modes import importing
from training import loop as train_loop
from workdir.checkpoints import CheckpointError, Checkpoints
from workdir.folder import WorkdirError

STEP, OPTIMIZER_STEP, LR, WARMUP = 38, 36, 3e-3, 100
NAMES = ("params", "params_ema", "mu", "nu")


@pytest.fixture(scope="module")
def config():
    return tiny.make_config(optim__lr=LR, optim__warmup=WARMUP, model__ema_rate=0.9)


@pytest.fixture(scope="module")
def leaves(config):
    return legacy.match_parameters(*model_and_shape(config))


@pytest.fixture(scope="module")
def groups(leaves):
    """{original path: array} of the parameters, their average and both moments."""
    generator = np.random.RandomState(0)
    shapes = {leaf.original: leaf.original_shape for leaf in leaves}
    drawn = {
        name: {path: generator.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
        for name in NAMES
    }
    drawn["mu"] = {path: 1e-2 * value for path, value in drawn["mu"].items()}
    drawn["nu"] = {path: 1e-4 * value**2 for path, value in drawn["nu"].items()}
    return drawn


@pytest.fixture
def state(groups):
    rates = {"step": STEP, "optimizer_step": OPTIMIZER_STEP, "lr": LR, "ema_rate": 0.9}
    return legacy_writers.score_sde_state(**groups, **rates)


@pytest.fixture
def checkpoint(state, tmp_path):
    path = tmp_path / "checkpoint_3"
    path.write_bytes(legacy_writers.pack(state))
    return path


def restore(config, workdir, number):
    template = build_experiment(config).state_template()
    freq = config.training.snapshot_freq
    with Checkpoints(workdir, snapshot_freq=freq, template=template, read_only=True) as checkpoints:
        return checkpoints.restore_snapshot(number)


def adam_state(state):
    [adam] = [part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState)]
    return adam


def assert_same(left, right):
    left, right = flatten_dict(left), flatten_dict(right)
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=str(path))


# --- what is computed afterwards -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_imported_network_computes_what_the_original_did(tmp_path):
    network = ReferenceNetwork("ncsnpp_ve_cifar10_continuous")
    shapes = {leaf.original: leaf.original_shape for leaf in legacy.match_parameters(*model_and_shape(network.config))}
    averaged = {path: network.parameter(path, shape) for path, shape in shapes.items()}
    other = {path: 2 * value for path, value in averaged.items()}
    rates = {"step": 50_005, "optimizer_step": 50_005, "lr": 2e-4, "ema_rate": 0.999}
    state = legacy_writers.score_sde_state(other, averaged, other, other, **rates)
    (tmp_path / "checkpoint_1").write_bytes(legacy_writers.pack(state))

    assert importing.import_checkpoint(network.config, tmp_path / "checkpoint_1", tmp_path / "run")
    imported = restore(network.config, tmp_path / "run", 1)
    assert int(imported.step) == 50_005
    model = build_experiment(network.config).model
    inputs = network.arrays["x"], network.arrays["labels"]
    output = np.asarray(jax.jit(model.apply)({"params": imported.params_ema}, *inputs))
    for sample, expected in zip(output, network.arrays["output"], strict=True):
        assert np.abs(sample - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_training_goes_on_as_the_original_would(config, leaves, groups, checkpoint, tmp_path):
    """Against Adam by hand: warm-up by the step before the update, bias correction by the update's own number."""
    importing.import_checkpoint(config, checkpoint, tmp_path / "run")
    state = restore(config, tmp_path / "run", STEP // config.training.snapshot_freq)
    assert (int(state.step), int(adam_state(state).count)) == (STEP, OPTIMIZER_STEP)
    grads = jax.tree.map(lambda p: np.float32(1e-4) * np.cos(100 * p), state.params)
    assert float(optax.tree.norm(grads)) < config.optim.grad_clip  # so that no clipping enters
    updates, _ = jax.jit(build_experiment(config).optimizer.update)(grads, state.opt_state, state.params)

    flat_updates, flat_grads = flatten_dict(updates), flatten_dict(grads)
    for leaf in leaves:
        g = flat_grads[leaf.path].astype(np.float64)
        m = 0.9 * groups["mu"][leaf.original].reshape(leaf.shape).astype(np.float64) + 0.1 * g
        v = 0.999 * groups["nu"][leaf.original].reshape(leaf.shape).astype(np.float64) + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9 ** (OPTIMIZER_STEP + 1)), v / (1 - 0.999 ** (OPTIMIZER_STEP + 1))
        expected = -LR * STEP / WARMUP * m_hat / (np.sqrt(v_hat) + 1e-8)
        np.testing.assert_allclose(flat_updates[leaf.path], expected, rtol=2e-5)  # 1 - b^37 in float32


@pytest.mark.slow
def test_export_undoes_import_to_the_byte(config, checkpoint, tmp_path):
    importing.import_checkpoint(config, checkpoint, tmp_path / "run")
    chosen = tiny.make_config(optim__lr=LR, optim__warmup=WARMUP, model__ema_rate=0.9, eval__begin_ckpt=3)
    importing.export_checkpoint(chosen, tmp_path / "run", tmp_path / "out" / "checkpoint_3")
    assert (tmp_path / "out" / "checkpoint_3").read_bytes() == checkpoint.read_bytes()
    with pytest.raises(ValueError, match="checkpoint_3 exists; nothing was overwritten: choose another --checkpoint"):
        importing.export_checkpoint(chosen, tmp_path / "run", tmp_path / "out" / "checkpoint_3")
    with pytest.raises(ValueError, match=r"cannot write /dev/null/checkpoint: .*; choose another"):
        importing.export_checkpoint(chosen, tmp_path / "run", "/dev/null/checkpoint")
    with pytest.raises(CheckpointError, match=r"checkpoint 1 is not in .*; present: 3"):
        importing.export_checkpoint(config, tmp_path / "run", tmp_path / "out" / "checkpoint_1")


def test_bare_parameters_start_anew(config, groups, tmp_path):
    path = tmp_path / "params"
    path.write_bytes(legacy_writers.pack(legacy_writers.nest(groups["params"])))
    importing.import_checkpoint(config, path, tmp_path / "run")
    state = restore(config, tmp_path / "run", 0)
    assert (int(state.step), int(adam_state(state).count)) == (0, 0)
    assert_same(state.params, legacy.params_from_score_sde(config, groups["params"]))
    assert_same(state.params, state.params_ema)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((adam_state(state).mu, adam_state(state).nu)))


@pytest.mark.slow
def test_a_bare_classifier_computes_what_the_original_did(tmp_path):
    """The 2021 code kept classifiers as their parameters alone."""
    network = ReferenceNetwork("wideresnet_b1_m1")
    config = cifar10_wideresnet.get_config()
    config.model.update(blocks_per_group=1, channel_multiplier=1)
    config.data.image_size = 16
    shapes = {leaf.original: leaf.original_shape for leaf in legacy.match_parameters(*model_and_shape(config))}
    flat = {path: network.parameter(path, shape) for path, shape in shapes.items()}
    (tmp_path / "classifier").write_bytes(legacy_writers.pack(legacy_writers.nest(flat)))
    importing.import_checkpoint(config, tmp_path / "classifier", tmp_path / "run")
    imported = restore(config, tmp_path / "run", 0)
    model = build_experiment(config).model
    output = jax.jit(model.apply)({"params": imported.params}, network.arrays["x"], network.arrays["sigmas"])
    expected = network.arrays["output"]
    assert (np.abs(output - expected).max(1) <= 1e-5 * np.abs(expected).max(1)).all()
    for mode in (run_lib.train, run_lib.evaluate):
        with pytest.raises(ValueError, match="is a classifier, which this mode cannot use"):
            mode(config, tmp_path / "run")


# --- refusals: in one sentence, with nothing written -----------------------------------------------------------------


def change(tree, path, value):
    """Returns nested dictionaries with one entry changed, or without it if `value` is None."""
    flat = flatten_dict(tree, sep="/") | {path: value}
    return {"model_state": {}} | legacy_writers.nest({path: value for path, value in flat.items() if value is not None})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("params_ema/Conv_0/bias", None, r"1 missing \(params_ema/input/bias\)"),
        ("optimizer/target/Conv_9/bias", np.zeros(3, np.float32), r"1 left over \(optimizer/target/Conv_9/bias\)"),
        ("params_ema/Conv_0/bias", np.zeros(5, np.float32), r"1 of another shape \(params_ema/input/bias\)"),
        ("params_ema/Conv_0/bias", np.zeros(8), r"1 float64, expected float32 \(params_ema/input/bias\)"),
        ("params_ema/Conv_0/bias", np.full(8, np.nan, np.float32), r"1 holds NaN or infinity \(params_ema/inp"),
        ("model_state/x", np.zeros(2, np.float32), r"1 left over \(model_state/x\)"),
        ("params_ema/Conv_0/bias", 3, r"params_ema/Conv_0/bias is int, not an array"),
        ("step", np.array(-1, np.int32), r"step=-1 is not a number of steps"),
        ("step", np.zeros(2, np.int32), r"step is ndarray, not a number"),
        ("lr", None, r"lr is NoneType, not a number"),
        ("optimizer", np.zeros(2, np.int32), r"it has no map optimizer/state/param_states"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(config, state, tmp_path, path, value, message):
    tree = state if path != "optimizer" else {key: value for key, value in state.items() if key != path}
    (tmp_path / "file").write_bytes(legacy_writers.pack(change(tree, path, value)))
    with pytest.raises(ValueError, match=message) as error:
        importing.import_checkpoint(config, tmp_path / "file", tmp_path / "run")
    assert str(tmp_path / "file") in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"{path} cannot be read: {reason}"):
            legacy.read_checkpoint(path, list)


def test_a_dry_run_lists_every_tensor_and_writes_nothing(config, leaves, state, checkpoint, tmp_path, capsys):
    assert importing.import_checkpoint(config, checkpoint, tmp_path / "run", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 * len(leaves) + 1
    [row] = [" ".join(line.split()) for line in lines if line.startswith("optimizer/target/Conv_0/kernel ")]
    assert row == "optimizer/target/Conv_0/kernel (3, 3, 1, 8) params/input/kernel (3, 3, 1, 8)"
    assert lines[-1].endswith(f"fits: {4 * len(leaves)} tensors, step {STEP}, would become checkpoint 3")

    checkpoint.write_bytes(legacy_writers.pack(change(state, "params_ema/Conv_0/bias", None)))
    assert not importing.import_checkpoint(config, checkpoint, tmp_path / "run", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    [missing] = [" ".join(line.split()) for line in lines if line.startswith("- ")]
    assert missing == "- - params_ema/input/bias (8,) missing"
    assert "does not fit this configuration: 1 missing (params_ema/input/bias)" in lines[-1]
    assert not (tmp_path / "run").exists()


def test_an_occupied_workdir_is_left_alone(config, checkpoint, tmp_path):
    importing.import_checkpoint(config, checkpoint, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(CheckpointError, match="checkpoints/3 exists; nothing was overwritten"):
        importing.import_checkpoint(config, checkpoint, tmp_path / "run")
    other = tiny.make_config(data__random_flip=True)
    with pytest.raises(WorkdirError, match=r"another experiment \(data.random_flip: False there, True now"):
        importing.import_checkpoint(other, checkpoint, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_other_rates_and_an_odd_step_are_told(checkpoint, tmp_path, caplog):
    config = tiny.make_config(optim__lr=2e-4, optim__warmup=WARMUP, model__ema_rate=0.9, training__n_jitted_steps=4)
    importing.import_checkpoint(config, checkpoint, tmp_path / "run", dry_run=True)
    assert "the original trained with optim.lr=0.003, this configuration has 0.0002" in caplog.text
    assert "model.ema_rate" not in caplog.text
    assert "step 38 of the newest checkpoint is not a multiple of training.n_jitted_steps=4" in caplog.text


def test_training_from_a_step_at_which_nothing_is_due_is_refused():
    train_loop.check_first_step(38, 2)
    with pytest.raises(ValueError, match=r"step 38 .* of training.n_jitted_steps=4, .*; set training.n_jitted_steps=2"):
        train_loop.check_first_step(38, 4)


# --- score_sde_pytorch -----------------------------------------------------------------------------------------------

# The layers of this network, in the order in which score_sde_pytorch's constructor makes them, read off its source.
BLOCK = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1")
ATTENTION = ("GroupNorm_0", "NIN_0", "NIN_1", "NIN_2", "NIN_3")
LAYERS = {
    "Dense_0": (),
    "Dense_1": (),
    "Conv_0": (),
    "ResnetBlockBigGANpp_0": BLOCK,
    "ResnetBlockBigGANpp_1": BLOCK,
    "AttnBlockpp_0": ATTENTION,
    "ResnetBlockBigGANpp_2": BLOCK,
    "ResnetBlockBigGANpp_3": (*BLOCK, "Conv_2"),
    "ResnetBlockBigGANpp_4": (*BLOCK, "Conv_2"),
    "GroupNorm_0": (),
    "Conv_1": (),
}
FREQUENCIES = "GaussianFourierProjection_0"  # made first, if at all; no optimizer and no average knows it
PARAMETERS = {"GroupNorm": ("scale", "bias"), "NIN": ("W", "b"), "GaussianFourierProjection": ("W",)}


def torch_parameters(flat):
    """Returns {original path: (PyTorch's name, value in its layout)}, in PyTorch's order of parameters."""
    layers = {FREQUENCIES: ()} | LAYERS if f"{FREQUENCIES}/W" in flat else LAYERS
    parameters = {}
    for number, (layer, parts) in enumerate(layers.items()):
        for part in parts or (layer,):
            kind = part.split("_")[0]
            for name in PARAMETERS.get(kind, ("kernel", "bias")):
                original = "/".join([layer, *([part] if parts else []), name])
                value = flat[original]
                if kind == "GroupNorm":
                    value = value.reshape(-1)
                elif name == "kernel":
                    value = np.moveaxis(value, (-1, -2), (0, 1))  # [..., in, out] to [out, in, ...]
                torch_name = {"kernel": "weight", "scale": "weight"}.get(name, name)
                parameters[original] = (
                    ".".join([f"all_modules.{number}", *([part] if parts else []), torch_name]),
                    value,
                )
    return parameters


def torch_state(groups):
    """Returns a training state as score_sde_pytorch saves it."""
    values = {name: [value for _, value in torch_parameters(groups[name]).values()] for name in NAMES}
    names = [name for name, _ in torch_parameters(groups["params"]).values()]
    model = collections.OrderedDict({"module.sigmas": np.geomspace(50, 0.01, 7)})
    model.update({f"module.{name}": value for name, value in zip(names, values["params"], strict=True)})
    moments = [
        {"step": OPTIMIZER_STEP, "exp_avg": mu, "exp_avg_sq": nu}
        for mu, nu in zip(values["mu"], values["nu"], strict=True)
    ]
    numpy_rate = legacy_writers.numpy_number(1e-3)  # what score_sde_pytorch's warm-up leaves there
    group = {"lr": numpy_rate, "betas": (0.9, 0.999), "eps": 1e-8, "params": list(range(len(names)))}
    untrained = int(f"{FREQUENCIES}/W" in groups["params"])
    return {
        "optimizer": {"state": dict(list(enumerate(moments))[untrained:]), "param_groups": [group]},
        "model": model,
        "ema": {"decay": 0.9, "num_updates": STEP, "shadow_params": values["params_ema"][untrained:]},
        "step": STEP,
    }


def read(path, config, leaves):
    network = config.model.name, *model_and_shape(config), leaves
    return legacy.read_checkpoint(path, lambda: legacy.match_torch_parameters(*network))


@pytest.mark.parametrize("write", [legacy_writers.write_zip, legacy_writers.write_legacy])
def test_a_pytorch_checkpoint_gives_the_same_state(config, leaves, groups, checkpoint, tmp_path, write):
    write(tmp_path / "checkpoint_3.pth", torch_state(groups))
    theirs = read(tmp_path / "checkpoint_3.pth", config, leaves)
    assert not any(row.note for row in theirs.compare(leaves))
    ours = read(checkpoint, config, leaves)
    assert (theirs.step, theirs.optimizer_step, theirs.ema_rate) == (STEP, OPTIMIZER_STEP, 0.9)
    assert theirs.tensors.keys() == ours.tensors.keys() == set(NAMES)
    for name in NAMES:
        assert_same(theirs.trees(leaves)[name], ours.trees(leaves)[name])


def test_frequencies_that_pytorch_does_not_train_are_kept(groups, tmp_path):
    config = tiny.make_config(model__embedding_type="fourier")
    leaves = legacy.match_parameters(*model_and_shape(config))
    generator = np.random.RandomState(1)
    drawn = {leaf.original: generator.standard_normal(leaf.original_shape).astype(np.float32) for leaf in leaves}
    legacy_writers.write_zip(tmp_path / "file.pth", torch_state(dict.fromkeys(NAMES, drawn)))
    checkpoint = read(tmp_path / "file.pth", config, leaves)
    assert not any(row.note for row in checkpoint.compare(leaves))
    trees = checkpoint.trees(leaves)
    for name, factor in zip(NAMES, (1, 1, 0, 0), strict=True):
        np.testing.assert_array_equal(trees[name]["fourier"]["frequencies"], factor * drawn[f"{FREQUENCIES}/W"])
        np.testing.assert_array_equal(trees[name]["input"]["kernel"], drawn["Conv_0/kernel"])


def test_pytorch_weights_give_what_its_layers_gave():
    """Outputs of torch.nn.Conv2d and torch.nn.Linear, against ours with the weights that the import makes of theirs."""
    from legacy.torch_names import TorchLeaf
    from models.convolution import Conv
    from models.layers import Dense

    with np.load(tiny.ROOT / "tests/golden/torch_layers.npz") as file:
        golden = dict(file)
    kernel = TorchLeaf("", "", (2, 3, 1, 0)).from_torch(golden["conv_weight"])
    x, variables = np.moveaxis(golden["x"], 1, -1), {"params": {"kernel": kernel, "bias": golden["conv_bias"]}}
    for stride, name in ((1, "conv_output"), (2, "strided_output")):
        output = Conv(3, stride=stride).apply(variables, jnp.asarray(x))
        np.testing.assert_allclose(np.moveaxis(output, -1, 1), golden[name], atol=1e-6)
    kernel = TorchLeaf("", "", (1, 0)).from_torch(golden["linear_weight"])
    output = Dense(3).apply({"params": {"kernel": kernel, "bias": golden["linear_bias"]}}, jnp.asarray(golden["v"]))
    np.testing.assert_allclose(output, golden["linear_output"], atol=1e-6)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("ema", "shadow_params"), [], "ema.shadow_params does not have a tensor for each of the"),
        (("optimizer", "state", 0, "step"), 5, r"optimizer.state counts different steps: \[5, 36\]"),
        (("optimizer", "param_groups"), [], "optimizer is not the state of Adam on one group of parameters"),
        (("model", "module.all_modules.0.bias"), "text", "its model is not a dictionary of tensors"),
        (("step",), "text", "step is str, not a number"),
        (("ema",), None, "it has no map ema"),
    ],
)
def test_a_wrong_pytorch_state_is_named(config, leaves, groups, tmp_path, path, value, message):
    state = inner = torch_state(groups)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    legacy_writers.write_zip(tmp_path / "file.pth", state)
    with pytest.raises(ValueError, match=f"file.pth: {message}"):
        read(tmp_path / "file.pth", config, leaves)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_import_from_the_command_line(state, tmp_path):
    (tmp_path / "file").write_bytes(legacy_writers.pack(change(state, "params_ema/Conv_0/bias", None)))
    arguments = ["--checkpoint", str(tmp_path / "file")]
    for flags in ([], ["--dry_run"]):
        result = tiny.run(tiny.command("import", tmp_path / "run", *arguments, *flags))
        assert result.returncode == 1
        assert "does not fit this configuration: 1 missing (params_ema/input/bias)" in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "run").exists()
    result = tiny.run(tiny.command("import", tmp_path / "run"))
    assert result.returncode == 1
    assert "--mode import needs --checkpoint FILE" in result.stderr
