"""Data sources, the deterministic input pipeline, and the scaling between stored levels and the network's range.

A source gives random access to images as integer levels. The batch of step i is a pure function of (seed, i): a run
that was killed and resumed sees what one that never stopped would have seen. Mirroring and dequantization happen on
the device, keyed by (seed, step, example), so only uint8 travels there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

import distributed
import rng

NUM_DIGITS_TRAIN = 1500  # of the 1,797 digits; the other 297 are the test split


class Source(Protocol):
    """Random access to the images of one split."""

    @property
    def num_levels(self) -> int:
        """Levels that a value can take."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes of the labels; 0 if the images carry none."""
        ...

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C]."""
        ...

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n]."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """A split that fits in memory."""

    levels: np.ndarray
    classes: np.ndarray
    num_levels: int
    num_classes: int

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.levels)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C]."""
        return self.levels[indices]

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n]."""
        return self.classes[indices]


@dataclass(frozen=True)
class TfdsSource:
    """A split that tensorflow-datasets prepared as ArrayRecord files; they are read without TensorFlow."""

    records: Any
    num_classes: int
    num_levels: int = 256

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.records)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Reads images as levels, uint8[n, H, W, C]."""
        return np.stack([record["image"] for record in self.records.__getitems__(indices.tolist())])

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Reads class labels, int64[n]."""
        return np.array([record["label"] for record in self.records.__getitems__(indices.tolist())])


def load_digits(split: str, path: str = "") -> ArraySource:
    """Loads the 8x8 grey handwritten digits that ship inside scikit-learn, 17 levels (0 to 16).

    The split is fixed for all time: a permutation by a frozen generator, 1,500 images to train on and 297 to test.

    Args:
      split: "train" or "test".
      path: unused, the data need no files.
    """
    from sklearn.datasets import load_digits as load_from_sklearn  # slow to import, and only this source needs it

    pixels, classes = load_from_sklearn(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(pixels))  # RandomState's stream never changes between versions
    chosen = order[:NUM_DIGITS_TRAIN] if split == "train" else order[NUM_DIGITS_TRAIN:]
    levels = pixels.reshape(-1, 8, 8, 1).astype(np.uint8)
    return ArraySource(levels[chosen], classes[chosen].astype(np.int64), num_levels=17, num_classes=10)


def load_tfds(name: str, split: str, path: str = "") -> TfdsSource:
    """Opens a data set that tensorflow-datasets has prepared.

    Args:
      name: of the TFDS builder, such as "cifar10".
      split: of that builder, such as "train".
      path: TFDS data folder; empty: $TFDS_DATA_DIR, or ~/tensorflow_datasets.

    Raises:
      FileNotFoundError: if the data are not prepared there as ArrayRecord files.
    """
    import tensorflow_datasets as tfds  # lazily: half a second, and the embedded data need none of it

    folder = path or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    # download=False: without it TFDS retries a machine that has no network for minutes.
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(folder), file_format="array_record")
        records = builder.as_data_source(split=split)
    except (AssertionError, KeyError, ValueError, NotImplementedError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"data set {name!r} is not prepared as ArrayRecord files in {folder}; prepare it once, where TensorFlow "
            f"is installed: tfds build {name} --file_format=array_record --data_dir={folder}"
        ) from error
    features = builder.info.features
    return TfdsSource(records, num_classes=features["label"].num_classes if "label" in features else 0)


# Every data source by the name that `data.dataset` gives it: (split, path) -> Source.
SOURCES: dict[str, Callable[[str, str], Source]] = {
    "digits": load_digits,
    "CIFAR10": functools.partial(load_tfds, "cifar10"),
}


def build_source(config: ConfigDict, split: str) -> Source:
    """Opens one split of the configured data set and checks that its images are what the network expects.

    Args:
      config: experiment configuration; reads `config.data`.
      split: "train" or "test".

    Raises:
      ValueError: if the data set is unknown or its images differ from the configuration.
      FileNotFoundError: if its files are missing.
    """
    if config.data.dataset not in SOURCES:
        raise ValueError(f"data.dataset={config.data.dataset!r} is unknown; known: {', '.join(sorted(SOURCES))}")
    source = SOURCES[config.data.dataset](split, config.data.path)
    found, expected = source.images(np.array([0])).shape[1:], image_shape(config)
    if found != expected:
        raise ValueError(
            f"{config.data.dataset} has images of (height, width, channels) {found}, but data.image_size, "
            f"data.image_width and data.num_channels say {expected}; set them to the data's"
        )
    if source.num_levels != config.data.num_levels:
        raise ValueError(
            f"{config.data.dataset} has {source.num_levels} levels, but data.num_levels={config.data.num_levels}; "
            f"bits/dim would be wrong: set data.num_levels={source.num_levels}"
        )
    return source


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the configured images."""
    return config.data.image_size, config.data.image_width or config.data.image_size, config.data.num_channels


