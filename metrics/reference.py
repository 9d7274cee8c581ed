"""Reference statistics on disk: what real images look like to an extractor, and where the numbers come from.

Our own .npz file holds `mean`, `cov`, `num_samples`, `provenance` (a JSON text) and, if they are wanted, the rows of
the features themselves. Read are, too, what other programs write: `pool_3`, features [N, 2048] of the score_sde of
2021, and `mu`, `sigma`, as pytorch-fid, TTUR and EDM have them. Those say nothing of where they come from.
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
from storage import guards
from storage.files import read_npz, write_atomically

NOT_STATED = "not stated by the file"
# Part of the largest eigenvalue by which another may be negative, and of the largest entry by which a matrix may not be
# symmetric: float32 rounding of a 2048x2048 covariance is 3e-6 of it.
ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where statistics come from; an empty text: the file does not say.

    Attributes:
      extractor: its key, one of metrics.extractors.KEYS.
      extractor_name: what it is, in words.
      extractor_hash: SHA-256 of its parameters.
      resize: rule by which it resizes images.
      dtype: in which features and statistics were computed.
      data: name of the data set.
      split: of it.
      preparation: what was done to the images as they are stored.
      fingerprint: of the images, see sources.base.Source.
      num_levels: that a value of an image can take; 0: not stated.
      settings: what else they were made with, as JSON.
    """

    extractor: str = ""
    extractor_name: str = ""
    extractor_hash: str = ""
    resize: str = ""
    dtype: str = ""
    data: str = ""
    split: str = ""
    preparation: str = ""
    fingerprint: str = ""
    num_levels: int = 0
    settings: str = "{}"

    def differences(self, other: Provenance) -> list[str]:
        """Names what differs, but for the settings, each with both values."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [
            f"{name}: {mine[name]!r} there, {theirs[name]!r} now"
            for name in mine
            if name != "settings" and mine[name] != theirs[name]
        ]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is known of the features of real images.

    Attributes:
      statistics: their mean, covariance and number.
      provenance: where they come from.
      features: of every image, float64[N, D]; None if they were not kept.
    """

    statistics: FeatureStatistics
    provenance: Provenance = Provenance()
    features: Float[np.ndarray, "N D"] | None = None


