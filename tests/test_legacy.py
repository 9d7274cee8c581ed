"""What the 2021 programs wrote: names and shapes of parameters, there and back; files that are not to be trusted."""

import contextlib
import pickle
import struct
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import legacy_writers
import msgpack
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference import ReferenceNetwork, config_of, model_and_shape

import legacy
from legacy.msgpack_file import read_msgpack, write_msgpack
from legacy.torch_file import read_torch
from legacy.torch_names import match_torch_parameters, plain_name
from models import create_model

# Its names are counted over both kinds of resampling layer, and over images and features.
SETTINGS = {"data.image_size": 8, "model.nf": 8, "model.ch_mult": (1, 2), "model.num_res_blocks": 1}
SETTINGS |= {"model.resblock_type": "ddpm", "model.fir": True, "model.progressive": "residual"}
SETTINGS |= {"model.progressive_input": "residual", "model.attn_resolutions": (4,)}


@pytest.fixture(scope="module")
def config():
    return config_of(SETTINGS)


@pytest.fixture(scope="module")
def flat(config):
    leaves = legacy.match_parameters(*model_and_shape(config))
    return {
        leaf.original: np.arange(np.prod(leaf.original_shape), dtype=np.float32).reshape(leaf.original_shape) + i
        for i, leaf in enumerate(leaves)
    }


def test_there_and_back_is_the_identity(config, flat):
    back = legacy.params_to_score_sde(config, legacy.params_from_score_sde(config, flat))
    assert back.keys() == flat.keys()
    for path, value in flat.items():
        np.testing.assert_array_equal(back[path], value)
        assert back[path].shape == value.shape


def test_shapes_are_translated_without_values(config, flat):
    """As for the trees of full-size networks: nothing is computed, and nothing as large is held."""
    abstract = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in flat.items()}
    translate = lambda flat: legacy.params_from_score_sde(config, flat)  # noqa: E731
    ours, expected = translate(abstract), translate(flat)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), ours) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )
    assert jax.eval_shape(translate, abstract) == ours
    back = lambda params: legacy.params_to_score_sde(config, params)  # noqa: E731
    assert back(ours) == jax.eval_shape(back, ours) == abstract


def test_names_follow_the_order_of_calls(config):
    originals = {"/".join(leaf.path): leaf.original for leaf in legacy.match_parameters(*model_and_shape(config))}
    assert originals["input/kernel"] == "Conv_0/kernel"
    assert originals["down0_block0/conv2/bias"] == "ResnetBlockDDPMpp_0/Conv_1/bias"
    assert originals["down0_resample/conv/kernel"] == "Downsample_0/Conv2d_0/weight"
    assert originals["down0_pyramid/conv/kernel"] == "Downsample_1/Conv2d_0/weight"
    assert originals["down1_block0/shortcut/kernel"] == "ResnetBlockDDPMpp_1/NIN_0/W"
    assert originals["down1_attention0/norm/scale"] == "AttnBlockpp_0/GroupNorm_0/scale"
    assert originals["middle_attention/output/bias"] == "AttnBlockpp_1/NIN_3/b"
    assert originals["up1_pyramid_conv/kernel"] == "Conv_1/kernel"
    assert originals["up1_resample/conv/bias"] == "Upsample_0/Conv2d_0/bias"
    assert originals["up0_pyramid/conv/bias"] == "Upsample_1/Conv2d_0/bias"
    assert originals["output_norm/scale"] == "GroupNorm_1/scale"
    assert len(set(originals.values())) == len(originals)


def test_group_norm_of_either_rank_is_read(config, flat):
    squeezed = {path: value.reshape(-1) if "GroupNorm" in path else value for path, value in flat.items()}
    assert squeezed["GroupNorm_0/scale"].ndim == 1
    assert flat["GroupNorm_0/scale"].shape == (1, 1, 1, 16)
    ours, expected = (flatten_dict(legacy.params_from_score_sde(config, tree)) for tree in (squeezed, flat))
    for path, value in expected.items():
        np.testing.assert_array_equal(ours[path], value)


def test_tree_is_that_of_the_network(config, flat):
    model = create_model(config)
    x, labels = jnp.zeros((1, 8, 8, 1)), jnp.ones(1)
    expected = jax.eval_shape(model.init, jax.random.key(0), x, labels)["params"]
    ours = legacy.params_from_score_sde(config, flat)
    assert jax.tree.map(lambda leaf: leaf.shape, ours) == jax.tree.map(lambda leaf: leaf.shape, expected)


