"""Steps whose loss or gradient is not finite: noticed, explained, skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoints import assert_equal, make_state, open_checkpoints

import losses
from configs.vp import digits_ddpmpp_continuous
from experiment.build import build_experiment
from parallel import distributed
from solvers import noise_levels
from training import divergence
from training import loop as train_loop
from training.divergence import LossWatch, NotFiniteError
from training.trainer import ScoreTrainer
from workdir.folder import Presence

OPTIMIZER = losses.make_optimizer(lr=1e-2, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=3, grad_clip=1.0)


def poisoned_loss(key, params, x, *, train, class_labels=None):
    """Squared distance to the parameters, with noise; not a number, or of infinite gradient, where images say so."""
    mean = params["mean"]
    values = jnp.square((mean + jax.random.normal(key, mean.shape))[None] - x).mean(axis=(1, 2, 3))
    steep = (mean - jax.lax.stop_gradient(mean)).sum()  # 0, of gradient 1
    marker = x[:, 0, 0, 0]
    return values + jnp.where(marker == 98.0, 1e38, 0.0) * steep + jnp.where(marker == 99.0, jnp.nan, 0.0)


def batches(poison):
    """Batches [steps, B, H, W, C]; `poison` says which value marks a step's first image."""
    levels = np.random.default_rng(0).integers(0, 17, (6, 4, 2, 2, 1)).astype(np.float32)
    levels[:, 1:, 0, 0, 0] = 1.0
    for step, value in poison.items():
        levels[step, 0, 0, 0, 0] = value
    return levels


