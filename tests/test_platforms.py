"""What a training step is on a GPU and a TPU: plain XLA. None is here; JAX lowers programs for them all the same."""

import jax
import numpy as np
import pytest
import tiny
from cases import by_default
from test_precision import equations

from experiment import programs
from experiment.build import build_experiment, map_train_steps
from models import cpu
from parallel import distributed

DIGITS = {"model__num_res_blocks": 1, "model__dropout": 0.1}
NCSNPP = DIGITS | {
    "model__attn_resolutions": (4,),
    "model__ch_mult": (1, 2),
    "model__fir": True,
    "model__progressive": "output_skip",
    "model__progressive_input": "residual",
}


def count(platforms, **settings):
    """(optimization barriers, blocks that are computed again) of a training step that is traced for these platforms."""
    config = tiny.make_config(**settings)
    experiment = build_experiment(config)
    shapes = programs.on_devices((experiment.state_shapes, experiment.batch_shapes))
    with cpu.for_platform(platforms[0]):
        traced = jax.jit(map_train_steps(experiment)).trace(experiment.keys["train"], *shapes)
        texts = [traced.lower(lowering_platforms=(platform,)).as_text() for platform in platforms]
    remats = [each for each in equations(traced.jaxpr.jaxpr) if each.primitive.name.startswith(("remat", "checkpoint"))]
    return sum(text.count("optimization_barrier") for text in texts), len(remats)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    by_default([NCSNPP], [DIGITS, NCSNPP, DIGITS | {"model__dtype": "bfloat16"}]),
    ids=["digits", "ncsnpp", "bfloat16"],
)
def test_accelerators_get_plain_xla(settings):
    assert count(("cuda", "tpu"), **settings) == (0, 0)


@pytest.mark.slow
def test_only_a_cpu_and_remat_compute_again():
    barriers, remats = count(("cpu",), **DIGITS)
    assert barriers > 20
    assert remats > 0
    barriers, remats = count(("cuda",), **DIGITS, model__remat=True)
    assert 0 < barriers == remats  # JAX's own, one for each block


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_plain_program_computes_what_the_tuned_one_does():
    """Two steps, dropout and all, both run here; up to the order of sums."""
    experiment, results = build_experiment(tiny.make_config(**DIGITS)), []
    levels = np.random.default_rng(0).integers(0, 17, (2, 16, 8, 8, 1), np.uint8)
    for platform in ("cpu", "cuda"):
        arguments = distributed.replicate(experiment.init_state()), distributed.shard(levels, 1)
        with cpu.for_platform(platform):
            state, metrics = map_train_steps(experiment)(experiment.keys["train"], *arguments)
        results.append(jax.device_get((metrics, state.params_ema)))
    (tuned, tuned_params), (plain, plain_params) = results
    assert tuned["loss"][0, 0] != tuned["loss"][0, 1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), tuned, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tuned_params, plain_params)