def test_image_width_does_not_change_names():
    network = ReferenceNetwork("ncsnpp_opt_nonsquare")
    leaves = legacy.match_parameters(*model_and_shape(network.config))
    assert {leaf.original for leaf in leaves} == set(network.gradient_norms())


def test_missing_and_unknown_parameters_are_named(config, flat):
    wrong = {path: value for path, value in flat.items() if path != "Conv_0/bias"} | {"Conv_9/bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"1 missing \(Conv_0/bias.*1 unknown \(Conv_9/bias.*check config.model"):
        legacy.params_from_score_sde(config, wrong)
    with pytest.raises(ValueError, match=r"missing .*1 unknown \(nothing"):
        legacy.params_to_score_sde(config, {"nothing": np.zeros(1)})


def test_wrong_shape_is_named(config, flat):
    with pytest.raises(ValueError, match=r"Conv_0/bias has shape \(5,\), .* has \(8,\) there; check config"):
        legacy.params_from_score_sde(config, flat | {"Conv_0/bias": np.zeros(5)})


# --- names in PyTorch ------------------------------------------------------------------------------------------------


def torch_names(settings):
    config = config_of(settings)
    leaves = legacy.match_parameters(*model_and_shape(config))
    torch_leaves = match_torch_parameters(config.model.name, *model_and_shape(config), leaves)
    return {"/".join(leaf.path): torch for leaf, torch in zip(leaves, torch_leaves, strict=True)}


def test_pytorch_counts_layers_as_its_constructor_makes_them():
    """By hand: two linear maps, the first convolution, one block a level, the pyramids; see SETTINGS."""
    names = {path: leaf.name for path, leaf in torch_names(SETTINGS).items()}
    assert names["embedding1/kernel"] == "all_modules.0.weight"
    assert names["input/bias"] == "all_modules.2.bias"
    assert names["down0_resample/conv/kernel"] == "all_modules.4.Conv2d_0.weight"
    assert names["down0_pyramid/conv/kernel"] == "all_modules.5.Conv2d_0.weight"
    assert names["down1_block0/shortcut/kernel"] == "all_modules.6.NIN_0.W"
    assert names["down1_attention0/output/bias"] == "all_modules.7.NIN_3.b"
    assert names["up1_pyramid_norm/scale"] == "all_modules.14.weight"
    assert names["up1_resample/conv/bias"] == "all_modules.16.Conv2d_0.bias"
    assert names["up0_pyramid/conv/bias"] == "all_modules.19.Conv2d_0.bias"
    assert names["output_conv/kernel"] == "all_modules.21.weight"
    assert len(set(names.values())) == len(names)


def test_pytorch_counts_layers_without_parameters():
    """Resampling alone has none; that of the output comes before the head of its level."""
    skips = {
        "model.resblock_type": "biggan",
        "model.progressive": "output_skip",
        "model.progressive_input": "input_skip",
    }
    names = {path: leaf.name for path, leaf in torch_names(SETTINGS | skips).items()}
    assert names["down0_resample/conv1/kernel"] == "all_modules.4.Conv_0.weight"
    assert names["down0_pyramid_combine/conv/kernel"] == "all_modules.6.Conv_0.weight"
    assert names["up1_pyramid_norm/scale"] == "all_modules.15.weight"
    assert names["up1_resample/conv1/kernel"] == "all_modules.17.Conv_0.weight"
    assert names["up0_block0/conv1/kernel"] == "all_modules.18.Conv_0.weight"
    assert names["up0_pyramid_norm/scale"] == "all_modules.21.weight"
    assert names["up0_pyramid_conv/bias"] == "all_modules.22.bias"


def test_pytorch_counts_the_layers_of_ddpm():
    plain = {"model.name": "ddpm", "model.nf": 32, "model.fir": False}
    plain |= {"model.progressive": "none", "model.progressive_input": "none", "model.scale_by_sigma": False}
    names = {path: leaf.name for path, leaf in torch_names(SETTINGS | plain).items()}
    assert names["embedding2/kernel"] == "all_modules.1.weight"
    assert names["down0_block0/embedding/bias"] == "all_modules.3.Dense_0.bias"
    assert names["down0_resample/conv/kernel"] == "all_modules.4.Conv_0.weight"
    assert names["down1_attention0/norm/scale"] == "all_modules.6.GroupNorm_0.weight"
    assert names["middle_block1/conv2/kernel"] == "all_modules.9.Conv_1.weight"
    assert names["up1_resample/conv/bias"] == "all_modules.13.Conv_0.bias"
    assert names["up0_block1/shortcut/kernel"] == "all_modules.15.NIN_0.W"
    assert names["output_norm/scale"] == "all_modules.16.weight"
    assert names["output_conv/kernel"] == "all_modules.17.weight"


def test_names_of_other_versions_and_wrappers_are_understood():
    assert plain_name("module.all_modules.6.Conv.weight") == "all_modules.6.Conv_0.weight"
    assert plain_name("all_modules.6.Conv_0.weight") == "all_modules.6.Conv_0.weight"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.name": "ncsnv2_64", "model.normalization": "InstanceNorm++"}, "'ncsnv2_64' is not supported for PyT"),
        ({"model.name": "ddpm", "model.nf": 32, "model.conditional": False}, "set model.conditional=True"),
        ({"model.name": "ddpm", "model.normalization": "InstanceNorm"}, "only with model.normalization='GroupNorm'"),
    ],
)
def test_networks_that_pytorch_computes_otherwise_are_refused(settings, message):
    config = config_of(SETTINGS | settings)
    with pytest.raises(ValueError, match=message):
        match_torch_parameters(config.model.name, *model_and_shape(config), [])


# --- files that are not to be trusted --------------------------------------------------------------------------------


def array(shape, dtype, content):
    return msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))})


