"""The order of examples, the digits, and the scaling between levels and the network's range."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import GOLDEN

import datasets
from configs import base
from parallel import distributed, rng
from sources.base import Source


def digits_config(**changes):
    config = base.get_config()
    config.data.update(dataset="digits", num_levels=17, uniform_dequantization=True)
    config.update_from_flattened_dict(changes)
    return config


def test_digits_are_those_of_scikit_learn_split_once_for_all():
    from sklearn.datasets import load_digits

    train, test = datasets.load_digits("train"), datasets.load_digits("test")
    assert (len(train), len(test)) == (1500, 297)
    together = np.concatenate([train.levels, test.levels]).reshape(1797, 64)
    original = load_digits().data.astype(np.uint8)
    np.testing.assert_array_equal(np.sort(together.view("V64"), 0), np.sort(original.view("V64"), 0))
    assert train.levels.max() == 16
    # The split itself is part of every published number: its first labels are pinned.
    np.testing.assert_array_equal(train.classes[:8], [2, 8, 2, 6, 6, 7, 1, 9])
    assert np.bincount(test.classes).min() >= 20


@pytest.mark.parametrize(("batch_size", "num_examples"), [(4, 12), (5, 12), (7, 5)])
def test_every_epoch_has_each_example_once(batch_size, num_examples):
    steps = range(4 * num_examples)
    stream = np.concatenate([datasets.training_indices(3, step, batch_size, num_examples) for step in steps])
    epochs = stream[: len(stream) // num_examples * num_examples].reshape(-1, num_examples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_examples), (len(epochs), 1)))
    assert not np.array_equal(epochs[0], epochs[1])  # each epoch is shuffled anew
    other_seed = np.concatenate([datasets.training_indices(4, step, batch_size, num_examples) for step in steps])
    assert not np.array_equal(stream, other_seed)


def test_batches_start_anywhere_in_the_same_stream():
    """A resumed run sees what an unbroken one sees, and the batches match their indices."""
    source = datasets.load_digits("train")
    arguments = {"seed": 1, "batch_size": 8, "steps_per_call": 2}
    unbroken = datasets.training_batches(source, first_step=0, **arguments)
    batches = [np.asarray(next(unbroken)) for _ in range(3)]
    resumed = next(datasets.training_batches(source, first_step=4, **arguments))
    np.testing.assert_array_equal(batches[2], resumed)
    indices = np.stack([datasets.training_indices(1, step, 8, 1500) for step in (4, 5)])
    np.testing.assert_array_equal(resumed[0], source.levels[indices])


def test_hosts_share_a_batch(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(distributed.host_share(np.arange(6)))
    np.testing.assert_array_equal(shares, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dequantize", [True, False])
def test_levels_survive_the_round_trip(centered, dequantize):
    scaler = datasets.Scaler(num_levels=256, centered=centered, dequantize=dequantize)
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    x = scaler.to_network(jax.random.key(0), levels)
    assert (x.min() >= -1.0) if centered else (x.min() >= 0.0)
    np.testing.assert_array_equal(scaler.to_levels(x), levels)
    np.testing.assert_array_equal(scaler.to_levels(jnp.full((1, 1, 1, 1), -9.0)), 0)
    np.testing.assert_array_equal(scaler.to_levels(jnp.full((1, 1, 1, 1), 9.0)), 255)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_the_middle_of_a_level_is_half_a_level_from_the_next(centered, dequantize, num_levels):
    """So that it maps back to its level, and still does when it is moved by 0.49 levels."""
    scaler = datasets.Scaler(num_levels, centered, dequantize)
    assert scaler.rounding == f"{'the bin they lie in' if dequantize else 'the nearest'} of {num_levels} levels"
    levels = jnp.arange(num_levels, dtype=jnp.uint8).reshape(1, num_levels, 1, 1)
    x = scaler.middle(levels)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(np.diff(x.ravel()), scaler.bin_width, rtol=1e-4)
    for shift in (-0.49, 0.0, 0.49):
        np.testing.assert_array_equal(scaler.to_levels(x + shift * scaler.bin_width), levels)
    margin = scaler.bin_width / 2 if dequantize else 0.0
    assert float(x.min()) == pytest.approx((-1.0 if centered else 0.0) + margin)
    assert float(x.max()) == pytest.approx(1.0 - margin)


def test_dequantization_matches_the_2021_code():
    """(u + 255 v) / 256 for v in [0, 1], with the same u for the same example whatever its batch."""
    scaler = datasets.Scaler(num_levels=256, centered=False, dequantize=True)
    levels = jax.random.randint(jax.random.key(1), (3, 4, 4, 2), 0, 256).astype(jnp.uint8)
    u = rng.uniform(jax.random.key(2), levels.shape)
    x = scaler.to_network(jax.random.key(2), levels)
    np.testing.assert_allclose(x, (u + 255.0 * (levels / 255.0)) / 256.0, rtol=1e-6)
    assert abs(float(u.mean()) - 0.5) < 4 * np.sqrt(1 / 12 / u.size)
    keys = rng.example_keys(jax.random.key(2), 3)
    np.testing.assert_array_equal(scaler.to_network(keys[1:2], levels[1:2]), x[1:2])


def test_scaling_is_that_of_the_2021_code(monkeypatch):
    """Its CIFAR-10, which it resized from 32 to 32 pixels, and the same dequantized with the uniforms it drew."""
    with np.load(GOLDEN / "math" / "data_resize.npz") as arrays:
        golden = dict(arrays)
    monkeypatch.setattr(rng, "uniform", lambda key, shape: golden["uniform_u"].reshape(shape))
    for dequantize, name in ((False, "cifar_float"), (True, "cifar_dequantized")):
        scaler = datasets.Scaler(num_levels=256, centered=False, dequantize=dequantize)
        x = scaler.to_network(jax.random.key(0), jnp.asarray(golden["cifar_in"][None]))
        # One rounding of values up to 1 in the one, two in the other: 255 * (level / 255) is not the level.
        np.testing.assert_allclose(x[0], golden[name], rtol=0, atol=1.2e-7)


def test_rounding_is_to_the_nearest_level():
    """The 2021 code truncated samples to uint8, which darkens them by half a level."""
    scaler = datasets.Scaler(num_levels=256, centered=False, dequantize=False)
    np.testing.assert_array_equal(scaler.to_levels(jnp.full((1, 1, 1, 1), 0.9999)), 255)


def test_flips_are_half_of_the_images():
    x = jnp.broadcast_to(jnp.arange(3.0).reshape(1, 1, 3, 1), (4000, 1, 3, 1))
    flipped = datasets.mirror_at_random(jax.random.key(0), x)[:, 0, 0, 0] == 2.0
    assert abs(float(flipped.mean()) - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_test_images_are_never_mirrored():
    config = digits_config(**{"data.random_flip": True})
    levels = jnp.asarray(datasets.load_digits("test").levels[:64])
    plain = digits_config()
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        datasets.build_preparation(config, train=False)(key, levels),
        datasets.build_preparation(plain, train=False)(key, levels),
    )
    assert not np.array_equal(
        datasets.build_preparation(config, train=True)(key, levels),
        datasets.build_preparation(plain, train=True)(key, levels),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.dataset": "digitz"},
            r"'digitz' is unknown; known: CELEBA, CIFAR10, CelebAHQ, FASHION_MNIST, FFHQ, LSUN, MNIST, SVHN, digits",
        ),
        ({"data.image_size": 32}, r"images of \(height, width, channels\) \(8, 8, 1\).*say \(32, 32, 1\)"),
        ({"data.num_levels": 256}, r"digits has 17 levels, but data.num_levels=256"),
    ],
)
def test_a_wrong_description_of_the_data_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        datasets.build_source(digits_config(**changes), "train")


class Stripes(Source):
    """A whole data set of one's own: the two members without defaults."""

    def __init__(self, shift=0):
        self.shift = shift

    def __len__(self):
        return 300

    def images(self, indices):
        return np.broadcast_to(
            ((indices + self.shift) % 256).astype(np.uint8)[:, None, None, None], (len(indices), 8, 8, 3)
        )