@pytest.mark.parametrize("poison", [{2: 99.0}, {2: 98.0}, {0: 99.0, 1: 99.0, 5: 98.0}, {}])
def test_skipped_steps_leave_the_state_bit_for_bit(poison):
    """The compiled loop with skipping against single steps that a poisoned batch is simply not given to."""
    levels, key = batches(poison), jax.random.key(0)
    params = {"mean": jnp.full((2, 2, 1), 0.5)}
    step = losses.make_train_step(poisoned_loss, OPTIMIZER, ema_rate=0.9)
    skipping = jax.jit(losses.make_train_steps(losses.skip_nonfinite(step)))
    after, metrics = skipping(key, losses.init_state(params, OPTIMIZER), levels)

    by_hand, one_step = losses.init_state(params, OPTIMIZER), jax.jit(step)
    for number, batch in enumerate(levels):
        by_hand = by_hand.replace(step=jnp.int32(number + 1)) if number in poison else one_step(key, by_hand, batch)[0]
    assert_equal(jax.tree.map(np.asarray, after), jax.tree.map(np.asarray, by_hand))
    is_bad = ~(np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"]))
    assert set(np.flatnonzero(is_bad)) == set(poison)
    if 98.0 in poison.values():
        assert np.isfinite(np.asarray(metrics["loss"])[[step for step in poison if poison[step] == 98.0]]).all()


def of_device(values, norms=None):
    arrays = {"loss": np.array([values], np.float32), "grad_norm": np.array([norms or [1.0] * len(values)], np.float32)}
    return {name: jax.device_put(array) for name, array in arrays.items()}


def test_the_first_bad_step_is_named_and_how_far_the_run_had_come():
    watch = LossWatch(skips=False)
    watch.add(2, of_device([1.0, 2.0]))
    watch.add(4, of_device([3.0, np.nan]))
    watch.add(6, of_device([np.nan, np.nan]))
    with pytest.raises(NotFiniteError, match="the loss became nan at step 4") as raised:
        watch.take()
    assert (raised.value.step, raised.value.looked_at) == (4, 6)


def test_a_bad_gradient_is_noticed_before_the_loss():
    watch = LossWatch(skips=False)
    watch.add(3, of_device([1.0, 2.0, 3.0], [1.0, np.inf, 1.0]))
    with pytest.raises(NotFiniteError, match=r"the gradient's norm became inf at step 2 \(gradient norm inf, loss 2\)"):
        watch.look()


def test_skipped_steps_are_counted_and_do_not_spoil_the_mean(caplog):
    watch = LossWatch(skips=True)
    watch.add(2, of_device([1.0, np.nan]))
    watch.look()
    watch.add(4, of_device([2.0, 3.0], [np.nan, 1.0]))
    assert watch.take() == {"loss": 2.0, "skipped": 2}
    assert "skipped 2 step(s), whose loss or gradient is not finite: 2, 3" in caplog.text
    watch.add(6, of_device([4.0, 6.0]))
    assert watch.take() == {"loss": 5.0}


def test_too_many_skipped_steps_in_a_row_end_the_run():
    watch, limit = LossWatch(skips=True), divergence.MAX_SKIPPED_IN_A_ROW
    watch.add(limit, of_device([np.nan] * limit))
    watch.add(limit + 1, of_device([1.0]))
    watch.add(2 * limit + 1, of_device([np.nan] * limit))
    watch.look()
    watch.add(2 * limit + 2, of_device([np.nan]))
    with pytest.raises(
        NotFiniteError, match=f"at step {2 * limit + 2} .*, the {limit + 1}th in a row that was skipped"
    ):
        watch.look()


def test_a_state_that_no_step_has_moved_is_not_worth_saving():
    watch, moved = LossWatch(skips=True), []
    for step, losses_of_call in ((0, []), (2, [np.nan, 1.0]), (4, [np.nan, np.nan]), (6, [1.0, np.nan])):
        watch.add(step, of_device(losses_of_call))
        watch.look()
        moved.append(watch.has_moved)
        watch.mark_saved()
    assert moved == [False, True, False, True]


@pytest.mark.parametrize("has_trained", [False, True])
def test_when_data_fail_what_was_trained_is_saved_and_nothing_else(tmp_path, has_trained):
    """A run whose first batch fails leaves no checkpoint of its first step behind."""

    def failing():
        raise FileNotFoundError("data.npz does not exist")
        yield

    state = make_state(4)
    with open_checkpoints(tmp_path) as checkpoints:
        watch = LossWatch(skips=False)
        loop = train_loop._Loop(None, checkpoints, None, Presence(tmp_path), watch)
        if has_trained:
            watch.add(4, of_device([1.0]))
        with pytest.raises(FileNotFoundError, match="does not exist"):
            loop.read(failing(), distributed.replicate(state), 4)
        newest = checkpoints.restore_newest()
    if has_trained:
        assert_equal(newest, state)
    else:
        assert newest is None


class _Diverging:
    """As much of a trainer as an explanation needs; its network is the score of data that are all zero."""

    group, rate = "training", "optim.lr"

    def __init__(self):
        self.experiment = build_experiment(digits_ddpmpp_continuous.get_config())

    def loss_at_time(self, key, params, x, labels, t):
        return params * self.experiment.sde.std(t) + x.mean() * 0


def test_losses_by_level_are_those_of_the_levels():
    """Of a loss that is the standard deviation itself: sigma = std / sqrt(1 - std²) under the VP SDE."""
    trainer = _Diverging()
    measured = np.array(divergence.losses_by_level(trainer, _source(trainer), jnp.float32(1.0), 3))
    sigma, std = measured.T
    assert len(sigma) == divergence.NUM_LEVELS
    np.testing.assert_allclose(sigma, std / np.sqrt(1 - std**2), rtol=2e-3)  # float32 near std = 1
    np.testing.assert_allclose(np.diff(np.log(sigma)), np.log(sigma[-1] / sigma[0]) / 9, rtol=1e-6)
    ends = noise_levels.noise_levels(trainer.experiment.sde, np.array([1e-5, 1.0])).sigma
    np.testing.assert_allclose(sigma[[0, -1]], ends, rtol=1e-9)


def _source(trainer):
    import datasets

    return datasets.build_source(trainer.experiment.config, "train")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_denoising_loss_of_a_network_that_predicts_nothing_is_one():
    """‖std · 0 + z‖² / D, z standard normal: 1 within four standard errors of 64 · 64 draws, at every level."""
    trainer = _Diverging()
    trainer.loss_at_time = functools.partial(ScoreTrainer.loss_at_time, trainer)
    params = jax.tree.map(jnp.zeros_like, trainer.experiment.state_template().params)
    measured = np.array(divergence.losses_by_level(trainer, _source(trainer), params, 1))[:, 1]
    np.testing.assert_allclose(measured, 1.0, atol=4 * np.sqrt(2 / 4096))