GOOD = legacy_writers.pack({"x": np.arange(6, dtype=np.float32).reshape(2, 3)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], "No more data to unpack"),
        (GOOD + b"x", "unpack"),
        (b"no checkpoint", "unpack"),
        (b"", "No more data to unpack"),
        (msgpack.packb([1, 2]), "does not hold a map"),
        (msgpack.packb({1: 2}), "expected str instance, int found"),
        (msgpack.packb({b"a": 2}), "expected str instance, bytes found"),
        (b"\x81\xa1x" * 5000, "StackError"),
        (array((2**40, 2**40), "float32", b"1234"), "cannot reshape array of size 1"),
        (array((1,), "object", b"12345678"), "cannot create an OBJECT array"),
        (array((1,), "float32", 1234), "a bytes-like object is required"),
        (msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb([1]))}), "not enough values"),
        (msgpack.packb({"x": {"__msgpack_chunked_array__": True, "shape": {"0": 2}}}), "chunks"),
    ],
)
def test_a_damaged_msgpack_file_is_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"file is damaged or no msgpack file of Flax: .*{message}"):
        read_msgpack(tmp_path / "file")


def test_arrays_in_chunks_are_joined(tmp_path):
    values = np.arange(6, dtype=np.float32)
    numbered = lambda items: {str(i): item for i, item in enumerate(items)}  # noqa: E731
    chunks = {"shape": numbered([2, 3]), "chunks": numbered([values[:4], values[4:]])}
    (tmp_path / "file").write_bytes(legacy_writers.pack({"x": {"__msgpack_chunked_array__": True} | chunks}))
    np.testing.assert_array_equal(read_msgpack(tmp_path / "file")["x"], values.reshape(2, 3))


def test_msgpack_is_written_as_it_was_read(tmp_path):
    (tmp_path / "file").write_bytes(GOOD)
    write_msgpack(tmp_path / "copy", read_msgpack(tmp_path / "file"))
    assert (tmp_path / "copy").read_bytes() == GOOD


WRITERS = [legacy_writers.write_zip, legacy_writers.write_legacy]


@pytest.mark.parametrize("write", WRITERS)
def test_tensors_are_read_without_pytorch(tmp_path, write):
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [np.float64(2) * np.ones(2), 7, "text", None]}
    write(tmp_path / "file", state)
    read = read_torch(tmp_path / "file")
    np.testing.assert_array_equal(read["a"], state["a"])
    np.testing.assert_array_equal(read["b"][0], state["b"][0])
    assert (read["a"].dtype, read["b"][1:]) == (np.float32, [7, "text", None])


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("module", "name"), [("os", "system"), ("builtins", "eval"), ("numpy", "load")])
def test_code_in_a_pickle_is_not_run(tmp_path, write, module, name):
    function = legacy_writers.Global(module, name)
    write(tmp_path / "file.pth", {"model": legacy_writers.Call(function, f"touch {tmp_path}/executed")})
    with pytest.raises(ValueError, match=rf"file.pth cannot be read .* asks for {module}.{name}, .* it was not run"):
        read_torch(tmp_path / "file.pth")
    assert not (tmp_path / "executed").exists()


