"""The extractor "classifier": a small network trained on the labels of the data themselves.

For data unlike photographs, such as the embedded digits. It is trained once, on the training split, and cached by the
content of the data and the settings.
"""

from __future__ import annotations

import dataclasses
import functools
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

EVAL_BATCH_SIZE = 256  # images per batch of features: one compiled function for any number of images
SMALLEST_SIDE = 8  # pixels: images are pooled by 2 while their shorter side is at least this


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
    """Architecture and training of the small classifier.

    The learning rate is small because a well-trained classifier keeps little of an image but its class, and a few large
    features dominate.
    """

    width: int = 16  # channels of the first convolution; doubled at each pooling
    num_features: int = 64  # D, units of the last layer but one
    num_steps: int = 400  # training steps
    batch_size: int = 128  # images per step
    learning_rate: float = 5e-4  # of Adam; falls to 0 along a half cosine


class Classifier(nn.Module):
    """A convolutional classifier of images in [0, 1]; returns (features, logits). `width` doubles at each pooling."""

    width: int
    num_features: int
    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B D"], Float[Array, "B K"]]:
        x, width = 2.0 * x - 1.0, self.width
        x = nn.swish(nn.Conv(width, (3, 3))(x))
        while min(x.shape[1:3]) >= SMALLEST_SIDE:
            width *= 2
            x = nn.max_pool(nn.swish(nn.Conv(width, (3, 3))(x)), (2, 2), strides=(2, 2))
        features = nn.swish(nn.Dense(self.num_features)(x.reshape(x.shape[0], -1)))
        return features, nn.Dense(self.num_classes)(features)


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """The features of a trained `Classifier`: the units of its last layer but one (see `extractors.Extractor`).

    A scale factor makes their mean square 1 on the training images, since KID's kernel depends on the scale.
    """

    name: str
    hash: str
    accuracy: float
    model: Classifier
    params: Any  # {"network": its parameters, "scale": factor of the features}
    image_shape: tuple[int, ...]  # (H, W, C) of its images
    num_levels: int  # of their pixels

    key: ClassVar[str] = "classifier"
    resize: ClassVar[str] = "none"

    @property
    def num_features(self) -> int:
        return self.model.num_features

    def __call__(
        self, levels: UInt8[np.ndarray, "N H W C"]
    ) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]:
        check_levels("levels", levels, self.num_levels)
        if levels.shape[1:] != self.image_shape:
            raise UserError(f"images have shape {levels.shape[1:]}; the {self.name} takes {self.image_shape}")
        return _apply(self.model, self.params, levels, self.num_levels)


def _scaled(levels: UInt8[np.ndarray, "B H W C"], num_levels: int) -> Float[np.ndarray, "B H W C"]:
    return levels.astype(np.float32) / np.float32(num_levels - 1)


@functools.partial(jax.jit, static_argnames="model")
def _apply_batch(model: Classifier, params: Any, x: Array) -> Any:
    features, logits = model.apply({"params": params["network"]}, x)
    return features * params["scale"], logits


def _apply(model: Classifier, params: Any, levels: np.ndarray, num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    return apply_in_batches(lambda x: _apply_batch(model, params, _scaled(x, num_levels)), levels, EVAL_BATCH_SIZE)


ADAM = optax.scale_by_adam()  # the learning rate is an argument of the step: one compiled function for all settings


@functools.partial(jax.jit, static_argnames="model")
def _train_step(model: Classifier, state: Any, learning_rate: Array, x: Array, labels: Array) -> Any:
    params, moments = state

    def loss_fn(params: Any) -> Array:
        _, logits = model.apply({"params": params}, x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, moments = ADAM.update(jax.grad(loss_fn)(params), moments)
    return jax.tree.map(lambda p, update: p - learning_rate * update, params, updates), moments


def _batches(num_images: int, settings: ClassifierSettings, seed: int) -> np.ndarray:
    """Return the image indices of each step; every image comes once before any comes twice."""
    generator = np.random.Generator(np.random.Philox(seed))
    needed = settings.num_steps * settings.batch_size
    epochs = [generator.permutation(num_images) for _ in range(-(-needed // num_images))]
    return np.concatenate(epochs)[:needed].reshape(settings.num_steps, settings.batch_size)


def _train(
    model: Classifier, settings: ClassifierSettings, levels: np.ndarray, num_levels: int, labels: np.ndarray, seed: int
) -> Any:
    """Return trained parameters as numpy arrays.

    One compiled call per step: inside a loop XLA's gradients of convolutions are tens of times slower on a CPU.
    """
    params = jax.jit(model.init)(jax.random.key(seed), _scaled(levels[:1], num_levels))["params"]
    state = (params, ADAM.init(params))
    for step, chosen in enumerate(_batches(len(levels), settings, seed)):
        decay = 0.5 * (1.0 + np.cos(np.pi * step / settings.num_steps))
        x = _scaled(levels[chosen], num_levels)
        state = _train_step(model, state, np.float32(settings.learning_rate * decay), x, labels[chosen])
    params = {"network": jax.tree.map(np.asarray, state[0]), "scale": np.float32(1.0)}
    features, _ = _apply(model, params, levels, num_levels)
    return params | {"scale": np.float32(1.0 / np.sqrt(np.mean(features**2)))}


def _from_arrays(stored: dict[str, np.ndarray]) -> tuple[Any, float]:
    """Return (params, accuracy) from the arrays of a cache file, checked."""
    arrays = {name.removeprefix("params/"): stored[name] for name in stored if name.startswith("params/")}
    params, accuracy = traverse_util.unflatten_dict(arrays, sep="/"), float(stored["accuracy"])
    if params_hash(params) != str(stored["hash"]):
        raise UserError("its parameters do not have the hash that it states")
    return params, accuracy


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """Read the arrays of a cached classifier; None if there is no file or it is damaged."""
    if not path.exists():
        return None
    try:
        stored = read_npz(path)
        _from_arrays(stored)
    except (KeyError, ValueError) as error:
        logging.warning("the feature extractor cached in %s is damaged (%s); it is trained again", path, error)
        return None
    return stored


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
    """Train the small classifier of a data set, or read it from the cache.

    The same data, settings and seed give the same features, bit for bit on the same machine. Levels are 0 ..
    num_levels - 1, labels count from 0; the accuracy is measured on the test images. `folder` is the cache, such as
    `<workdir>/features`.
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
        params = _train(model, settings, train_levels, num_levels, train_labels, seed)
        _, logits = _apply(model, params, test_levels, num_levels)
        arrays: dict[str, Any] = {f"params/{name}": array for name, array in flatten_params(params).items()}
        arrays |= {"accuracy": float((logits.argmax(axis=1) == test_labels).mean()), "hash": params_hash(params)}
        write_atomically(path, lambda file: np.savez(file, **arrays))
        return arrays

    trained = distributed.once_arrays(load_or_train)
    assert trained is not None
    params, accuracy = _from_arrays(trained)
    logging.info("feature extractor: %.1f %% of %d test images correct; %s", 100 * accuracy, len(test_levels), path)
    return FeatureExtractor(
        name=f"classifier of {model.num_classes} classes trained on this data set, {settings.num_features} features",
        hash=params_hash(params),
        accuracy=accuracy,
        model=model,
        params=params,
        image_shape=train_levels.shape[1:],
        num_levels=num_levels,
    )
