"""The data sets, the deterministic input pipeline, and the scaling between stored levels and the network's range.

A source gives random access to images as integer levels. The batch of step i is a pure function of (seed, i): a resumed
run sees the same batches as an unbroken one. Mirroring and dequantization happen on the device, keyed by (seed, step,
example), so only uint8 is transferred.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from configs.settings import check, image_shape
from errors import UserError
from parallel import distributed, rng
from sources.base import Source
from sources.digits import load_digits
from sources.folder import Rules, load_folder
from sources.npz import load_npz_split
from sources.pictures import Fit
from sources.tfds import PREFIX, TfdsSource, keep, load_any, load_celeba, load_lsun, load_tfds, scene_name
from sources.tfrecord import load_tfrecord
from storage.files import content_hash

NUM_COMPARED = 16  # images that hosts compare
# Data sets of TFDS: their TFDS names, but for LSUN, of which each scene has one.
TFDS_NAMES = {
    "CIFAR10": "cifar10",
    "SVHN": "svhn_cropped",
    "MNIST": "mnist",
    "FASHION_MNIST": "fashion_mnist",
    "CELEBA": "celeb_a",
}

# Every data set by its name in `data.dataset`: (configuration, "train" or "test") -> Source.
SOURCES: dict[str, Callable[[ConfigDict, str], Source]] = {
    "digits": lambda config, split: load_digits(split),
    "folder": lambda config, split: load_folder(config.data.path, split, _build_rules(config)),
    "npz": lambda config, split: load_npz_split(
        config.data.path, split, image_shape(config), config.data.num_levels, config.data.test_share
    ),
    "CIFAR10": lambda config, split: _build_cached(config, load_tfds(TFDS_NAMES["CIFAR10"], split, config.data.path)),
    "SVHN": lambda config, split: _build_cached(config, load_tfds(TFDS_NAMES["SVHN"], split, config.data.path)),
    "MNIST": lambda config, split: _build_any(config, split),
    "FASHION_MNIST": lambda config, split: _build_any(config, split),
    "CELEBA": lambda config, split: _build_cached(config, load_celeba(split, config.data.image_size, config.data.path)),
    "LSUN": lambda config, split: _build_cached(
        config, load_lsun(config.data.category, split, config.data.image_size, config.data.path)
    ),
    "FFHQ": lambda config, split: load_tfrecord(config.data.tfrecords_path, image_shape(config)),
    "CelebAHQ": lambda config, split: load_tfrecord(config.data.tfrecords_path, image_shape(config)),
}


def _build_cached(config: ConfigDict, source: TfdsSource) -> Source:
    return keep(source, image_shape(config), config.data.cache_gib)


def _build_any(config: ConfigDict, split: str) -> Source:
    name = tfds_name(config.data.dataset, config.data.category)
    return load_any(name, split, config.data.path, _build_rules(config))


def _build_rules(config: ConfigDict) -> Rules:
    """Return how `config.data` prepares pictures of any size and kind."""
    data = config.data
    fit = Fit(image_shape(config), data.resize, convert_channels=True, group="data")
    return Rules(fit, data.num_levels, data.strict, data.test_share, data.cache_gib)


def tfds_name(dataset: str, category: str) -> str:
    """Return the TFDS name of a data set, for LSUN of its category; empty if it is not one of TFDS."""
    if dataset == "LSUN":
        return scene_name(category)
    return dataset.removeprefix(PREFIX) if dataset.startswith(PREFIX) else TFDS_NAMES.get(dataset, "")


def build_source(config: ConfigDict, split: str) -> Source:
    """Open one split of the configured data set and check its images against the configuration.

    Args:
      config: experiment configuration; reads `config.data` and `config.model.num_classes`.
      split: "train" or "test".
    """
    check(config, "data")
    build = _build_any if config.data.dataset.startswith(PREFIX) else SOURCES[config.data.dataset]
    source = build(config, split)
    found, expected = source.images(np.array([0])).shape[1:], image_shape(config)
    if found != expected:
        raise UserError(
            f"{config.data.dataset} has images of (height, width, channels) {found}, but data.image_size, "
            f"data.image_width and data.num_channels say {expected}; set them to the data's"
        )
    if source.num_levels != config.data.num_levels:
        raise UserError(
            f"{config.data.dataset} has {source.num_levels} levels, but data.num_levels={config.data.num_levels}; "
            f"bits/dim would be wrong: set data.num_levels={source.num_levels}"
        )
    if split == "train" and config.model.num_classes not in (0, source.num_classes):
        carried = f"labels of {source.num_classes} classes" if source.num_classes else "no labels"
        raise UserError(
            f"the images of {config.data.dataset} carry {carried}, but model.num_classes={config.model.num_classes}; "
            f"set model.num_classes={source.num_classes}"
        )
    if split == "test" and 0 < config.model.num_classes < source.num_classes:
        raise UserError(
            f"the labels of the test images of {config.data.dataset} go up to {source.num_classes - 1}, but "
            f"model.num_classes={config.model.num_classes}; correct them, or the classes of the training images"
        )
    if not distributed.is_alone():
        _check_same_on_all(source, split)
    return source


def _check_same_on_all(source: Source, split: str) -> None:
    """Check that every host has the images of process 0: their number, and some of them at even distances.

    The fingerprint depends on path and modification time, which may differ between copies of a file.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, NUM_COMPARED).astype(np.int64))
    seen = {"number of images": len(source), f"hash of {len(chosen)} images": content_hash(source.images(chosen))}
    distributed.require_same({f"{name} of the {split} split": value for name, value in seen.items()})


