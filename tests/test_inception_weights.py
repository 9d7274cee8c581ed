"""Conversion of the public weights: from PyTorch's file and TensorFlow's graphs, checked, whole or not at all."""

import dataclasses
import importlib.util
import subprocess
import sys

import inception_oracle as oracle
import legacy_writers
import numpy as np
import pytest
import tiny
from torch_states import inception_state

import run_lib
from errors import UserError
from metrics import inception
from metrics.extractors import build_extractor
from metrics.inception import convert_weights, tensorflow_name
from metrics.pretrained import param_shapes

# Three layers of the network, narrower, stand in for all of it.
SMALL = {f"{layer}/{name}": (4,) for layer in ("Conv2d_1a_3x3", "Mixed_7c/branch3x3_2b") for name in ("scale", "bias")}
SMALL |= {path.replace("scale", "mean").replace("bias", "var"): shape for path, shape in SMALL.items()}
SMALL |= {"Conv2d_1a_3x3/kernel": (3, 3, 2, 4), "Mixed_7c/branch3x3_2b/kernel": (3, 1, 5, 4)}
SMALL |= {"fc/kernel": (4, 7), "fc/bias": (7,)}


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(inception, "param_shapes", lambda model, side: SMALL)
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))
    state = inception_state(SMALL)
    return state | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros(1, np.int64)}


@pytest.fixture
def logs(monkeypatch):
    said = []
    for level in ("warning", "info"):
        monkeypatch.setattr(inception.logging, level, lambda text, *values: said.append(text % values))
    return said


@pytest.mark.parametrize("write", [legacy_writers.write_zip, legacy_writers.write_legacy])
def test_a_file_of_pytorch_is_converted(small, tmp_path, logs, write):
    write(tmp_path / "weights.pth", small)
    path, digest = convert_weights(tmp_path / "weights.pth")
    assert path == tmp_path / "cache/weights/inception_2015.npz" == inception.weights_path()
    with np.load(path) as arrays:
        assert {name: array.shape for name, array in arrays.items()} == SMALL
        kernel, dense = small["Mixed_7c.branch3x3_2b.conv.weight"], small["fc.weight"]
        np.testing.assert_array_equal(arrays["Mixed_7c/branch3x3_2b/kernel"][2, 0, 1, 3], kernel[3, 1, 2, 0])
        np.testing.assert_array_equal(arrays["fc/kernel"], dense.T)
        np.testing.assert_array_equal(arrays["Conv2d_1a_3x3/var"], small["Conv2d_1a_3x3.bn.running_var"])
    assert "weights.pth is not the published file: its SHA-256 starts with " in logs[0]
    assert logs[1] == f"wrote {path}: 12 arrays, SHA-256 of the parameters {digest}"


def test_the_published_file_brings_no_warning(small, tmp_path, logs, monkeypatch):
    legacy_writers.write_zip(tmp_path / "weights.pth", small)
    digest = inception.hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "PTH_SHA256", digest[:8])
    path, _ = run_lib.convert_weights(tmp_path / "weights.pth", tmp_path / "mine.npz")
    assert path == tmp_path / "mine.npz"
    assert [text.split(":")[0] for text in logs] == [f"wrote {tmp_path}/mine.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.bias": None}, "does not hold the weights of this network: fc/bias is missing$"),
        ({"fc.weight": np.zeros((1000, 4), "f4")}, r"fc/kernel has shape \(4, 1000\), expected \(4, 7\)"),
        ({"fc.bias": np.full(7, np.nan, "f4")}, "fc/bias is not of finite numbers"),
        ({"AuxLogits.fc.bias": np.zeros(7, "f4")}, "AuxLogits.fc.bias is unknown"),
        (dict.fromkeys(("fc.bias", "fc.weight", "Conv2d_1a_3x3.conv.weight")) | {"y": np.zeros(1)},
         "Conv2d_1a_3x3/kernel is missing; fc/bias is missing; fc/kernel is missing, and 1 more"),
    ],
)  # fmt: skip
def test_what_is_not_this_network_is_refused_and_nothing_is_overwritten(small, tmp_path, change, message):
    state = {name: array for name, array in (small | change).items() if array is not None}
    legacy_writers.write_zip(tmp_path / "weights.pth", state)
    (tmp_path / "mine.npz").write_text("before")
    with pytest.raises(ValueError, match=message):
        convert_weights(tmp_path / "weights.pth", tmp_path / "mine.npz")
    assert (tmp_path / "mine.npz").read_text() == "before"


def test_other_files_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"--checkpoint /none.pth does not exist"):
        convert_weights("/none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text.pth cannot be read as a checkpoint of PyTorch"):
        convert_weights(tmp_path / "text.pth")
    legacy_writers.write_zip(tmp_path / "list.pth", {"x": [1, 2]})
    with pytest.raises(ValueError, match=r"list.pth holds no dictionary of tensors; expected pt_inception-2015"):
        convert_weights(tmp_path / "list.pth")


def test_what_cannot_be_written_is_told(small, tmp_path):
    legacy_writers.write_zip(tmp_path / "weights.pth", small)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*/file/mine.npz: .*; choose another --output"):
        convert_weights(tmp_path / "weights.pth", tmp_path / "file" / "mine.npz")


