"""Networks that are told classes: their parameters, labels in training, and a run that learns two classes apart."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from reference import config_of

import datasets
import legacy
import losses
import plots
import run_lib
from files import read_npz
from models import create_model
from models.ncsnpp import NCSNpp
from runtime import drawing, sample_run
from runtime.experiment import build_experiment
from runtime.smoke import shrink

SMALL = {"data.image_size": 4, "data.num_channels": 1, "model.ch_mult": (1,)}

# --- the network -----------------------------------------------------------------------------------------------------


class Embedding(NCSNpp):
    """The part of a network that labels can touch, by itself."""

    @nn.compact
    def __call__(self, time_cond, class_labels):
        return self._embed(time_cond, class_labels)


def embedding_of(network):
    fields = [field.name for field in dataclasses.fields(network) if field.name not in ("parent", "name")]
    return Embedding(**{name: getattr(network, name) for name in fields})


def make_pair(name, nf):
    """The network without classes and that of three."""
    settings = SMALL | {"model.name": name, "model.nf": nf}
    return [create_model(config_of(settings | {"model.num_classes": num_classes})) for num_classes in (0, 3)]


@pytest.mark.parametrize(("name", "nf"), [("ncsnpp", 8), ("ddpm", 32)])
def test_classes_add_one_table_and_change_no_other_parameter(name, nf):
    x, t, keys = jnp.zeros((1, 4, 4, 1)), jnp.ones(1), {"params": jax.random.key(0)}
    without, told = (jax.eval_shape(model.init, keys, x, t)["params"] for model in make_pair(name, nf))
    assert told.pop("label_embedding")["embedding"].shape == (4, 4 * nf)
    assert told == without  # the shapes of all others

    initial = [embedding_of(model).init(keys, t, None)["params"] for model in make_pair(name, nf)]
    table = initial[1].pop("label_embedding")["embedding"]
    assert abs(float(table.std()) - 1) < 4 / np.sqrt(2 * table.size)  # standard normal numbers
    jax.tree.map(np.testing.assert_array_equal, *initial)


def test_the_label_is_added_to_the_embedding_of_the_noise_level():
    """The row of each label; without labels, for every example, the last one."""
    without, told = map(embedding_of, make_pair("ncsnpp", 8))
    t, labels = jnp.array([1.0, 50.0, 300.0, 999.0]), jnp.array([0, 2, 3, 2])
    params = told.init({"params": jax.random.key(0)}, t, None)["params"]
    table = params["label_embedding"]["embedding"]
    rest = {name: layer for name, layer in params.items() if name != "label_embedding"}
    plain = without.apply({"params": rest}, t, None)
    for given, rows in ((labels, table[labels]), (None, jnp.tile(table[3], (4, 1)))):
        np.testing.assert_array_equal(told.apply({"params": params}, t, given), plain + rows)


def test_the_original_has_no_such_networks():
    config = config_of({"model.num_classes": 3})
    with pytest.raises(ValueError, match=r"model.num_classes=3: score_sde has no networks that are told classes"):
        legacy.match_parameters(config)


# --- labels in training ----------------------------------------------------------------------------------------------


def echo(key, params, x, *, train, class_labels=None):
    """A loss that is the label itself, -1 without one."""
    return jnp.full(len(x), -1) if class_labels is None else class_labels


@pytest.fixture(scope="module")
def dropping():
    return losses.with_label_dropout(echo, no_label=7, probability=0.2)


def test_labels_are_dropped_with_their_probability(dropping):
    n = 20_000
    labels = np.arange(n) % 7
    seen = np.asarray(dropping(jax.random.key(0), {}, jnp.zeros((n, 1)), train=True, class_labels=jnp.asarray(labels)))
    is_dropped = seen == 7
    np.testing.assert_array_equal(seen[~is_dropped], labels[~is_dropped])
    assert abs(is_dropped.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / n)
    for label in range(7):  # whatever the label is
        rate, count = is_dropped[labels == label].mean(), (labels == label).sum()
        assert abs(rate - 0.2) < 4 * np.sqrt(0.2 * 0.8 / count)


def test_whether_a_label_is_dropped_depends_on_its_own_example_alone(dropping):
    keys, labels = jax.random.split(jax.random.key(1), 40), jnp.arange(40) % 7
    together = dropping(keys, {}, jnp.zeros((40, 1)), train=True, class_labels=labels)
    assert 0 < (together == 7).sum() < 40
    part = dropping(keys[10:16], {}, jnp.zeros((6, 1)), train=True, class_labels=(labels[10:16] + 3) % 7)
    np.testing.assert_array_equal(part == 7, together[10:16] == 7)


def test_no_label_is_dropped_in_an_evaluation(dropping):
    x, labels = jnp.zeros((50, 1)), jnp.arange(50) % 7
    np.testing.assert_array_equal(dropping(jax.random.key(0), {}, x, train=False, class_labels=labels), labels)
    assert (dropping(jax.random.key(0), {}, x, train=True) == -1).all()


def test_batches_have_the_labels_of_their_images():
    source = datasets.load_digits("train")
    arguments = {"seed": 1, "first_step": 4, "batch_size": 8, "steps_per_call": 2}
    levels, labels = next(datasets.training_batches(source, with_labels=True, **arguments))
    np.testing.assert_array_equal(levels, next(datasets.training_batches(source, **arguments)))
    indices = np.stack([datasets.training_indices(1, step, 8, 1500) for step in (4, 5)])
    np.testing.assert_array_equal(labels[0], source.classes[indices])
    assert labels.dtype == np.int32


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1])
def test_a_network_that_is_told_classes_must_also_do_without(probability):
    config = tiny.make_config(model__num_classes=10, training__label_dropout=probability)
    with pytest.raises(ValueError, match=rf"training.label_dropout={probability}: expected a probability between"):
        build_experiment(config)


def test_data_of_other_classes_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"digits carry labels of 10 classes, but model.num_classes=7; set model.num_c"
    ):
        datasets.build_source(tiny.make_config(model__num_classes=7), "train")
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
    config = tiny.make_config(data__dataset="npz", data__path=str(tmp_path), model__num_classes=7)
    with pytest.raises(ValueError, match=r"npz carry no labels, but model.num_classes=7; set model.num_classes=0"):
        datasets.build_source(config, "train")
    assert len(datasets.build_source(config, "test")) == 2  # the labels of test images are not needed


def test_a_smoke_run_is_told_the_digits():
    small = shrink(tiny.make_config(model__num_classes=1000, sampling__labels="0..999", sampling__guidance_scale=2.0))
    assert (small.model.num_classes, small.sampling.labels) == (10, "0..9")
    build_experiment(small)


# --- a run -----------------------------------------------------------------------------------------------------------

MEANS = (3, 12)  # level of all pixels of the images of each class, of 16


def configure(folder, **changes):
    settings = {
        "data__dataset": "npz",
        "data__path": str(folder),
        "data__image_size": 4,
        "model__num_res_blocks": 0,
        "model__num_classes": 2,
        "model__ema_rate": 0.9,
        "training__label_dropout": 0.3,
        "training__batch_size": 32,
        "training__n_iters": 400,
        "training__n_jitted_steps": 20,
        "training__log_freq": 200,
        "training__eval_freq": 1000,
        "training__snapshot_freq": 400,
        "training__snapshot_freq_for_preemption": 400,
        "training__snapshot_sampling": False,
        "optim__warmup": 20,
        "optim__lr": 1e-2,
        "sampling__labels": "1,0",
        "sampling__method": "ddim",
        "sampling__num_steps": 8,
        "eval__batch_size": 8,
    }
    return tiny.make_config(**settings | changes).lock()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flat images of two classes, dark and bright."""
    folder = tmp_path_factory.mktemp("data")
    labels = np.arange(64) % 2
    images = np.broadcast_to(np.array(MEANS, np.uint8)[labels, None, None, None], (64, 4, 4, 1))
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
    return folder


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_lib.train(configure(data), folder)
    return folder


