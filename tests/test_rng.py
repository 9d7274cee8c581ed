"""Randomness per example: the same noise for an example whatever its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cpu import dropout
from parallel import rng

DRAWS = {
    "normal": lambda key, B: rng.normal(key, (B, 3, 2)),
    "uniform": lambda key, B: rng.uniform(key, (B, 5), minval=-1.0, maxval=3.0),
    "rademacher": lambda key, B: rng.rademacher(key, (B, 4)),
    "bernoulli": lambda key, B: rng.bernoulli(key, 0.3, (B, 4)),
    "randint": lambda key, B: rng.randint(key, B, 1000),
}


@pytest.mark.parametrize("name", sorted(DRAWS))
def test_an_example_draws_the_same_in_any_batch(name):
    draw, key = DRAWS[name], jax.random.key(3)
    together = draw(key, 6)
    np.testing.assert_array_equal(draw(key, 4), together[:4])
    keys = rng.example_keys(key, 6)
    np.testing.assert_array_equal(draw(keys[2:5], 3), together[2:5])
    assert len(np.unique(np.asarray(together).reshape(6, -1), axis=0)) > 1


def test_moments():
    key, n = jax.random.key(0), 20_000
    z = rng.normal(key, (n, 1))
    assert abs(float(z.mean())) < 4 / np.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * np.sqrt(2 / n)
    u = rng.uniform(key, (n,), minval=-1.0, maxval=3.0)
    assert abs(float(u.mean()) - 1.0) < 4 * np.sqrt(16 / 12 / n)
    assert abs(float(rng.bernoulli(key, 0.3, (n, 1)).mean()) - 0.3) < 4 * np.sqrt(0.21 / n)
    np.testing.assert_array_equal(jnp.abs(rng.rademacher(key, (10, 3))), 1.0)
    assert set(np.asarray(rng.randint(key, 1000, 4)).tolist()) == {0, 1, 2, 3}


def test_split_and_fold_in_act_on_one_key_and_on_each_of_many():
    key = jax.random.key(1)
    keys = rng.example_keys(key, 3)
    first, second = rng.split(keys)
    expected = [jax.random.split(k) for k in keys]
    np.testing.assert_array_equal(jax.random.key_data(first), [jax.random.key_data(e[0]) for e in expected])
    np.testing.assert_array_equal(jax.random.key_data(second), [jax.random.key_data(e[1]) for e in expected])
    folded = rng.fold_in(keys, 7)
    np.testing.assert_array_equal(
        jax.random.key_data(folded), [jax.random.key_data(jax.random.fold_in(k, 7)) for k in keys]
    )
    assert rng.split(key)[0].shape == rng.fold_in(key, 7).shape == ()


def test_keys_that_do_not_match_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"got 3 keys for 4 examples; pass one key, or one per example"):
        rng.normal(rng.example_keys(jax.random.key(0), 3), (4, 2))


@pytest.mark.parametrize("probability", [0.9, 0.1234567, 2.0**-23, 1.0, 0.0])
def test_bernoulli_draws_what_jax_does(probability):
    shape = (3, 129, 257)
    keys = jax.random.split(jax.random.key(7), shape[0])
    expected = jax.vmap(lambda key: jax.random.bernoulli(key, probability, shape[1:]))(keys)
    for draw in (rng.bernoulli, dropout.bernoulli):
        np.testing.assert_array_equal(draw(keys, probability, shape), expected)


def test_bernoulli_leaves_other_generators_to_jax():
    keys = jax.random.split(jax.random.key(7, impl="rbg"), 3)
    np.testing.assert_array_equal(dropout.bernoulli(keys, 0.5, (3, 100)), rng.bernoulli(keys, 0.5, (3, 100)))
