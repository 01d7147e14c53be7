"""The beginning of a random permutation, which is computed entry by entry where it is
long."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt as mo
from metaopt._shuffle import shuffled


@ft.partial(jax.jit, static_argnums=(1, 2))
def drawn(key, size, count):
    return shuffled(key, size, count)


@pytest.mark.parametrize("size", [1, 7, 2**16, 2**16 + 1, 100_003, 2**17])
def test_every_number_comes_once(size):
    whole = np.asarray(drawn(jax.random.key(0), size, size))
    np.testing.assert_array_equal(np.sort(whole), np.arange(size))
    part = drawn(jax.random.key(0), size, -(-size // 3))
    np.testing.assert_array_equal(part, whole[: -(-size // 3)])


def test_a_few_are_a_permutation_of_jax():
    want = jax.random.permutation(jax.random.key(3), 1000)[:10]
    np.testing.assert_array_equal(drawn(jax.random.key(3), 1000, 10), want)


def excess(counts):
    """How far counts are from even ones, in standard deviations of chi squared."""
    mean, freedom = counts.mean(), counts.size - 1
    return (np.sum((counts - mean) ** 2 / mean) - freedom) / np.sqrt(2 * freedom)


def test_draws_are_even_and_independent():
    size, keys = 100_000, jax.random.split(jax.random.key(1), 40_000)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: shuffled(key, size, 3)))(keys))
    first, second, _ = (draws // (size // 20)).T
    gap = (draws[:, 1] - draws[:, 0]) % size // (size // 20)
    low = draws[:, 0] % 20
    for one in first, second, gap, low:
        assert excess(np.bincount(one, minlength=20)) < 4
    for one, other in (first, second), (first, low), (second, gap):
        assert excess(np.bincount(20 * one + other, minlength=400)) < 4


def test_one_permutation_has_no_trend():
    order = np.asarray(drawn(jax.random.key(2), 100_000, 100_000))
    spread = 4 / np.sqrt(order.size)
    assert abs(np.corrcoef(order, np.arange(order.size))[0, 1]) < spread
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < spread
    other = np.asarray(drawn(jax.random.key(3), 100_000, 100_000))
    assert abs(np.corrcoef(order, other)[0, 1]) < spread


def test_a_few_of_a_million_rows_sort_nothing():
    data = mo.Minibatches(jnp.zeros((1_000_000, 1)), 32)
    plan = ft.partial(data.plan, num_steps=1)
    assert "sort" not in str(jax.make_jaxpr(plan)(jax.random.key(0)))
    cost: Any = jax.jit(plan).lower(jax.random.key(0)).compile().cost_analysis()
    assert cost["bytes accessed"] < 1e5


def test_minibatches_of_many_rows_make_epochs():
    rows = 2**16 + 10
    data = mo.Minibatches(jnp.arange(rows), 20_000)
    plan = np.asarray(data.plan(jax.random.key(0), 7))
    assert plan.shape == (7, 20_000)
    for epoch in plan[:3], plan[3:6]:
        assert len(np.unique(epoch)) == 60_000
    assert (plan[:3] != plan[3:6]).any()
