"""Features of real images: read in batches, kept for later, and compared only with those of the same network."""

import dataclasses

import numpy as np
import pytest
import tiny
from fake_features import LinearExtractor, make_source

import evaluation
from evaluation import FeatureStatistics, frechet_distance, sample_metrics
from metrics import efficientnet, inception
from metrics.neighbors import Balls
from metrics.reference import Provenance, Reference, save_reference
from modes.evaluate import real_features
from modes.evaluate.real_features import RealFeatures, batches_of, cached_features, extract

SIZES = {"data__image_size": 4, "data__image_width": 5, "data__num_channels": 3, "data__num_levels": 256}


def configure(**changes):
    return tiny.make_config(**SIZES | {"eval__extractor": "efficientnet_lite0"} | changes)


@pytest.fixture
def extractor(monkeypatch):
    fake = LinearExtractor()
    monkeypatch.setattr(real_features, "build_extractor", lambda key, **settings: fake)
    return fake


def compute(folder, *, train=None, test=None, **changes):
    return RealFeatures.compute(configure(**changes), train or make_source(), test or make_source(20, seed=2), folder)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "batch"), [(10**9, 256), (128 * 60, 128), (200 * 60, 192), (50 * 60, 50), (1, 1)])
def test_every_image_is_read_once_in_batches_that_fit(monkeypatch, limit, batch):
    monkeypatch.setattr(real_features, "BATCH_BYTES", limit)
    source, extractor = make_source(600 if batch > 50 else 120), LinearExtractor()
    found = np.concatenate([levels for levels, *_ in extract(extractor, source, "test")])
    np.testing.assert_array_equal(found, source.levels)
    if batch == 256:
        monkeypatch.setattr(real_features.distributed, "local_device_count", lambda: 16)
        assert len(batches_of(source)[0]) == 512
    assert max(source.asked) == batch
    assert extractor.images == len(source)
    assert np.concatenate(batches_of(source)).tolist() == list(range(len(source)))


def test_the_batches_change_nothing(tmp_path, monkeypatch):
    whole = compute_features(tmp_path / "a")
    monkeypatch.setattr(real_features, "BATCH_BYTES", 7 * 60)
    for name, array in compute_features(tmp_path / "b").items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-6)


# --- kept for later --------------------------------------------------------------------------------------------------


def compute_features(folder, extractor=None, source=None, *, with_logits=True):
    extractor = extractor or LinearExtractor()
    return cached_features(extractor, source or make_source(), folder, name="test", with_logits=with_logits)


@pytest.mark.parametrize("exact", [True, False])
def test_features_are_kept_without_loss(tmp_path, monkeypatch, exact):
    """As float32 where that is what they are."""
    if not exact:
        monkeypatch.setattr(LinearExtractor, "features", lambda self, levels: levels.reshape(len(levels), -1) / 10)
    extractor = LinearExtractor()
    first, again = (compute_features(tmp_path, extractor) for _ in range(2))
    assert extractor.images == 60  # once
    [path] = tmp_path.iterdir()
    assert path.name.startswith("real_")
    with np.load(path) as stored:
        assert stored["features"].dtype == (np.float32 if exact else np.float64)
    for name in ("features", "logits"):
        assert again[name].dtype == np.float64
        np.testing.assert_array_equal(first[name], again[name])
    np.testing.assert_array_equal(first["features"], extractor.features(make_source().levels))


