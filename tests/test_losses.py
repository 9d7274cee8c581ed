"""Objectives, optimizer and train step against the arrays of the 2021 code and closed forms."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import losses
from configs import base
from models.layers import Dropout
from parallel import rng
from sde_lib import VESDE, VPSDE, expand, subVPSDE

GOLDEN = Path(__file__).parent / "golden" / "losses"
# How far the reference's own float32 arrays are from float64, where that exceeds 1e-5.
REFERENCE_ERROR = {
    # std as 1 - exp(.) is off by 6e-6 at t = 0.01, and the weighted loss divides by its square. Ours agrees with
    # float64 there (test_continuous_loss_matches_float64).
    "loss_sde_subvpsde": 2e-5,
    # The tiny network saturates at sigma = 50, where 1 - tanh^2 keeps few digits: 2.4e-5 of the largest gradient.
    # Ours is computed in float64, so that only the reference's error counts.
    "loss_smld": 5e-5,
}
SDES = {"VESDE": VESDE, "VPSDE": VPSDE, "subVPSDE": subVPSDE}


class TinyModel(nn.Module):
    """tanh(x w + b) (1 + labels / 1000), the trainable model of the reference arrays."""

    @nn.compact
    def __call__(self, x, labels, train=False):
        w = self.param("w", nn.initializers.zeros, (3, 3))
        b = self.param("b", nn.initializers.zeros, (3,))
        return jnp.tanh(x @ w + b.reshape(1, 1, 1, 3)) * expand(1 + 0.001 * labels, x)


def load(name):
    stored = np.load(GOLDEN / f"{name}.npz")
    return stored, json.loads(str(stored["meta"]))


def inject(monkeypatch, **draws):
    """Replaces draws of `rng` by given arrays."""
    for name, value in draws.items():
        monkeypatch.setattr(rng, name, lambda *args, value=value, **kwargs: jnp.asarray(value))


def loss_and_grads(loss_fn, stored, dtype=np.float32, train=True):
    params = {"w": jnp.asarray(stored["w"], dtype), "b": jnp.asarray(stored["b"], dtype)}
    key, x = jax.random.key(0), jnp.asarray(stored["image"], dtype)
    return jax.value_and_grad(lambda p: loss_fn(key, p, x, train=train).mean())(params)


def check_against(stored, suffix, loss, grads, rtol=1e-5):
    np.testing.assert_allclose(loss, stored[f"loss_{suffix}"], rtol=rtol)
    for name in ("w", "b"):
        expected = stored[f"grad_{name}_{suffix}"]
        np.testing.assert_allclose(grads[name], expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("reduce_mean", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", ["loss_sde_vesde", "loss_sde_vesde_tiny_t", "loss_sde_subvpsde"])
def test_continuous_loss_matches_reference(monkeypatch, name, weighted, reduce_mean, train):
    stored, meta = load(name)
    inject(monkeypatch, uniform=stored["t"], normal=stored["z"])
    loss_fn = losses.make_continuous_loss(
        SDES[meta["sde"]["class"]](), TinyModel(), reduce_mean=reduce_mean, likelihood_weighting=weighted
    )
    loss, grads = loss_and_grads(loss_fn, stored, train=train)
    suffix = f"train{int(train)}_reducemean{int(reduce_mean)}_lw{int(weighted)}"
    check_against(stored, suffix, loss, grads, rtol=REFERENCE_ERROR.get(name, 1e-5))
    mean, std = SDES[meta["sde"]["class"]]().marginal_prob(jnp.asarray(stored["image"]), jnp.asarray(stored["t"]))
    np.testing.assert_allclose(mean + expand(std, mean) * stored["z"], stored["perturbed"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_continuous_loss_differs_from_the_reference_by_its_std_alone(monkeypatch, weighted):
    """With the std that the 2021 code computed, 1 - exp(.) in float32, its loss at t = 1e-5 and 1e-3 comes out."""
    stored, _ = load("loss_sde_vpsde_tiny_t")
    inject(monkeypatch, uniform=stored["t"], normal=stored["z"])
    monkeypatch.setattr(VPSDE, "std", lambda sde, t: jnp.sqrt(1.0 - jnp.exp(2.0 * sde.log_mean_coeff(t))))
    loss_fn = losses.make_continuous_loss(VPSDE(), TinyModel(), reduce_mean=True, likelihood_weighting=weighted)
    # Half an ulp of exp(.) at 1 is 3e-8, and 1e-5's variance 1e-6: which way it rounds is worth 3 %.
    check_against(stored, f"train1_reducemean1_lw{int(weighted)}", *loss_and_grads(loss_fn, stored), rtol=3e-5)


@pytest.mark.parametrize(
    ("name", "weighted"),
    [("loss_sde_vpsde_tiny_t", False), ("loss_sde_vpsde_tiny_t", True), ("loss_sde_subvpsde", True)],
)
def test_continuous_loss_matches_float64(monkeypatch, name, weighted):
    """Where the reference cancels (std is 0.6 % off at t = 1e-5), ours agrees with float64 to float32 rounding."""
    stored, meta = load(name)
    inject(monkeypatch, uniform=stored["t"], normal=stored["z"])
    sde = SDES[meta["sde"]["class"]]()
    loss_fn = losses.make_continuous_loss(sde, TinyModel(), reduce_mean=True, likelihood_weighting=weighted)
    loss, _ = loss_and_grads(loss_fn, stored)

    t, z, x = (stored[name].astype(np.float64) for name in ("t", "z", "image"))
    wide = lambda coef: coef[:, None, None, None]  # noqa: E731
    log_mean = -0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1
    variance = -np.expm1(2 * log_mean)
    std = np.sqrt(variance) if isinstance(sde, VPSDE) else variance
    noisy = wide(np.exp(log_mean)) * x + wide(std) * z
    output = np.tanh(noisy @ stored["w"].astype(np.float64) + stored["b"]) * wide(1 + 0.999 * t)
    weight = (0.1 + 19.9 * t) / std**2 if weighted else np.ones_like(t)
    if weighted and not isinstance(sde, VPSDE):
        weight *= -np.expm1(4 * log_mean)
    np.testing.assert_allclose(loss, (wide(weight) * np.square(z - output)).mean(), rtol=2e-6)


@pytest.mark.parametrize("reduce_mean", [True, False])
def test_ddpm_loss_matches_reference(monkeypatch, reduce_mean):
    stored, _ = load("loss_ddpm")
    inject(monkeypatch, randint=stored["labels"], normal=stored["z"])
    loss_fn = losses.make_discrete_loss(VPSDE(), TinyModel(), reduce_mean=reduce_mean)
    check_against(stored, f"reducemean{int(reduce_mean)}", *loss_and_grads(loss_fn, stored))


@pytest.mark.parametrize("reduce_mean", [True, False])
def test_smld_loss_matches_reference(monkeypatch, reduce_mean):
    stored, _ = load("loss_smld")
    with jax.enable_x64(True):
        inject(monkeypatch, randint=stored["labels"], normal=stored["z"].astype(np.float64))
        loss_fn = losses.make_discrete_loss(VESDE(), TinyModel(), reduce_mean=reduce_mean)
        loss, grads = loss_and_grads(loss_fn, stored, dtype=np.float64)
    check_against(stored, f"reducemean{int(reduce_mean)}", loss, grads, rtol=REFERENCE_ERROR["loss_smld"])


class DroppingModel(nn.Module):
    """The image with dropout; no parameters that matter."""

    @nn.compact
    def __call__(self, x, labels, train=False):
        self.param("w", nn.initializers.zeros, ())
        return Dropout(0.25)(x, train)


@pytest.mark.parametrize(
    ("sde", "make"),
    [
        (VPSDE(), losses.make_continuous_loss),
        (VPSDE(), losses.make_discrete_loss),
        (VESDE(), losses.make_discrete_loss),
    ],
)
def test_training_drops_values_and_testing_does_not(monkeypatch, sde, make):
    """Without noise the loss of a pixel of 1 is a² in testing; in training a² / 0.75², or 0 if its value is dropped."""
    options = {"likelihood_weighting": False} if make is losses.make_continuous_loss else {}
    x = jnp.ones((3, 16, 16, 1))
    inject(monkeypatch, normal=jnp.zeros(x.shape), uniform=jnp.full(3, 0.5), randint=jnp.full(3, 500))
    loss_fn = make(sde, DroppingModel(), reduce_mean=True, **options)
    loss = lambda seed, train: loss_fn(jax.random.key(seed), {"w": 0.0}, x, train=train)  # noqa: E731
    tested = np.asarray(loss(0, False))
    np.testing.assert_allclose(loss(1, False), tested, rtol=1e-6)
    kept = [np.asarray(loss(seed, True)) / tested * 0.75**2 * 256 for seed in (0, 1)]
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-2)
    np.testing.assert_allclose(kept, 0.75 * 256, atol=5 * np.sqrt(0.75 * 0.25 * 256))
    assert len(set(np.round(np.concatenate(kept)))) > 2  # each image and each step has a mask of its own


class LabelModel(nn.Module):
    """Returns its label."""

    @nn.compact
    def __call__(self, x, labels, train=False):
        return expand(jnp.asarray(labels, jnp.float32), x) * jnp.ones_like(x)


@pytest.mark.parametrize("sde", [VPSDE(N=25), VESDE(N=25)])
def test_discrete_losses_draw_every_level_as_often(monkeypatch, sde):
    """The loss without noise is (c i)², with c known: so the labels i that the network saw come out of the losses."""
    monkeypatch.setattr(rng, "normal", lambda key, shape: jnp.zeros(shape))
    x = jnp.zeros((5000, 1, 1, 1))
    loss_fn = losses.make_discrete_loss(sde, LabelModel(), reduce_mean=True)
    found = np.sqrt(np.asarray(loss_fn(jax.random.key(0), {}, x, train=True)))
    factors = np.abs(np.asarray(sde.discrete_kernel(jnp.zeros((25, 1)), jnp.arange(25))[2]))
    values = factors * np.arange(25)  # of each label
    assert np.all(np.diff(np.sort(values)) > 1e-4)
    labels = np.abs(found[:, None] - values).argmin(1)
    np.testing.assert_allclose(found, values[labels], rtol=1e-5)
    counts = np.bincount(labels, minlength=25)
    np.testing.assert_allclose(counts, 200, atol=5 * np.sqrt(200))


def nested(stored, prefix):
    return {
        "a": jnp.asarray(stored[f"{prefix}/a"]),
        "n": {"w": jnp.asarray(stored[f"{prefix}/n/w"])},
    }


@pytest.mark.parametrize(
    "name",
    [
        "optim_step0_warmup5000_clip1",
        "optim_step100_clip0",
        "optim_step100_warmup5000_clip1",
        "optim_step7000_nowarmup_noclip_wd",
    ],
)
def test_optimizer_and_ema_match_reference(name):
    stored, meta = load(name)
    settings = meta["config"]
    optimizer = losses.make_optimizer(
        lr=settings["lr"],
        beta1=settings["beta1"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        warmup=settings["warmup"],
        grad_clip=settings["grad_clip"],
    )
    params, ema = nested(stored, "init/param"), nested(stored, "init/param")
    state = optimizer.init(params)
    state = optax.tree.set(state, mu=nested(stored, "init/m"), nu=nested(stored, "init/v"))
    start = jnp.asarray(meta["start_step"], jnp.int32)
    state = jax.tree.map(lambda leaf: start if leaf.dtype == jnp.int32 else leaf, state)
    for i in range(4):
        updates, state = optimizer.update(nested(stored, f"step{i}/grad"), state, params)
        params = optax.apply_updates(params, updates)
        ema = losses.update_ema(ema, params, meta["ema_rate"])
        expected = nested(stored, f"step{i}/param")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-9), params, expected)
        moments = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
        for moment, key in zip(moments, ("m", "v"), strict=True):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6, atol=1e-12),
                moment,
                nested(stored, f"step{i}/{key}"),
            )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-9), ema, nested(stored, f"step{i}/ema")
        )


@pytest.mark.parametrize(
    "name", ["train_step_vesde_continuous", "train_step_subvpsde_continuous", "train_step_vpsde_discrete"]
)
def test_train_step_matches_reference(monkeypatch, name):
    """Three steps on two devices of three images equal three steps on one device of six."""
    stored, meta = load(name)
    sde = SDES[meta["sde"]["class"]]()
    settings = meta["config"]
    optimizer = losses.make_optimizer(
        lr=settings["lr"], beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=settings["warmup"], grad_clip=1.0
    )
    if meta["continuous"]:
        loss_fn = losses.make_continuous_loss(
            sde, TinyModel(), reduce_mean=meta["reduce_mean"], likelihood_weighting=meta["likelihood_weighting"]
        )
    else:
        loss_fn = losses.make_discrete_loss(sde, TinyModel(), reduce_mean=meta["reduce_mean"])
    step_fn = losses.make_train_step(loss_fn, optimizer, ema_rate=meta["ema_rate"])
    state = losses.init_state({k: jnp.asarray(stored[f"init/param/{k}"]) for k in ("w", "b")}, optimizer)
    start = jnp.asarray(meta["start_step"], jnp.int32)
    # The original's schedule reads the state's step; Adam's own count starts at 0.
    opt_state = list(state.opt_state)
    opt_state[-1] = jax.tree.map(lambda leaf: start, opt_state[-1])
    state = state.replace(step=start, opt_state=tuple(opt_state))

    flat = lambda array: array.reshape(6, *array.shape[2:])  # noqa: E731
    for i in range(3):
        draws = {"normal": flat(stored["z"][i])}
        draws |= {"uniform": flat(stored["t"][i])} if meta["continuous"] else {"randint": flat(stored["labels"][i])}
        inject(monkeypatch, **draws)
        state, metrics = step_fn(jax.random.key(0), state, jnp.asarray(flat(stored["image"][i])))
        np.testing.assert_allclose(metrics["loss"], stored[f"step{i}/loss"], rtol=1e-5)
        for k in ("w", "b"):
            np.testing.assert_allclose(state.params[k], stored[f"step{i}/param/{k}"], rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(state.params_ema[k], stored[f"step{i}/ema/{k}"], rtol=2e-5, atol=2e-6)
        assert int(state.step) == int(stored[f"step{i}/state_step"])


def test_scanned_steps_equal_a_loop():
    """`n_jitted_steps` in one compiled scan take the same steps as single calls."""
    loss_fn = losses.make_continuous_loss(VPSDE(), TinyModel(), reduce_mean=True, likelihood_weighting=False)
    optimizer = losses.make_optimizer(lr=1e-2, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=2, grad_clip=1.0)
    step_fn = losses.make_train_step(loss_fn, optimizer, ema_rate=0.9)
    state = losses.init_state({"w": 0.1 * jnp.ones((3, 3)), "b": jnp.zeros(3)}, optimizer)
    batches = jax.random.normal(jax.random.key(1), (4, 5, 2, 2, 3))
    key = jax.random.key(2)
    scanned, metrics = jax.jit(losses.make_train_steps(step_fn))(key, state, batches)
    looped, step_fn, loop_losses = state, jax.jit(step_fn), []
    for batch in batches:
        looped, step_metrics = step_fn(key, looped, batch)
        loop_losses.append(step_metrics["loss"])
    np.testing.assert_allclose(metrics["loss"], jnp.stack(loop_losses), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), scanned, looped)
    assert len({float(loss) for loss in loop_losses}) == 4  # every step draws its own noise


def test_data_and_loss_have_keys_of_their_own_at_each_step():
    """Otherwise the noise that dequantizes would be that of the loss, or that of every step the same."""
    seen = []

    def loss_fn(key, params, x, train):
        seen.append(np.asarray(jax.random.key_data(key)))
        return params["w"] * x.mean(axis=(1, 2, 3))

    def prepare(key, x):
        seen.append(np.asarray(jax.random.key_data(key)))
        return x

    optimizer = losses.make_optimizer(lr=1e-2, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=0, grad_clip=1.0)
    step = losses.make_train_step(loss_fn, optimizer, ema_rate=0.9, prepare=prepare)
    state = losses.init_state({"w": jnp.ones(())}, optimizer)
    for _ in range(3):
        state, _ = step(jax.random.key(0), state, jnp.ones((2, 2, 2, 1)))
    assert len(seen) == len({key.tobytes() for key in seen}) == 6


def test_loss_of_an_image_does_not_depend_on_its_batch():
    """With one key for each image, a batch of four equals four batches of one."""
    loss_fn = losses.make_continuous_loss(VESDE(), TinyModel(), reduce_mean=False, likelihood_weighting=False)
    params = {"w": jnp.eye(3), "b": jnp.zeros(3)}
    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    keys = rng.example_keys(jax.random.key(1), 4)
    together = loss_fn(keys, params, x, train=False)
    alone = [loss_fn(keys[i : i + 1], params, x[i : i + 1], train=False)[0] for i in range(4)]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(3, losses.SMALL + 1, 7), (losses.SMALL + 1,), (2,)])
def test_global_norm_is_that_of_all_values(sizes):
    rng = np.random.RandomState(0)
    arrays = [rng.randn(size).astype(np.float32) for size in sizes]
    expected = np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in arrays))
    assert float(losses.global_norm(arrays)) == pytest.approx(expected, rel=1e-6)


def test_update_is_that_of_optax():
    """Of Adam and of clipping, over steps with and without it, up to rounding."""
    rng = np.random.RandomState(0)
    gradients = [{"a": rng.randn(5, 3) * scale, "b": rng.randn(7) * scale} for scale in (1e-3, 3.0, 0.02, 50.0)]
    gradients = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradients)
    ours = optax.chain(losses.clip_by_global_norm(1.0), losses.scale_by_adam(0.9, 0.999, 1e-8))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.999, 1e-8))
    states = [each.init(gradients[0]) for each in (ours, theirs)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for gradient in gradients:
        (found, states[0]), (expected, states[1]) = (
            each.update(gradient, state) for each, state in zip((ours, theirs), states, strict=True)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=4e-7), (found, states[0]), (expected, states[1])
        )


def test_optimizer_state_has_one_structure_for_all_settings():
    """So a run can be resumed with another learning rate, warm-up or bound."""
    settings = {"lr": 1e-3, "beta1": 0.9, "eps": 1e-8}
    params = {"w": jnp.zeros(3)}
    states = [
        losses.make_optimizer(**settings, weight_decay=decay, warmup=warmup, grad_clip=clip).init(params)
        for decay, warmup, clip in [(0.0, 5, 1.0), (0.0, 0, -1.0), (0.1, 0, 1.0)]
    ]
    assert len({jax.tree.structure(state) for state in states}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.optimizer": "SGD"}, r"optim.optimizer='SGD' is unknown; known: Adam"),
        ({"optim.grad_clip": 0.0}, r"optim.grad_clip=0.0: expected a positive bound, or a negative number for none"),
        ({"optim.lr": -1.0}, r"optim.lr=-1.0: expected a positive number"),
    ],
)
def test_bad_optimizer_settings_are_refused(changes, message):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        losses.build_optimizer(config)


@pytest.mark.parametrize(
    ("sde", "changes", "message"),
    [
        (subVPSDE(), {"training.continuous": False, "training.sde": "subvpsde"}, r"set training.continuous=True"),
        (
            VPSDE(),
            {"training.continuous": False, "training.likelihood_weighting": True},
            r"likelihood_weighting=True needs training.continuous=True",
        ),
    ],
)
def test_undefined_losses_are_refused(sde, changes, message):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        losses.build_loss(config, sde, TinyModel())
