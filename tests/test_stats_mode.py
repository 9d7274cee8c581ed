"""--mode stats: every number against numpy or scipy on all images at once, and nothing replaced in silence."""

import json
import shutil

import numpy as np
import pytest
import tiny
from fake_features import LinearExtractor, make_source
from PIL import Image
from scipy.spatial.distance import pdist

import datasets
import run_lib
from metrics import efficientnet
from metrics.classifier import build_feature_extractor
from metrics.reference import load_reference
from modes import stats as data_stats
from modes.evaluate import real_features
from sources.base import ArraySource
from workdir import folder as workdirs

SIZES = {"data__image_size": 4, "data__image_width": 5, "data__num_channels": 3, "data__num_levels": 256}
SOURCE = make_source()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def extractor(monkeypatch):
    """Features known by hand, of images that are in memory."""
    fake = LinearExtractor()
    monkeypatch.setattr(real_features, "build_extractor", lambda key, **settings: fake)
    monkeypatch.setattr(datasets, "build_source", lambda config, split: SOURCE)
    return fake


def stats(path, **changes):
    flags = {name: changes.pop(name) for name in ("split", "keep_features") if name in changes}
    settings = SIZES | {"eval__extractor": "efficientnet_lite0"} | changes
    path = run_lib.stats(tiny.make_config(**settings), str(path), **flags)
    return load_reference(path), json.loads(path.with_suffix(".json").read_text())


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [7, 60])
@pytest.mark.parametrize("keep", [False, True])
def test_statistics_are_numpys_of_all_images(tmp_path, monkeypatch, extractor, batch, keep):
    monkeypatch.setattr(real_features, "BATCH_BYTES", batch * 60)
    found, stated = stats(tmp_path / "new" / "r.npz", keep_features=keep)
    features = extractor.features(SOURCE.levels)
    np.testing.assert_allclose(found.statistics.mean, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.statistics.cov, np.cov(features.T), rtol=1e-11)
    assert (found.statistics.num_samples, extractor.images) == (60, 60)
    assert (found.features is not None) == keep
    if keep:
        np.testing.assert_array_equal(found.features, features)
    assert stated["reference"]["hash"] == found.statistics.hash
    assert (stated["reference"]["num_samples"], stated["reference"]["num_features"]) == (60, 5)


def test_the_file_says_where_it_comes_from(tmp_path, extractor):
    found, stated = stats(tmp_path / "r.npz", split="test")
    of = found.provenance
    assert (of.extractor, of.extractor_hash, of.resize) == (extractor.key, extractor.hash, extractor.resize)
    assert (of.data, of.split, of.preparation, of.num_levels) == ("digits", "test", "as stored", 256)
    assert (of.fingerprint, of.dtype) == (SOURCE.fingerprint, "features float32, statistics float64")
    settings = json.loads(of.settings)
    assert settings["settings"]["data.image_width"] == 5
    assert settings["settings"]["eval.extractor"] == "efficientnet_lite0"
    assert {"versions", "commit"} < settings.keys()
    assert stated["reference"]["settings"] == settings


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dequantize", [False, True])
def test_pixels_are_those_that_the_network_sees(tmp_path, extractor, centered, dequantize):
    """Dequantization noise u is uniform: here its quantiles stand for it, of the same mean and, to 1e-6, variance."""
    settings = {"data__centered": centered, "data__uniform_dequantization": dequantize}
    found = stats(tmp_path / "r.npz", **settings)[1]["pixels"]
    levels = SOURCE.levels.astype(np.float64)
    noise = (np.arange(1000) + 0.5) / 1000 if dequantize else np.zeros(1)
    seen = (levels[..., None] + noise) / (256 if dequantize else 255)
    seen = 2 * seen - 1 if centered else seen
    assert found["sigma_data"] == pytest.approx(seen.std(), rel=1e-9)
    for channel in range(3):
        of = found["channels"][channel]
        assert of["mean"] == pytest.approx(levels[..., channel].mean() / 255, rel=1e-12)
        assert of["std"] == pytest.approx(levels[..., channel].std() / 255, rel=1e-12)
        assert of["network_mean"] == pytest.approx(seen[..., channel, :].mean(), rel=1e-10, abs=1e-12)
        assert of["network_std"] == pytest.approx(seen[..., channel, :].std(), rel=1e-9)
    largest = found["largest_distance"]
    expected = pdist(seen.mean(axis=-1).reshape(60, -1)).max()
    assert largest["in_network_range"] == pytest.approx(expected, rel=1e-12)
    assert largest["in_network_range_at_most"] == largest["in_network_range"]
    assert largest["is_exact"]
    first, second = (seen.mean(axis=-1)[index] for index in largest["images"])
    assert np.linalg.norm(first - second) == pytest.approx(expected, rel=1e-12)
    assert largest["in_unit_range"] == pytest.approx(pdist(levels.reshape(60, -1)).max() / 255, rel=1e-12)
    assert found["network_range"] == ([-1.0, 1.0] if centered else [0.0, 1.0])
    assert found["overrides"] == [
        f"--config.model.sigma_max={expected:.4g}",
        f"--config.restore.data_std={seen.std():.4g}",
    ]


