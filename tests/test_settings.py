"""The table of settings: complete, checked, and what results depend on, by the table and by the numbers themselves."""

import json
import re

import jax
import numpy as np
import pytest
import tiny

from checks import Choice
from configs import base, settings
from experiment.build import SamplingProgram, build_bpd_program, build_experiment, build_loss_program
from modes.encode import build_encoding_program
from parallel import distributed
from workdir import compatibility, results
from workdir import folder as workdirs
from workdir.folder import WorkdirError

GROUPS = sorted({name.partition(".")[0] for name in settings.SETTINGS if "." in name})
KINDS = sorted(set().union(*(setting.affects for setting in settings.SETTINGS.values())))
PRODUCT = sorted(
    path
    for path in tiny.ROOT.glob("**/*.py")
    if path.relative_to(tiny.ROOT).parts[0] not in (".venv", "tests", "configs", "docs", "tools", "runs")
)
METHODS = {"copy_and_resolve_references", "get", "items", "keys", "lock", "to_dict", "unlock", "update", "values"}


def change(**changes):
    config = base.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


# --- complete --------------------------------------------------------------------------------------------------------


def test_every_setting_that_code_reads_is_in_the_table():
    pattern = re.compile(rf"config\.({'|'.join(GROUPS)})\.(\w+)")
    for path in PRODUCT:
        for group, key in pattern.findall(path.read_text()):
            assert f"{group}.{key}" in settings.SETTINGS or key in METHODS, f"{path} reads {group}.{key}"


def test_every_setting_of_the_table_is_read():
    text = "\n".join(path.read_text() for path in PRODUCT)
    keys = {name.rpartition(".")[2] for name in settings.SETTINGS}
    assert [key for key in sorted(keys) if not re.search(rf"\.{key}\b|[\"']{key}[\"']", text)] == []


def test_every_row_has_a_meaning_and_kinds_that_are_explained():
    text = (tiny.ROOT / "configs" / "settings.py").read_text().partition("RESULTS =")[0]
    assert all(f'"{kind}"' in text for kind in KINDS)
    assert [name for name, setting in settings.SETTINGS.items() if not setting.meaning] == []
    assert len(settings.SETTINGS) == len(settings.TABLE)


def test_two_configurations_share_no_value():
    first, second = base.get_config(), base.get_config()
    first.model.fir_kernel[0] = 7
    assert second.model.fir_kernel == settings.SETTINGS["model.fir_kernel"].default == [1, 3, 3, 1]


# --- checked ---------------------------------------------------------------------------------------------------------


def refusal(name, value):
    """The message by which a value is refused; "" if it is not."""
    config = base.get_config().unlock()
    group, _, key = name.rpartition(".")
    of_group = config[group] if group else config
    with of_group.ignore_type():
        of_group[key] = value
    try:
        settings.check(config)
    except ValueError as error:
        return str(error)
    return ""


WRONG_TYPES = {
    bool: (1, "True or False"),
    int: (True, "a whole number"),
    float: ("x", "a finite number"),
    str: (3, "a text"),
    tuple: (3, "a list"),
    list: ("13", "a list"),
}


@pytest.mark.parametrize("name", settings.SETTINGS)
def test_wrong_types_and_no_numbers_are_refused(name):
    default = settings.SETTINGS[name].default
    wrong, words = WRONG_TYPES[type(default)]
    assert refusal(name, wrong) == f"{name}={wrong!r}: expected {words}"
    if isinstance(default, float):
        assert refusal(name, float("nan")) == f"{name}=nan: expected a finite number"
        assert refusal(name, float("inf")) == f"{name}=inf: expected a finite number"
    if isinstance(settings.SETTINGS[name].rule, Choice):
        assert refusal(name, "nonesuch").startswith(f"{name}='nonesuch' is unknown; known: ")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("training.n_jitted_steps", -1, "training.n_jitted_steps=-1: expected 1 or more"),
        ("sampling.num_steps", -1, "sampling.num_steps=-1: expected 0 or more"),
        ("sampling.solver_order", 4, "sampling.solver_order=4: expected 0 to 3"),
        ("sampling.rtol", 0.0, "sampling.rtol=0.0: expected a positive number"),
        ("sampling.guidance_interval", (2.0, 1.0), "sampling.guidance_interval=(2.0, 1.0): expected (low, high)"),
        ("optim.grad_clip", 0.0, "optim.grad_clip=0.0: expected a positive bound, or a negative number for none"),
        ("data.test_share", 1.0, "data.test_share=1.0: expected more than 0 and less than 1"),
        ("model.ch_mult", (1, 1.5), "model.ch_mult=(1, 1.5): expected a positive multiple of model.nf"),
        ("model.attn_resolutions", ("a",), "model.attn_resolutions=('a',): expected whole numbers"),
        ("data.dataset", "tfds:", "data.dataset='tfds:' is unknown; known: CELEBA, CIFAR10, "),
        ("restore.operator", "blur", "restore.operator='blur' is unknown; known: colorize, fourier, "),
        # allowed
        ("sampling.rtol", 1, ""),
        ("training.sde", "VESDE", ""),
        ("data.dataset", "tfds:kmnist", ""),
        ("restore.operator", "mine.py:build", ""),
        ("optim.grad_clip", -1.0, ""),
        ("sampling.guidance_interval", (2.0, 0.0), ""),
        ("model.attn_resolutions", (), ""),
    ],
)
def test_a_value_out_of_range_is_refused(name, value, message):
    found = refusal(name, value)
    assert found.startswith(message)
    assert bool(found) == bool(message)


