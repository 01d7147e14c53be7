"""Hyperparameters with a range: round trips, bounds, derivatives, refusals."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt._jaxpr._dependence import leaves_with_influence
from metaopt.hyper import AbstractHyper, Integer, Interval, Positive, values


DTYPES = (jnp.float32, jnp.float64)

INTEGER_REFUSES = "`value` of a `metaopt.hyper.Integer`.*SelfTuningSolver.*`.relaxed`"


def made(kind: str, shape: tuple[int, ...] = (), dtype=jnp.float64) -> AbstractHyper:
    match kind:
        case "positive":
            return Positive(jnp.full(shape, 0.3, dtype))
        case "interval":
            return Interval(jnp.full(shape, 0.3, dtype), low=-1, high=2)
        case "integer":
            return Integer(jnp.full(shape, 3, dtype), low=-2, high=4)
    raise ValueError(kind)


each_kind = pytest.mark.parametrize("kind", ["positive", "interval", "integer"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


# Values


@each_dtype
def test_positive_comes_back(dtype):
    given = jnp.asarray([1e-30, 1e-3, 1.0, 0.1, 1e30], dtype)
    # The logarithm is rounded, which is a relative error of the value: eps times its size,
    # at most 70 here.
    back = Positive(given).value
    np.testing.assert_allclose(back, given, rtol=100 * float(jnp.finfo(dtype).eps))


@each_dtype
def test_interval_comes_back_at_its_ends(dtype):
    low, high = -1.0, 2.0
    eps = float(jnp.finfo(dtype).eps)
    inside = np.array([0.1, 0.5, 0.9])
    # The numbers next to the ends, and further and further inside.
    near = np.concatenate([eps * 2.0 ** np.arange(1, 12), inside])
    given = jnp.asarray(np.concatenate([low + near, high - near]), dtype)
    back = Interval(given, low, high).value
    assert jnp.all((low < back) & (back < high))
    np.testing.assert_allclose(back, given, rtol=0, atol=3 * eps)
    # Towards an end at zero nothing is lost at all: small rates stay what they are.
    small = jnp.asarray([1e-30, 1e-10, 1e-4], dtype)
    np.testing.assert_allclose(Interval(small, 0, 1).value, small, rtol=100 * eps)
    np.testing.assert_allclose(Interval(-small, -1, 0).value, -small, rtol=100 * eps)


@each_dtype
def test_integer_comes_back_at_its_ends(dtype):
    for low, high in [(0, 1), (-3, 5), (0, 255), (999_990, 1_000_000)]:
        given = np.arange(low, high + 1)
        number = Integer(jnp.asarray(given, dtype), low, high)
        np.testing.assert_array_equal(number.value, given)
        assert number.value.dtype == dtype
        # From the middle of each level: in float32 near 1,000,000 this is to 1/16.
        bound = 0.1 if dtype == jnp.float32 else 1e-6
        np.testing.assert_allclose(number.relaxed, given, rtol=0, atol=bound)


def test_integer_tells_the_most_levels_apart_in_float32():
    given = np.arange(-1_000_000, 1_000_001)
    number = Integer(jnp.asarray(given, jnp.float32), -1_000_000, 1_000_000)
    np.testing.assert_array_equal(number.value, given)


@each_dtype
@pytest.mark.parametrize("raw", [-1e30, -200.0, -20.0, 20.0, 200.0, 1e30])
def test_no_raw_leaves_the_range(raw, dtype):
    raw = jnp.asarray(raw, dtype)
    # Bounds that no binary number is equal to.
    interval = eqx.tree_at(lambda x: x.raw, Interval(0.2, 0.1, 0.3), raw)
    low, high = jnp.asarray(0.1, dtype), jnp.asarray(0.3, dtype)
    assert low <= interval.value <= high
    integer = eqx.tree_at(lambda x: x.raw, Integer(1, -2, 4), raw)
    assert integer.value == (-2 if raw < 0 else 4)
    assert -2.5 <= integer.relaxed <= 4.5


def test_integer_is_the_number_nearest_to_relaxed():
    raw = jnp.linspace(-6, 6, 1001)
    number = eqx.tree_at(lambda x: x.raw, Integer(1, -2, 4), raw)
    np.testing.assert_array_equal(number.value, np.clip(np.round(number.relaxed), -2, 4))
    assert set(np.asarray(number.value).tolist()) == {-2, -1, 0, 1, 2, 3, 4}


@each_kind
def test_nan_is_seen(kind):
    hyper = eqx.tree_at(lambda x: x.raw, made(kind), jnp.asarray(jnp.nan))
    assert jnp.isnan(hyper.value)


# Arrays and dtypes


@each_kind
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3)])
def test_any_shape(kind, shape):
    hyper = made(kind, shape)
    assert hyper.raw.shape == hyper.value.shape == shape


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Positive(2),
        lambda: Positive(0.5),
        lambda: Positive(np.array([1, 2])),
        lambda: Interval(0.5, 0, 1),
        lambda: Integer(1, 0, 3),
        lambda: Integer(np.int64(1), 0, 3),
    ],
)
def test_numbers_take_the_default_dtype(make, x64):
    with jax.enable_x64(x64):
        hyper = make()
        assert hyper.raw.dtype == hyper.value.dtype == (jnp.float64 if x64 else jnp.float32)
        # A weak type would make the second call of a compiled function trace again.
        assert not hyper.raw.weak_type and not hyper.value.weak_type


@each_kind
@pytest.mark.parametrize("dtype", [jnp.bfloat16, *DTYPES])
def test_floating_dtypes_are_kept(kind, dtype):
    hyper = made(kind, (2,), dtype)
    # Half precision is too coarse for the levels of a sigmoid.
    wide = kind == "integer" and dtype == jnp.bfloat16
    assert hyper.raw.dtype == hyper.value.dtype == (jnp.float32 if wide else dtype)


@pytest.mark.parametrize("cls, number", [(Interval, np.float32), (Integer, np.int32)])
def test_a_range_is_static(cls, number):
    hyper = cls(1, number(0), number(3))
    assert len(jax.tree.leaves(hyper)) == 1
    assert jax.tree.structure(hyper) == jax.tree.structure(cls(2, 0, 3))


# Transformations


@each_kind
def test_jit_and_vmap(kind):
    stacked = made(kind, (3,))
    one = made(kind)
    read = lambda hyper: hyper.value
    np.testing.assert_array_equal(jax.jit(read)(stacked), stacked.value)
    np.testing.assert_allclose(jax.vmap(read)(stacked), jnp.stack(3 * [one.value]))


@each_kind
def test_made_inside_of_a_transformation(kind):
    make = {
        "positive": Positive,
        "interval": lambda value: Interval(value, -1, 2),
        "integer": lambda value: Integer(value, -2, 4),
    }[kind]
    given = jnp.asarray([1.0, 1.0])
    out = jax.jit(lambda value: (make(value).value, make(1.0).value))(given)
    np.testing.assert_allclose(out[0], given, rtol=1e-12)
    np.testing.assert_allclose(out[1], 1.0, rtol=1e-12)
    np.testing.assert_allclose(eqx.filter_vmap(make)(given).value, given, rtol=1e-12)
    # What is out of range and not known yet is never a plausible number.
    bad = jax.jit(lambda value: make(value).raw)(-3.0)
    assert not jnp.isfinite(bad)
    with pytest.raises(ValueError, match="`value` must"):
        jax.jit(lambda: make(-3.0).raw)()


def test_made_of_what_is_differentiated():
    derivative = jax.grad(lambda value: Positive(value).raw)(0.25)
    np.testing.assert_allclose(derivative, 4.0)


@pytest.mark.parametrize("raw", [-30.0, -1.0, 0.0, 1.0, 30.0])
def test_derivatives(raw):
    hyper = eqx.tree_at(lambda x: x.raw, Positive(1.0), raw)
    np.testing.assert_allclose(jax.grad(lambda h: h.value)(hyper).raw, np.exp(raw))
    slope = 1 / (2 + np.exp(raw) + np.exp(-raw))
    interval = eqx.tree_at(lambda x: x.raw, Interval(0.5, -1, 2), raw)
    found = jax.grad(lambda h: h.value)(interval).raw
    np.testing.assert_allclose(found, 3 * slope, rtol=1e-12)
    integer = eqx.tree_at(lambda x: x.raw, Integer(1, -2, 4), raw)
    found = jax.grad(lambda h: h.relaxed)(integer).raw
    np.testing.assert_allclose(found, 7 * slope, rtol=1e-12)


# The derivative that a whole number has not


def loss_in_a_loop(params, hyper):
    def body(carry, _):
        return jnp.sin(carry * hyper.value), None

    return jax.lax.scan(body, params, None, length=3)[0]


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint])
@pytest.mark.parametrize(
    "derivative",
    [
        lambda fn, hyper: jax.grad(fn)(hyper),
        lambda fn, hyper: jax.make_jaxpr(jax.grad(fn))(hyper),
        lambda fn, hyper: jax.eval_shape(jax.hessian(fn), hyper),
        lambda fn, hyper: jax.jvp(fn, (hyper,), (hyper,)),
        lambda fn, hyper: jax.jit(lambda h: jax.jvp(fn, (h,), (h,))[1])(hyper),
        lambda fn, hyper: jax.vmap(jax.grad(fn))(
            jax.tree.map(lambda a: jnp.stack([a, a]), hyper)
        ),
    ],
)
def test_integer_refuses_its_derivative(derivative, wrap):
    hyper = Integer(2, 0, 5)
    loss = wrap(loss_in_a_loop)
    with pytest.raises(ValueError, match=INTEGER_REFUSES):
        derivative(lambda h: loss(0.3, h), hyper)
    # Through the gradient of the loss, as along the path of a solver.
    with pytest.raises(ValueError, match=INTEGER_REFUSES):
        derivative(lambda h: jax.grad(loss)(0.3, h), hyper)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint])
def test_integer_lets_other_derivatives_pass(wrap):
    hyper, fixed = Integer(2, 0, 5), lambda params: loss_in_a_loop(params, Fixed(2.0))
    loss = wrap(loss_in_a_loop)
    np.testing.assert_allclose(jax.grad(loss)(0.3, hyper), jax.grad(fixed)(0.3))
    second = jax.grad(jax.grad(loss))(0.3, hyper)
    np.testing.assert_allclose(second, jax.grad(jax.grad(fixed))(0.3))
    held = jax.grad(lambda h: loss(0.3, jax.lax.stop_gradient(h)) + h.relaxed)(hyper)
    np.testing.assert_allclose(held.raw, jax.grad(lambda h: h.relaxed)(hyper).raw)


class Fixed(eqx.Module):
    value: jax.Array | float


@each_kind
def test_dependence_is_seen(kind):
    assert leaves_with_influence(lambda hyper: hyper.value, made(kind)) == [True]


# In a bilevel problem


ADJOINTS = {
    "unrolled": mo.UnrolledAdjoint(),
    "blocks": mo.UnrolledAdjoint(mo.memory.Blocks()),
    "forward": mo.ForwardAdjoint(),
    "implicit": mo.ImplicitAdjoint(),
}

INNER = mo.Descent(optax.sgd(0.2), num_steps=60)


def ridge(params, hyper, batch):
    penalty = hyper["l2"].value * jnp.sum(params**2)
    return jnp.sum((params - hyper["target"].value) ** 2) + penalty


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_hypergradient(adjoint):
    problem = mo.BilevelProblem(ridge, lambda params, hyper, batch: jnp.sum(params))
    hyper = {"l2": Positive(0.5), "target": Interval(1.0, 0.0, 4.0)}
    hypergradient, _ = mo.hypergradient(
        problem, hyper, params=jnp.zeros(2), inner=INNER, adjoint=ADJOINTS[adjoint]
    )
    # params = target / (1 + l2), and two entries of it are added.
    found = hypergradient["l2"].raw, hypergradient["target"].raw
    expected = -2 / 1.5**2 * 0.5, 2 / 1.5 * (1.0 * 3.0 / 4.0)
    # Sixty steps leave 0.4 ** 60 of the way, and linear solves a part in a million.
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    hyper["target"] = Integer(1, 0, 3)
    with pytest.raises(ValueError, match=INTEGER_REFUSES):
        mo.hypergradient(
            problem, hyper, params=jnp.zeros(2), inner=INNER, adjoint=ADJOINTS[adjoint]
        )


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_integer_in_a_solve_that_is_not_differentiated_in_it(adjoint):
    """Implicit adjoints trace a derivative in all of `hyper` in every solve."""

    def solved(l2, target):
        solution = mo.solve_inner(
            mo.InnerProblem(ridge),
            {"l2": l2, "target": target},
            params=jnp.zeros(()),
            solver=INNER,
            adjoint=ADJOINTS[adjoint],
        )
        return solution.value

    l2, target = Positive(0.5), Integer(3, 0, 5)
    np.testing.assert_allclose(solved(l2, target), 3 / 1.5)
    derivative = jax.jacfwd if adjoint == "forward" else jax.grad
    found = derivative(solved)(l2, target).raw
    expected = derivative(solved)(l2, Fixed(jnp.asarray(3.0))).raw
    np.testing.assert_allclose(found, expected)
    with pytest.raises(ValueError, match=INTEGER_REFUSES):
        derivative(lambda target: solved(l2, target))(target)


def test_outer_steps_keep_the_range():
    solution = mo.solve_bilevel(
        mo.BilevelProblem(ridge, lambda params, hyper, batch: jnp.sum((params - 9) ** 2)),
        {"l2": Positive(0.5), "target": Interval(1.0, 0.0, 4.0)},
        params=jnp.zeros(()),
        solver=mo.NestedSolver(
            inner=INNER, adjoint=mo.ImplicitAdjoint(), outer=optax.adam(2.0)
        ),
        num_steps=5,
    )
    found = values(solution.hyper)
    assert 0 < found["l2"] < 0.1 and 3.9 < found["target"] < 4


# Printing


def test_values():
    tree = {
        "l2": Positive(np.ones(2)),
        "rest": [Integer(3, 0, 5), jnp.asarray(2.0), "name", None],
    }
    found = values(tree)
    assert eqx.tree_equal(found["l2"], jnp.ones(2))
    assert found["rest"][0] == 3 and found["rest"][1:] == tree["rest"][1:]
    assert eqx.tree_equal(jax.jit(values)({"x": Integer(3, 0, 5)}), {"x": jnp.array(3.0)})
    as_lists = jax.tree.map(lambda a: a.tolist(), values(tree["l2"]))
    assert json.loads(json.dumps(as_lists)) == [1.0, 1.0]


def test_values_of_one():
    assert values(Integer(3, 0, 5)) == 3


# Refusals


@pytest.mark.parametrize(
    "cls, arguments, message",
    [
        (Positive, [0.0], "`value` must be positive.*Interval.*got 0.0"),
        (Positive, [-1], "`value` must be positive.*got -1.0"),
        (Positive, [np.array([[1.0, -2.0]])], r"`value\[0, 1\]` must.*got -2.0"),
        (Positive, [float("nan")], "`value` must be positive.*got nan"),
        (Positive, [jnp.array([1.0, jnp.nan])], "`value` holds infinite or NaN"),
        (Positive, [float("inf")], "`value` must be positive.*got inf"),
        (Positive, [np.zeros(0)], "`value` is an empty array"),
        (Positive, [True], "`value` must be a number or an array.*got True"),
        (Positive, [np.array([True])], "`value` must be a number or an array"),
        (Positive, [1j], "`value` must be a number or an array.*got 1j"),
        (Positive, [jnp.array(1j)], "`value` is complex"),
        (Positive, ["0.1"], "`value` must be a number or an array.*got '0.1'"),
        (Interval, [0, 0, 1], "`value` must lie between `low` and `high`, 0.0 and"),
        (Interval, [1, 0, 1], "not at an end.*got 1.0 in float64"),
        (Interval, [-0.1, 0, 1], "`value` must lie between.*got -0.1"),
        (Interval, [1.1, 0, 1], "`value` must lie between.*got 1.1"),
        (Interval, [np.nan, 0, 1], "`value` must lie between.*got nan"),
        (Interval, [np.float32(1 - 1e-9), 0, 1], "got 1.0 in float32"),
        (Interval, [0.5, 1, 0], "`low` must be less than `high`; got 1 and 0"),
        (Interval, [0.5, 0, float("inf")], "`high` must be finite; got inf"),
        (Interval, [0.5, float("nan"), 1], "`low` must be finite; got nan"),
        (Interval, [0.5, jnp.zeros(2), 1], "`low` must be a Python number"),
        (Interval, [0.5, False, 1], "`low` must be a Python number.*got False"),
        (Integer, [2.5, 0, 5], "`value` must be a whole number from 0 to 5; got 2.5"),
        (Integer, [6, 0, 5], "`value` must be a whole number from 0 to 5; got 6.0"),
        (Integer, [-1, 0, 5], "`value` must be a whole number.*got -1.0"),
        (Integer, [np.array([1, 7]), 0, 5], r"`value\[1\]` must be a whole number"),
        (Integer, [1, 0.0, 5], "`low` must be an int; got 0.0"),
        (Integer, [1, 0, True], "`high` must be an int; got True"),
        (Integer, [1, 1, 1], "`low` must be less than `high`; got 1 and 1"),
        (Integer, [1, 0, 10**7], "`high` must be at most 1,000,000 in size.*Interval"),
    ],
)
def test_refusals(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(*arguments)


def test_float64_in_a_32_bit_world_is_named():
    with jax.enable_x64(False):
        with pytest.warns(UserWarning, match="`value` is float64 and is used as float32"):
            Positive(np.array([0.1]))
        # A single number is not worth a warning, which would be an error here.
        assert Positive(np.float64(0.1)).raw.dtype == jnp.float32
