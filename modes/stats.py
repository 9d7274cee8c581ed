"""The mode "stats": what a data set looks like to an extractor, and what its pixels say of a run's settings."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

import checks
import datasets
from configs.settings import affecting
from datasets import Scaler, build_scaler
from errors import UserError
from experiment import smoke
from metrics.extractors import Extractor
from metrics.frechet import FeatureStatistics
from metrics.pixels import FarthestPair, LevelCounts, farthest_pair, radii_from
from metrics.reference import Moments, Provenance, Reference, compact, load_reference, save_reference
from modes.evaluate.real_features import build_configured_extractor, choose_extractor, extract
from parallel import distributed
from storage import guards
from storage.files import cache_folder, content_hash, write_json
from workdir import folder as workdirs

SPLITS = ("train", "test")
CENTER_IMAGES = 256  # whose mean is the centre that distances are taken from
DTYPE = "features float32, statistics float64"


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PixelStatistics:
    """What the levels of a split say of the settings of a run.

    Attributes:
      counts: how often each channel takes each level.
      farthest: the two images that differ most.
      scaler: between levels and the network's range.
    """

    counts: LevelCounts
    farthest: FarthestPair
    scaler: Scaler

    @property
    def network_range(self) -> tuple[float, float]:
        """Smallest and largest value that the network sees."""
        return (-1.0, 1.0) if self.scaler.centered else (0.0, 1.0)

    def in_network_range(self, mean: float, variance: float) -> tuple[float, float]:
        """Maps mean and variance of levels to mean and standard deviation of what the network sees.

        Dequantization adds noise uniform on a level's width, of variance width^2 / 12.
        """
        width = self.scaler.bin_width
        noise = 1.0 / 12.0 if self.scaler.dequantize else 0.0
        zero = self.network_range[0] + (0.5 * width if self.scaler.dequantize else 0.0)
        return zero + width * mean, width * math.sqrt(variance + noise)

    @property
    def sigma_data(self) -> float:
        """Standard deviation of all values together, in the network's range."""
        return self.in_network_range(*self.counts.all())[1]

    @property
    def sigma_max(self) -> float:
        """Largest Euclidean distance of two images that was found, in the network's range.

        What Song and Ermon 2020, Technique 1, set the largest noise level to.
        """
        return self.farthest.distance * self.scaler.bin_width

    @property
    def overrides(self) -> list[str]:
        """Flags that set up a run for these data; a value of 0 would be no setting."""
        found = {"model.sigma_max": self.sigma_max, "restore.data_std": self.sigma_data}
        return [f"--config.{key}={value:.4g}" for key, value in found.items() if value > 0]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        highest, width = self.scaler.num_levels - 1, self.scaler.bin_width
        channels = []
        for mean, variance in self.counts.channels():
            seen_mean, seen_std = self.in_network_range(mean, variance)
            of_unit = {"mean": mean / highest, "std": math.sqrt(variance) / highest}
            channels.append(of_unit | {"network_mean": seen_mean, "network_std": seen_std})
        largest = {
            "in_network_range": self.sigma_max,
            "in_network_range_at_most": self.farthest.bound * width,
            "in_unit_range": self.farthest.distance / highest,
            "is_exact": self.farthest.is_exact,
            "images": list(self.farthest.pair),
            "images_compared": self.farthest.num_compared,
        }
        return {
            "network_range": list(self.network_range),
            "dequantized": self.scaler.dequantize,
            "channels": channels,
            "sigma_data": self.sigma_data,
            "largest_distance": largest,
            "overrides": self.overrides,
        }


def measure(
    extractor: Extractor, source: datasets.Source, scaler: Scaler, *, keep_features: bool
) -> tuple[FeatureStatistics, np.ndarray | None, PixelStatistics]:
    """Reads every image of a split once, and again those that may be farthest from each other.

    Returns:
      Statistics of the features; the features, float64[N, D], if they are to be kept; statistics of the pixels.

    Raises:
      UserError: if there are fewer than two images, or a feature is not finite.
    """
    if len(source) < 2:
        raise UserError(f"the split has {len(source)} image(s); statistics need two or more")
    first = source.images(np.arange(min(len(source), CENTER_IMAGES)))
    center = np.rint(first.mean(axis=0, dtype=np.float64)).astype(np.int64)
    counts, moments, radii, rows = LevelCounts(first.shape[-1]), Moments(), [], []
    for levels, features, _ in extract(extractor, source, "features"):
        counts.add(levels)
        moments.add(features)
        radii.append(radii_from(levels, center))
        if keep_features:
            rows.append(compact(features))
    farthest = farthest_pair(source.images, np.concatenate(radii))
    kept = np.concatenate(rows).astype(np.float64) if keep_features else None
    return moments.statistics(), kept, PixelStatistics(counts, farthest, scaler)


# --- files -----------------------------------------------------------------------------------------------------------


def _provenance(config: ConfigDict, source: datasets.Source, split: str, extractor: Extractor) -> Provenance:
    made_by = {
        "settings": affecting(config, "statistics"),
        "versions": workdirs.versions(),
        "commit": workdirs.commit(),
    }
    return Provenance(
        extractor=extractor.key,
        extractor_name=extractor.name,
        extractor_hash=extractor.hash,
        resize=extractor.resize,
        dtype=DTYPE,
        data=config.data.dataset,
        split=split,
        preparation=source.preparation,
        fingerprint=source.fingerprint,
        num_levels=source.num_levels,
        settings=json.dumps(made_by, sort_keys=True),
    )


