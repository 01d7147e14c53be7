"""Random permutations computed entry by entry, and epochs of minibatches made of them."""

import functools as ft
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt as mo
from jaxprs import names
from metaopt._core._shuffle import permuted


def shuffled(key, size, count):
    """The first entries of one permutation."""
    return permuted(key[None], jnp.zeros(count, int), jnp.arange(count), size)


drawn = jax.jit(shuffled, static_argnums=(1, 2))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 2**16, 2**16 + 1, 100_003, 2**17])
def test_every_number_comes_once(size):
    whole = np.asarray(drawn(jax.random.key(0), size, size))
    np.testing.assert_array_equal(np.sort(whole), np.arange(size))
    part = drawn(jax.random.key(0), size, -(-size // 3))
    np.testing.assert_array_equal(part, whole[: -(-size // 3)])


def test_entries_of_several_permutations_are_those_of_each():
    keys, size = jax.random.split(jax.random.key(3), 3), 1000
    which = jnp.array([2, 0, 1, 1, 0, 2])
    places = jnp.array([5, 999, 0, 500, 3, 5])
    got = jax.jit(permuted, static_argnums=3)(keys, which, places, size)
    want = [drawn(keys[i], size, size)[j] for i, j in zip(which, places)]
    np.testing.assert_array_equal(got, want)


def excess(counts):
    """How far counts are from even ones, in standard deviations of chi squared."""
    mean, freedom = counts.mean(), counts.size - 1
    return (np.sum((counts - mean) ** 2 / mean) - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_numbers_are_equally_frequent(size):
    # Two odd moduli would make even permutations alone; few rounds favour some orders.
    keys = jax.random.split(jax.random.key(size), 100_000)
    orders = np.asarray(jax.jit(jax.vmap(lambda key: shuffled(key, size, size)))(keys))
    codes = np.unique(orders @ size ** np.arange(size), return_counts=True)
    assert codes[0].size == math.factorial(size)
    assert excess(codes[1]) < 4


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
    key = jax.random.key(0)
    for draw, of in (data.plan, key), (data.take, data.init(key)):
        draw = ft.partial(draw, num_steps=1)
        assert not any("sort" in name for name in names(draw, of))
        cost: Any = jax.jit(draw).lower(of).compile().cost_analysis()
        assert cost["bytes accessed"] < 1e5


def taken(data, counts, key):
    """The draws of several calls in a row, one array for each."""
    take = jax.jit(lambda cursor, count: data.take(cursor, count), static_argnums=1)
    cursor, plans = data.init(key), []
    for count in counts:
        plan, cursor = take(cursor, count)
        plans.append(np.asarray(plan))
    return plans


def assert_epochs(draws, rows):
    """Every row once in each epoch, each of which has another order."""
    draws = np.concatenate([plan.ravel() for plan in draws])
    epochs = draws[: draws.size // rows * rows].reshape(-1, rows)
    assert len(epochs) > 2
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))
    assert all((one != other).any() for one, other in itertools.pairwise(epochs))


@pytest.mark.parametrize("rows, batch_size", [(13, 4), (12, 4), (7, 7)])
@pytest.mark.parametrize("counts", [(1,) * 30, (1, 9, 2, 17, 3)])
def test_each_row_comes_once_in_an_epoch_however_many_are_taken(rows, batch_size, counts):
    # An epoch once began at each outer step, and its last rows were hardly ever seen.
    data, key = mo.Minibatches(jnp.arange(rows), batch_size), jax.random.key(4)
    draws = taken(data, counts, key)
    assert_epochs(draws, rows)
    # The same stream, however it is cut.
    whole = data.plan(key, sum(counts))
    np.testing.assert_array_equal(np.concatenate(draws), whole)
    assert (whole != data.plan(jax.random.key(5), sum(counts))).any()


def test_a_cursor_of_more_rows_goes_on_with_fewer():
    many, few = (mo.Minibatches(jnp.arange(rows), 4) for rows in (100, 10))
    _, cursor = many.take(many.init(jax.random.key(0)), 24)
    draws = np.asarray(few.take(cursor, 5)[0]).ravel()
    # Of 96 rows the last epoch of ten has six.
    np.testing.assert_array_equal(np.sort(draws[4:14]), np.arange(10))
    assert draws.min() >= 0 and draws.max() < 10


def test_minibatches_of_many_rows_make_epochs():
    rows = 2**16 + 10
    data = mo.Minibatches(jnp.arange(rows), 20_000)
    plan = np.asarray(data.plan(jax.random.key(0), 7))
    assert plan.shape == (7, 20_000)
    flat = plan.ravel()
    one, other = flat[:rows], flat[rows : 2 * rows]
    for epoch in one, other:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))
    assert (one != other).any()