@pytest.fixture(scope="module")
def sampled(data, workdir):
    return run_lib.sample(configure(data), workdir, num_images=13)


def test_the_network_learns_two_classes_apart(sampled):
    """Samples of either class are nearer to its level; the labels are those of the file."""
    stored = read_npz(sampled / "samples.npz")
    np.testing.assert_array_equal(stored["labels"], [1, 0] * 6 + [1])
    distances = np.abs(stored["samples"].mean(axis=(1, 2, 3))[:, None] - np.array(MEANS))
    np.testing.assert_array_equal(distances.argmin(axis=1), stored["labels"])
    assert int(stored["nfe"]) == 9


def test_the_picture_has_a_row_for_each_label(sampled):
    assert sampled.name == "ckpt_1_ddim_8_labels_1,0"
    levels = read_npz(sampled / "samples.npz")["samples"]
    rows = np.concatenate([levels[:12:2], levels[1:12:2]])  # six whole columns of thirteen samples
    with Image.open(sampled / "samples.png") as image:
        np.testing.assert_array_equal(np.array(image), plots.grid_of_levels(rows, 17, num_columns=6))
    facts = json.loads((sampled / "settings.json").read_text())["facts"]
    assert (facts["labels"], facts["sampler"]["sampling.labels"]) == ([1, 0], "1,0")


def test_as_many_are_drawn_of_each_label():
    assert [sample_run._default_number(labels) for labels in ((), (3,), (1, 0), tuple(range(10)))] == [64, 64, 64, 70]
    assert drawing.rows_of_labels(3, 10, 100).tolist() == [[0], [1], [2]]
    assert drawing.rows_of_labels(80, 10, 100)[3].tolist() == [3, 13, 23, 33, 43, 53, 63, 73]
    assert drawing.rows_of_labels(5000, 1000, 100).ravel().tolist() == list(range(100))