def default_output(config: ConfigDict, split: str, source: datasets.Source) -> Path:
    """Returns the file in the cache that is named after data, size, split and extractor.

    The end of its name is of the images' fingerprint: folders of any pictures have one name, and are not one.
    """
    size = "x".join(map(str, datasets.image_shape(config)))
    data = re.sub(r"[^A-Za-z0-9.-]+", "_", config.data.dataset)  # "tfds:x/y" is no name of a file
    name = f"{data}_{size}_{split}_{choose_extractor(config)}_{content_hash(source.fingerprint)[:8]}"
    return cache_folder("stats") / f"{name}.npz"


def check_output_name(output: str) -> None:
    """Raises a ValueError if the file that --output names would be no .npz file."""
    if output and not output.endswith(".npz"):
        raise UserError(f"--output={output}: expected a name that ends in .npz")


@distributed.on_main
def check_replaceable(path: Path, provenance: Provenance) -> bool:
    """Checks that nothing but the same statistics is replaced.

    Returns:
      Whether the file is there and has the features of every image.

    Raises:
      UserError: if a file of that name holds something else, and what.
    """
    way_out = "choose another --output, or delete it"
    beside = path.with_suffix(".json")
    if not path.exists():
        if beside.exists():
            raise UserError(f"{beside} would be replaced, but does not belong to statistics of this name; {way_out}")
        return False
    try:
        stored = load_reference(path)
    except UserError as error:
        raise UserError(f"{error}; it is not replaced: {way_out}") from error
    differences = stored.provenance.differences(provenance)
    if differences:
        raise UserError(f"{path} holds other statistics ({'; '.join(differences)}); {way_out}")
    logging.info("%s is of the same images and extractor, and is made anew", path)
    return stored.features is not None


def stats(config: ConfigDict, output: str = "", *, split: str = "train", keep_features: bool = False) -> Path:
    """Measure a split of the data: statistics of its features, which samples are compared with, and of its pixels.

    Writes an .npz file, which eval.reference reads, and beside it a .json file with all numbers and the settings that
    follow from them. Needs no trained network.

    Args:
      config: experiment configuration; reads data, eval.extractor, eval.weights and, for "classifier", seed.
      output: the .npz file; empty: in the folder "stats" of the cache, named after data, split and extractor.
      split: "train" or "test".
      keep_features: keep the features of every image, which KID, precision and recall need.

    Returns:
      The .npz file.

    Raises:
      UserError: if a setting is wrong, data or weights are missing, or the file holds other statistics.
      WorkdirError: if the folder of the file cannot be written.
    """
    config = smoke.resolve(config)
    checks.one_of("--split", split, SPLITS)
    check_output_name(output)
    choose_extractor(config)
    open_split = functools.cache(functools.partial(datasets.build_source, config))
    source, scaler = open_split(split), build_scaler(config)
    path = Path(output).expanduser() if output else default_output(config, split, source)
    workdirs.check_writable(path.parent, "--output")
    extractor = build_configured_extractor(config, open_split, cache_folder("features"))
    provenance = _provenance(config, source, split, extractor)
    keep_features |= check_replaceable(path, provenance)
    statistics, features, pixels = measure(extractor, source, scaler, keep_features=keep_features)
    reference = Reference(statistics, provenance, features)
    if distributed.is_main_process():
        _write(path, reference, pixels)
        _log(path, reference, pixels)
    return path


def _write(path: Path, reference: Reference, pixels: PixelStatistics) -> None:
    """Writes the statistics, then the numbers beside them."""
    stated = dataclasses.asdict(reference.provenance)
    stated |= {"settings": guards.parse_json(reference.provenance.settings), "hash": reference.statistics.hash}
    stated |= {"num_samples": reference.statistics.num_samples, "num_features": len(reference.statistics.mean)}
    stated |= {"has_features": reference.features is not None}
    save_reference(path, reference)
    write_json(path.with_suffix(".json"), {"reference": stated, "pixels": pixels.to_dict()})


def _log(path: Path, reference: Reference, pixels: PixelStatistics) -> None:
    low, high = pixels.network_range
    found, stated = pixels.to_dict(), reference.provenance
    logging.info("%s split of %s: %d images", stated.split, stated.data, reference.statistics.num_samples)
    for number, channel in enumerate(found["channels"]):
        logging.info(
            "channel %d: mean %.4f, standard deviation %.4f in [0, 1]; %.4f, %.4f in the network's range [%g, %g]",
            *(number, *channel.values(), low, high),
        )
    logging.info("sigma_data, standard deviation of all values, in the network's range: %.4f", pixels.sigma_data)
    logging.info("sigma_max, largest distance of two images, in the network's range: %s", _distance_text(pixels))
    logging.info("settings for these data (sigma_max: of the VE SDE alone): %s", " ".join(pixels.overrides))
    logging.info("statistics: %s (%s)", path, stated.extractor_name)
    logging.info("numbers:    %s", path.with_suffix(".json"))


def _distance_text(pixels: PixelStatistics) -> str:
    found, (first, second) = pixels.farthest, pixels.farthest.pair
    text = f"{pixels.sigma_max:.4g}, of images {first} and {second}"
    if found.is_exact:
        return f"{text}, exact"
    bound = found.bound * pixels.scaler.bin_width
    return (
        f"{text}, is the largest among the {found.num_compared:,} images farthest from the middle; that of all images "
        f"is at most {bound:.4g}"
    )
