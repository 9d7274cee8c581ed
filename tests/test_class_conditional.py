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
from reference import config_of, model_and_shape

import datasets
import legacy
import losses
import run_lib
from experiment import drawing
from experiment.build import build_experiment
from experiment.smoke import shrink
from models import create_model, factory
from models.layers import Dense, LabelEmbedding
from models.ncsnpp import NCSNpp
from modes import sample as sample_run
from report import plots
from sde_lib import VPSDE, expand
from storage.files import read_npz

SMALL = {"data.image_size": 4, "data.num_channels": 1, "model.ch_mult": (1,), "model.num_res_blocks": 0}

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


@pytest.mark.parametrize(("name", "nf"), [("ncsnpp", 8), pytest.param("ddpm", 32, marks=pytest.mark.exhaustive)])
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
    with pytest.raises(ValueError, match=r"model.num_classes=3: score_sde has no class-conditional networks"):
        legacy.match_parameters(*model_and_shape(config))


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


@pytest.mark.parametrize("probability", [0.0, 1.0])
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


class OneImageOfEachClass(nn.Module):
    """Predicts the noise of flat images whose level its label embedding says: the smallest network told classes."""

    num_classes: int

    @nn.compact
    def __call__(self, x, time_cond, train=False, class_labels=None):
        level = Dense(1, name="level")(
            LabelEmbedding(self.num_classes, 8, name="label_embedding")(class_labels, len(x))
        )
        t = time_cond / 999
        mean, std = VPSDE().marginal_prob(jnp.broadcast_to(level[:, :, None, None], x.shape), t)
        return (x - mean) / expand(std, x)


def build_network(config):
    return OneImageOfEachClass(config.model.num_classes)


LEVELS = (3, 12)  # of all pixels of the images of each class, of 0 .. 16
SETTINGS = {
    "model__name": "one_image",
    "data__dataset": "npz",
    "data__image_size": 4,
    "model__num_classes": 2,
    "training__label_dropout": 0.3,
    "training__batch_size": 32,
    "training__n_iters": 400,
    "training__n_jitted_steps": 20,
    "training__log_freq": 200,
    "training__eval_freq": 1000,
    "training__snapshot_freq": 200,
    "training__snapshot_freq_for_preemption": 200,
    "training__snapshot_num_samples": 6,
    "optim__warmup": 0,
    "optim__lr": 2e-2,
    "model__ema_rate": 0.98,
    "sampling__labels": "1,0",
    "sampling__method": "ddim",
    "sampling__num_steps": 8,
    "eval__batch_size": 8,
}


def configure(folder, **changes):
    return tiny.make_config(**SETTINGS | {"data__path": str(folder)} | changes).lock()


@pytest.fixture(scope="module", autouse=True)
def network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(factory.NETWORKS, "one_image", build_network)
        patch.setitem(factory.SCORE_NETWORKS, "one_image", build_network)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flat images of two classes, dark and bright."""
    folder = tmp_path_factory.mktemp("data")
    labels = np.arange(64) % 2
    images = np.broadcast_to(np.array(LEVELS, np.uint8)[labels, None, None, None], (64, 4, 4, 1))
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


def levels_of(folder):
    """The mean level of each sample: a level's pixels are even on [level, level + 1), which rounds down to it."""
    return read_npz(folder / "samples.npz")["samples"].mean(axis=(1, 2, 3))


@pytest.mark.exhaustive
def test_the_network_learns_two_classes_apart(sampled):
    stored = read_npz(sampled / "samples.npz")
    np.testing.assert_array_equal(stored["labels"], [1, 0] * 6 + [1])
    np.testing.assert_array_equal(levels_of(sampled), np.array(LEVELS)[stored["labels"]])
    assert int(stored["nfe"]) == 9


def test_without_labels_the_network_knows_the_mean_of_all(data, workdir):
    """The best that one level can be for both classes; learned from the images that were shown without their label."""
    folder = run_lib.sample(configure(data, sampling__labels=""), workdir, num_images=2)
    np.testing.assert_allclose(levels_of(folder), np.mean(LEVELS), atol=1.01)
    assert "labels" not in read_npz(folder / "samples.npz")


