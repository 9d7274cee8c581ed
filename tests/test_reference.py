"""Reference statistics on disk: ours, those of other programs, and files that are refused."""

import dataclasses
import json

import numpy as np
import pytest

from errors import UserError
from metrics.frechet import FeatureStatistics
from metrics.reference import Moments, Provenance, Reference, compact, load_reference, save_reference
from storage.files import read_npz

GENERATOR = np.random.default_rng(0)
ROWS = (GENERATOR.standard_normal((50, 4)) @ GENERATOR.standard_normal((4, 4)) + 100.0).astype(np.float32)
FROM = Provenance(
    extractor="inception",
    extractor_name="a network",
    extractor_hash="ab12",
    resize="none",
    dtype="float32",
    data="digits",
    split="train",
    preparation="as stored",
    fingerprint="cd34",
    num_levels=17,
    settings='{"seed": 1}',
)


def statistics(rows):
    return FeatureStatistics(rows.mean(axis=0, dtype=np.float64), np.cov(rows.astype(np.float64).T), len(rows))


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (7, 13, 30), (49, 1)])
def test_moments_are_numpys_whatever_the_batches(sizes):
    moments, start = Moments(), 0
    for size in sizes:
        moments.add(ROWS[start : start + size])
        start += size
    found, expected = moments.statistics(), statistics(ROWS)
    assert found.num_samples == 50
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(found.cov, expected.cov, rtol=1e-12, atol=1e-12 * np.abs(expected.cov).max())


def test_moments_keep_small_spreads_around_large_means():
    """The sum of squares less the square of the sum would lose all digits."""
    rows = 1e8 + GENERATOR.standard_normal((1000, 2))
    moments = Moments()
    for part in np.split(rows, 10):
        moments.add(part)
    np.testing.assert_allclose(moments.statistics().cov, np.cov(rows.T), rtol=1e-6, atol=1e-6)


def test_moments_refuse_what_has_none():
    moments = Moments()
    moments.add(ROWS[:1])
    with pytest.raises(ValueError, match=r"1 image\(s\) have no covariance; give two or more"):
        moments.statistics()
    with pytest.raises(ValueError, match="features has 1 values that are NaN or infinite"):
        moments.add(np.array([[1.0, np.nan]]))


# --- our own files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, ROWS.astype(np.float64)])
def test_a_file_returns_what_was_saved(tmp_path, rows):
    save_reference(tmp_path / "new" / "r.npz", Reference(statistics(ROWS), FROM, rows))
    loaded = load_reference(tmp_path / "new" / "r.npz")
    assert loaded.provenance == FROM
    assert loaded.statistics.hash == statistics(ROWS).hash
    assert (loaded.features is None) == (rows is None)
    if rows is not None:
        assert loaded.features.dtype == np.float64
        np.testing.assert_array_equal(loaded.features, rows)
        assert read_npz(tmp_path / "new" / "r.npz")["features"].dtype == np.float32


def test_rows_are_kept_in_float32_only_if_that_changes_nothing():
    assert compact(ROWS.astype(np.float64)).dtype == np.float32
    assert compact(np.array([[0.1]])).dtype == np.float64


def test_differences_are_named_but_for_the_settings():
    other = dataclasses.replace(FROM, split="test", settings="{}")
    assert FROM.differences(other) == ["split: 'train' there, 'test' now"]
    assert FROM.differences(dataclasses.replace(FROM, settings="{}")) == []


# --- files of other programs -----------------------------------------------------------------------------------------


def test_pool_3_of_score_sde_is_features(tmp_path):
    loaded = load_reference(write(tmp_path / "cifar10_stats.npz", pool_3=ROWS, logits=ROWS))
    np.testing.assert_array_equal(loaded.features, ROWS)
    np.testing.assert_allclose(loaded.statistics.mean, statistics(ROWS).mean, rtol=1e-14)
    np.testing.assert_allclose(loaded.statistics.cov, statistics(ROWS).cov, rtol=1e-12)
    assert loaded.statistics.num_samples == 50
    assert loaded.provenance == Provenance(dtype="float32")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mu_and_sigma_of_others_have_no_count(tmp_path, dtype):
    expected = statistics(ROWS)
    path = write(tmp_path / "fid.npz", mu=expected.mean.astype(dtype), sigma=expected.cov.astype(dtype))
    loaded = load_reference(path)
    np.testing.assert_allclose(loaded.statistics.cov, expected.cov, rtol=1e-6, atol=1e-5)
    assert loaded.statistics.cov.dtype == np.float64
    assert (loaded.statistics.num_samples, loaded.provenance, loaded.features) == (0, Provenance(), None)