class Moments:
    """Mean and covariance of rows that come a batch at a time and are not kept; in float64.

    By the update of Chan, Golub and LeVeque (1983) for joining the moments of two sets. Rounding apart, the result
    does not depend on the batches.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, rows: Float[np.ndarray, "B D"]) -> None:
        """Takes in a batch of finite rows.

        Raises:
          UserError: if a value is NaN or infinite.
        """
        rows = as_features("features", rows, min_samples=1)
        mean = rows.mean(axis=0)
        shift, total = mean - self._mean, self.num_samples + len(rows)
        centered = rows - mean
        between = np.outer(shift, shift) * (self.num_samples * len(rows) / total)
        self._squares = self._squares + centered.T @ centered + between
        self._mean = self._mean + shift * (len(rows) / total)
        self.num_samples = total

    def statistics(self) -> FeatureStatistics:
        """Returns the statistics of all rows so far.

        Raises:
          UserError: if there are fewer than two.
        """
        if self.num_samples < 2:
            raise UserError(f"{self.num_samples} image(s) have no covariance; give two or more")
        return FeatureStatistics(self._mean, self._squares / (self.num_samples - 1), self.num_samples)


def compact(features: Float[np.ndarray, "N D"]) -> np.ndarray:
    """Returns features as float32 if that changes none of them, which networks that run in it grant; else unchanged."""
    small = features.astype(np.float32)
    return small if np.array_equal(small, features) else features


# --- files -----------------------------------------------------------------------------------------------------------


def save_reference(path: str | Path, reference: Reference) -> None:
    """Writes an .npz file, whole or not at all."""
    arrays = dataclasses.asdict(reference.statistics)
    arrays["provenance"] = json.dumps(dataclasses.asdict(reference.provenance), sort_keys=True)
    if reference.features is not None:
        arrays["features"] = compact(reference.features)
    write_atomically(path, lambda file: np.savez(file, **arrays))


def load_reference(path: str | Path) -> Reference:
    """Reads statistics from an .npz file, ours or another program's; nothing in it is run.

    Raises:
      UserError: naming the file, if it is damaged or no such file, its arrays do not fit together or are not finite,
        or the covariance is none.
      UserError: if there is none.
    """
    arrays = read_npz(path)
    if "pool_3" in arrays:
        return _from_rows(path, arrays["pool_3"])
    mean, cov = arrays.get("mean", arrays.get("mu")), arrays.get("cov", arrays.get("sigma"))
    if mean is None or cov is None:
        raise UserError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected mean and cov of --mode stats, mu and "
            "sigma, or pool_3"
        )
    _check_statistics(path, mean, cov)
    provenance = _read_provenance(path, arrays["provenance"]) if "provenance" in arrays else Provenance()
    num_samples = _read_count(path, arrays.get("num_samples", np.array(0)))
    features = None
    if "features" in arrays:
        features = _read_rows(path, "features", arrays["features"])
        if features.shape != (num_samples, len(mean)):
            raise UserError(
                f"{path} has features {features.shape}; expected one of {len(mean)} for each of {num_samples} images"
            )
    statistics = FeatureStatistics(mean.astype(np.float64), cov.astype(np.float64), num_samples)
    return Reference(statistics, provenance, features)


def _read_rows(path: str | Path, name: str, rows: np.ndarray) -> np.ndarray:
    if rows.dtype.kind != "f":
        raise UserError(f"{path}: {name} is {rows.dtype}{list(rows.shape)}; expected floating-point rows [N, D]")
    return as_features(f"{path}: {name}", rows)


def _from_rows(path: str | Path, rows: np.ndarray) -> Reference:
    """Returns the statistics of the features that score_sde kept of a data set."""
    features = _read_rows(path, "pool_3", rows)
    return Reference(FeatureStatistics.from_features(features), Provenance(dtype=str(rows.dtype)), features)


def _read_count(path: str | Path, value: np.ndarray) -> int:
    if value.shape != () or value.dtype.kind not in "iu" or value < 0:
        raise UserError(f"{path} has num_samples {value}; expected a whole number, 0 if it is not known")
    return int(value)


def _read_provenance(path: str | Path, value: np.ndarray) -> Provenance:
    try:
        provenance = guards.build(Provenance, guards.parse_json(str(value)))
    except UserError as error:
        raise UserError(
            f"{path} does not say as this version does where it comes from ({error}); make it anew with --mode stats"
        ) from error
    return provenance


def _check_statistics(path: str | Path, mean: np.ndarray, cov: np.ndarray) -> None:
    """Checks that two arrays are a mean and a covariance, up to rounding.

    Raises:
      UserError: naming the file and what is wrong.
    """
    if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise UserError(f"{path} has mean {mean.shape} and covariance {cov.shape}; expected [D] and [D, D]")
    for name, array in (("mean", mean), ("covariance", cov)):
        if array.dtype.kind != "f":
            raise UserError(f"{path} has a {name} of {array.dtype}; expected floating-point numbers")
        check_finite(f"{path}: {name}", array)
    cov = cov.astype(np.float64)
    if np.abs(cov - cov.T).max() > ROUNDING * np.abs(cov).max():
        raise UserError(f"{path} has a covariance that is not symmetric; the file is damaged, make it anew")
    values = np.linalg.eigvalsh(cov)
    if values[0] < -ROUNDING * max(values[-1], 0.0):
        raise UserError(
            f"{path} has a covariance with the negative eigenvalue {values[0]:.3g}, the largest being "
            f"{values[-1]:.3g}; no data have it: the file is damaged, make it anew"
        )