# --- order -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_examples)


def training_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Return the example indices of one training step (counted from 0), int64[batch_size], for all hosts together.

    Steps read one endless stream in which every epoch is a new permutation: each example comes exactly once per epoch,
    whether or not the batch size divides their number.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, num_examples)
    orders = {epoch: _epoch_order(seed, int(epoch), num_examples) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][offset] for epoch, offset in zip(epochs, offsets, strict=True)])


def training_batches(
    source: Source, *, seed: int, first_step: int, batch_size: int, steps_per_call: int, with_labels: bool = False
) -> Iterator[Array | tuple[Array, Array]]:
    """Yield the batches of successive compiled calls, already on the devices of this host.

    A background thread reads and places the next batches while the devices compute. `batch_size` is of all hosts
    together, `steps_per_call` the number of training steps in one compiled call.

    Yields:
      Levels, uint8[devices, steps_per_call, B, H, W, C], B images per device; with labels (levels, int32[devices,
      steps_per_call, B]).
    """

    def load(step: int) -> Array | tuple[Array, Array]:
        steps = range(step, step + steps_per_call)
        indices = [distributed.host_share(training_indices(seed, s, batch_size, len(source))) for s in steps]
        levels = distributed.shard(np.stack([source.images(i) for i in indices]), axis=1)
        if not with_labels:
            return levels
        labels = np.stack([source.labels(i) for i in indices]).astype(np.int32)
        return levels, distributed.shard(labels, axis=1)

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = [pool.submit(load, first_step), pool.submit(load, first_step + steps_per_call)]
        step = first_step + 2 * steps_per_call
        while True:
            batch = ahead.pop(0).result()
            ahead.append(pool.submit(load, step))
            step += steps_per_call
            yield batch


# --- scaling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaler:
    """Maps stored levels to the network's range and back."""

    num_levels: int  # of the stored data
    centered: bool  # the network's range is [-1, 1]; if not, [0, 1]
    dequantize: bool  # level v is the interval [v, v + 1) / num_levels; if not, the point v / (num_levels - 1)

    def center(self, y: Array) -> Array:
        """Map [0, 1] to the network's range."""
        return 2.0 * y - 1.0 if self.centered else y

    def uncenter(self, x: Array) -> Array:
        """Map the network's range to [0, 1]."""
        return (x + 1.0) / 2.0 if self.centered else x

    @property
    def bin_width(self) -> float:
        """Distance of two neighbouring levels in the network's range."""
        return (2.0 if self.centered else 1.0) / (self.num_levels if self.dequantize else self.num_levels - 1)

    def middle(self, levels: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Map levels to the network's range without noise: to the middle of the values that round to them."""
        y = levels.astype(jnp.float32)
        return self.center((y + 0.5) / self.num_levels if self.dequantize else y / (self.num_levels - 1))

    def to_network(self, key: PRNGKeyArray, levels: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Map levels to the network's range, dequantized if so configured; `key` is one key, or one per example."""
        if not self.dequantize:
            return self.middle(levels)
        return self.center((levels.astype(jnp.float32) + rng.uniform(key, levels.shape)) / self.num_levels)

    def to_levels(self, x: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
        """Map samples of the network to the nearest level, clipping values outside the range."""
        y = self.uncenter(x)
        levels = jnp.floor(y * self.num_levels) if self.dequantize else jnp.round(y * (self.num_levels - 1))
        return jnp.clip(levels, 0, self.num_levels - 1).astype(jnp.uint8)

    @property
    def rounding(self) -> str:
        """How samples become levels, in words."""
        return f"{'the bin they lie in' if self.dequantize else 'the nearest'} of {self.num_levels} levels"


def build_scaler(config: ConfigDict) -> Scaler:
    """Build the scaling from `config.data`."""
    check(config, "data")
    return Scaler(config.data.num_levels, config.data.centered, config.data.uniform_dequantization)


def mirror_at_random(key: PRNGKeyArray, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Mirror each image left to right with probability 1/2."""
    chosen = rng.bernoulli(key, 0.5, (x.shape[0], 1, 1, 1))
    return jnp.where(chosen, x[:, :, ::-1], x)


def build_preparation(
    config: ConfigDict, *, train: bool
) -> Callable[[PRNGKeyArray, UInt8[Array, "B H W C"]], Float[Array, "B H W C"]]:
    """Build the pure function (key, levels) -> x that turns a batch of levels into the loss's input.

    With `train`, images are mirrored if so configured.
    """
    scaler = build_scaler(config)
    flip = train and config.data.random_flip

    def prepare(key: PRNGKeyArray, levels: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        key_flip, key_dequantize = rng.split(key)
        x = scaler.to_network(key_dequantize, levels)
        return mirror_at_random(key_flip, x) if flip else x

    return prepare
