"""Features of the real images, with which those of samples are compared."""

from __future__ import annotations

import dataclasses
import functools
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
from storage.files import content_hash, local_path
from workdir import results
from workdir.progress import track

BATCH_IMAGES = 256  # read at a time, or one batch of every device if that is more
BATCH_BYTES = 2**25  # limit on the levels read at a time
BATCH_STEP = 64  # large batches are multiples of it, which fill up the networks' own batches
FEWEST_IMAGES = 2  # of a split, for a covariance
TAKE_WEIGHTS = ("inception", "tfgan")  # extractors that read eval.weights


def every_image(source: datasets.Source) -> UInt8[np.ndarray, "N H W C"]:
    """Return all images of a split, in memory."""
    return source.images(np.arange(len(source)))


def batches_of(source: datasets.Source) -> list[np.ndarray]:
    """Return the indices of all images of a split, in batches that fit in memory."""
    most = max(BATCH_IMAGES, BATCH_SIZE * distributed.local_device_count())
    size = min(most, max(1, BATCH_BYTES // source.images(np.array([0])).nbytes))
    size = size // BATCH_STEP * BATCH_STEP or size
    return [np.arange(start, min(start + size, len(source))) for start in range(0, len(source), size)]


def choose_extractor(config: ConfigDict) -> str:
    """Return the key of the configured extractor.

    Raises:
      UserError: if it is unknown, does not take such images, or does not read the given weights.
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
    """Build the configured extractor; train "classifier" on all images in memory, or read it from `folder`.

    `split` opens a split of the data; only "classifier" calls it.

    Raises:
      UserError: if a setting is wrong, weights are missing, or "classifier" is chosen for images without labels.
    """
    key = choose_extractor(config)
    if key != "classifier":
        return build_extractor(key, num_levels=config.data.num_levels, weights=config.eval.weights)
    train, test = split("train"), split("test")
    if not train.num_classes:
        others = (
            "set eval.extractor to inception, efficientnet_lite0 or tfgan (docs/extractors.md says how to get each); "
        )
        raise UserError(
            f"data.dataset={config.data.dataset!r} has no labels to train a feature extractor on, so that samples "
            f"cannot be measured with eval.extractor={config.eval.extractor!r}; "
            f"{others if config.data.num_channels in (1, 3) else ''}"
            "--mode eval does without if eval.enable_sampling=False"
        )
    of_train, of_test = ((every_image(each), each.labels(np.arange(len(each)))) for each in (train, test))
    return classifier.build_feature_extractor(
        *of_train, *of_test, num_levels=train.num_levels, folder=folder, seed=config.seed
    )


def extract(
    extractor: Extractor, source: datasets.Source, name: str
) -> Iterator[tuple[UInt8[np.ndarray, "B H W C"], Float[np.ndarray, "B D"], Float[np.ndarray, "B K"]]]:
    """Yield (levels, features, logits) of every image of a split, a batch at a time; `name` is for the progress log."""
    for indices in track(batches_of(source), name):
        levels = source.images(indices)
        features, logits = distributed.divide(extractor, levels)
        yield levels, features, logits


def cached_features(
    extractor: Extractor, source: datasets.Source, folder: Path, *, name: str, with_logits: bool
) -> dict[str, Float[np.ndarray, "N D"]]:
    """Return the "features" of every image of a split and, if wanted, their "logits", class scores; float64.

    They are kept in a file of the folder, named after everything that they depend on.
    """
    wanted = ("features", "logits")[: 1 + with_logits]
    described = f"{extractor.key} {extractor.hash} {extractor.resize} {source.num_levels} {len(source)} {wanted}"
    path = folder / f"real_{content_hash(described, source.fingerprint)[:32]}.npz"

    def compute() -> dict[str, np.ndarray]:
        parts = [outputs[: len(wanted)] for _, *outputs in extract(extractor, source, name)]
        joined = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return {key: compact(array) for key, array in zip(wanted, joined, strict=True)}

    return {key: array.astype(np.float64) for key, array in results.cached(path, compute).items()}


def _check_reference(path: str, reference: Reference, extractor: Extractor) -> None:
    """Check that a file's statistics are of the extractor's features."""
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


@dataclasses.dataclass(frozen=True)
class RealFeatures:
    """Features of the real images, computed once for a sweep."""

    extractor: Extractor
    reference: Float[np.ndarray, "N D"] | FeatureStatistics  # samples are compared with it: training split or a file
    test: tuple[Float[np.ndarray, "M D"], Float[np.ndarray, "M K"]] | None  # (features, logits); None: too few images
    reference_info: ReferenceInfo

    @classmethod
    def compute(cls, config: ConfigDict, train: datasets.Source, test: datasets.Source, workdir: Path) -> RealFeatures:
        """Build the extractor, read or compute the reference, and compute the features of the test split.

        Features and a trained extractor are kept in the folder "features" of the workdir.

        Raises:
          UserError: if a setting is wrong, weights or the reference are missing, the reference is of another extractor,
            or a split has too few images or no labels to train an extractor on.
        """
        path, folder = config.eval.reference, workdir / "features"
        choose_extractor(config)
        stored = None
        if path:
            place = local_path(path, "eval.reference")
            if not place.is_file():
                raise UserError(
                    f"eval.reference={path!r} is not a file; --mode stats makes one; empty: the training split"
                )
            stored = load_reference(place)
        extractor = build_configured_extractor(config, {"train": train, "test": test}.__getitem__, folder)
        reference: np.ndarray | FeatureStatistics
        if stored:
            _check_reference(path, stored, extractor)
            reference = stored.statistics if stored.features is None else stored.features
            of = stored.provenance
            images = f"{of.data} {of.split}" if of.data else f"extractor and images {NOT_STATED}"
            count, digest = stored.statistics.num_samples, stored.statistics.hash
            info = ReferenceInfo(f"{Path(path).name} ({images})", count, digest, of.fingerprint, of.preparation)
        else:
            if len(train) < FEWEST_IMAGES:
                raise UserError(
                    f"the training split has {len(train)} image(s); metrics of samples need {FEWEST_IMAGES} or more to "
                    "compare with: add some, or set eval.enable_sampling=False"
                )
            found = cached_features(extractor, train, folder, name="training features", with_logits=False)
            reference = found["features"]
            digest = FeatureStatistics.from_features(reference).hash
            info = ReferenceInfo("train", len(reference), digest, train.fingerprint, train.preparation)
        measured = None
        if len(test) < FEWEST_IMAGES:
            logging.warning("the test split has %d image(s), too few to be measured as if they were samples", len(test))
        else:
            found = cached_features(extractor, test, folder, name="test features", with_logits=True)
            measured = found["features"], found["logits"]
        return cls(extractor, reference, measured, info)

    @functools.cached_property
    def _prepared(self) -> PreparedReference:
        return PreparedReference.of(self.reference)

    @functools.cached_property
    def floor(self) -> tuple[Metric, ...]:
        """Metrics of the test split, measured as if they were samples; empty if it has too few images."""
        if self.test is None:
            return ()
        return floor_metrics(self.test, reference=self._prepared, extractor=self.extractor.key)

    def measure(self, levels: UInt8[np.ndarray, "N H W C"]) -> tuple[Metric, ...]:
        """Return the metrics of samples, and those of the test split for comparison."""
        features, logits = distributed.divide(self.extractor, levels)
        return sample_metrics((features, logits), reference=self._prepared, extractor=self.extractor.key) + self.floor

    @property
    def feature_info(self) -> FeatureInfo:
        """Extractor as the report describes it."""
        of = self.extractor
        return FeatureInfo(of.name, of.hash, of.accuracy, of.key, of.resize)
