"""Gradient accumulation against the full batch, on one device and on four; and that the state is updated in place."""

import dataclasses
import functools
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

import datasets
import losses
from classifier.experiment import Normalization, build_classifier_experiment, classifier_config
from experiment.build import build_experiment, map_train_steps
from models.layers import Dropout, LabelEmbedding
from parallel import distributed
from training import loop as train_loop

STEPS_PER_CALL, CALLS, IMAGES = 2, 2, 16
# Everything that draws for each example: flips, dequantization, times, noise, dropout, labels left out.
RANDOM = {
    "model.num_res_blocks": 1,
    "model.dropout": 0.3,
    "model.init_scale": 1.0,
    "model.num_classes": 10,
    "training.label_dropout": 0.4,
    "training.likelihood_weighting": True,
    "training.importance_sampling": True,
    "data.random_flip": True,
    "data.uniform_dequantization": True,
    "optim.lr": 1e-2,
    "optim.warmup": 0,
    # Adam divides by the size of the gradient: of what is rounding alone, such as the gradient of a bias that has no
    # effect, it would make steps as large as any.
    "optim.eps": 1e-3,
    "training.batch_size": IMAGES,
    "training.n_jitted_steps": STEPS_PER_CALL,
}


def make_config(**changes):
    return tiny.make_config(**{name.replace(".", "__"): value for name, value in RANDOM.items()} | changes)


def batches():
    """Digits of every call, [steps, images, ...], and their labels."""
    source = datasets.build_source(tiny.make_config(), "train")
    for call in range(CALLS):
        indices = np.arange(STEPS_PER_CALL * IMAGES) + 100 * call
        levels = source.images(indices).reshape(STEPS_PER_CALL, IMAGES, 8, 8, 1)
        yield levels, source.labels(indices).reshape(STEPS_PER_CALL, IMAGES)


def place(batch):
    return tuple(distributed.shard(part, axis=1) for part in batch)


class Program:
    """Compiled training steps and the state that they start from, on the host."""

    def __init__(self, experiment):
        self.key, self.first_state = experiment.keys["train"], jax.device_get(experiment.init_state())
        steps = map_train_steps(experiment)
        self.run = steps.lower(self.key, distributed.replicate(self.first_state), place(next(batches()))).compile()

    @property
    def temporary_bytes(self):
        return self.run.memory_analysis().temp_size_in_bytes

    def train(self):
        """Returns the state after a few steps and the losses of all of them."""
        state, losses = distributed.replicate(self.first_state), []
        for batch in batches():
            state, metrics = self.run(self.key, state, place(batch))
            losses.extend(np.asarray(metrics["loss"])[0].tolist())
        return distributed.unreplicate(state), losses


class Small(nn.Module):
    """Draws for each example what a score network does, and compiles in a second."""

    @nn.compact
    def __call__(self, x, labels, train, class_labels=None):
        known = LabelEmbedding(10, 16)(class_labels, len(x)) + nn.Dense(16)(labels[:, None] / 1000)
        h = Dropout(0.3)(nn.silu(nn.Conv(16, (3, 3))(x) + known[:, None, None]), train)
        return nn.Conv(1, (3, 3))(h)


@functools.cache
def program(microbatches=1, remat=False, network=None):
    experiment = build_experiment(make_config(training__microbatches=microbatches, model__remat=remat))
    if network is not None:
        loss = losses.build_loss(experiment.config, experiment.sde, network)
        experiment = dataclasses.replace(experiment, model=network, loss_fn=loss)
    return Program(experiment)


@functools.cache
def of_full_batch(network=None):
    return program(network=network).train()


def assert_equal(found, expected):
    (state, losses), (full_state, full_losses) = found, expected
    np.testing.assert_allclose(losses, full_losses, rtol=2e-6)
    # 16 images in another order of summation: a few units in the last place, and four steps of them.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
    jax.tree.map(close, jax.tree.leaves(state), jax.tree.leaves(full_state))


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [1, 4])
def test_parts_of_devices_batches_are_those_of_the_global_batch(num_parts):
    """Three devices, `num_parts` parts of each, two examples in a part: together 0, 1, 2, ... in order."""

    def indices(_):
        def of_part(part):
            with distributed.part_of_batch(part, num_parts):
                return distributed.example_index(2)

        return jax.lax.map(of_part, jax.numpy.arange(num_parts))

    found = jax.vmap(indices, axis_name=distributed.AXIS)(np.zeros(3))
    np.testing.assert_array_equal(found.reshape(-1), np.arange(3 * num_parts * 2))
    np.testing.assert_array_equal(distributed.example_index(3), np.arange(3))  # what is traced later is whole again


