"""The report: what is stored comes back, what is stated is true of the numbers, and a failure leaves the old one."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

import report
from metrics.metric import Metric
from report import CheckpointInfo, DataInfo, FeatureInfo, ReferenceInfo, Report, SamplerInfo, page, plots

FEATURES = FeatureInfo("a classifier", "abcdef0123456789" * 4, 0.99)


def metrics(**values):
    return tuple(Metric(name, value, stderr, 500, note="a note") for name, (value, stderr) in values.items())


def full_report(number=2, distance=0.25, floor=0.1, **changes):
    measured = (Metric("frechet_distance", distance, 0.05, 500, label="FD-classifier", note="a note"),)
    measured += metrics(
        frechet_distance_test=(floor, 0.02),
        kernel_distance=(0.01, 0.002),
        kernel_distance_test=(-0.001, 0.002),
        bits_per_dim=(2.6, 0.02),
        bits_per_dim_bound=(2.75, 0.03),
        gaussian_bits_per_dim=(2.949, 0.02),
    )
    return dataclasses.replace(
        Report(
            checkpoint=CheckpointInfo(number, 1000 * number),
            seed=42,
            data=DataInfo("digits", 1500, 297, 17),
            metrics=measured,
            sampler=SamplerInfo({"method": "pc", "num_steps": 250}, 250, 25.04, 500, "the nearest of 17 levels"),
            features=FEATURES,
            reference=ReferenceInfo("train", 1500, "0123456789abcdef" * 4),
            files={"grid": f"ckpt_{number}/samples.png"},
        ),
        **changes,
    )


def row_of(page, heading):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {heading}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_report_comes_back_from_its_file(tmp_path):
    for stored in (full_report(2), full_report(10, sampler=None, features=None, reference=None, files={}, metrics=())):
        report.save_report(tmp_path, stored)
    (tmp_path / "report_old.json").write_text("not one of ours")
    assert report.read_reports(tmp_path) == [
        full_report(2),
        full_report(10, sampler=None, features=None, reference=None, files={}, metrics=()),
    ]
    assert report.report_path(tmp_path, 10).name == "report_10.json"


def test_an_interval_comes_back_from_its_file(tmp_path):
    stored = full_report(metrics=(Metric("frechet_distance_unbiased", 0.1, 0.1, 500, interval=(-0.1, 0.3)),))
    report.save_report(tmp_path, stored)
    assert report.read_reports(tmp_path) == [stored]


def test_what_is_not_finite_is_null_in_the_file_and_not_run_on_the_page(tmp_path):
    broken = full_report(metrics=metrics(frechet_distance=(math.nan, math.inf)))
    broken = dataclasses.replace(broken, sampler=SamplerInfo({"snr": math.inf}, 250, math.nan, 500))
    values = broken.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert (values["metrics"][0]["value"], values["metrics"][0]["stderr"]) == (None, None)
    assert (values["sampler"]["seconds"], values["sampler"]["settings"]["snr"]) == (None, None)


def test_every_field_that_a_metric_must_state_is_in_the_file():
    values = full_report().to_dict()
    assert values["checkpoint"] == {"number": 2, "step": 2000, "ema": True}
    stated = {"name": "digits", "train_images": 1500, "test_images": 297, "num_levels": 17, "hash": ""}
    assert values["data"] == stated
    assert values["sampler"].keys() == {"settings", "nfe", "seconds", "num_samples", "rounding"}
    assert values["features"] == dataclasses.asdict(FEATURES)
    assert values["reference"].keys() == {"split", "num_samples", "hash", "data_hash", "preparation"}
    assert values["metrics"][0].keys() == {field.name for field in dataclasses.fields(Metric)}
    assert values["seed"] == 42


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (2.9634, 0.0191, "2.963 ± 0.019"),
        (0.24213, 0.0452, "0.242 ± 0.045"),
        (1533.11, 17.3, "1533 ± 17"),
        (1533.11, 1.73, "1533.1 ± 1.7"),
        (12345.6, 250.0, "12346 ± 250"),
        (0.5, 0.0, "0.5"),
        (0.123456, None, "0.1235"),
        (None, None, "not run"),
    ],
)
def test_numbers_are_written_to_the_second_digit_of_their_uncertainty(value, stderr, text):
    assert report.number_text(value, stderr) == text


@pytest.mark.parametrize(
    ("distance", "verdict"),
    [
        (0.25, "**2.50 times the floor**. That is within 3 times the floor (0.3), even without"),
        (0.33, "**3.30 times the floor**. That is within 3 times the floor plus its uncertainty (0.3 + 0.06), but not"),
        (0.46, "That is **not** within 3 times the floor plus its uncertainty (0.3 + 0.06): it is 0.1 too much."),
    ],
)
def test_the_floor_sentence_says_what_the_numbers_say(distance, verdict):
    assert verdict in page.floor_sentence(full_report(distance=distance))


def test_sentences_say_when_something_was_not_run():
    empty = full_report(metrics=())
    assert page.floor_sentence(empty) == "Fréchet distance of the samples against the floor: not run."
    assert page.bits_sentence(empty) == "bits/dim against the Gaussian: not run."
    assert page.bias_sentence(empty) == ""


def test_the_page_says_how_few_samples_there_are():
    assert page.few_sentence(full_report()).startswith("**500 samples**: fewer than 10,000 samples: the bias of")
    enough = full_report(metrics=(Metric("frechet_distance", 0.3, 0.1, 10_000),))
    assert page.few_sentence(enough) == page.few_sentence(full_report(metrics=())) == ""


def test_the_page_names_the_reference_and_the_interval():
    unbiased = Metric("frechet_distance_unbiased", 0.1234, 0.05, 500, label="FD-x without bias", interval=(0.02, 0.22))
    changed = full_report(metrics=(unbiased,), reference=ReferenceInfo("statistics.npz", 50_000, "0" * 64))
    text = page.render_report(pathlib.Path(), [changed], {})
    assert row_of(text, "FD-x without bias: the same")[1] == "0.123 ± 0.050"
    assert row_of(text, "FD-x without bias (`frechet")[1] == "0.123 ± 0.050; 95 %: 0.020 to 0.220"
    assert row_of(text, "Fréchet distance to the reference")[1] == "not run"
    assert "Samples are compared with the reference by features of each image (a classifier)" in text


def test_bits_of_different_images_are_not_compared():
    network, gaussian = metrics(bits_per_dim=(2.6, 0.02), gaussian_bits_per_dim=(2.949, 0.02))
    changed = full_report(metrics=(dataclasses.replace(network, num_samples=1500), gaussian))
    assert "are for different images, and are not compared" in page.bits_sentence(changed)


def test_the_bias_sentence_names_the_side_with_fewer_images():
    few, many = Metric("frechet_distance", 0.3, 0.1, 100), Metric("frechet_distance_test", 0.1, 0.1, 297)
    assert "here the distance of the samples is raised more" in page.bias_sentence(full_report(metrics=(few, many)))
    few = dataclasses.replace(few, num_samples=500)
    assert "here the floor is raised more" in page.bias_sentence(full_report(metrics=(few, many)))
    assert page.bias_sentence(full_report()) == ""  # as many of both


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (2.6, "The network beats the Gaussian: the difference is 0.349 ± 0.028 bits/dim."),
        (2.92, "beats the Gaussian: the difference is 0.029 ± 0.028 bits/dim, which is less than twice"),
        (3.5, "does **not** beat the Gaussian: the difference is -0.551 ± 0.028 bits/dim."),
    ],
)
def test_the_bits_sentence_says_who_wins(network, sentence):
    changed = metrics(bits_per_dim=(network, 0.02), gaussian_bits_per_dim=(2.949, 0.02))
    assert sentence in page.bits_sentence(full_report(metrics=changed))


def test_the_page_has_every_number_and_picture(tmp_path):
    folder = tmp_path / "eval"
    lines = [{"step": step, "loss": 10.0 / step, "eval_loss": 12.0 / step} for step in range(1, 50)]
    (tmp_path / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, distance in ((1, 0.9), (2, 0.25), (10, 0.2)):
        report.save_report(folder, full_report(number, distance))
    grid = plots.grid_of_levels(np.zeros((4, 8, 8, 1), np.uint8), 17)
    plots.save_png(folder / "ckpt_10" / "samples.png", grid)
    page = report.write_report(folder).read_text()

    assert page.startswith("# Evaluation of checkpoint 10 (step 10,000) on digits\n")
    assert row_of(page, "FD-classifier: Fréchet distance to the training images")[1:3] == [
        "0.200 ± 0.050",
        "0.100 ± 0.020",
    ]
    assert row_of(page, "kernel distance")[1:3] == ["0.0100 ± 0.0020", "-0.0010 ± 0.0020"]
    assert row_of(page, "exp of the mean information")[1:3] == ["not run", "not run"]
    assert row_of(page, "bits/dim of the network")[1] == "2.600 ± 0.020"
    assert row_of(page, "variational bound on bits/dim")[1] == "2.750 ± 0.030"
    assert row_of(page, "1 ")[:3] == ["1", "1,000", "0.900 ± 0.050"]
    assert row_of(page, "10 ")[2] == "0.200 ± 0.050"
    assert row_of(page, "checkpoint | step")[:4] == ["checkpoint", "step", "FD-classifier", "kernel distance"]
    for setting, value in {
        "seed": "42",
        "parameters": "exponential moving average (EMA)",
        "data": "digits: 1,500 training and 297 test images, 17 levels",
        "sampler": "method=pc, num_steps=250",
        "network evaluations per sample (nfe)": "250",
        "samples": "500 in 25.0 s",
        "rounding of the samples": "the nearest of 17 levels",
        "feature extractor": "a classifier (`classifier`)",
        "its hash": "`abcdef0123456789`",
        "its accuracy": "99.0 %",
        "reference": "train split, 1,500 images",
    }.items():
        assert row_of(page, setting)[1] == value
    pictures = [line.split("](")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert pictures == ["ckpt_10/samples.png", "frechet_distance.png", "bits_per_dim.png", "loss_curve.png"]
    for name in pictures:
        with Image.open(folder / name) as image:
            assert image.size == ((70, 70) if name.startswith("ckpt") else (770, 440))
            image.load()


def test_one_checkpoint_without_samples_or_losses_has_a_page_too(tmp_path):
    report.save_report(tmp_path / "eval", full_report(sampler=None, features=None, reference=None, metrics=()))
    page = report.write_report(tmp_path / "eval").read_text()
    assert "## All checkpoints" not in page
    assert "Pictures: not run." in page  # the grid that it names is not there: no broken link
    for setting in ("sampler", "feature extractor", "reference"):
        assert row_of(page, setting)[1] == "not run"
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["report.md", "report_2.json"]


def test_a_failure_leaves_the_old_report(tmp_path, monkeypatch):
    report.save_report(tmp_path, full_report(1))
    report.write_report(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "report_2.json").write_text('{"half a')
    with pytest.raises(
        ValueError, match=r"report_2.json cannot be read .*; delete it and evaluate that checkpoint again"
    ):
        report.write_report(tmp_path)
    report.save_report(tmp_path, full_report(2))
    monkeypatch.setattr(page, "_settings_table", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(tmp_path)
    (tmp_path / "report_2.json").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_folders_and_reports_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no report_<k>.json; run with --mode eval first"):
        report.write_report(tmp_path)
    for content in ("[]", "{}", json.dumps(full_report().to_dict() | {"colour": 1})):
        (tmp_path / "report_1.json").write_text(content)
        with pytest.raises(ValueError, match=r"report_1.json cannot be read \(not a report of this version"):
            report.read_reports(tmp_path)


def test_a_metric_that_the_page_does_not_know_is_shown_by_its_name():
    unknown = full_report(metrics=metrics(sliced_distance=(1.5, 0.1)))
    assert row_of(page._main_table(unknown), "sliced_distance")[1] == "1.50 ± 0.10"
