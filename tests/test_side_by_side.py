"""`--mode compare`: the table says what the reports say, and what cannot be compared is refused."""

import dataclasses
import json

import pytest
import test_report

import report
import run_lib
from metrics.metric import Metric
from report import ReferenceInfo, SamplerInfo, side_by_side


def write(folder, name, **changes):
    """Writes a report of test_report.full_report, changed, and returns its path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(test_report.full_report(**changes).to_dict()))
    return str(path)


def rows_of(text):
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_two_reports_stand_beside_each_other_with_their_difference(tmp_path, capsys):
    files = [write(tmp_path, "a", number=1), write(tmp_path, "b", number=2, distance=0.35)]
    run_lib.compare_reports(files)
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert rows[""] == ["a.json", "b.json", "difference"]
    assert len({len(line) for line in text.splitlines() if line.startswith(("| FD", "| bits"))}) == 1
    assert rows["FD-classifier"] == ["0.250 ± 0.050", "0.350 ± 0.050", "0.100 ± 0.071"]
    assert rows["bits_per_dim"] == ["2.600 ± 0.020", "2.600 ± 0.020", "0.000 ± 0.028"]
    assert rows["checkpoint"][:2] == ["1 (step 1,000)", "2 (step 2,000)"]
    assert "500 samples, rounded to the nearest of 17 levels, against the reference (train split, 1,500 images)" in text
    assert "by the extractor classifier abcdef0123456789." in text
    assert "was computed differently" not in text


def test_three_reports_have_no_difference_and_only_common_metrics(tmp_path):
    loss = Metric("loss", 1.0, 0.1, 297)
    metrics = test_report.full_report().metrics
    files = [write(tmp_path, name, metrics=(*metrics, loss)) for name in "ab"]
    files.append(write(tmp_path, "c"))
    rows = rows_of(report.compare_reports(files))
    assert len(rows["FD-classifier"]) == 3
    assert "loss" not in rows
    assert rows_of(report.compare_reports(files[:2]))["loss"][:2] == ["1.00 ± 0.10", "1.00 ± 0.10"]


def change(part, **changes):
    return {part: dataclasses.replace(getattr(test_report.full_report(), part), **changes)}


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        (
            change("features", key="inception"),
            "feature extractor: classifier abcdef0123456789 and inception abcdef0123456789",
        ),
        (
            change("features", hash="f" * 64),
            "feature extractor: classifier abcdef0123456789 and classifier ffffffffffffffff",
        ),
        (change("features", resize="bicubic"), "resizing for it: none and bicubic"),
        (change("reference", hash="f" * 64), "reference: 0123456789abcdef and ffffffffffffffff"),
        (change("reference", num_samples=1000), "images of the reference: 1500 and 1000"),
        (change("sampler", num_samples=600), "samples: 500 and 600"),
        (
            change("sampler", rounding="the bin they lie in of 17 levels"),
            "rounding of the samples: the nearest of 17 levels and the bin they lie in of 17 levels",
        ),
        (change("sampler", rounding=""), "rounding of the samples: the nearest of 17 levels and not known"),
        (change("data", num_levels=256), "levels: 17 and 256"),
        (change("data", hash="f" * 64), "data set: digits (hash not known) and digits ffffffffffffffff"),
        (
            change("features", hash="f" * 64) | change("reference", num_samples=9),
            "feature extractor: classifier abcdef0123456789 and classifier ffffffffffffffff; images of the reference: ",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_and_named(tmp_path, changes, listed):
    files = [write(tmp_path, "a"), write(tmp_path, "b", **changes)]
    with pytest.raises(ValueError, match="cannot be compared, since these differ: ") as error:
        report.compare_reports(files)
    assert f"differ: {listed}" in str(error.value)
    assert str(error.value).startswith(f"{files[0]}, {files[1]} cannot")
    assert "\n" not in str(error.value)


def test_bits_are_compared_whatever_the_extractor_if_nothing_else_is_in_common(tmp_path):
    bits = tuple(m for m in test_report.full_report().metrics if "bits" in m.name)
    few = tuple(dataclasses.replace(m, num_samples=100) for m in bits)
    files = [write(tmp_path, "a", **change("features", hash="f" * 64)), write(tmp_path, "b", metrics=bits)]
    assert list(rows_of(report.compare_reports(files)))[-3:] == [m.name for m in bits]
    with pytest.raises(ValueError, match="images of bits_per_dim: 500 and 100"):
        report.compare_reports([files[0], write(tmp_path, "c", metrics=few)])
    with pytest.raises(ValueError, match="have no metric in common"):
        report.compare_reports([files[0], write(tmp_path, "d", metrics=())])


def test_a_reference_is_known_by_its_images_if_every_report_names_them(tmp_path):
    named = [ReferenceInfo("train", 1500, letter * 64, "d" * 64, "as stored") for letter in "ab"]
    files = [write(tmp_path, letter, reference=of) for letter, of in zip("ab", named, strict=True)]
    assert "FD-classifier" in rows_of(report.compare_reports(files))
    cropped = dataclasses.replace(named[0], preparation="cropped")
    with pytest.raises(ValueError, match=r"reference: images dddddddddddddddd, as stored and images d{16}, cropped"):
        report.compare_reports([files[0], write(tmp_path, "c", reference=cropped)])


def test_what_was_computed_otherwise_is_told(tmp_path):
    bits = Metric("bits_per_dim", 2.5, 0.1, 500, "bits/dim", "by another ODE solver")
    changed = (bits, *test_report.full_report().metrics[4:])
    text = report.compare_reports([write(tmp_path, "a"), write(tmp_path, "b", metrics=changed)])
    assert "bits_per_dim was computed differently." in text
    assert "b.json: by another ODE solver." in text
    notes = [f"rtol 0.01, {count} network evaluations; own error is 0.{count} on average" for count in (37, 43)]
    alike = [(dataclasses.replace(bits, note=note),) for note in notes]
    files = [write(tmp_path, name, metrics=metrics) for name, metrics in zip("cd", alike, strict=True)]
    assert "computed differently" not in report.compare_reports(files)


def test_columns_are_named_by_what_their_paths_do_not_share(tmp_path):
    files = []
    for run in ("one", "two"):
        (tmp_path / run / "eval").mkdir(parents=True)
        files.append(write(tmp_path / run / "eval", "report_2"))
    assert rows_of(report.compare_reports(files))[""][:2] == ["one/eval/report_2.json", "two/eval/report_2.json"]
    assert rows_of(report.compare_reports([files[0], files[0]]))[""][:2] == ["report_2.json", "report_2.json"]


def test_files_that_are_no_reports_are_named(tmp_path):
    good, bad = write(tmp_path, "a"), tmp_path / "samplers.json"
    with pytest.raises(ValueError, match=r"1 file\(s\) to compare; expected 2 or more report_<k>.json files"):
        report.compare_reports([good])
    with pytest.raises(ValueError, match=r"there is no file nowhere.json; give report_<k>.json files"):
        report.compare_reports([good, "nowhere.json"])
    for content in ('{"results": []}', "[1]", "half a", '{"metrics": [1]}'):
        bad.write_text(content)
        with pytest.raises(ValueError, match=r"samplers.json is not a report_<k>.json of --mode eval \("):
            report.compare_reports([good, str(bad)])


def test_every_metric_of_samples_is_known_as_one():
    for name in ("frechet_distance_unbiased", "inception_score_10", "density_test", "recall"):
        assert side_by_side._is_of_samples(name)
    assert not side_by_side._is_of_samples("bits_per_dim")
    assert SamplerInfo({}, 1, 1.0, 1).rounding == ""
