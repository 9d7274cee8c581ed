"""The smoke run: every experiment shrinks to two steps on the digits, and some really take them."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
import test_configs
from PIL import Image

import datasets
import run_lib
from configs.settings import flatten
from experiment.build import build_experiment
from experiment.smoke import shrink
from parallel import distributed
from workdir.checkpoints import Checkpoints

LEAVES = sorted(set(test_configs.LEAVES) - set(test_configs.CLASSIFIERS))
# What shrinking may change; all else, the family, the noise levels and the objective, is kept.
SHRUNK = {
    *("data." + key for key in ("dataset", "image_size", "num_channels", "num_levels", "category")),
    *("model." + key for key in ("nf", "ch_mult", "num_res_blocks", "attn_resolutions")),
    *("model." + key for key in ("blocks_per_group", "channel_multiplier")),
    *("training." + key for key in ("batch_size", "n_iters", "n_jitted_steps", "log_freq", "eval_freq")),
    *("training." + key for key in ("snapshot_freq", "snapshot_freq_for_preemption", "snapshot_num_samples")),
    *("classifier." + key for key in ("batch_size", "n_iters", "n_jitted_steps", "log_freq", "eval_freq", "warmup")),
    *("classifier." + key for key in ("snapshot_freq", "snapshot_freq_for_preemption")),
    *("classifier." + key for key in ("blocks_per_group", "channel_multiplier")),
    "optim.warmup",
    *("sampling." + key for key in ("num_steps", "n_steps_each", "rtol", "atol")),
    *("likelihood." + key for key in ("rtol", "atol")),
    *("eval." + key for key in ("begin_ckpt", "end_ckpt", "batch_size", "num_samples")),
    *("eval." + key for key in ("enable_bpd", "enable_sampling", "extractor", "weights", "reference")),
}
# DDPM++ is trained in the test below and in test_end_to_end.py.
FAMILIES = ["ve/church_ncsnpp_continuous", "vp/ddpm/cifar10", "ve/ncsn/cifar10_124", "ve/ncsnv2/cifar10"]


def smoke_config(leaf, **changes):
    config = test_configs.load(leaf)
    config.training.smoke = True
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_experiment_shrinks_and_builds(leaf):
    config = test_configs.load(leaf)
    before = flatten(config)
    small = shrink(config)
    after = flatten(small)
    assert flatten(config) == before
    assert small.is_locked
    assert {key for key in before if after[key] != before[key]} <= SHRUNK
    assert flatten(shrink(small)) == after
    experiment = build_experiment(small)
    assert experiment.image_shape == (8, 8, 1)
    assert len(datasets.build_source(small, "train")) == 1500


def test_batches_are_divided_by_any_number_of_devices(monkeypatch):
    config = test_configs.load("vp/cifar10_ddpmpp")
    for devices, batch_size in ((1, 8), (2, 8), (3, 9), (8, 8), (16, 16)):
        monkeypatch.setattr(distributed, "device_count", lambda devices=devices: devices)
        small = shrink(config)
        assert small.training.batch_size == batch_size
        assert small.eval.batch_size % devices == 0
        assert small.eval.batch_size >= 297


def test_the_sampler_has_as_many_steps_as_the_sde_needs():
    """DDPM's chain is not defined in beta_max steps or fewer; a sampler of few steps keeps them."""
    assert shrink(smoke_config("vp/ddpm/cifar10")).sampling.num_steps == 21
    assert shrink(smoke_config("vp/ddpm/cifar10", model__beta_max=30.5)).sampling.num_steps == 31
    assert shrink(smoke_config("ve/ncsn/cifar10")).sampling.num_steps == 10


def states(workdir, config):
    """The states before the first step, after it and after the second; the workdir's snapshot is gone afterwards."""
    experiment = build_experiment(config)
    settings = {"snapshot_freq": config.training.snapshot_freq, "template": experiment.state_template()}
    with Checkpoints(workdir, read_only=True, **settings) as checkpoints:
        last = checkpoints.restore_snapshot(1)
    shutil.rmtree(workdir / "checkpoints" / "1")
    with Checkpoints(workdir, read_only=True, **settings) as checkpoints:
        return experiment.init_state(), checkpoints.restore_newest(), last


def changes(before, after):
    """The largest change of each parameter array."""
    return [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True)]


@pytest.fixture
def quick_compilation():
    """Compiles with few optimizations: each program runs once or twice, and the tests wait for the compiler only."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("leaf", FAMILIES)
def test_a_smoke_run_trains_two_steps(leaf, tmp_path, quick_compilation):
    config = smoke_config(leaf)
    run_lib.train(config, tmp_path)
    small = shrink(config)

    records = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(0 < record["loss"] < 1e6 for record in records)

    stored = np.load(tmp_path / "samples" / "iter_2" / "sample.npz", allow_pickle=False)
    assert stored["samples"].shape == (8, 8, 8, 1)
    assert stored["samples"].max() <= 16
    evaluations = sum(step != "none" for step in (small.sampling.predictor, small.sampling.corrector))
    assert int(stored["nfe"]) == evaluations * small.sampling.num_steps
    with Image.open(tmp_path / "samples" / "iter_2" / "sample.png") as image:
        assert len(image.getcolors()) > 1

    # Adam's first steps are as long as the learning rate, whatever the gradient; warm-up makes the first one 0.
    initial, first, last = states(tmp_path, small)
    assert [int(state.step) for state in (initial, first, last)] == [0, 1, 2]
    assert max(changes(initial, first)) == pytest.approx(0.0 if small.optim.warmup else small.optim.lr, rel=0.1)
    second = changes(first, last)
    assert 0.5 * small.optim.lr < max(second) < 1.5 * small.optim.lr
    # What stays has no gradient, or one of 1e-13 behind a convolution that starts at 1e-10: Adam's step is then too
    # small to move a number near 1.
    gradients = [np.abs(mean).max() for mean in jax.tree.leaves(optax.tree.get(last.opt_state, "mu"))]
    assert all(gradient < 1e-11 for gradient, change in zip(gradients, second, strict=True) if change == 0)


@pytest.mark.exhaustive
def test_a_smoke_run_is_evaluated(tmp_path, quick_compilation):
    config = smoke_config("vp/digits_ddpmpp_continuous")
    run_lib.train(config, tmp_path)
    run_lib.evaluate(config, tmp_path)
    report = json.loads((tmp_path / "eval" / "report_1.json").read_text())
    assert report["checkpoint"] == {"number": 1, "step": 2, "ema": True}
    assert [(metric["name"], metric["num_samples"]) for metric in report["metrics"]] == [("loss", 297)]
