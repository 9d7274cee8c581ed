"""Reference statistics on disk: features of real images as an extractor sees them, and their provenance.

Our .npz file holds `mean`, `cov`, `num_samples`, `provenance` (JSON) and optionally the rows of features themselves.
Files of other programs, which state no provenance, are read, too: `pool_3`, features [N, 2048] of the 2021 score_sde,
and `mu`, `sigma` of pytorch-fid, TTUR and EDM.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from errors import UserError
from metrics.frechet import FeatureStatistics
from metrics.metric import as_features, check_finite
from storage import untrusted
from storage.files import read_npz, write_atomically

NOT_STATED = "not stated by the file"
# Tolerance for negative eigenvalues, relative to the largest one, and for asymmetry, relative to the largest entry:
# float32 rounding of a 2048x2048 covariance causes 3e-6.
ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where statistics come from; an empty text: the file does not state it."""

    extractor: str = ""  # its key, one of metrics.extractors.KEYS
    extractor_name: str = ""  # what it is, in words
    extractor_hash: str = ""  # SHA-256 of its parameters
    resize: str = ""  # how it resizes images
    dtype: str = ""  # of the computation of features and statistics
    data: str = ""  # name of the data set
    split: str = ""  # of it
    preparation: str = ""  # what was done to the stored images
    fingerprint: str = ""  # of the images, see sources.base.Source
    num_levels: int = 0  # of the images; 0: not stated
    settings: str = "{}"  # what else they were made with, as JSON

    def differences(self, other: Provenance) -> list[str]:
        """Name what differs, except the settings, with both values."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [
            f"{name}: {mine[name]!r} there, {theirs[name]!r} now"
            for name in mine
            if name != "settings" and mine[name] != theirs[name]
        ]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is known of the features of real images."""

    statistics: FeatureStatistics  # their mean, covariance and number
    provenance: Provenance = Provenance()  # where they come from
    features: Float[np.ndarray, "N D"] | None = None  # of every image, float64[N, D]; None if not stored


class Moments:
    """Running mean and covariance of rows that come in batches, in float64.

    By the update of Chan, Golub and LeVeque (1983). Up to rounding, the result does not depend on the batches.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, rows: Float[np.ndarray, "B D"]) -> None:
        """Add a batch of finite rows."""
        rows = as_features("features", rows, min_samples=1)
        mean = rows.mean(axis=0)
        shift, total = mean - self._mean, self.num_samples + len(rows)
        centered = rows - mean
        between = np.outer(shift, shift) * (self.num_samples * len(rows) / total)
        self._squares = self._squares + centered.T @ centered + between
        self._mean = self._mean + shift * (len(rows) / total)
        self.num_samples = total

    def statistics(self) -> FeatureStatistics:
        """Return the statistics of all rows so far, two or more."""
        if self.num_samples < 2:
            raise UserError(f"{self.num_samples} image(s) have no covariance; give two or more")
        return FeatureStatistics(self._mean, self._squares / (self.num_samples - 1), self.num_samples)


def compact(features: Float[np.ndarray, "N D"]) -> np.ndarray:
    """Return features as float32 if that changes none of them, as of networks that run in float32; else unchanged."""
    small = features.astype(np.float32)
    return small if np.array_equal(small, features) else features


def save_reference(path: str | Path, reference: Reference) -> None:
    """Write an .npz file, atomically."""
    arrays = dataclasses.asdict(reference.statistics)
    arrays["provenance"] = json.dumps(dataclasses.asdict(reference.provenance), sort_keys=True)
    if reference.features is not None:
        arrays["features"] = compact(reference.features)
    write_atomically(path, lambda file: np.savez(file, **arrays))


def load_reference(path: str | Path) -> Reference:
    """Read statistics from an .npz file, ours or another program's; nothing in it is executed."""
    arrays = read_npz(path)

    def read_rows(name: str) -> np.ndarray:
        rows = arrays[name]
        if rows.dtype.kind != "f":
            raise UserError(f"{path}: {name} is {rows.dtype}{list(rows.shape)}; expected floating-point rows [N, D]")
        return as_features(f"{path}: {name}", rows)

    if "pool_3" in arrays:  # the features that the 2021 score_sde kept of a data set
        rows = read_rows("pool_3")
        return Reference(FeatureStatistics.from_features(rows), Provenance(dtype=str(arrays["pool_3"].dtype)), rows)
    mean, cov = arrays.get("mean", arrays.get("mu")), arrays.get("cov", arrays.get("sigma"))
    if mean is None or cov is None:
        raise UserError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected mean and cov of --mode stats, mu and "
            "sigma, or pool_3"
        )
    _check_statistics(path, mean, cov)
    try:
        stated = arrays.get("provenance")
        provenance = Provenance() if stated is None else untrusted.build(Provenance, untrusted.parse_json(str(stated)))
    except UserError as error:
        raise UserError(
            f"{path} states its provenance in another way than this version ({error}); make it again with --mode stats"
        ) from error
    count = arrays.get("num_samples", np.array(0))
    if count.shape != () or count.dtype.kind not in "iu" or count < 0:
        raise UserError(f"{path} has num_samples {count}; expected a whole number, 0 if it is not known")
    features = None
    if "features" in arrays:
        features = read_rows("features")
        if features.shape != (count, len(mean)):
            raise UserError(
                f"{path} has features {features.shape}; expected one of {len(mean)} for each of {count} images"
            )
    statistics = FeatureStatistics(mean.astype(np.float64), cov.astype(np.float64), int(count))
    return Reference(statistics, provenance, features)


def _check_statistics(path: str | Path, mean: np.ndarray, cov: np.ndarray) -> None:
    """Check that two arrays are a mean and a covariance, up to rounding."""
    if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise UserError(f"{path} has mean {mean.shape} and covariance {cov.shape}; expected [D] and [D, D]")
    for name, array in (("mean", mean), ("covariance", cov)):
        if array.dtype.kind != "f":
            raise UserError(f"{path} has a {name} of {array.dtype}; expected floating-point numbers")
        check_finite(f"{path}: {name}", array)
    cov = cov.astype(np.float64)
    if np.abs(cov - cov.T).max() > ROUNDING * np.abs(cov).max():
        raise UserError(f"{path} has a covariance that is not symmetric; the file is damaged, make it again")
    values = np.linalg.eigvalsh(cov)
    if values[0] < -ROUNDING * max(values[-1], 0.0):
        raise UserError(
            f"{path} has a covariance with the negative eigenvalue {values[0]:.3g} (the largest is "
            f"{values[-1]:.3g}), which no data have: the file is damaged, make it again"
        )
