"""What an evaluation mixes and what not: results of changed data, reports of other features, a Gaussian of few."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from fake_features import make_source

import datasets
from configs.settings import image_shape
from metrics.metric import Metric
from modes.evaluate import evaluate as eval_loop
from modes.evaluate.evaluate import Evaluator, other_reports
from report import CheckpointInfo, DataInfo, FeatureInfo, ReferenceInfo, Report, save_report
from workdir import results
from workdir.folder import WorkdirError


def evaluator(**changes):
    config, scaler = tiny.make_config(**changes), SimpleNamespace(num_levels=17)
    return Evaluator(SimpleNamespace(config=config, scaler=scaler, image_shape=image_shape(config)))


# --- changed data ----------------------------------------------------------------------------------------------------


def open_with(folder, **contents):
    results.open_folder(folder, tiny.make_config(), ("samples",), {}, flag="--eval_folder", contents=contents)


def test_results_of_changed_data_are_not_mixed(tmp_path):
    open_with(tmp_path, data="a")
    open_with(tmp_path, data="a")
    with pytest.raises(WorkdirError, match=r"\(data_sha256: 'a' there, 'b' now\); choose a new --eval_folder"):
        open_with(tmp_path, data="b")


def test_samples_do_not_depend_on_the_data(tmp_path):
    """What was drawn before losses were measured is used again, and what is measured then holds them to the data."""
    open_with(tmp_path)
    results.record_facts(tmp_path, {"nfe": 3})
    open_with(tmp_path, data="a")
    open_with(tmp_path)
    with pytest.raises(WorkdirError, match="data_sha256: 'a' there, 'b' now"):
        open_with(tmp_path, data="b")
    assert '"nfe": 3' in (tmp_path / "settings.json").read_text()


def test_the_data_are_those_of_both_splits(monkeypatch):
    sources = {"train": make_source(), "test": make_source(20, seed=2)}
    monkeypatch.setattr(datasets, "build_source", lambda config, split: sources[split])
    only_samples = {"eval__enable_loss": False, "eval__enable_bpd": False}
    assert evaluator(**only_samples).contents == {}
    first = evaluator(**only_samples | {"eval__enable_loss": True}).contents
    assert first == evaluator(**only_samples | {"eval__enable_bpd": True}).contents
    for split in sources:
        changed = sources | {split: make_source(seed=7)}
        monkeypatch.setattr(datasets, "build_source", lambda config, split, changed=changed: changed[split])
        assert evaluator().contents.keys() == first.keys()
        assert evaluator().contents != first


# --- the Gaussian ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_images", "side", "reason"),
    [
        (128, 8, ""),
        (127, 8, "there are 127 training images, fewer than 2 for each of 64 values: its fit would mean nothing"),
        (30_000, 111, "an image has 12,321 values, more than the 12,288 that are fitted here"),
    ],
)
def test_a_gaussian_is_fitted_only_where_it_means_something(monkeypatch, num_images, side, reason):
    source = range(num_images)  # all that is asked is its length
    monkeypatch.setattr(datasets, "build_source", lambda config, split: source)
    assert evaluator(data__image_size=side).no_gaussian == reason


@pytest.mark.parametrize("num_images", [59, 300])
def test_the_report_says_why_there_is_no_gaussian(monkeypatch, tmp_path, num_images):
    images = make_source(num_images, (8, 8, 1), num_levels=17)
    monkeypatch.setattr(datasets, "build_source", lambda config, split: images)
    measured = {name: np.full((1, num_images), 2.0) for name in ("bpd", "stderr", "nats", "nfe")}
    monkeypatch.setattr(eval_loop, "measure_bpd", lambda *args: measured)
    found = {metric.name: metric for metric in eval_loop._bpd_metrics(evaluator(), None, tmp_path)}
    assert ("gaussian_bits_per_dim" in found) == (num_images == 300)
    assert ("no Gaussian to compare with: there are 59" in found["bits_per_dim"].note) == (num_images == 59)


# --- reports of other features ---------------------------------------------------------------------------------------

REAL = SimpleNamespace(
    feature_info=FeatureInfo("a classifier", "ab", 0.9), reference_info=ReferenceInfo("train", 1500, "cd", "ef")
)


def write_report(folder, number, *, features=REAL.feature_info, reference=REAL.reference_info):
    report = Report(
        checkpoint=CheckpointInfo(number, 100 * number),
        seed=1,
        data=DataInfo("digits", 1500, 297, 17),
        metrics=(Metric("frechet_distance", 1.0, 0.1, 100),),
        features=features,
        reference=reference if features else None,
    )
    save_report(folder, report)
    return folder / f"report_{number}.json"


def test_reports_of_the_same_features_stay(tmp_path):
    assert other_reports(tmp_path, range(1, 3), REAL) == []
    for number, changes in ((1, {}), (7, {}), (8, {"features": None})):
        write_report(tmp_path, number, **changes)
    assert other_reports(tmp_path, range(1, 3), REAL) == []


@pytest.mark.parametrize(
    "other",
    [
        {"features": dataclasses.replace(REAL.feature_info, key="inception")},
        {"features": dataclasses.replace(REAL.feature_info, hash="xy")},
        {"reference": dataclasses.replace(REAL.reference_info, hash="xy")},
        {"reference": dataclasses.replace(REAL.reference_info, num_samples=3)},
    ],
)
def test_reports_of_other_features_do_not_stand_beside_new_ones(tmp_path, other):
    path = write_report(tmp_path, 2, **other)
    write_report(tmp_path, 1)
    with pytest.raises(WorkdirError, match=r"report_2.json has metrics of another .*; evaluate checkpoint 2 in"):
        other_reports(tmp_path, range(1, 2), REAL)
    assert other_reports(tmp_path, range(1, 3), REAL) == [path]
    assert path.exists()


def test_they_are_deleted_once_a_checkpoint_could_be_evaluated(tmp_path, monkeypatch):
    """And not if the evaluation is refused."""
    paths = [write_report(tmp_path, number) for number in (1, 2, 3)]
    of_one, pages = eval_loop.read_reports(tmp_path)[0], []
    monkeypatch.setattr(eval_loop, "write_report", lambda folder, losses: pages.append(sorted(folder.iterdir())))
    eval_loop._write(tmp_path, tmp_path, of_one, [paths[0], paths[2]])
    assert pages == [paths[:2]]


def test_a_reference_of_unknown_size_says_so():
    assert ReferenceInfo("train", 1500, "ab").words == "train split, 1,500 images"
    assert ReferenceInfo("a.npz (x)", 0, "ab").words == "a.npz (x), images whose number is not known"