def test_a_damaged_weights_file_is_told_with_the_commands_that_make_it_anew(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"mine.npz is damaged .*; to make it again: curl .* --output .*/mine.npz$"):
        build_extractor("inception", num_levels=256, weights=str(tmp_path / "mine.npz"))
    np.savez(tmp_path / "mine.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match=r"does not hold the weights of this network: .*; to make it again: curl"):
        build_extractor("inception", num_levels=256, weights=str(tmp_path / "mine.npz"))


def test_missing_weights_are_told_with_the_commands_that_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path))
    url = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
    command = "python main.py --mode convert_weights --checkpoint pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError) as caught:
        build_extractor("inception", num_levels=256)
    path = tmp_path / "weights/inception_2015.npz"
    assert str(caught.value) == (
        f"the weights of the Inception network are not in {path}; to get them: curl -LO {url} && {command}"
    )
    with pytest.raises(ValueError, match=f"{command} --output {tmp_path}/mine.npz$"):
        build_extractor("inception", num_levels=256, weights=str(tmp_path / "mine.npz"))


@pytest.mark.exhaustive
def test_converted_weights_make_the_extractor(tmp_path):
    shapes = param_shapes(inception.Inception(), inception.SIDE)
    legacy_writers.write_zip(tmp_path / "weights.pth", inception_state(shapes))
    path, digest = convert_weights(tmp_path / "weights.pth", tmp_path / "mine.npz")
    extractor = build_extractor("inception", num_levels=256, weights=str(path))
    assert (extractor.key, extractor.hash, extractor.num_features) == ("inception", digest, 2048)
    features, logits = dataclasses.replace(extractor, batch_size=2)(oracle.levels((2, 32, 32, 3)))
    with np.load(tiny.ROOT / "tests/golden/inception.npz") as golden:
        expected = golden["full"]
    for found, true in ((features, expected[:, :2048]), (logits, expected[:, 2048 + 1008 :])):
        np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-4 * np.std(true))


# --- TensorFlow ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Conv2d_1a_3x3/kernel", "conv/conv2d_params"),
        ("Conv2d_4a_3x3/scale", "conv_4/batchnorm/gamma"),
        ("Mixed_5b/branch1x1/bias", "mixed/conv/batchnorm/beta"),
        ("Mixed_5b/branch5x5_2/kernel", "mixed/tower/conv_1/conv2d_params"),
        ("Mixed_5d/branch3x3dbl_3/kernel", "mixed_2/tower_1/conv_2/conv2d_params"),
        ("Mixed_6a/branch3x3/kernel", "mixed_3/conv/conv2d_params"),
        ("Mixed_6a/branch3x3dbl_1/mean", "mixed_3/tower/conv/batchnorm/moving_mean"),
        ("Mixed_6e/branch7x7dbl_5/var", "mixed_7/tower_1/conv_4/batchnorm/moving_variance"),
        ("Mixed_7a/branch7x7x3_4/kernel", "mixed_8/tower_1/conv_3/conv2d_params"),
        ("Mixed_7b/branch3x3_2b/kernel", "mixed_9/tower/mixed/conv_1/conv2d_params"),
        ("Mixed_7c/branch3x3dbl_3a/kernel", "mixed_10/tower_1/mixed/conv/conv2d_params"),
        ("Mixed_7c/branch_pool/kernel", "mixed_10/tower_2/conv/conv2d_params"),
        ("fc/bias", "softmax/biases"),
    ],
)
def test_names_are_those_of_the_frozen_graph(path, name):
    """As public programs list them that read classify_image_graph_def.pb."""
    assert tensorflow_name(path) == name


def test_every_array_has_a_name_of_its_own():
    paths = param_shapes(inception.Inception(), inception.SIDE)
    assert len(paths) == 94 * 5 + 2
    assert len({tensorflow_name(path) for path in paths}) == len(paths)


WRITE_GRAPHS = """
import sys, numpy as np, tensorflow as tf
folder = sys.argv[1]
arrays = dict(np.load(folder + "/arrays.npz"))
graph = tf.Graph()
with graph.as_default():
    tf.constant(np.arange(3), name="other")
    for name, array in arrays.items():
        tf.constant(array, name=name)
open(folder + "/frozen.pb", "wb").write(graph.as_graph_def().SerializeToString())

class Module(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([], tf.float32)])
    def __call__(self, x):
        with tf.name_scope("imported"):
            return x + tf.add_n([tf.reduce_sum(tf.constant(arrays[name], name=name)) for name in arrays])

tf.saved_model.save(Module(), folder + "/saved")

with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    for i, name in enumerate(arrays):
        if i % 2:
            tf.constant(arrays[name], name=name)
        else:
            tf.compat.v1.get_variable(name, initializer=arrays[name])
    session.run(tf.compat.v1.global_variables_initializer())
    x = tf.constant(0.0, name="x")
    tf.compat.v1.saved_model.simple_save(session, folder + "/saved_by_1", {"x": x}, {"x": x})
"""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    arrays = {tensorflow_name(path): np.random.RandomState(0).random_sample(shape) for path, shape in SMALL.items()}
    np.savez(folder / "arrays.npz", **{name: array.astype(np.float32) for name, array in arrays.items()})
    run = subprocess.run([sys.executable, "-c", WRITE_GRAPHS, folder], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")
@pytest.mark.parametrize("source", ["frozen.pb", "saved", "saved_by_1"])
def test_a_graph_of_tensorflow_is_converted(small, graphs, source):
    path, _ = convert_weights(graphs / source)
    with np.load(path) as arrays, np.load(graphs / "arrays.npz") as expected:
        assert set(arrays) == set(SMALL)
        for name in arrays:
            np.testing.assert_array_equal(arrays[name], expected[tensorflow_name(name)])
    assert "tensorflow" not in sys.modules