def test_a_group_is_checked_alone():
    config = change(training__n_iters=0)
    settings.check(config, "sampling", "model")
    with pytest.raises(ValueError, match=r"training.n_iters=0: expected 1 or more"):
        settings.check(config, "training")


def test_a_missing_setting_is_named():
    config = base.get_config().unlock()
    del config.sampling.snr
    with pytest.raises(ValueError, match=r"has no sampling.snr; start from configs.base.get_config"):
        settings.check(config)
    del config["likelihood"]
    with pytest.raises(ValueError, match=r"has no likelihood.dequantization"):
        settings.check(config, "likelihood")


# --- what results depend on ------------------------------------------------------------------------------------------


def test_what_never_matters():
    """Where the data lie, and how they and the features are kept."""
    for kind in KINDS:
        free = {"data.path", "data.tfrecords_path", "data.cache_gib", "data.strict", "model.remat"}
        assert not free & settings.affecting(base.get_config(), kind).keys()


@pytest.mark.parametrize(
    ("kind", "depends", "does_not"),
    [
        ("run", "model.nf model.dropout data.random_flip data.resize training.snapshot_freq jax.enable_x64",
         "model.ema_rate model.dtype optim.lr sampling.snr classifier.snapshot_freq seed"),
        ("checkpoints", "model.nf data.dataset training.sde training.snapshot_freq",
         "model.dropout model.ema_rate data.random_flip jax.enable_x64"),
        ("samples", "seed model.nf model.dtype sampling.snr data.num_levels data.centered jax.default_prng_impl",
         "model.dropout model.ema_rate data.dataset eval.batch_size sampling.classifier likelihood.rtol"),
        ("batches", "eval.batch_size", "sampling.snr"),
        ("loss", "training.objective seed model.nf", "sampling.snr likelihood.rtol training.lr model.dropout"),
        ("likelihood", "likelihood.rtol eval.batch_size eval.bpd_dataset seed", "sampling.snr training.objective"),
        ("latents", "sampling.rtol sampling.atol model.nf data.centered", "sampling.snr data.cache_gib seed"),
        ("restorations", "restore.method sampling.snr seed", "restore.images model.dropout"),
        ("classifier", "model.channel_multiplier classifier.snapshot_freq data.dataset model.beta_max",
         "model.nf training.snapshot_freq classifier.lr"),
        ("noise", "data.dataset data.centered training.sde model.beta_max", "model.nf data.path jax.enable_x64"),
        ("statistics", "data.image_size eval.extractor seed jax.default_matmul_precision", "sampling.snr model.nf"),
    ],
)  # fmt: skip
def test_what_results_depend_on(kind, depends, does_not):
    found = settings.affecting(base.get_config(), kind)
    assert set(depends.split()) <= found.keys()
    assert not set(does_not.split()) & found.keys()


def alternative(setting):
    """Another allowed value of a setting."""
    default, rule = setting.default, setting.rule
    if isinstance(rule, Choice):
        return next((name for name in rule.known if name != default), default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return "elsewhere"
    if isinstance(default, tuple):
        return (0.5, *default[1:])
    return default + 2 if isinstance(default, int) else 0.7 * default + 0.001


RESULTS = {
    "samples": lambda experiment, params: SamplingProgram(experiment, 4)(params, np.arange(4))[0],
    "loss": lambda experiment, params: build_loss_program(experiment)(params, LEVELS, np.arange(4)),
    "likelihood": lambda experiment, params: build_bpd_program(experiment)(params, LEVELS, np.arange(4), 0)["bpd"],
    "latents": lambda experiment, params: build_encoding_program(experiment)(params, LEVELS)["latents"],
}
LEVELS = np.random.default_rng(0).integers(0, 17, (4, 8, 8, 1), np.uint8)
# The next predictor is not defined with a probability flow. Rematerialization rounds differently in the last place,
# which an adaptive integration amplifies up to its tolerance; results of both may be mixed.
FIXED = {"sampling.predictor", "model.remat"}
TINY = {"sampling__num_steps": 25, "sampling__rtol": 1e-2, "sampling__atol": 1e-2}


def perturb(params):
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.1 * generator.standard_normal(leaf.shape).astype("f4"), params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind == "samples" else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in RESULTS]
)
def test_results_do_not_depend_on_what_does_not_affect_them(kind):
    """The same to the last bit when every setting that the table does not name is another one, all at once."""
    config = tiny.make_config(**TINY)
    others = [s for s in settings.SETTINGS.values() if kind not in s.affects and s.name not in FIXED]
    changed = tiny.make_config(**TINY)
    changed.update_from_flattened_dict({s.name: alternative(s) for s in others})
    first, second = build_experiment(config), build_experiment(changed)
    params = distributed.replicate(perturb(first.init_state().params))
    compute = RESULTS[kind]
    np.testing.assert_array_equal(compute(first, params), compute(second, params))
    affecting = tiny.make_config(**TINY, model__beta_max=15.0)
    assert not np.array_equal(compute(build_experiment(affecting), params), compute(first, params))