def test_the_overrides_are_keys_of_the_configuration(tmp_path, extractor):
    for override in stats(tmp_path / "r.npz")[1]["pixels"]["overrides"]:
        key, value = override.removeprefix("--config.").split("=")
        tiny.make_config().update_from_flattened_dict({key: float(value)})


def test_a_distance_that_may_not_be_the_largest_says_so(tmp_path, extractor, monkeypatch, caplog):
    few = data_stats.farthest_pair
    monkeypatch.setattr(data_stats, "farthest_pair", lambda *args: few(*args, compared=5))
    with caplog.at_level("INFO", logger="absl"):
        largest = stats(tmp_path / "r.npz")[1]["pixels"]["largest_distance"]
    assert not largest["is_exact"]
    truth = pdist(SOURCE.levels.reshape(60, -1) / 128).max()
    assert largest["in_network_range"] <= truth <= largest["in_network_range_at_most"]
    assert "is the largest among the 5 images farthest from the middle; that of all images is at most" in caplog.text


def test_equal_images_give_no_override(tmp_path, extractor, monkeypatch):
    same = ArraySource(np.full((6, 4, 5, 3), 9, np.uint8), np.zeros(6, np.int64), 256, 0)
    monkeypatch.setattr(datasets, "build_source", lambda config, split: same)
    unchanged = stats(tmp_path / "r.npz", data__uniform_dequantization=False)[1]
    assert unchanged["pixels"]["overrides"] == []


def test_one_image_is_refused(tmp_path, extractor, monkeypatch):
    monkeypatch.setattr(datasets, "build_source", lambda config, split: make_source(1))
    with pytest.raises(ValueError, match=r"the split has 1 image\(s\); statistics need two or more"):
        stats(tmp_path / "r.npz")
    assert not (tmp_path / "r.npz").exists()


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_default_file_is_named_after_what_is_in_it(tmp_path, extractor, monkeypatch):
    path = run_lib.stats(tiny.make_config(**SIZES, eval__extractor="efficientnet_lite0"))
    assert path.parent == tmp_path / "cache" / "stats"
    assert path.name.startswith("digits_4x5x3_train_efficientnet_lite0_")
    monkeypatch.setattr(datasets, "build_source", lambda config, split: make_source(seed=9))
    assert run_lib.stats(tiny.make_config(**SIZES, eval__extractor="efficientnet_lite0")) != path
    assert len(list(path.parent.glob("*.npz"))) == len(list(path.parent.glob("*.json"))) == 2