STORAGE = legacy_writers.Storage("FloatStorage", "0", 4)


@pytest.mark.parametrize(
    ("size", "stride", "offset", "message"),
    [
        ((5,), (1,), 0, "larger than its values"),
        ((2, 2), (3, 1), 0, "larger than its values"),
        ((4,), (1,), 1, "larger than its values"),
        ((2**30, 2**30), (0, 0), 0, "larger than its values"),
        ((2,), (-1,), 3, "are not counts"),
        ((2,), (1,), -2, "are not counts"),
        ((2,), (1, 1), 0, "has no shape"),
        ((2,), (1.5,), 0, "are not counts"),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_values(tmp_path, size, stride, offset, message):
    rebuild = legacy_writers.Global("torch._utils", "_rebuild_tensor_v2")
    state = {"first": np.zeros(4, np.float32), "x": legacy_writers.Call(rebuild, STORAGE, offset, size, stride)}
    legacy_writers.write_zip(tmp_path / "file", state)
    with pytest.raises(ValueError, match=message):
        read_torch(tmp_path / "file")


@pytest.mark.parametrize("size", [5, 2**60, -1, "4"])
def test_declared_sizes_are_not_believed(tmp_path, size):
    rebuild = legacy_writers.Global("torch._utils", "_rebuild_tensor_v2")
    for write, view in zip(WRITERS, [(), (None,)], strict=True):
        storage = STORAGE._replace(size=size, view=view, key="7")
        write(tmp_path / "file", {"x": legacy_writers.Call(rebuild, storage, 0, (1,), (1,))})
        with pytest.raises(ValueError, match="file cannot be read as a checkpoint of PyTorch"):
            read_torch(tmp_path / "file")


@pytest.mark.parametrize("write", WRITERS)
def test_a_truncated_pytorch_file_is_refused(tmp_path, write):
    write(tmp_path / "file", {"x": np.arange(400, dtype=np.float32)})
    content = (tmp_path / "file").read_bytes()
    for length in (4, 30, 200, len(content) // 2, len(content) - 1):
        (tmp_path / "file").write_bytes(content[:length])
        with pytest.raises(ValueError, match="file cannot be read as a checkpoint of PyTorch"):
            read_torch(tmp_path / "file")


def test_a_compressed_archive_is_refused(tmp_path):
    content, _ = legacy_writers.dump({"x": np.zeros(4, np.float32)})
    for name, compression in (("data.pkl", zipfile.ZIP_DEFLATED), ("data/0", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / "file", "w") as archive:
            for member, data in (("data.pkl", content), ("data/0", bytes(16))):
                kind = compression if member == name else zipfile.ZIP_STORED
                archive.writestr(f"archive/{member}", data, compress_type=kind)
        with pytest.raises(ValueError, match=r"pickle is compressed|the size of archive/data/0 is not what"):
            read_torch(tmp_path / "file")


def test_a_pickle_cannot_ask_for_memory(tmp_path):
    """Python's own reader in C makes a memo as long as the largest index, and a byte array as large as it is told."""
    for instruction in (b"r" + struct.pack("<I", 2**24), b"\x96" + struct.pack("<q", 2**28)):
        content = b"\x80\x02}" + instruction + b"."
        with zipfile.ZipFile(tmp_path / "file", "w") as archive:
            archive.writestr("archive/data.pkl", content)
        tracemalloc.start()
        with contextlib.suppress(ValueError):
            read_torch(tmp_path / "file")
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_a_plain_pickle_is_no_checkpoint(tmp_path):
    (tmp_path / "file").write_bytes(pickle.dumps({"x": 1}, protocol=2) * 3)
    with pytest.raises(ValueError, match="file cannot be read as a checkpoint of PyTorch: it is not a file"):
        read_torch(tmp_path / "file")
