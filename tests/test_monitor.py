"""The watch over each step: what it costs, and that nothing is left of it unread."""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt._core._tree import max_of_sizes, sum_of_sizes, tree_add
from metaopt._objective import Objective
from metaopt._solver._gauge import measured, scaled_gauge


NUM_STEPS = 50


def loss(params, hyper, batch):
    x, y = batch
    decay = sum(jnp.sum(weight**2) for weight in params)
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.mean((x - y) ** 2) + jnp.exp(hyper["decay"]) * decay


def transform(hyper):
    return optax.sgd(jnp.exp(hyper["rate"]), momentum=0.9)


PROBLEM = mo.BilevelProblem(loss, loss)
INNER = mo.Descent(transform, NUM_STEPS)


def arguments() -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (6, 12), (12, 3), (20, 6), (20, 3)
    arrays = [
        jax.random.normal(key, shape, jnp.float32) / 3
        for key, shape in zip(keys, shapes, strict=True)
    ]
    hyper = {"rate": jnp.float32(-3.0), "decay": jnp.float32(-5.0)}
    return hyper, arrays[:2], tuple(arrays[2:])


def by_hand(hyper, params, rows):
    def outer(hyper):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(loss)(params, hyper, rows)
            updates, state = transform(hyper).update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, transform(hyper).init(params)
        return loss(jax.lax.scan(step, carry, None, NUM_STEPS)[0][0], hyper, rows)

    return jax.grad(outer)(hyper)


def gradient_alone(hyper, params, rows):
    key, adjoint = jax.random.key(0), mo.UnrolledAdjoint(mo.memory.StoreAll())
    data = mo.FullBatch(rows)
    objective = Objective(PROBLEM, INNER, data, data, params, None, key)
    return tree_add(*objective.trace(adjoint, hyper, None)[2])


def with_verdict(hyper, params, rows):
    settings: Any = {
        "inner": INNER,
        "adjoint": mo.UnrolledAdjoint(mo.memory.StoreAll()),
        "throw": False,
    }
    return mo.hypergradient(PROBLEM, hyper, rows, rows, params=params, **settings)[0]


_NO_WORK = {"get-tuple-element", "parameter", "constant", "tuple", "bitcast", "copy"}


def loop_operations(fn) -> int:
    """The number of operations in the bodies of the loops of a compiled function."""
    text = jax.jit(fn).lower(*arguments()).compile().as_text()
    assert text is not None
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    count = collections.Counter()
    for computation in re.split(r"\n(?=(?:%|ENTRY))", text):
        name = re.match(r"%?([\w.\-]+)", computation)
        if name and name[1] in bodies:
            found = re.findall(r" = (?:\([^=]*?\)|\S+) ([\w\-]+)\(", computation)
            count.update(op for op in found if op not in _NO_WORK)
    assert count.total() > 10  # both loops were found
    return count.total()


def test_nothing_is_left_of_the_watch_where_the_gradient_alone_is_read():
    hand = loop_operations(by_hand)
    assert loop_operations(gradient_alone) <= hand
    # So the count sees what watches the steps.
    assert loop_operations(with_verdict) > hand
    for ours, plain in zip(
        jax.tree.leaves(jax.jit(gradient_alone)(*arguments())),
        jax.tree.leaves(jax.jit(by_hand)(*arguments())),
        strict=True,
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (4, 0), (5, 3), (7, 16), (2, 3, 9)])
def test_reductions_in_columns(shape):
    x = jnp.abs(jax.random.normal(jax.random.key(1), shape))
    np.testing.assert_allclose(sum_of_sizes(x), jnp.sum(x), rtol=1e-12)
    assert max_of_sizes(x) == jnp.max(x, initial=0)
    if x.size:
        for bad in jnp.nan, jnp.inf:
            marked = x.ravel().at[-1].set(bad).reshape(shape)
            assert not jnp.isfinite(sum_of_sizes(marked))
            assert not jnp.isfinite(max_of_sizes(marked))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gauge_of_a_loss_of_any_scale(scale):
    # Squares of these cotangents overflow or vanish in float32.
    end, before = jnp.array([3.0, 4.0], jnp.float32), jnp.array([60.0, 80.0], jnp.float32)
    variances = jnp.full(1, 1e-14, jnp.float32)
    gauge = scaled_gauge([scale * end], jnp.float32)
    for cotangent in (end, before, 1e-3 * end):
        gauge = measured(gauge, [scale * cotangent], variances)
    want = np.array([1e-5, 5e-7, 100, 5], np.float32) * np.float32(scale)
    np.testing.assert_allclose(gauge, want, rtol=1e-5)