# --- order -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_examples)


def training_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Returns the example indices of one training step, int64[batch_size].

    Steps read one endless stream, each epoch of which is a fresh permutation: every example comes exactly once an
    epoch, whether or not the batch size divides their number.

    Args:
      seed: of the experiment.
      step: counted from 0.
      batch_size: of all hosts together.
      num_examples: in the split.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, num_examples)
    orders = {epoch: _epoch_order(seed, int(epoch), num_examples) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][offset] for epoch, offset in zip(epochs, offsets, strict=True)])


def training_batches(
    source: Source, *, seed: int, first_step: int, batch_size: int, steps_per_call: int
) -> Iterator[Array]:
    """Yields the batches of successive compiled calls, already on the devices of this host.

    A background thread reads and places the next batches while the devices work on the present one.

    Args:
      source: training split.
      seed: of the experiment.
      first_step: step of the first batch, counted from 0.
      batch_size: of all hosts together.
      steps_per_call: training steps in one compiled call.

    Yields:
      Levels, uint8[devices, steps_per_call, B, H, W, C], B images for each device.
    """

    def load(step: int) -> Array:
        steps = range(step, step + steps_per_call)
        indices = [training_indices(seed, s, batch_size, len(source)) for s in steps]
        levels = [source.images(distributed.host_share(i)) for i in indices]
        return distributed.shard(np.stack(levels), axis=1)

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
    """Maps stored levels to the network's range and back.

    Attributes:
      num_levels: of the stored data.
      centered: the network's range is [-1, 1] if set, [0, 1] otherwise.
      dequantize: level v stands for the interval [v, v + 1) / num_levels; if not set, for the point
        v / (num_levels - 1).
    """

    num_levels: int
    centered: bool
    dequantize: bool

    def center(self, y: Array) -> Array:
        """Maps [0, 1] to the network's range."""
        return 2.0 * y - 1.0 if self.centered else y

    def uncenter(self, x: Array) -> Array:
        """Maps the network's range to [0, 1]."""
        return (x + 1.0) / 2.0 if self.centered else x

    def to_network(self, key: PRNGKeyArray, levels: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Maps levels to the network's range, dequantizing them uniformly if so configured.

        Args:
          key: one key, or one for each example.
          levels: integers 0 .. num_levels - 1.
        """
        y = levels.astype(jnp.float32)
        if self.dequantize:
            return self.center((y + rng.uniform(key, levels.shape)) / self.num_levels)
        return self.center(y / (self.num_levels - 1))

    def to_levels(self, x: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
        """Maps samples of the network to the nearest level, clipping what lies outside the range."""
        y = self.uncenter(x)
        levels = jnp.floor(y * self.num_levels) if self.dequantize else jnp.round(y * (self.num_levels - 1))
        return jnp.clip(levels, 0, self.num_levels - 1).astype(jnp.uint8)


def build_scaler(config: ConfigDict) -> Scaler:
    """Builds the scaling that `config.data` describes."""
    if not 2 <= config.data.num_levels <= 256:
        raise ValueError(f"data.num_levels={config.data.num_levels}; expected 2 to 256, what uint8 images can hold")
    return Scaler(config.data.num_levels, config.data.centered, config.data.uniform_dequantization)


def mirror_at_random(key: PRNGKeyArray, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Mirrors each image left to right with probability 1/2."""
    chosen = rng.bernoulli(key, 0.5, (x.shape[0], 1, 1, 1))
    return jnp.where(chosen, x[:, :, ::-1], x)


def build_preparation(
    config: ConfigDict, *, train: bool
) -> Callable[[PRNGKeyArray, UInt8[Array, "B H W C"]], Float[Array, "B H W C"]]:
    """Builds the function that turns a batch of levels into what the loss sees.

    Args:
      config: experiment configuration; reads `config.data`.
      train: mirror the images if so configured.

    Returns:
      A pure function (key, levels) -> x in the network's range.
    """
    scaler = build_scaler(config)
    flip = train and config.data.random_flip

    def prepare(key: PRNGKeyArray, levels: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        key_flip, key_dequantize = rng.split(key)
        x = scaler.to_network(key_dequantize, levels)
        return mirror_at_random(key_flip, x) if flip else x

    return prepare
