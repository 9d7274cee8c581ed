"""Features of the real images, with which those of samples are compared."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

import datasets
from errors import UserError
from evaluation import PreparedReference, floor_metrics, sample_metrics
from metrics import classifier
from metrics.extractors import Extractor, build_extractor, resolve_extractor
from metrics.frechet import FeatureStatistics
from metrics.metric import INCEPTION, Metric
from metrics.pretrained import BATCH_SIZE
from metrics.reference import NOT_STATED, Reference, compact, load_reference
from parallel import distributed
from report import FeatureInfo, ReferenceInfo
from storage.files import content_hash
from workdir import results
from workdir.progress import track

BATCH_IMAGES = 256  # read at a time, or one batch of every device if that is more
BATCH_BYTES = 2**25  # the same, in bytes of their levels
BATCH_STEP = 64  # large batches are multiples of it, so that no network's own batch is filled up in vain
FEWEST_IMAGES = 2  # of a split, so that it has a covariance
TAKE_WEIGHTS = ("inception", "tfgan")  # extractors that read eval.weights
FOR_PHOTOGRAPHS = "inception, efficientnet_lite0 or tfgan"
_Compared = tuple[Float[np.ndarray, "N D"] | FeatureStatistics, ReferenceInfo]  # samples with what, and its name


def every_image(source: datasets.Source) -> UInt8[np.ndarray, "N H W C"]:
    """Returns all images of a split, in memory."""
    return source.images(np.arange(len(source)))


def batches_of(source: datasets.Source) -> list[np.ndarray]:
    """Returns the indices of a split's images, each once, in batches of which one fits in memory."""
    most = max(BATCH_IMAGES, BATCH_SIZE * distributed.local_device_count())
    size = min(most, max(1, BATCH_BYTES // source.images(np.array([0])).nbytes))
    size = size // BATCH_STEP * BATCH_STEP or size
    return [np.arange(start, min(start + size, len(source))) for start in range(0, len(source), size)]


# --- extractor -------------------------------------------------------------------------------------------------------


def choose_extractor(config: ConfigDict) -> str:
    """Returns the key of the configured extractor.

    Raises:
      UserError: if it is unknown, takes no such images, or has no use for the weights that are named.
    """
    settings = config.eval
    key = resolve_extractor(settings.extractor, channels=config.data.num_channels, weights=settings.weights)
    if settings.weights and key not in TAKE_WEIGHTS:
        raise UserError(
            f"eval.weights={settings.weights!r} is of no use to the extractor {key!r}; set eval.extractor to inception "
            "or tfgan, or leave eval.weights empty"
        )
    return key


def build_configured_extractor(config: ConfigDict, split: Callable[[str], datasets.Source], folder: Path) -> Extractor:
    """Builds the configured extractor; "classifier" is trained on the data, all of which are then in memory.

    Args:
      config: experiment configuration.
      split: opens a split of the data; called only for "classifier".
      folder: where "classifier" is kept, and looked for.

    Raises:
      UserError: if a setting is wrong, or "classifier" is chosen for images without labels.
      UserError: if weights are missing.
    """
    key = choose_extractor(config)
    if key != "classifier":
        return build_extractor(key, num_levels=config.data.num_levels, weights=config.eval.weights)
    train, test = split("train"), split("test")
    if not train.num_classes:
        others = f"set eval.extractor to {FOR_PHOTOGRAPHS} (docs/extractors.md says how to get each); "
        raise UserError(
            f"data.dataset={config.data.dataset!r} has no labels to train a feature extractor on, so that samples "
            f"cannot be measured with eval.extractor={config.eval.extractor!r}; "
            f"{others if config.data.num_channels in (1, 3) else ''}"
            "--mode eval does without if eval.enable_sampling=False"
        )
    return classifier.build_feature_extractor(
        every_image(train),
        train.labels(np.arange(len(train))),
        every_image(test),
        test.labels(np.arange(len(test))),
        num_levels=train.num_levels,
        folder=folder,
        seed=config.seed,
    )


# --- features of a split ---------------------------------------------------------------------------------------------


def extract(
    extractor: Extractor, source: datasets.Source, name: str
) -> Iterator[tuple[UInt8[np.ndarray, "B H W C"], Float[np.ndarray, "B D"], Float[np.ndarray, "B K"]]]:
    """Yields (levels, features, logits) of every image of a split, a batch at a time, and logs how it goes."""
    for indices in track(batches_of(source), name):
        levels = source.images(indices)
        features, logits = distributed.divide(extractor, levels)
        yield levels, features, logits


def cached_features(
    extractor: Extractor, source: datasets.Source, folder: Path, *, name: str, with_logits: bool
) -> dict[str, Float[np.ndarray, "N D"]]:
    """Returns the features of every image of a split, and class scores, from a file if they were computed before.

    Args:
      extractor: that computes them.
      source: of the images.
      folder: of the file, which is named after all that the features depend on.
      name: of the split, for the log.
      with_logits: class scores are wanted, too.

    Returns:
      "features", float64[N, D], and "logits", float64[N, K], if they are wanted.
    """
    wanted = ("features", "logits")[: 1 + with_logits]
    described = f"{extractor.key} {extractor.hash} {extractor.resize} {source.num_levels} {len(source)} {wanted}"
    path = folder / f"real_{content_hash(described, source.fingerprint)[:32]}.npz"

    def compute() -> dict[str, np.ndarray]:
        parts = [outputs[: len(wanted)] for _, *outputs in extract(extractor, source, name)]
        joined = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return {key: compact(array) for key, array in zip(wanted, joined, strict=True)}

    return {key: array.astype(np.float64) for key, array in results.cached(path, compute).items()}


# --- reference -------------------------------------------------------------------------------------------------------


def open_reference(path: str) -> Reference:
    """Reads the file that eval.reference names.

    Raises:
      UserError: if there is none.
      UserError: if it holds no statistics.
    """
    place = Path(os.path.expanduser(path))
    if not place.is_file():
        raise UserError(f"eval.reference={path!r} is not a file; --mode stats makes one; empty: the training split")
    return load_reference(place)


def check_reference(path: str, reference: Reference, extractor: Extractor) -> None:
    """Checks that the statistics of a file are of the features that an extractor computes.

    Raises:
      UserError: if they are another network's, or may be.
    """
    stored, dimension = reference.provenance, len(reference.statistics.mean)
    way_out = f"set eval.extractor to the file's, or make a file of {extractor.key!r} with --mode stats"
    if not stored.extractor and extractor.key not in INCEPTION:
        raise UserError(
            f"eval.reference={path!r} does not state its extractor, as files of other programs; those go with "
            f"{' or '.join(INCEPTION)}, not {extractor.key!r}: {way_out}"
        )
    if stored.extractor and (stored.extractor, stored.extractor_hash) != (extractor.key, extractor.hash):
        raise UserError(
            f"eval.reference={path!r} is of the extractor {stored.extractor!r} with parameters "
            f"{stored.extractor_hash[:16]}, the configured one is {extractor.key!r} with {extractor.hash[:16]}, and "
            f"features of different networks cannot be compared; {way_out}"
        )
    if dimension != extractor.num_features:
        raise UserError(
            f"eval.reference={path!r} has features of {dimension} dimensions, the extractor {extractor.key!r} of "
            f"{extractor.num_features}; {way_out}"
        )


def _info_of_file(path: str, reference: Reference) -> ReferenceInfo:
    stored = reference.provenance
    of = f"{stored.data} {stored.split}" if stored.data else f"extractor and images {NOT_STATED}"
    name = f"{Path(path).name} ({of})"
    count, digest = reference.statistics.num_samples, reference.statistics.hash
    return ReferenceInfo(name, count, digest, stored.fingerprint, stored.preparation)


def _read_reference(config: ConfigDict, stored: Reference, extractor: Extractor) -> _Compared:
    check_reference(config.eval.reference, stored, extractor)
    compared = stored.statistics if stored.features is None else stored.features
    return compared, _info_of_file(config.eval.reference, stored)


def _compute_reference(extractor: Extractor, train: datasets.Source, folder: Path) -> _Compared:
    """Returns the features of the training split and what the report says of them."""
    if len(train) < FEWEST_IMAGES:
        raise UserError(
            f"the training split has {len(train)} image(s); metrics of samples need {FEWEST_IMAGES} or more to compare "
            "with: add some, or set eval.enable_sampling=False"
        )
    features = cached_features(extractor, train, folder, name="training features", with_logits=False)["features"]
    digest = FeatureStatistics.from_features(features).hash
    return features, ReferenceInfo("train", len(features), digest, train.fingerprint, train.preparation)


def _test_features(
    extractor: Extractor, test: datasets.Source, folder: Path
) -> tuple[Float[np.ndarray, "M D"], Float[np.ndarray, "M K"]] | None:
    """Returns (features, logits) of the test split, or None if it is too small to be measured."""
    if len(test) < FEWEST_IMAGES:
        logging.warning("the test split has %d image(s), too few to be measured in the place of samples", len(test))
        return None
    found = cached_features(extractor, test, folder, name="test features", with_logits=True)
    return found["features"], found["logits"]


@dataclasses.dataclass(frozen=True)
class RealFeatures:
    """Features of the real images, computed once for a sweep.

    Attributes:
      extractor: what computes them.
      reference: what samples are compared with: features of the training split, features or statistics of a file.
      test: (features, logits) of the test split; None if it has too few images.
      reference_info: says in a report what the reference is.
    """

    extractor: Extractor
    reference: Float[np.ndarray, "N D"] | FeatureStatistics
    test: tuple[Float[np.ndarray, "M D"], Float[np.ndarray, "M K"]] | None
    reference_info: ReferenceInfo

    @classmethod
    def compute(cls, config: ConfigDict, train: datasets.Source, test: datasets.Source, workdir: Path) -> RealFeatures:
        """Builds the extractor, reads the reference or computes it, and computes the features of the test split.

        What takes long is kept in the folder "features" of the workdir.

        Raises:
          UserError: if a setting is wrong, the reference is another extractor's, or there are no labels to train one.
          UserError: if weights or the reference are missing.
        """
        path, folder = config.eval.reference, workdir / "features"
        choose_extractor(config)
        stored = open_reference(path) if path else None
        extractor = build_configured_extractor(config, {"train": train, "test": test}.__getitem__, folder)
        reference, info = (
            _read_reference(config, stored, extractor) if stored else _compute_reference(extractor, train, folder)
        )
        return cls(extractor, reference, _test_features(extractor, test, folder), info)

    @functools.cached_property
    def _prepared(self) -> PreparedReference:
        return PreparedReference.of(self.reference)

    @functools.cached_property
    def floor(self) -> tuple[Metric, ...]:
        """Metrics of the test split in the place of samples; none if it has too few images."""
        if self.test is None:
            return ()
        return floor_metrics(self.test, reference=self._prepared, extractor=self.extractor.key)

    def measure(self, levels: UInt8[np.ndarray, "N H W C"]) -> tuple[Metric, ...]:
        """Measures samples, and the test split in their place."""
        features, logits = distributed.divide(self.extractor, levels)
        return sample_metrics((features, logits), reference=self._prepared, extractor=self.extractor.key) + self.floor

    @property
    def feature_info(self) -> FeatureInfo:
        """Says in a report what computed the features."""
        of = self.extractor
        return FeatureInfo(of.name, of.hash, of.accuracy, of.key, of.resize)