@pytest.mark.parametrize(
    "change",
    [
        {"extractor": LinearExtractor(seed=1)},
        {"extractor": LinearExtractor(key="inception")},
        {"extractor": LinearExtractor(resize="bicubic")},
        {"source": make_source(seed=3)},
        {"source": make_source(59)},
        {"source": dataclasses.replace(make_source(), num_levels=255)},
        {"with_logits": False},
    ],
)
def test_features_of_another_kind_are_computed_anew(tmp_path, change):
    if "source" in change and not hasattr(change["source"], "asked"):
        object.__setattr__(change["source"], "asked", [])
    compute_features(tmp_path)
    found = compute_features(tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 2
    extractor, source = change.get("extractor", LinearExtractor()), change.get("source", make_source())
    np.testing.assert_array_equal(found["features"], extractor.features(source.levels))


def test_a_second_evaluation_computes_nothing(tmp_path, extractor):
    first = compute(tmp_path)
    assert extractor.images == 80
    again = compute(tmp_path)
    assert extractor.images == 80
    np.testing.assert_array_equal(first.reference, again.reference)
    assert (first.reference_info, first.feature_info) == (again.reference_info, again.feature_info)
    assert first.reference_info.hash == FeatureStatistics.from_features(first.reference).hash
    assert first.reference_info.data_hash == make_source().fingerprint


# --- reference -------------------------------------------------------------------------------------------------------


OF_FAKE = Provenance(
    extractor="efficientnet_lite0", extractor_hash="0" * 64, data="digits", split="train", fingerprint="f"
)


def saved(folder, provenance=OF_FAKE, *, rows=False, num_features=5):
    features = LinearExtractor(num_features=num_features).features(make_source().levels)
    reference = Reference(FeatureStatistics.from_features(features), provenance, features if rows else None)
    save_reference(folder / "r.npz", reference)
    return str(folder / "r.npz")


def test_statistics_of_a_file_stand_in_for_the_training_split(tmp_path, extractor):
    samples = make_source(40, seed=4).levels
    computed = {m.name: m for m in compute(tmp_path).measure(samples)}
    extractor.images = 0
    real = compute(tmp_path / "new", eval__reference=saved(tmp_path))
    assert extractor.images == 20  # of the test split alone
    found = {m.name: m for m in real.measure(samples)}
    for name in ("frechet_distance", "frechet_distance_test"):
        assert found[name].value == pytest.approx(computed[name].value, rel=1e-9)
    assert "kernel_distance" not in found
    assert real.reference_info.split == "r.npz (digits train)"
    assert (real.reference_info.num_samples, real.reference_info.data_hash) == (60, "f")


def test_features_of_a_file_give_every_metric(tmp_path, extractor):
    samples = make_source(40, seed=4).levels
    path = saved(tmp_path, rows=True)
    assert compute(tmp_path, eval__reference=path).measure(samples) == compute(tmp_path).measure(samples)


def test_the_numbers_are_those_of_the_metrics(tmp_path, extractor):
    samples, real = make_source(40, seed=4).levels, compute(tmp_path)
    train, test = extractor.features(make_source().levels), extractor(make_source(20, seed=2).levels)
    expected = sample_metrics(extractor(samples), reference=train, test=test, extractor="efficientnet_lite0")
    assert real.measure(samples) == expected
    assert real.measure(samples)[0].value == frechet_distance(extractor.features(samples), train).value


def test_the_test_split_and_the_neighbours_of_the_reference_are_measured_once(tmp_path, extractor, monkeypatch):
    measured = []
    of_test, around = evaluation.floor_metrics, Balls.around
    monkeypatch.setattr(real_features, "floor_metrics", lambda *a, **k: measured.append("floor") or of_test(*a, **k))
    monkeypatch.setattr(
        Balls, "around", lambda x, *a, **k: measured.append(k.get("name", "real")) or around(x, *a, **k)
    )
    real = compute(tmp_path)
    levels = make_source(30, seed=3).levels
    assert real.measure(levels) == real.measure(levels)
    assert sorted(measured) == ["features", "features", "features", "floor", "real"]


def test_a_file_of_another_program_goes_with_inception(tmp_path, monkeypatch):
    fake = LinearExtractor(key="inception")
    monkeypatch.setattr(real_features, "build_extractor", lambda key, **settings: fake)
    features = fake.features(make_source().levels)
    np.savez(tmp_path / "fid.npz", mu=features.mean(0), sigma=np.cov(features.T))
    settings = {"eval__extractor": "inception", "eval__reference": str(tmp_path / "fid.npz")}
    real = compute(tmp_path, **settings)
    assert real.reference_info.split == "fid.npz (extractor and images not stated by the file)"
    assert (real.reference_info.num_samples, real.reference_info.data_hash) == (0, "")
    found = {m.name: m for m in real.measure(make_source(40, seed=4).levels)}
    expected = frechet_distance(fake.features(make_source(40, seed=4).levels), features).value
    assert found["frechet_distance"].value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("provenance", "num_features", "message"),
    [
        (Provenance(), 5, "does not state its extractor, .* go with inception or tfgan, not 'efficientnet_lite0'"),
        (dataclasses.replace(OF_FAKE, extractor="inception"), 5, "the extractor 'inception' with parameters 0000"),
        (dataclasses.replace(OF_FAKE, extractor_hash="12" * 32), 5, "parameters 1212121212121212, the configured one"),
        (OF_FAKE, 4, "has features of 4 dimensions, the extractor 'efficientnet_lite0' of 5"),
    ],
)
def test_a_reference_of_another_network_is_refused(tmp_path, extractor, provenance, num_features, message):
    path = saved(tmp_path, provenance, num_features=num_features)
    with pytest.raises(ValueError, match=rf"r.npz' .*{message}.*with --mode stats"):
        compute(tmp_path, eval__reference=path)
    assert extractor.images == 0


