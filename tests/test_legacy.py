"""Translation of the 2021 code's parameters: names, shapes, there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference import ReferenceNetwork, config_of

import legacy
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
    leaves = legacy.match_parameters(config)
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


def test_names_follow_the_order_of_calls(config):
    originals = {"/".join(leaf.path): leaf.original for leaf in legacy.match_parameters(config)}
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
    assert {leaf.original for leaf in legacy.match_parameters(network.config)} == set(network.gradient_norms())


def test_missing_and_unknown_parameters_are_named(config, flat):
    wrong = {path: value for path, value in flat.items() if path != "Conv_0/bias"} | {"Conv_9/bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"1 missing \(Conv_0/bias.*1 unknown \(Conv_9/bias.*check config.model"):
        legacy.params_from_score_sde(config, wrong)
    with pytest.raises(ValueError, match=r"missing .*1 unknown \(nothing"):
        legacy.params_to_score_sde(config, {"nothing": np.zeros(1)})


def test_wrong_shape_is_named(config, flat):
    with pytest.raises(ValueError, match=r"Conv_0/bias has shape \(5,\), .* has \(8,\) there; check config"):
        legacy.params_from_score_sde(config, flat | {"Conv_0/bias": np.zeros(5)})