def test_a_singular_covariance_in_float32_is_one(tmp_path):
    """Fewer images than features: its eigenvalues are zero up to rounding, on both sides."""
    few = statistics(GENERATOR.standard_normal((10, 64)))
    cov = few.cov.astype(np.float32)
    assert np.linalg.eigvalsh(cov.astype(np.float64))[0] < 0
    load_reference(write(tmp_path / "few.npz", mu=few.mean, sigma=cov))


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.ones(2)}, r"bad.npz holds mu; expected mean and cov of --mode stats, mu and sigma, or pool_3"),
        ({"mu": np.ones(2), "sigma": np.eye(3)}, r"bad.npz has mean \(2,\) and covariance \(3, 3\)"),
        ({"mu": np.ones((2, 1)), "sigma": np.eye(2)}, r"bad.npz has mean \(2, 1\)"),
        ({"mu": np.ones(2), "sigma": np.full((2, 2), np.nan)}, "bad.npz: covariance has 4 values that are NaN"),
        ({"mu": np.array([np.inf, 0]), "sigma": np.eye(2)}, "bad.npz: mean has 1 values that are NaN or inf"),
        ({"mu": np.ones(2, int), "sigma": np.eye(2)}, "bad.npz has a mean of int64"),
        ({"mu": np.ones(2), "sigma": np.array([[1.0, 0.0], [0.1, 1.0]])}, "bad.npz has a covariance that is not sym"),
        (
            {"mu": np.ones(2), "sigma": np.diag([1.0, -0.01])},
            "bad.npz has a covariance with the negative eigenvalue",
        ),
        ({"mean": np.ones(2), "cov": np.eye(2), "num_samples": -1}, "bad.npz has num_samples -1"),
        ({"mean": np.ones(2), "cov": np.eye(2), "num_samples": 1.5}, "bad.npz has num_samples 1.5"),
        (
            {"mean": np.ones(2), "cov": np.eye(2), "provenance": "{"},
            r"bad.npz states its provenance .*again with --mode",
        ),
        ({"mean": np.ones(2), "cov": np.eye(2), "provenance": "[1]"}, "bad.npz states its provenance in another way"),
        (
            {"mean": np.ones(2), "cov": np.eye(2), "provenance": '{"x": 1}'},
            "bad.npz states its provenance in another way",
        ),
        (
            {"mean": np.ones(2), "cov": np.eye(2), "provenance": '{"split": 1}'},
            "bad.npz states its provenance in another way .*split is 1",
        ),
        ({"mean": np.ones(2), "cov": np.eye(2), "num_samples": 9, "features": ROWS}, r"bad.npz has features \(50, 4\)"),
        ({"pool_3": np.ones((5, 1, 1, 2))}, r"bad.npz: pool_3 has shape \(5, 1, 1, 2\); expected \[N, D\]"),
        ({"pool_3": np.ones((5, 2), np.uint8)}, r"bad.npz: pool_3 is uint8\[5, 2\]"),
        ({"pool_3": np.ones((1, 2))}, "bad.npz: pool_3 has 1 rows; expected 2 or more"),
    ],
)
def test_a_file_that_holds_no_statistics_is_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        load_reference(write(tmp_path / "bad.npz", **arrays))


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "r.npz"
    save_reference(path, Reference(statistics(ROWS), FROM))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"r.npz is damaged or not an .npz file"):
        load_reference(path)
    with pytest.raises(UserError):
        load_reference(tmp_path / "none.npz")


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", mu=np.array([print, print], dtype=object), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"evil.npz is damaged .*: array 'mu': Object arrays cannot be loaded"):
        load_reference(tmp_path / "evil.npz")


def test_the_provenance_is_readable_json(tmp_path):
    save_reference(tmp_path / "r.npz", Reference(statistics(ROWS), FROM))
    assert json.loads(str(read_npz(tmp_path / "r.npz")["provenance"])) == dataclasses.asdict(FROM)