def test_guidance_goes_beyond_the_class(data, workdir):
    """The scores are linear in the levels: guided samples have mean + w (level - mean). Both evaluations count."""
    folder = run_lib.sample(configure(data, sampling__guidance_scale=1.5), workdir, num_images=4)
    assert folder.name == "ckpt_2_ddim_8_labels_1,0_scale_1.5"
    mean = np.mean(LEVELS)
    guided = mean + 1.5 * (np.array(LEVELS) - mean)
    np.testing.assert_allclose(levels_of(folder), guided[[1, 0, 1, 0]], atol=1.01)
    assert int(read_npz(folder / "samples.npz")["nfe"]) == 18


def test_the_picture_has_a_row_for_each_label(workdir, sampled):
    assert sampled.name == "ckpt_2_ddim_8_labels_1,0"
    levels = read_npz(sampled / "samples.npz")["samples"]
    rows = np.concatenate([levels[:12:2], levels[1:12:2]])  # six whole columns of thirteen samples
    with Image.open(sampled / "samples.png") as image:
        np.testing.assert_array_equal(np.array(image), plots.grid_of_levels(rows, 17, num_columns=6))
    facts = json.loads((sampled / "settings.json").read_text())["facts"]
    assert (facts["labels"], facts["sampler"]["sampling.labels"]) == ([1, 0], "1,0")
    levels = read_npz(workdir / "samples" / "iter_400" / "sample.npz")["samples"]  # as in training
    with Image.open(workdir / "samples" / "iter_400" / "sample.png") as image:
        expected = plots.grid_of_levels(np.concatenate([levels[::2], levels[1::2]]), 17, num_columns=3)
        np.testing.assert_array_equal(np.array(image), expected)


@pytest.mark.exhaustive
def test_a_killed_run_ends_with_the_same_parameters(data, workdir, tmp_path):
    """Bit for bit: labels and their dropout follow from (seed, step)."""
    run_lib.train(configure(data, training__n_iters=200), tmp_path)
    run_lib.train(configure(data), tmp_path)
    ends = [drawing.restore(build_experiment(configure(data)), folder).params for folder in (workdir, tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_four_devices_draw_the_same_digits(tmp_path):
    """From the command line, with a network of a few thousand parameters that has been told nothing yet."""
    settings = {
        "model__num_classes": 10,
        "sampling__labels": "0..9",
        "training__n_iters": 12,
        "sampling__method": "ddim",
    }
    settings |= {"sampling__num_steps": 4, "sampling__guidance_scale": 2.0, "eval__batch_size": 4}
    for mode, flags, devices in (
        ("train", (), 1),
        ("sample", ("--num_images=12", "--output=one"), 1),
        ("sample", ("--num_images=12", "--output=four"), 4),
    ):
        result = tiny.run(tiny.command(mode, tmp_path, *flags, **settings), devices=devices)
        assert result.returncode == 0, result.stderr[-3000:]
    one, four = (read_npz(tmp_path / name / "samples.npz") for name in ("one", "four"))
    np.testing.assert_array_equal(one["labels"], four["labels"])
    difference = one["samples"].astype(int) - four["samples"]
    assert np.abs(difference).max() <= 1  # a value on the edge of a level may round either way
    assert (difference == 0).mean() > 0.99


def test_images_to_show_are_chosen_evenly():
    assert drawing.evenly_chosen(1000, 4).tolist() == [0, 250, 500, 750]
    assert drawing.evenly_chosen(3, 100).tolist() == [0, 1, 2]


def test_as_many_are_drawn_of_each_label():
    assert [sample_run._default_number(labels) for labels in ((), (3,), (1, 0), tuple(range(10)))] == [64, 64, 64, 70]
    assert drawing.rows_of_labels(3, 10, 100).tolist() == [[0], [1], [2]]
    assert drawing.rows_of_labels(80, 10, 100)[3].tolist() == [3, 13, 23, 33, 43, 53, 63, 73]
    assert drawing.rows_of_labels(5000, 1000, 100).ravel().tolist() == list(range(100))