def test_a_missing_reference_is_said_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(real_features, "build_extractor", None)
    with pytest.raises(ValueError, match=r"eval.reference='/none.npz' is not a file; --mode stats makes one"):
        compute(tmp_path, eval__reference="/none.npz")


# --- which extractor -------------------------------------------------------------------------------------------------


def test_colour_without_labels_is_measured_with_efficientnet(tmp_path, monkeypatch, extractor):
    monkeypatch.setattr(efficientnet, "PACKAGE", "numpy")  # whatever is installed
    monkeypatch.setattr(inception, "weights_path", lambda weights="": tmp_path / "none")
    asked = []
    monkeypatch.setattr(real_features, "build_extractor", lambda key, **settings: asked.append(key) or extractor)
    assert len(compute(tmp_path, eval__extractor="auto").reference) == 60
    assert asked == ["efficientnet_lite0"]


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (3, r"has no labels .*'classifier'; set eval.extractor to inception, efficientnet_lite0 or tfgan \(docs"),
        (2, r"has no labels .*'classifier'; --mode eval does without if eval.enable_sampling=False"),
    ],
)
def test_without_labels_the_classifier_names_the_others(tmp_path, channels, message):
    with pytest.raises(ValueError, match=message):
        compute(tmp_path, eval__extractor="classifier", data__num_channels=channels)


def test_weights_that_nobody_reads_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"eval.weights='w.npz' is of no use to the extractor 'efficientnet_lite0'"):
        compute(tmp_path, eval__weights="w.npz")


def test_the_digits_are_measured_with_the_classifier():
    assert real_features.choose_extractor(tiny.make_config()) == "classifier"


def test_splits_that_are_too_small(tmp_path, extractor, caplog):
    with pytest.raises(ValueError, match=r"the training split has 1 image\(s\); metrics of samples need 2 or"):
        compute(tmp_path, train=make_source(1))
    real = compute(tmp_path, test=make_source(1))
    assert real.test is None
    assert {m.name for m in real.measure(make_source(40, seed=4).levels)}.isdisjoint({"frechet_distance_test"})
    few = {m.name for m in compute(tmp_path, test=make_source(2)).measure(make_source(40, seed=4).levels)}
    assert "frechet_distance_test" in few


def test_the_digits_reach_the_classifier_as_when_all_were_given_at_once():
    """In whole batches of its 256, but for the last."""
    assert [len(batch) for batch in batches_of(make_source(1500, (8, 8, 1)))] == [256] * 5 + [220]
