"""The score of a network: signs, labels and scales, against the arrays of the 2021 code and exact scores."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import SDES, load, make_score_fn, sde_of

from models.score import get_score_fn
from sde_lib import VESDE, expand

CASES = [(name, kind) for name in ("vesde", "vpsde", "subvpsde") for kind in ("continuous", "discrete")]


class Recorder:
    """Stands for a network: 0.25 x + 0.5, and keeps what it was called with."""

    def apply(self, variables, x, labels, train, rngs):
        self.called_with = {"variables": variables, "labels": labels, "train": train, "rngs": rngs}
        return 0.25 * x + 0.5


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_matches_the_reference(name, kind):
    stored, meta = load(f"score_fn_{name}_{kind}")
    model = Recorder()
    score_fn = get_score_fn(sde_of(meta), model, {}, train=False, continuous=meta["continuous"])
    score = score_fn(jnp.asarray(stored["x"]), jnp.asarray(stored["t"]))
    expected_labels = stored["labels_passed_to_model"]
    np.testing.assert_allclose(model.called_with["labels"], expected_labels, rtol=2e-6)
    assert model.called_with["labels"].dtype == expected_labels.dtype
    # The reference's std loses digits below t = 0.1 except for VE (1 - exp in float32): see the next test.
    first = 0 if name == "vesde" else 2
    np.testing.assert_allclose(score[first:], stored["score"][first:], rtol=1e-5)


@pytest.mark.parametrize("name", SDES)
def test_a_network_that_predicts_noise_gives_the_exact_score(name):
    """The optimal network's output is -std score (VE: the score), so the score function must return the score."""
    sde = SDES[name]
    exact = make_score_fn(sde)
    scale = (lambda t: jnp.ones_like(t)) if name == "vesde" else (lambda t: -sde.std(t))
    time_of = (lambda s: jnp.log(s / 0.01) / np.log(5000.0)) if name == "vesde" else (lambda labels: labels / 999)

    class Optimal:
        def apply(self, variables, x, labels, train, rngs):
            t = time_of(labels)
            return expand(scale(t), x) * exact(x, t)

    x, t = jnp.linspace(-1, 1, 12).reshape(6, 2, 1, 1), jnp.array([1e-5, 1e-3, 0.1, 0.5, 0.9, 1.0])
    score = get_score_fn(sde, Optimal(), {}, train=False, continuous=True)(x, t)
    np.testing.assert_allclose(score, exact(x, t), rtol=2e-5)


def test_ddpm_levels_have_the_chains_std():
    """At DDPM's levels the discrete score is -output / sqrt(1 - alpha_bar), computed here in float64."""
    sde = SDES["vpsde"]
    levels = np.array([0, 1, 500, 999])
    alpha_bar = np.cumprod(1 - np.linspace(0.1, 20, 1000) / 1000)
    x = jnp.ones((4, 1))
    score = get_score_fn(sde, Recorder(), {}, train=False, continuous=False)(x, jnp.asarray(levels / 999))
    np.testing.assert_allclose(score[:, 0], -0.75 / np.sqrt(1 - alpha_bar[levels]), rtol=1e-6)


def test_variables_and_dropout_reach_the_network():
    model, key = Recorder(), jax.random.key(0)
    arguments = (VESDE(), model, {"w": 1})
    x, t = jnp.ones((2, 3)), jnp.ones(2)
    get_score_fn(*arguments, train=True, continuous=True, dropout_key=key)(x, t)
    assert model.called_with["variables"] == {"params": {"w": 1}}
    assert model.called_with["train"]
    assert model.called_with["rngs"] == {"dropout": key}
    get_score_fn(*arguments, train=False, continuous=True, dropout_key=key)(x, t)
    assert model.called_with["rngs"] is None


def test_a_linen_module_is_called_by_its_own_signature():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, labels, train):
            kept = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.Dense(1, use_bias=False)(kept) + 0 * expand(labels, x)

    model, x, t = Net(), jnp.ones((4, 1)), jnp.full(4, 0.5)
    params = {"Dense_0": {"kernel": jnp.full((1, 1), 3.0)}}
    score = get_score_fn(VESDE(), model, params, train=False, continuous=True)(x, t)
    np.testing.assert_array_equal(score, np.full((4, 1), 3.0))
    noisy = get_score_fn(VESDE(), model, params, train=True, continuous=True, dropout_key=jax.random.key(1))(x, t)
    assert set(np.unique(noisy)) <= {0.0, 6.0}
