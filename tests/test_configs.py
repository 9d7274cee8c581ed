"""The configurations: locked, short, and equal to the original's but for a written list of corrections."""

import fnmatch
import importlib
import json

import jax
import numpy as np
import pytest
import tiny

from configs import base
from configs.settings import flatten
from configs.ve import cifar10_ncsnpp
from experiment.build import build_experiment
from models.factory import require_score_network

FOLDER = tiny.ROOT / "configs"
LEAVES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/**/[a-z]*.py"))
CLASSIFIERS = [leaf for leaf in LEAVES if leaf.startswith("classifier/")]
ORIGINAL = json.loads((tiny.ROOT / "tests" / "golden" / "configs.json").read_text())
DEFAULTS = flatten(base.get_config())
MISSING = "missing"

# (configurations, key, the original's value, ours, reason). A pattern's * matches slashes too.
UNREAD = "no code, the original's included, reads it"
UNSET = "the original lacks it and fails without it; as in the configurations of 256 pixels"
FACES_1024 = "ve/*hq_ncsnpp_continuous"
CORRECTIONS = [
    ("*", "model.attention_type", "ddpm", MISSING, UNREAD),
    ("*", "model.conv_size", 3, MISSING, UNREAD),
    ("*", "optim.amsgrad", False, MISSING, UNREAD),
    ("ve/celeba_ncsnpp", "model.sigma_begin", 90, MISSING, UNREAD),
    ("ve/ncsn/celeba", "training.loss", "vesde", MISSING, "misnames training.sde"),
    ("ve/ncsn/celeba", "training.sde", MISSING, "vesde", "set under another name, training.loss"),
    ("ve/ncsnv2/bedroom", "training.continuouse", False, MISSING, "misspelt"),
    ("ve/ncsnv2/bedroom", "training.continuous", True, False, "set under a misspelt name, training.continuouse"),
    (FACES_1024, "training.n_jitted_steps", MISSING, 5, UNSET),
    (FACES_1024, "eval.enable_loss", MISSING, True, UNSET),
    (FACES_1024, "eval.enable_sampling", MISSING, True, UNSET),
    (FACES_1024, "eval.enable_bpd", MISSING, False, UNSET),
    (FACES_1024, "eval.bpd_dataset", MISSING, "test", UNSET),
    (FACES_1024, "model.beta_min", MISSING, 0.1, UNSET),
    (FACES_1024, "model.beta_max", MISSING, 20.0, UNSET),
    *(
        (leaf, "data.tfrecords_path", path, "", "the folder of one person; the user's is a flag")
        for leaf, path in {
            "ve/celebahq_256_ncsnpp_continuous": "/home/yangsong/ncsc/celebahq/r08.tfrecords",
            "ve/celebahq_ncsnpp_continuous": "/atlas/u/yangsong/celeba_hq/-r10.tfrecords",
            "ve/ffhq_256_ncsnpp_continuous": "/home/yangsong/ncsc/ffhq/ffhq-r08.tfrecords",
            "ve/ffhq_ncsnpp_continuous": "/raid/song/ffhq-dataset/ffhq/ffhq-r10.tfrecords",
            "vp/ddpm/celebahq": "/atlas/u/yangsong/celeba_hq/-r10.tfrecords",
        }.items()
    ),
]


def load(leaf):
    return importlib.import_module("configs." + leaf.replace("/", ".")).get_config()


def corrections(leaf):
    """The corrections that apply to a configuration, {key: (the original's value, ours)}."""
    original = ORIGINAL[leaf]
    found = {key: (theirs, ours) for leaves, key, theirs, ours, _ in CORRECTIONS if fnmatch.fnmatch(leaf, leaves)}
    return {key: (theirs, ours) for key, (theirs, ours) in found.items() if key in original or theirs == MISSING}


def test_all_39_are_there():
    assert len(ORIGINAL) == 39
    assert ORIGINAL.keys() <= set(LEAVES)


@pytest.mark.parametrize("leaf", sorted(ORIGINAL))
def test_a_configuration_equals_the_original(leaf):
    """Every key of ours has the original's value, the corrected one, or, where the original has none, the default."""
    original, corrected = ORIGINAL[leaf], corrections(leaf)
    assert {key: original.get(key, MISSING) for key in corrected} == {key: pair[0] for key, pair in corrected.items()}
    expected = DEFAULTS | original | {key: ours for key, (_, ours) in corrected.items()}
    assert flatten(load(leaf)) == {key: value for key, value in expected.items() if value != MISSING}


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda correction: " ".join(map(str, correction[:2])))
def test_a_correction_applies_to_something(correction):
    leaves, key, theirs, _, _ = correction
    assert any(ORIGINAL[leaf].get(key, MISSING) == theirs for leaf in fnmatch.filter(ORIGINAL, leaves))


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_is_short_and_builds(leaf):
    assert len((FOLDER / f"{leaf}.py").read_text().splitlines()) <= 25
    config = load(leaf)
    assert config.is_locked
    with pytest.raises(AttributeError, match='Did you mean "sigma_max"'):
        config.model.sigma_mx = 1.0
    with pytest.raises(TypeError):
        config.model.nf = "many"
    build_experiment(config)


@pytest.mark.parametrize("leaf", sorted(set(LEAVES) - set(CLASSIFIERS)))
def test_a_leaf_tells_its_row_and_its_command(leaf):
    text = importlib.import_module("configs." + leaf.replace("/", ".")).__doc__
    assert f"python main.py --config configs/{leaf}.py --mode train --workdir " in text
    assert "Song et al. 2021" in text or "o row of the paper" in text
    assert ("--config.data.tfrecords_path" in text) == (load(leaf).data.dataset in ("CelebAHQ", "FFHQ"))


@pytest.mark.parametrize("leaf", CLASSIFIERS)
def test_a_classifier_is_no_score_network(leaf):
    with pytest.raises(ValueError, match="is a classifier, which this mode cannot use"):
        require_score_network(load(leaf).model.name)


def test_cifar10_ncsnpp_has_the_published_size():
    experiment = build_experiment(cifar10_ncsnpp.get_config())
    shapes = jax.eval_shape(experiment.init_state).params
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 62_693_251


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.log_freq": 0}, r"training.log_freq=0: expected 1 or more"),
        ({"model.ema_rate": 1.0}, r"model.ema_rate=1.0: expected 0 or more and less than 1"),
        ({"eval.bpd_dataset": "val"}, r"eval.bpd_dataset='val' is unknown; known: test, train"),
        (
            {"model.scale_by_sigma": True},
            r"or for model.name='ncsnpp' model.embedding_type='fourier'",
        ),
        ({"data.num_levels": 300}, r"data.num_levels=300: expected 2 to 256"),
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
