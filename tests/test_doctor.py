"""--mode doctor: each kind of line, that what is broken is found, and that it takes seconds."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tfds_files
import tiny

import checks
import main
import run_lib
from metrics import efficientnet, inception
from modes.doctor import doctor, inventory, self_test
from modes.doctor.inventory import BROKEN, MISSING, OK, WARNING, Finding
from parallel import distributed

SECONDS = 60  # a bound for a busy machine; cold and by itself it takes 12
NO_TEST = {}  # in the place of the checks, where only the inventory counts


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "hub"))


def found(findings, name):
    return next(each for each in findings if each.name == name)


def states(findings):
    return {each.name: each.state for each in findings}


# --- the whole mode --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_doctor_finds_this_machine_in_order_within_seconds(capsys):
    start = time.monotonic()
    assert run_lib.doctor()
    assert time.monotonic() - start < SECONDS
    output = capsys.readouterr().out
    for text in (
        "\npackages\n  ok       Python",
        "\ndevices\n  ok       cpu",
        "\nself-test\n  ok       sampler of the ODE",
    ):
        assert text in output
    assert " missing: not there; fine, unless you need it" in output
    assert BROKEN not in output


def test_only_what_is_broken_fails(monkeypatch, capsys):
    monkeypatch.setattr(self_test, "CHECKS", NO_TEST)
    assert run_lib.doctor(tiny.make_config())
    assert "data.dataset=digits  inside scikit-learn" in capsys.readouterr().out
    assert not run_lib.doctor(tiny.make_config(sampling__predictor="eulr"))
    output = capsys.readouterr().out
    assert "BROKEN   settings             sampling.predictor='eulr' is unknown" in output
    assert "  1 BROKEN: fix this first" in output
    monkeypatch.setattr(self_test, "CHECKS", {"sums": lambda: self_test.Outcome(False, "2 + 2 = 5")})
    assert not run_lib.doctor()
    assert "BROKEN   sums                 2 + 2 = 5" in capsys.readouterr().out


def test_the_mode_needs_no_configuration():
    mode = main.MODES["doctor"]
    assert (mode.config, mode.workdir, mode.flags) == ("optional", "none", ())


def test_lines_have_columns_and_remedies_stay_whole():
    remedy = "command " * 30
    findings = [
        Finding("a", "x", OK, "word " * 30),
        Finding("a", "y", MISSING, "gone", remedy),
        Finding("b", "z", OK, ""),
    ]
    lines = list(doctor.lines(findings))
    assert lines[0] == "\na"
    assert lines[1].startswith("  ok       x                    word")
    assert all(len(line) <= 120 for line in lines[:3])
    assert f"{' ' * 32}-> {remedy}" in lines
    assert lines[-2:] == ["\nb", "  ok       z                    "]


# --- what there is ---------------------------------------------------------------------------------------------------


def test_packages_are_compared_with_the_requirements(monkeypatch):
    versions = {"tensorflow": "", "tf-keras": "", "jax": "0.9.0"}
    original = inventory.version_of
    monkeypatch.setattr(inventory, "version_of", lambda name: versions.get(name, original(name)))
    findings = list(inventory.find_packages())
    jax, tensorflow = found(findings, "jax"), found(findings, "TensorFlow")
    assert (jax.state, jax.text) == (WARNING, "0.9.0 is installed; tested with <0.13,>=0.10.2")
    assert tensorflow.state == MISSING
    assert "not installed: tensorflow, tf-keras" in tensorflow.text
    assert tensorflow.remedy == "python -m pip install -r requirements.txt"
    versions["optax"] = ""
    core = found(inventory.find_packages(), "core")
    assert (core.state, core.remedy) == (BROKEN, "python -m pip install -r requirements-core.txt")


def test_a_python_that_is_not_supported_is_a_warning(monkeypatch):
    monkeypatch.setattr(inventory.platform, "python_version", lambda: "3.15.1")
    python = found(inventory.find_packages(), "Python")
    assert (python.state, python.text) == (WARNING, "3.15.1; tested with >=3.11,<3.15")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_requirements_name_tensorflow_where_it_has_a_wheel(monkeypatch, version):
    monkeypatch.setattr(inventory.platform, "python_version_tuple", lambda: (*version.split("."), "0"))
    assert found(inventory.find_packages(), "core").state == OK
    tensorflow = found(inventory.find_packages(), "TensorFlow")
    expected = version in checks.PYTHONS_OF_TENSORFLOW
    assert ("not available for Python 3.14" in tensorflow.text) == (not expected)
    if not expected:
        assert (tensorflow.state, tensorflow.remedy.split()[2]) == (MISSING, "python3.13")
    marks = [each.marker.evaluate({"python_version": version}) for each in inventory.requirements("requirements.txt")]
    assert marks == [expected] * len(marks)


def test_a_gpu_that_is_not_used_is_told(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    gpu = found(inventory.find_devices(), "gpu")
    assert (gpu.state, gpu.remedy) == (WARNING, 'python -m pip install --upgrade "jax[cuda12]"')


def test_processes_of_a_scheduler_are_told(monkeypatch):
    assert (
        found(inventory.find_devices(), "processes").text == "only this one; neither SLURM nor Open MPI started others"
    )
    of_hosts = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    for name, value in of_hosts.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "80")
    text = found(inventory.find_devices(), "processes").text
    assert text == "process 3 of 4, with process 0 at 127.0.0.1:80 (by Open MPI)"
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    assert found(inventory.find_devices(), "processes").state == WARNING


def test_a_folder_that_cannot_be_written_is_broken(monkeypatch, tmp_path):
    assert found(inventory.find_folders(), "cache").state == OK
    assert "(not created yet)" in found(inventory.find_folders(), "cache").text
    monkeypatch.setattr(inventory, "LITTLE_DISK", 2**60)
    assert found(inventory.find_folders(), "cache").state == WARNING
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "file" / "cache"))
    cache = found(inventory.find_folders(), "cache")
    assert (cache.state, cache.remedy) == (BROKEN, "export SCORE_SDE_CACHE=FOLDER, on another disk")


def test_weights_are_looked_for_where_the_extractors_do(monkeypatch, tmp_path):
    monkeypatch.setattr(efficientnet, "is_installed", lambda: False)
    findings = list(inventory.find_weights())
    assert states(findings) == {"inception": MISSING, "efficientnet_lite0": MISSING, "tfgan": MISSING, "classifier": OK}
    assert found(findings, "inception").remedy == inception.how_to_get_weights(inception.weights_path())
    assert found(findings, "efficientnet_lite0").remedy == efficientnet.HOW_TO_INSTALL
    assert "?tf-hub-format=compressed' | tar -xz" in found(findings, "tfgan").remedy
    inception.weights_path().parent.mkdir(parents=True)
    inception.weights_path().write_bytes(b"no zip")
    assert found(inventory.find_weights(), "inception").state == BROKEN
    np.savez(inception.weights_path(), x=np.zeros(3))
    model = Path(found(findings, "tfgan").text.split("; ")[1].split(" is not")[0])
    assert model.parent == tmp_path / "hub"
    assert model.name == "c4be6b55dc0338e82546082d22184ebdc77d76cf"  # what TensorFlow Hub 0.16.1 calls it
    model.mkdir(parents=True)
    (model / "saved_model.pb").touch()
    monkeypatch.setattr(efficientnet, "is_installed", lambda: True)
    assert set(states(inventory.find_weights()).values()) == {OK}


def test_statistics_are_listed(tmp_path):
    missing = found(inventory.find_statistics(), "reference")
    assert (missing.state, missing.remedy) == (MISSING, "python main.py --config CONFIG --mode stats")
    folder = tmp_path / "cache" / "stats"
    folder.mkdir(parents=True)
    for i in range(8):
        (folder / f"s{i}.npz").touch()
    assert found(inventory.find_statistics(), "reference").text.endswith(
        "s0.npz, s1.npz, s2.npz, s3.npz, s4.npz, s5.npz and 2 more"
    )


def write_own(root):
    records = [{"image": np.zeros((4, 4, 3), np.uint8), "label": 0}]
    features = {"image": tfds_files.image((4, 4, 3)), "label": tfds_files.label()}
    tfds_files.write(root, "tiny_own", features, {"train": records, "test": records})


def test_data_sets_are_listed(tmp_path, monkeypatch):
    findings = list(inventory.find_data())
    assert states(findings) == {"digits": OK, "TFDS": MISSING, "decoded images": OK}
    assert found(findings, "TFDS").remedy.endswith("cifar10_ddpmpp_continuous.py --mode prepare")
    assert Path(inventory.ROOT, inventory.ANY_CONFIG).exists()
    write_own(tmp_path / "tfds")
    run_lib.prepare(own_config())
    findings = list(inventory.find_data())
    assert found(findings, "TFDS").text == f"{tmp_path / 'tfds'}: tiny_own/1.0.0"
    assert "1 x 4 x 4 x 3, 1 x 4 x 4 x 3" in found(findings, "decoded images").text
    monkeypatch.setattr(inventory.datasets, "load_digits", lambda split: Path("/dev/null/x").read_bytes())
    assert found(inventory.find_data(), "digits").state == BROKEN


def own_config(**changes):
    settings = {"dataset": "tfds:tiny_own", "image_size": 4, "num_channels": 3, "num_levels": 256} | changes
    return tiny.make_config(**{f"data__{name}": value for name, value in settings.items()})


@pytest.mark.parametrize(
    ("changes", "state", "text", "remedy"),
    [
        ({}, OK, "prepared in", ""),
        ({"dataset": "MNIST"}, MISSING, "mnist is not prepared in", "python main.py --config CONFIG --mode prepare"),
        ({"dataset": "tfds:nonesuch"}, BROKEN, "has no data set 'nonesuch'", ""),
        ({"dataset": "digitz"}, BROKEN, "data.dataset='digitz' is unknown", ""),
        ({"dataset": "LSUN", "category": "x"}, BROKEN, "data.category='x' is no scene of LSUN", ""),
        ({"dataset": "folder"}, MISSING, "no path is configured", "--config.data.path=DIR"),
        ({"dataset": "folder", "path": "/dev/null"}, OK, "/dev/null is there", ""),
        ({"dataset": "FFHQ"}, MISSING, "no path is configured", "--config.data.tfrecords_path=FILE"),
        ({"dataset": "FFHQ", "tfrecords_path": "/x.tfr"}, MISSING, "'/x.tfr' is not there", "--config.data.tfrecords_"),
    ],
)
def test_the_configured_data_set_is_looked_for(tmp_path, changes, state, text, remedy):
    write_own(tmp_path / "tfds")
    config = own_config(**changes)
    finding = found(inventory.find_configured(config), f"data.dataset={config.data.dataset}")
    assert finding.state == state
    assert text in finding.text
    assert finding.remedy.startswith(remedy)
    assert bool(finding.remedy) == bool(remedy)


@pytest.mark.parametrize(
    ("changes", "state", "text", "remedy"),
    [
        ({"extractor": "classifier"}, OK, "classifier measures samples", ""),
        ({"extractor": "inception"}, MISSING, "inception_2015.npz is not there", "curl -LO https://"),
        ({"extractor": "inception", "weights": "/x.npz"}, MISSING, "/x.npz is not there", "curl -LO https://"),
        ({"extractor": "efficientnet_lite0"}, MISSING, "not installed", efficientnet.HOW_TO_INSTALL),
        ({"extractor": "incept"}, BROKEN, "eval.extractor='incept' is unknown", ""),
    ],
)
def test_what_measures_samples_is_looked_for(monkeypatch, changes, state, text, remedy):
    monkeypatch.setattr(efficientnet, "is_installed", lambda: False)
    config = own_config()
    config.eval.update(changes)
    finding = inventory._find_extractor(config)
    assert finding.state == state
    assert text in finding.text
    assert finding.remedy.startswith(remedy)
    assert bool(finding.remedy) == bool(remedy)


def test_the_reference_is_looked_for(tmp_path):
    config = own_config()
    assert inventory._find_reference(config).text == "samples are compared with the training images"
    config.eval.reference = str(tmp_path / "stats.npz")
    finding = inventory._find_reference(config)
    assert finding.state == MISSING
    assert finding.remedy == f"python main.py --config CONFIG --mode stats --output {config.eval.reference}"
    (tmp_path / "stats.npz").touch()
    assert inventory._find_reference(config).state == OK


# --- the self-test ---------------------------------------------------------------------------------------------------


def break_sampler(monkeypatch):
    build = self_test.build_sampler

    def scaled(*arguments):
        sampler = build(*arguments)
        return lambda *given: (1.05 * sampler(*given)[0], 0)

    monkeypatch.setattr(self_test, "build_sampler", scaled)


def break_likelihood(monkeypatch):
    build = self_test.build_likelihood

    def shifted(*arguments):
        likelihood = build(*arguments)

        def measure(*given):
            result = likelihood(*given)
            return result.replace(nats=result.nats + 2e-3)

        return measure

    monkeypatch.setattr(self_test, "build_likelihood", shifted)


def break_checkpoint(monkeypatch):
    store = self_test._store_and_restore

    def damage(state, experiment):
        restored = store(state, experiment)
        return restored.replace(params=self_test.jax.tree.map(lambda leaf: leaf + np.float32(1e-6), restored.params))

    monkeypatch.setattr(self_test, "_store_and_restore", damage)


def break_devices(monkeypatch):
    monkeypatch.setattr(distributed, "mean", lambda tree: 2 * tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "break_it", "says"),
    [
        ("sampler of the ODE", break_sampler, "expected 0.3, 0.25"),
        ("likelihood", break_likelihood, "log p off by at most 0.002 nats; expected less than 0.001"),
        ("training", break_checkpoint, "resumed from a checkpoint DIFFERS FROM unbroken"),
        ("devices", break_devices, "mean over 1 device(s) 2, expected 1"),
    ],
)
def test_what_is_wrong_is_found(monkeypatch, name, break_it, says):
    break_it(monkeypatch)
    outcome = self_test.run_check(name)
    assert not outcome.passed
    assert says in outcome.text


def test_what_a_check_raises_is_what_it_found(monkeypatch):
    def fail():
        raise RuntimeError("no such kernel\nand many lines more")

    monkeypatch.setitem(self_test.CHECKS, "broken", fail)
    outcome = self_test.run_check("broken")
    assert not outcome.passed
    assert outcome.text.startswith("RuntimeError: no such kernel (")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data__dataset": "folder", "data__path": "gs://b/x"}, "data.path=gs://b/x: expected a path of this machine"),
        ({"eval__reference": "s3://b/x.npz"}, "eval.reference=s3://b/x.npz: expected a path of this machine"),
        ({"data__dataset": "LSUN", "data__category": "nowhere"}, "nowhere"),
    ],
)
def test_a_configured_path_or_scene_that_cannot_be_is_a_finding(monkeypatch, capsys, changes, text):
    monkeypatch.setattr(self_test, "CHECKS", NO_TEST)
    assert not run_lib.doctor(tiny.make_config(**changes))
    assert text in capsys.readouterr().out