# --- continued or refused --------------------------------------------------------------------------------------------

MOVED = {"data__path": "/elsewhere", "data__cache_gib": 1.0, "model__remat": True}


@pytest.mark.parametrize("kind", ["run", "checkpoints", "classifier"])
def test_data_may_move_between_runs(tmp_path, kind):
    workdirs.record_config(tmp_path, base.get_config())
    compatibility.check_same_experiment(tmp_path, change(**MOVED), kind)


def test_dropout_is_of_the_training_alone(tmp_path):
    workdirs.record_config(tmp_path, base.get_config())
    compatibility.check_same_experiment(tmp_path, change(model__dropout=0.3, model__ema_rate=0.9), "checkpoints")
    with pytest.raises(WorkdirError, match=r"\(model.dropout: 0.1 there, 0.3 now\); choose a new --workdir"):
        compatibility.check_same_experiment(tmp_path, change(model__dropout=0.3))


@pytest.mark.parametrize("kinds", [("samples",), ("latents",), ("restorations",), ("samples", "loss", "likelihood")])
def test_results_go_on_where_what_differs_does_not_affect_them(tmp_path, kinds):
    def open_with(**changes):
        results.open_folder(tmp_path, change(**changes), kinds, {}, flag="--output")

    open_with()
    open_with(**MOVED, model__dropout=0.3, model__ema_rate=0.9, model__init_scale=1.0, optim__lr=1.0)
    with pytest.raises(WorkdirError, match=r"\(model.nf: 128 there, 64 now\); choose a new --output"):
        open_with(model__nf=64)


def test_results_of_the_version_before_are_resumed(tmp_path):
    """Its settings.json has settings that do not matter, and not what JAX was set to."""
    config = base.get_config()
    old = {
        name: value for name, value in settings.flatten(config).items() if name.startswith(("seed", "data", "model"))
    }
    old |= settings.of_group(config, "sampling") | {"training.sde": "vpsde", "training.continuous": True}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(old | {"params_crc32": 0, "facts": {"nfe": 3}}))
    results.open_folder(tmp_path, change(**MOVED, model__dropout=0.3), ("samples",), {}, flag="--output")
    stored = json.loads(path.read_text())
    assert stored["jax.enable_x64"] is False
    assert stored["facts"] == {"nfe": 3}
    with pytest.raises(WorkdirError, match=r"sampling.snr: 0.16 there, 0.2 now"):
        results.open_folder(tmp_path, change(sampling__snr=0.2), ("samples",), {}, flag="--output")


def test_a_setting_that_was_not_there_had_its_default(tmp_path):
    workdirs.record_config(tmp_path, base.get_config())
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["config"]["model.num_classes"]
    path.write_text(json.dumps(stored))
    compatibility.check_same_experiment(tmp_path, base.get_config())
    with pytest.raises(WorkdirError, match=r"model.num_classes: 0 there, 3 now"):
        compatibility.check_same_experiment(tmp_path, change(model__num_classes=3))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("jax_enable_x64", True, "jax.enable_x64: False there, True now); set JAX_ENABLE_X64=False, or choose a new"),
        ("jax_default_prng_impl", "rbg", "'threefry2x32' there, 'rbg' now); set JAX_DEFAULT_PRNG_IMPL=threefry2x32,"),
        ("jax_threefry_partitionable", False, "jax.threefry_partitionable: True there, False now"),
        ("jax_default_matmul_precision", "highest", "None there, 'highest' now); unset JAX_DEFAULT_MATMUL_PRECISION,"),
    ],
)
def test_what_jax_was_set_to_is_recorded_and_compared(tmp_path, name, value, message):
    config = base.get_config()
    workdirs.record_config(tmp_path, config)
    folder = tmp_path / "samples"
    results.open_folder(folder, config, ("samples",), {}, flag="--output")
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        compatibility.check_same_experiment(tmp_path, config, "checkpoints")  # a network may be used as one likes
        with pytest.raises(WorkdirError, match=re.escape(message)):
            compatibility.check_same_experiment(tmp_path, config)
        with pytest.raises(WorkdirError, match=re.escape(message.partition(", or choose")[0])):
            results.open_folder(folder, config, ("samples",), {}, flag="--output")
    finally:
        jax.config.update(name, before)