def check_equal_to_full_batch(trained, network=None):
    state, _ = trained
    assert_equal(trained, of_full_batch(network))
    leaves = (jax.tree.leaves(each.params) for each in (state, program(network=network).first_state))
    moved = [np.abs(last - first).max() for last, first in zip(*leaves, strict=True)]
    assert np.median(moved) > 1e-2  # a thousand times the tolerance


@pytest.mark.parametrize("microbatches", [4, 16])
def test_microbatches_train_as_the_full_batch(microbatches):
    check_equal_to_full_batch(program(microbatches, network=Small()).train(), Small())


@pytest.mark.exhaustive
@pytest.mark.parametrize(("microbatches", "remat"), [(4, False), (16, False), (4, True)])
def test_microbatches_of_a_score_network_train_as_the_full_batch(microbatches, remat):
    check_equal_to_full_batch(program(microbatches, remat).train())
    assert program(microbatches, remat).temporary_bytes < program().temporary_bytes / 2


ON_DEVICES = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np
import test_microbatches as t
state, losses = t.program(microbatches=2).train()
t.check_in_place(t.program(microbatches=2), 4)
np.savez(sys.argv[1], *jax.tree.leaves(state), losses=losses)
"""


@pytest.mark.exhaustive
def test_microbatches_on_four_devices_train_as_the_full_batch_on_one(tmp_path):
    run = tiny.run([sys.executable, "-c", ON_DEVICES, tmp_path / "state.npz"], devices=4)
    assert run.returncode == 0, run.stderr[-2000:]
    state, losses = of_full_batch()
    with np.load(tmp_path / "state.npz") as stored:
        leaves = [stored[f"arr_{i}"] for i in range(len(jax.tree.leaves(state)))]
        assert_equal((leaves, stored["losses"]), (state, losses))


@pytest.mark.exhaustive
def test_the_classifier_trains_in_microbatches(monkeypatch):
    """In those of its own group of settings."""
    asked, accumulate = [], losses.accumulate
    monkeypatch.setattr(losses, "accumulate", lambda *args: asked.append(args[1]) or accumulate(*args))

    def program(microbatches):
        changes = {"model__num_classes": 0, "classifier__blocks_per_group": 1, "classifier__channel_multiplier": 1}
        config = make_config(**changes, classifier__microbatches=microbatches, classifier__lr=1e-2)
        experiment = build_classifier_experiment(classifier_config(config, 10), Normalization((0.3,), (0.4,)))
        return Program(experiment)

    assert_equal(program(4).train(), program(1).train())
    assert set(asked) == {1, 4}


@pytest.mark.parametrize(
    ("group", "changes", "devices", "message"),
    [
        ("training", {"microbatches": 3}, 1, r"training.microbatches=3 does not divide the 16 images .*: 2 or 4"),
        ("training", {"microbatches": 16}, 4, r"does not divide the 4 images of a batch on each device; .* does: 4$"),
        ("training", {"microbatches": 0}, 1, r"training.microbatches=0 .* does: 1$"),
        ("classifier", {"microbatches": 5}, 2, r"classifier.microbatches=5 does not divide the 8 images .*: 4 or 8"),
    ],
)
def test_microbatches_that_do_not_divide_are_refused(monkeypatch, group, changes, devices, message):
    monkeypatch.setattr(distributed, "device_count", lambda: devices)
    config = tiny.make_config(**{f"{group}__{name}": value for name, value in changes.items()})
    with pytest.raises(ValueError, match=message):
        train_loop.check_schedule(group, config[group])


# --- in place --------------------------------------------------------------------------------------------------------


def addresses(state):
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]


def check_in_place(program, devices):
    """Every buffer of the state is reused, and so the compiled program says; the old state is gone."""
    state, batch = distributed.replicate(program.first_state), place(next(batches()))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert len(addresses(state)) == devices * len(jax.tree.leaves(state))
    assert program.run.memory_analysis().alias_size_in_bytes == held // devices
    # The first call gets what was copied from numpy, which on a CPU may be numpy's own memory, and not for XLA to use.
    state, _ = program.run(program.key, state, batch)
    before, old = addresses(state), state
    state, _ = program.run(program.key, state, batch)
    assert addresses(state) == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


@pytest.mark.slow
def test_the_state_is_updated_in_place():
    check_in_place(program(), 1)
