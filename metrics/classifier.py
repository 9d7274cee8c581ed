"""The extractor "classifier": a small network trained on the labels of the data themselves.

For data that no standard network knows, such as the embedded digits. It is trained on the training split, once: it is
cached by the content of the data and the settings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import logging
from flax import traverse_util
from jaxtyping import Array, Float, Integer, UInt8

from errors import UserError
from metrics.images import apply_in_batches, check_levels, flatten_params, params_hash
from parallel import distributed
from storage.files import content_hash, read_npz, write_atomically

EVAL_BATCH_SIZE = 256  # images of a batch of features: one compiled function serves any number of images
SMALLEST_SIDE = 8  # pixels: images are pooled by 2 while their shorter side is at least this


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
    """Architecture and training of the small classifier.

    Attributes:
      width: channels of the first convolution; doubled at each pooling.
      num_features: D, units of the last layer but one.
      num_steps: training steps.
      batch_size: images of a step.
      learning_rate: of Adam at the start; it falls to 0 along a half cosine. Small on purpose: a classifier trained
        hard keeps little of an image but its class, and a few large features drown the others.
    """

    width: int = 16
    num_features: int = 64
    num_steps: int = 400
    batch_size: int = 128
    learning_rate: float = 5e-4


class Classifier(nn.Module):
    """A plain convolutional classifier; returns (features, logits).

    Attributes:
      width: channels of the first convolution; doubled at each pooling.
      num_features: units of the last layer but one.
      num_classes: K.
    """

    width: int
    num_features: int
    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B D"], Float[Array, "B K"]]:
        """Classifies images in [0, 1]."""
        x, width = 2.0 * x - 1.0, self.width
        x = nn.swish(nn.Conv(width, (3, 3))(x))
        while min(x.shape[1:3]) >= SMALLEST_SIDE:
            width *= 2
            x = nn.max_pool(nn.swish(nn.Conv(width, (3, 3))(x)), (2, 2), strides=(2, 2))
        features = nn.swish(nn.Dense(self.num_features)(x.reshape(x.shape[0], -1)))
        return features, nn.Dense(self.num_classes)(features)


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """The features of a trained `Classifier`: the units of its last layer but one.

    Attributes:
      name: what it is, for the report.
      hash: of its parameters, in hex.
      accuracy: share of the test images that it classifies rightly.
      model: its architecture.
      params: {"network": its parameters, "scale": factor that makes the mean square of the features 1 on the
        training images, so that KID, whose kernel has a scale, is of a common size}.
      image_shape: (H, W, C) of the images it takes.
      num_levels: of their pixels.
      key: name in the table of extractors.
      resize: rule by which images are resized: they are not.
    """

    name: str
    hash: str
    accuracy: float
    model: Classifier
    params: Any
    image_shape: tuple[int, ...]
    num_levels: int

    key: ClassVar[str] = "classifier"
    resize: ClassVar[str] = "none"

    @property
    def num_features(self) -> int:
        """D, units of the last layer but one."""
        return self.model.num_features

    def __call__(
        self, levels: UInt8[np.ndarray, "N H W C"]
    ) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]:
        """Returns (features, logits) of images given as levels, float64.

        Raises:
          UserError: if images have another shape, or a level is not below `num_levels`.
        """
        check_levels("levels", levels, self.num_levels)
        if levels.shape[1:] != self.image_shape:
            raise UserError(f"images have shape {levels.shape[1:]}; the {self.name} takes {self.image_shape}")
        return _apply(self.model, self.params, _Scaled(levels, self.num_levels))


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """Levels as float32 in [0, 1], made when they are asked for: whole data sets of floats do not fit in memory."""

    levels: UInt8[np.ndarray, "N H W C"]
    num_levels: int

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, chosen: slice | np.ndarray) -> Float[np.ndarray, "B H W C"]:
        return self.levels[chosen].astype(np.float32) / np.float32(self.num_levels - 1)


@functools.partial(jax.jit, static_argnames="model")
def _apply_batch(model: Classifier, params: Any, x: Array) -> Any:
    features, logits = model.apply({"params": params["network"]}, x)
    return features * params["scale"], logits


def _apply(model: Classifier, params: Any, images: _Scaled) -> tuple[np.ndarray, np.ndarray]:
    return apply_in_batches(lambda x: _apply_batch(model, params, x), images, EVAL_BATCH_SIZE)


# --- training --------------------------------------------------------------------------------------------------------


ADAM = optax.scale_by_adam()  # the learning rate is an argument of the step: one compiled function for all settings


@functools.partial(jax.jit, static_argnames="model")
def _train_step(model: Classifier, state: Any, learning_rate: Array, x: Array, labels: Array) -> Any:
    params, moments = state

    def loss_fn(params: Any) -> Array:
        _, logits = model.apply({"params": params}, x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, moments = ADAM.update(jax.grad(loss_fn)(params), moments)
    return jax.tree.map(lambda p, update: p - learning_rate * update, params, updates), moments


def _batches(num_images: int, settings: ClassifierSettings, seed: int) -> Iterator[np.ndarray]:
    """Yields the images of each step; every image comes once before any comes twice."""
    generator = np.random.Generator(np.random.Philox(seed))
    needed = settings.num_steps * settings.batch_size
    epochs = [generator.permutation(num_images) for _ in range(-(-needed // num_images))]
    return iter(np.concatenate(epochs)[:needed].reshape(settings.num_steps, settings.batch_size))


def _train(model: Classifier, settings: ClassifierSettings, images: _Scaled, labels: np.ndarray, seed: int) -> Any:
    """Returns trained parameters as numpy arrays.

    One compiled call for each step: within a loop XLA's gradients of convolutions are tens of times slower on a CPU.
    """
    params = jax.jit(model.init)(jax.random.key(seed), images[:1])["params"]
    state = (params, ADAM.init(params))
    for step, chosen in enumerate(_batches(len(images), settings, seed)):
        decay = 0.5 * (1.0 + np.cos(np.pi * step / settings.num_steps))
        state = _train_step(model, state, np.float32(settings.learning_rate * decay), images[chosen], labels[chosen])
    params = {"network": jax.tree.map(np.asarray, state[0]), "scale": np.float32(1.0)}
    features, _ = _apply(model, params, images)
    return params | {"scale": np.float32(1.0 / np.sqrt(np.mean(features**2)))}


# --- cache -----------------------------------------------------------------------------------------------------------


def _to_arrays(params: Any, accuracy: float) -> dict[str, Any]:
    arrays: dict[str, Any] = {f"params/{name}": array for name, array in flatten_params(params).items()}
    return arrays | {"accuracy": accuracy, "hash": params_hash(params)}


def _from_arrays(stored: dict[str, np.ndarray]) -> tuple[Any, float]:
    """Returns (params, accuracy) of what `_to_arrays` has returned.

    Raises:
      KeyError: if something is missing.
      UserError: if it is damaged.
    """
    arrays = {name.removeprefix("params/"): stored[name] for name in stored if name.startswith("params/")}
    params, accuracy = traverse_util.unflatten_dict(arrays, sep="/"), float(stored["accuracy"])
    if params_hash(params) != str(stored["hash"]):
        raise UserError("its parameters do not have the hash that it states")
    return params, accuracy


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """Reads the arrays of a classifier, or None if there is no file or it is damaged, which is said."""
    if not path.exists():
        return None
    try:
        stored = read_npz(path)
        _from_arrays(stored)
    except (KeyError, ValueError) as error:
        logging.warning("the feature extractor cached in %s is damaged (%s); it is trained anew", path, error)
        return None
    return stored


# --- building --------------------------------------------------------------------------------------------------------


def _check_labels(name: str, labels: np.ndarray | None, num_images: int) -> np.ndarray:
    if labels is None or not len(labels):
        raise UserError(
            f"{name} is empty: a feature extractor is trained on class labels, which these data lack; choose a data "
            "set with labels, or set eval.enable_sampling=False to evaluate without metrics of samples"
        )
    labels = np.asarray(labels)
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(
            f"{name} is {labels.dtype}{list(labels.shape)}; expected integers from 0, one for each of {num_images} "
            "images"
        )
    return labels.astype(np.int32)


def build_feature_extractor(
    train_levels: UInt8[np.ndarray, "N H W C"],
    train_labels: Integer[np.ndarray, "N"] | None,
    test_levels: UInt8[np.ndarray, "M H W C"],
    test_labels: Integer[np.ndarray, "M"] | None,
    *,
    num_levels: int,
    folder: str | Path,
    seed: int = 0,
    settings: ClassifierSettings | None = None,
) -> FeatureExtractor:
    """Trains the small classifier of a data set, or reads it from the cache.

    The same data, settings and seed give the same features, on the same machine to the last bit.

    Args:
      train_levels: images to train on, integers 0 .. num_levels - 1.
      train_labels: their classes, counted from 0; None if there are none.
      test_levels: images on which the accuracy is measured.
      test_labels: their classes.
      num_levels: of the data.
      folder: of the cache, such as `<workdir>/features`; made if need be.
      seed: of the initial parameters and of the order of the images.
      settings: architecture and training; None takes the defaults.

    Raises:
      UserError: if there are no labels, they do not fit the images, or levels are out of range.
    """
    settings = settings or ClassifierSettings()
    for name, levels in (("train_levels", train_levels), ("test_levels", test_levels)):
        check_levels(name, levels, num_levels)
    train_labels = _check_labels("train_labels", train_labels, len(train_levels))
    test_labels = _check_labels("test_labels", test_labels, len(test_levels))
    described = f"{settings} num_levels={num_levels} seed={seed} SMALLEST_SIDE={SMALLEST_SIDE}"
    key = content_hash(described, train_levels, train_labels, test_levels, test_labels)
    path = Path(folder) / f"classifier_{key[:16]}.npz"
    model = Classifier(settings.width, settings.num_features, int(train_labels.max()) + 1)

    def load_or_train() -> dict[str, Any]:
        if (stored := _load(path)) is not None:
            return stored
        logging.info("training the feature extractor: %d images, %d steps", len(train_levels), settings.num_steps)
        params = _train(model, settings, _Scaled(train_levels, num_levels), train_labels, seed)
        _, logits = _apply(model, params, _Scaled(test_levels, num_levels))
        arrays = _to_arrays(params, float((logits.argmax(axis=1) == test_labels).mean()))
        write_atomically(path, lambda file: np.savez(file, **arrays))
        return arrays

    trained = distributed.once_arrays(load_or_train)
    assert trained is not None
    params, accuracy = _from_arrays(trained)
    logging.info("feature extractor: %.1f %% of %d test images right; %s", 100 * accuracy, len(test_levels), path)
    return FeatureExtractor(
        name=f"classifier of {model.num_classes} classes trained on this data set, {settings.num_features} features",
        hash=params_hash(params),
        accuracy=accuracy,
        model=model,
        params=params,
        image_shape=train_levels.shape[1:],
        num_levels=num_levels,
    )
