"""The mode "stats": feature statistics of a data set, and the settings that follow from its pixels."""

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
from configs.settings import affecting, image_shape
from datasets import Scaler, build_scaler
from errors import UserError
from experiment import smoke
from metrics.extractors import Extractor
from metrics.frechet import FeatureStatistics
from metrics.pixels import FarthestPair, LevelCounts, farthest_pair, radii_from
from metrics.reference import Moments, Provenance, Reference, compact, load_reference, save_reference
from modes.evaluate.real_features import build_configured_extractor, choose_extractor, extract
from parallel import distributed
from storage import untrusted
from storage.files import cache_folder, content_hash, write_json
from workdir import folder as workdirs

SPLITS = ("train", "test")
CENTER_IMAGES = 256  # their mean is the center that distances are measured from
DTYPE = "features float32, statistics float64"


def describe_pixels(counts: LevelCounts, farthest: FarthestPair, scaler: Scaler) -> dict[str, Any]:
    """Return statistics of the levels of a split and the settings that follow from them, as in the .json file.

    "network" is the network's range. `sigma_max` is the largest Euclidean distance of two images there, to which Song
    and Ermon 2020, Technique 1, set the largest noise level.
    """
    low, high = (-1.0, 1.0) if scaler.centered else (0.0, 1.0)
    highest, width = scaler.num_levels - 1, scaler.bin_width
    # Dequantization adds noise uniform on a level's width, of variance width^2 / 12.
    shift, noise = (0.5, 1.0 / 12.0) if scaler.dequantize else (0.0, 0.0)

    def network_std(variance: float) -> float:
        return width * math.sqrt(variance + noise)

    sigma_data, sigma_max = network_std(counts.all()[1]), farthest.distance * width
    overrides = {"model.sigma_max": sigma_max, "restore.data_std": sigma_data}
    return {
        "network_range": [low, high],
        "dequantized": scaler.dequantize,
        "channels": [
            {
                "mean": mean / highest,
                "std": math.sqrt(variance) / highest,
                "network_mean": low + shift * width + width * mean,
                "network_std": network_std(variance),
            }
            for mean, variance in counts.channels()
        ],
        "sigma_data": sigma_data,
        "largest_distance": {
            "in_network_range": sigma_max,
            "in_network_range_at_most": farthest.bound * width,
            "in_unit_range": farthest.distance / highest,
            "is_exact": farthest.is_exact,
            "images": list(farthest.pair),
            "images_compared": farthest.num_compared,
        },
        # A value of 0 is no setting.
        "overrides": [f"--config.{key}={value:.4g}" for key, value in overrides.items() if value > 0],
    }


def measure(
    extractor: Extractor, source: datasets.Source, scaler: Scaler, *, keep_features: bool
) -> tuple[FeatureStatistics, np.ndarray | None, dict[str, Any]]:
    """Return statistics of the features, the features float64[N, D] if kept, and the description of the pixels.

    Reads every image once, and those that may be farthest from each other twice.
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
    return moments.statistics(), kept, describe_pixels(counts, farthest, scaler)


def _default_output(config: ConfigDict, split: str, source: datasets.Source) -> Path:
    size = "x".join(map(str, image_shape(config)))
    data = re.sub(r"[^A-Za-z0-9.-]+", "_", config.data.dataset)  # "tfds:x/y" is no name of a file
    # All folders of pictures have one name: the fingerprint of the images tells them apart.
    name = f"{data}_{size}_{split}_{choose_extractor(config)}_{content_hash(source.fingerprint)[:8]}"
    return cache_folder("stats") / f"{name}.npz"


@distributed.on_main
def _check_replaceable(path: Path, provenance: Provenance) -> bool:
    """Check that nothing but the same statistics is replaced; return whether they include the features."""
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
    logging.info("recompute %s, which is of the same images and extractor", path)
    return stored.features is not None


def _write(path: Path, reference: Reference, pixels: dict[str, Any]) -> None:
    """Write the statistics and, beside them, the numbers; log the numbers."""
    provenance, statistics = reference.provenance, reference.statistics
    stated = dataclasses.asdict(provenance) | {
        "settings": untrusted.parse_json(provenance.settings),
        "hash": statistics.hash,
        "num_samples": statistics.num_samples,
        "num_features": len(statistics.mean),
        "has_features": reference.features is not None,
    }
    save_reference(path, reference)
    write_json(path.with_suffix(".json"), {"reference": stated, "pixels": pixels})

    logging.info("%s split of %s: %d images", provenance.split, provenance.data, statistics.num_samples)
    for number, channel in enumerate(pixels["channels"]):
        logging.info(
            "channel %d: mean %.4f, standard deviation %.4f in [0, 1]; %.4f, %.4f in the network's range [%g, %g]",
            *(number, *channel.values(), *pixels["network_range"]),
        )
    logging.info("sigma_data, standard deviation of all values, in the network's range: %.4f", pixels["sigma_data"])
    largest = pixels["largest_distance"]
    distance = "{:.4g}, of images {} and {}".format(largest["in_network_range"], *largest["images"])
    if largest["is_exact"]:
        distance += ", exact"
    else:
        distance += (
            f", is the largest among the {largest['images_compared']:,} images farthest from the middle; that of all "
            f"images is at most {largest['in_network_range_at_most']:.4g}"
        )
    logging.info("sigma_max, largest distance of two images, in the network's range: %s", distance)
    logging.info("settings for these data (sigma_max: for the VE SDE only): %s", " ".join(pixels["overrides"]))
    logging.info("statistics: %s (%s)", path, provenance.extractor_name)
    logging.info("numbers:    %s", path.with_suffix(".json"))


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
      UserError: if a setting is wrong, data or weights are missing, there are fewer than two images, a feature is not
        finite, or the file holds other statistics.
      WorkdirError: if the folder of the file cannot be written.
    """
    config = smoke.resolve(config)
    checks.one_of("--split", split, SPLITS)
    if output and not output.endswith(".npz"):
        raise UserError(f"--output={output}: expected a name that ends in .npz")
    choose_extractor(config)
    open_split = functools.cache(functools.partial(datasets.build_source, config))
    source, scaler = open_split(split), build_scaler(config)
    path = Path(output) if output else _default_output(config, split, source)
    workdirs.check_writable(path.parent, "--output")
    extractor = build_configured_extractor(config, open_split, cache_folder("features"))
    made_by = {"versions": workdirs.versions(), "commit": workdirs.commit()}
    provenance = Provenance(
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
        settings=json.dumps(made_by | {"settings": affecting(config, "statistics")}, sort_keys=True),
    )
    keep_features |= _check_replaceable(path, provenance)
    statistics, features, pixels = measure(extractor, source, scaler, keep_features=keep_features)
    if distributed.is_main_process():
        _write(path, Reference(statistics, provenance, features), pixels)
    return path
