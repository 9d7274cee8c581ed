"""The configurations: locked, short, and equal to the original's where the original has them."""

import json

import jax
import numpy as np
import pytest
import tiny

from configs import base
from configs.ve import cifar10_ncsnpp
from runtime.experiment import build_experiment
from runtime.workdir import flatten

# Keys of the original that no code, its own included, reads.
READ_BY_NOTHING = ("model.attention_type", "model.conv_size")
LEAVES = sorted(path for folder in ("ve", "vp", "subvp") for path in (tiny.ROOT / "configs" / folder).glob("[a-z]*.py"))


def load(path):
    namespace: dict = {"__name__": path.stem}
    exec(compile(path.read_text(), path, "exec"), namespace)
    return namespace["get_config"]()


def test_cifar10_ncsnpp_equals_the_original():
    original = json.loads((tiny.ROOT / "tests" / "golden" / "configs.json").read_text())["ve/cifar10_ncsnpp"]
    ours = flatten(cifar10_ncsnpp.get_config())
    compared = {key: value for key, value in original.items() if key not in READ_BY_NOTHING}
    assert {key: ours.get(key) for key in compared} == compared


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_leaf_is_short_and_builds(path):
    assert len(path.read_text().splitlines()) <= 25
    config = load(path)
    assert config.is_locked
    with pytest.raises(AttributeError, match='Did you mean "sigma_max"'):
        config.model.sigma_mx = 1.0
    with pytest.raises(TypeError):
        config.model.nf = "many"
    build_experiment(config)


def test_cifar10_ncsnpp_has_the_published_size():
    experiment = build_experiment(cifar10_ncsnpp.get_config())
    shapes = jax.eval_shape(experiment.init_state).params
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 62_693_251


def test_every_key_is_commented():
    """Each line that sets a default says what it means."""
    lines = (tiny.ROOT / "configs" / "base.py").read_text().splitlines()
    keys = [line.strip() for line in lines if line.strip().startswith('"') and ":" in line]
    assert [key for key in keys if "#" not in key and not key.endswith("(),")] == []
    assert base.get_config().is_locked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.log_freq": 0}, r"training.log_freq=0; expected 1 or more"),
        ({"model.ema_rate": 1.0}, r"model.ema_rate=1.0; expected 0 <= rate < 1"),
        ({"eval.bpd_dataset": "val"}, r"eval.bpd_dataset='val' is unknown; known: test, train"),
        ({"model.scale_by_sigma": True}, r"set model.embedding_type='fourier'"),
        ({"data.num_levels": 300}, r"data.num_levels=300; expected 2 to 256"),
        ({"training.sde": "vp"}, r"training.sde='vp' is unknown; known: subvpsde, vesde, vpsde"),
        ({"model.name": "unet"}, r"model.name='unet' is unknown; known: "),
        ({"sampling.corrector": "mala"}, r"sampling.corrector='mala' is unknown; known: "),
        ({"likelihood.trace": "hutch"}, r"likelihood.trace='hutch' is unknown; known: "),
    ],
)
def test_a_bad_setting_is_refused_when_built(changes, message):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        build_experiment(config)