def test_a_new_data_set_is_one_small_class(monkeypatch):
    monkeypatch.setitem(datasets.SOURCES, "stripes", lambda config, split: Stripes())
    config = digits_config(**{"data.dataset": "stripes", "data.num_channels": 3, "data.num_levels": 256})
    source = datasets.build_source(config, "train")
    batch = next(datasets.training_batches(source, seed=0, first_step=0, batch_size=8, steps_per_call=1))
    first = datasets.training_indices(0, 0, 8, len(source))
    np.testing.assert_array_equal(np.sort(np.asarray(batch)[..., 0, 0, 0], axis=None), np.sort(first % 256))
    assert (source.num_classes, source.preparation) == (0, "as stored")
    assert source.fingerprint == Stripes().fingerprint != Stripes(shift=1).fingerprint
    with pytest.raises(ValueError, match="the images of this data set carry no labels"):
        source.labels(np.arange(2))


def test_data_that_are_not_prepared_are_named(tmp_path):
    config = digits_config(**{"data.dataset": "CIFAR10", "data.path": str(tmp_path)})
    with pytest.raises(ValueError, match=r"'cifar10' is not prepared as ArrayRecord files in .*--mode prepare"):
        datasets.build_source(config, "train")


PREPARE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Cifar10(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("3.0.2")
    pkg_dir_path = sys.argv[1]

    def _info(self):
        features = {"image": tfds.features.Image(shape=(4, 4, 3)), "label": tfds.features.ClassLabel(num_classes=10)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            yield i, {"image": np.full((4, 4, 3), 10 * i, np.uint8), "label": i}

from sources import tfds_build

sys.exit(tfds_build.main("cifar10", sys.argv[1]))
"""
READ = """
import sys
import numpy as np
import datasets

source = datasets.load_tfds("cifar10", "train", sys.argv[1])
everything = np.arange(len(source))
print(source.num_classes, sorted(source.labels(everything)), source.images(everything).shape, end=" ")
print((source.images(everything)[:, 0, 0, 0] == 10 * source.labels(everything)).all(), "tensorflow" in sys.modules)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")
def test_prepared_tfds_data_are_read_without_tensorflow(tmp_path):
    """What TFDS itself wrote, each in a process of its own: writing needs TensorFlow, reading must not."""
    prepared = tiny.run([sys.executable, "-c", PREPARE, str(tmp_path)])
    assert prepared.returncode == 0, prepared.stderr[-2000:]
    result = tiny.run([sys.executable, "-c", READ, str(tmp_path)])
    expected = "10 [np.int64(0), np.int64(1), np.int64(2), np.int64(3), np.int64(4)] (5, 4, 4, 3) True False"
    assert result.stdout.strip() == expected, result.stderr[-2000:]
