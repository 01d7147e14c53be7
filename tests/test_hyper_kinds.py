"""Shares, ordered numbers and schedules as hyperparameters."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt.hyper import (
    Interval,
    Ordered,
    PiecewiseLinear,
    Positive,
    Simplex,
    WarmupCosine,
)


ADJOINTS = {
    "unrolled": mo.UnrolledAdjoint(),
    "forward": mo.ForwardAdjoint(),
    "implicit": mo.ImplicitAdjoint(),
}
each_adjoint = pytest.mark.parametrize("adjoint", list(ADJOINTS))
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def moved(hyper: Any, raw: Any) -> Any:
    return eqx.tree_at(lambda h: h.raw, hyper, raw)


# Values


@each_dtype
def test_simplex_comes_back(dtype):
    given = jnp.asarray([[0.2, 0.3, 0.5], [1e-6, 0.5, 0.499999]], dtype)
    shares = Simplex(given)
    assert shares.raw.dtype == shares.value.dtype == given.dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(shares.value, given, rtol=20 * eps)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_no_raw_leaves_the_simplex(size):
    shares = Simplex(jnp.full((2, 5), 0.2))
    raw = size * jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)))
    value = moved(shares, raw).value
    assert jnp.all(value >= 0)
    np.testing.assert_allclose(jnp.sum(value, axis=-1), 1.0, rtol=1e-6)


@each_dtype
def test_ordered_comes_back(dtype):
    given = jnp.asarray([[-1.0, 0.0, 0.001, 30.0], [5.0, 6.0, 7.0, 8.0]], dtype)
    numbers = Ordered(given)
    assert numbers.raw.dtype == numbers.value.dtype == given.dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(numbers.value, given, rtol=20 * eps, atol=20 * eps)
    raw = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), dtype)
    assert jnp.all(jnp.diff(moved(numbers, raw).value, axis=-1) > 0)


array = jnp.array
REFUSED: dict[str, tuple[Any, str]] = {
    "scalar": (lambda: Simplex(1.0), "must have an axis, along which the shares"),
    "zero": (lambda: Simplex(array([0.0, 1.0])), r"`value\[0\]` must be positive, and sum"),
    "sum": (lambda: Simplex(array([0.2, 0.2])), "must be positive, and sum to 1"),
    "list": (lambda: Simplex([0.5, 0.5]), "must be a number or an array"),  # pyright: ignore
    "scalar in order": (lambda: Ordered(1.0), "must have an axis, along which the numbers"),
    "not in order": (
        lambda: Ordered(array([1.0, 3.0, 2.0])),
        r"`value\[2\]` must be larger",
    ),
    "equal": (lambda: Ordered(array([1.0, 1.0])), r"`value\[1\]` must be larger than"),
    "knots": (lambda: PiecewiseLinear(0.1, 5), "`knots` must be some"),  # pyright: ignore
    "shape of knots": (lambda: PiecewiseLinear(Positive(0.1), 5), r"got \(\)"),
    "steps": (lambda: WarmupCosine(0.1, 0), "`num_steps`"),
    "share": (lambda: WarmupCosine(0.1, 5, warmup=1.0), "must lie between"),
    "peak": (lambda: WarmupCosine(-0.1, 5), "`value` must be positive"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_shares_inside_of_a_transformation():
    out = jax.jit(lambda value: Simplex(value).value)(jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(out, [0.25, 0.75], rtol=1e-12)
    bad = jax.jit(lambda value: Simplex(value).raw)(jnp.array([0.25, 0.25]))
    assert jnp.all(jnp.isnan(bad))


# Schedules


def test_piecewise_linear_is_numpy_interpolation():
    knots = jnp.array([0.1, 0.4, 0.2])
    schedule = PiecewiseLinear(Positive(knots), 9)
    expected = np.interp(np.arange(9), [0, 4, 8], knots)
    np.testing.assert_allclose(schedule.value, expected, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(9)), expected, rtol=1e-12)
    np.testing.assert_allclose(schedule(jnp.asarray(20)), 0.2, rtol=1e-12)
    # A number for each step.
    each = PiecewiseLinear(Positive(knots), 3)
    np.testing.assert_allclose(each.value, knots, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_counts_all_steps(dtype):
    knots = Positive(jnp.linspace(0.1, 0.9, 3000).astype(dtype))
    schedule = PiecewiseLinear(knots, 3000)
    assert schedule.value.dtype == dtype
    np.testing.assert_array_equal(schedule.value, knots.value)
    assert WarmupCosine(jnp.asarray(0.5, dtype), 3000).value.dtype == dtype


def test_warmup_cosine_by_its_formula():
    schedule = WarmupCosine(0.5, 20, warmup=0.25, end=0.1)
    steps = np.arange(20)
    share = np.clip((steps - 5) / 15, 0, 1)
    expected = 0.5 * np.minimum((steps + 1) / 5, 1)
    expected *= 0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2
    np.testing.assert_allclose(schedule.value, expected, rtol=1e-10)
    assert schedule(jnp.asarray(100)) == schedule(jnp.asarray(19))
    assert len(jax.tree.leaves(schedule)) == 3


@pytest.mark.parametrize(
    "schedule",
    [
        PiecewiseLinear(Positive(jnp.array([0.1, 0.3])), 4),
        PiecewiseLinear(Interval(jnp.array([0.1, 0.3, 0.2, 0.1]), 0.0, 0.5), 4),
        WarmupCosine(0.3, 4, warmup=0.3),
    ],
    ids=["two knots", "a knot for each step", "cosine"],
)
def test_schedules_are_learning_rates(schedule):
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: 0.5 * params**2, lambda params, hyper, batch: params
    )
    inner = mo.Descent(lambda hyper: optax.sgd(hyper["rate"]), num_steps=4)
    gradient, report = mo.hypergradient(
        problem,
        {"rate": schedule},
        params=jnp.asarray(1.0),
        inner=inner,
        adjoint=mo.UnrolledAdjoint(),
    )
    # The params are the product of 1 - rate over the steps.
    reached = lambda schedule: jnp.prod(1 - schedule.value)
    np.testing.assert_allclose(report.outer.loss, reached(schedule), rtol=1e-12)
    expected = jax.grad(reached)(schedule)
    found = jax.tree.leaves(gradient["rate"])
    assert len(found) == len(jax.tree.leaves(expected)) > 0
    for a, b in zip(found, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


# Hypergradients


@each_adjoint
def test_hypergradient_of_shares_and_of_ordered_numbers(adjoint):
    targets = jnp.array([1.0, -2.0, 4.0])

    def inner_loss(params, hyper, batch):
        mixed = jnp.sum(hyper["mix"].value * targets)
        return (params["a"] - mixed) ** 2 + jnp.sum(
            (params["b"] - hyper["edges"].value) ** 2
        )

    def outer_loss(params, hyper, batch):
        return params["a"] ** 2 + jnp.sum(jnp.sin(params["b"]))

    shares, edges = jnp.array([0.2, 0.3, 0.5]), jnp.array([-1.0, 0.5, 2.0])
    hyper = {"mix": Simplex(shares), "edges": Ordered(edges)}
    gradient, _ = mo.hypergradient(
        mo.BilevelProblem(inner_loss, outer_loss),
        hyper,
        params={"a": jnp.zeros(()), "b": jnp.zeros(3)},
        inner=mo.Descent(optax.sgd(0.25), num_steps=60),
        adjoint=ADJOINTS[adjoint],
    )
    mixed = jnp.sum(shares * targets)
    expected = 2 * mixed * shares * (targets - mixed)
    np.testing.assert_allclose(gradient["mix"].raw, expected, rtol=1e-6)
    slopes = jnp.cos(edges)
    sums = jnp.cumsum(slopes[::-1])[::-1]  # each entry moves those after it
    expected = sums * jnp.array([1.0, 1.5, 1.5])
    np.testing.assert_allclose(gradient["edges"].raw, expected, rtol=1e-6)


def test_values_of_a_tree():
    rate = PiecewiseLinear(Positive(jnp.array([0.1, 0.2])), 5)
    tree = {"mix": Simplex(jnp.array([0.5, 0.5])), "rate": rate}
    found = mo.hyper.values(tree)
    np.testing.assert_allclose(found["mix"], [0.5, 0.5])
    np.testing.assert_allclose(found["rate"].knots, [0.1, 0.2], rtol=1e-6)