def test_the_same_statistics_are_made_anew_and_keep_their_features(tmp_path, extractor):
    path = tmp_path / "r.npz"
    first = stats(path, keep_features=True)[0]
    again = stats(path, data__centered=False)[0]
    np.testing.assert_array_equal(first.features, again.features)
    assert first.statistics.hash == again.statistics.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"split": "test"},
            r"r.npz holds other statistics \(split: 'train' there, 'test' now\); choose another --output",
        ),
        ({"data__dataset": "folder"}, r"\(data: 'digits' there, 'folder' now\)"),
    ],
)
def test_other_statistics_are_not_replaced(tmp_path, extractor, change, message):
    path = tmp_path / "r.npz"
    stats(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        stats(path, **change)
    extractor.seed = 1
    with pytest.raises(ValueError, match=r"\(extractor_hash: '0+' there, '0+1' now\)"):
        stats(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["r.npz", "r.json"])
def test_a_file_of_something_else_is_not_replaced(tmp_path, extractor, name):
    (tmp_path / name).write_text("mine")
    message = {"r.npz": "r.npz is damaged or not an .npz file.*; it is not replaced", "r.json": "r.json would be rep"}
    with pytest.raises(ValueError, match=message[name]):
        stats(tmp_path / "r.npz")
    assert (tmp_path / name).read_text() == "mine"
    assert extractor.images == 0


def test_wrong_flags_are_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "build_source", None)
    with pytest.raises(ValueError, match="--split='val' is unknown; known: test, train"):
        stats(tmp_path / "r.npz", split="val")
    with pytest.raises(ValueError, match=r"--output=.*/r.txt: expected a name that ends in .npz"):
        stats(tmp_path / "r.txt")


def test_a_place_that_cannot_be_written_is_named(extractor):
    with pytest.raises(workdirs.WorkdirError, match=r"cannot write in --output=/dev/null: .*; choose a folder"):
        stats("/dev/null/r.npz")
    assert extractor.images == 0


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_from_the_command_line(tmp_path, digits_features):
    """With the classifier that is in the cache."""
    path = tmp_path / "digits.npz"
    shutil.copytree(digits_features, tmp_path / "cache" / "features")
    result = tiny.run(tiny.command("stats", "none", f"--output={path}", "--split=test", "--keep_features"))
    assert result.returncode == 0, result.stderr[-3000:]
    train, test = (datasets.load_digits(split) for split in ("train", "test"))
    arrays = train.levels, train.classes, test.levels, test.classes
    own = build_feature_extractor(*arrays, num_levels=17, folder=digits_features, seed=42)
    features = own(test.levels)[0]
    found = load_reference(path)
    assert (found.provenance.extractor, found.provenance.extractor_hash) == ("classifier", own.hash)
    assert found.provenance.fingerprint == test.fingerprint
    np.testing.assert_allclose(found.features, features, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.statistics.cov, np.cov(features.T), rtol=1e-4, atol=1e-7)
    largest = pdist(test.levels.reshape(297, -1) * 2 / 17).max()
    assert f"--config.model.sigma_max={largest:.4g} --config.restore.data_std=" in result.stderr
    assert f"sigma_max, largest distance of two images, in the network's range: {largest:.4g}" in result.stderr
    assert f"statistics: {path}" in result.stderr


@pytest.mark.exhaustive
@pytest.mark.skipif(not efficientnet.is_installed(), reason=f"{efficientnet.PACKAGE} is not installed")
def test_a_folder_of_colour_pictures_without_labels(tmp_path):
    generator, root = np.random.default_rng(0), tmp_path / "pictures"
    root.mkdir()
    for number in range(8):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"{number}.png")
    data = {"data__dataset": "folder", "data__path": root, "data__num_channels": 3, "data__num_levels": 256}
    arguments = tiny.command("stats", "none", "--keep_features", **data, eval__extractor="efficientnet_lite0")
    result = tiny.run(arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    [path] = (tmp_path / "cache" / "stats").glob("folder_8x8x3_train_efficientnet_lite0_*.npz")
    found = load_reference(path)
    assert found.statistics.num_samples == 7  # a tenth, one picture, is held out
    config = tiny.make_config(**data | {"data__path": str(root)})
    source = datasets.build_source(config, "train")
    assert found.provenance.fingerprint == source.fingerprint
    assert found.features.shape == (7, 1280)
    np.testing.assert_allclose(found.statistics.mean, found.features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.statistics.cov, np.cov(found.features.T), rtol=1e-9, atol=1e-12)
