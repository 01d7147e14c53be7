"""Steps that are undone: to the last bit, with few bits stored, and with hypergradients
that are those of the steps taken."""

import functools as ft
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt._solver import _lossless as lossless
from problems import CASES, flat, LOSS, relative_error


ADJOINT = mo.ReversibleAdjoint()
UNROLLED = mo.UnrolledAdjoint()

# Arithmetic that has to be the same to the last bit is what the compiler makes of it.
pytestmark = pytest.mark.optimized


#
# Products that lose nothing
#


@pytest.mark.one_of(4)
@pytest.mark.parametrize("least", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int64])
def test_products_are_undone_and_rounded_to_one_unit(least, dtype):
    rng = np.random.default_rng(0)
    steps, size = 500, 400
    floor = int(least * lossless.ONE)
    limit = lossless.largest_bound(floor)
    # Both ends of the range of numerators, and what lies between.
    numerators = rng.integers(floor, lossless.ONE + 1, steps)
    numerators[:200], numerators[200:250] = floor, lossless.ONE
    largest = 2**30 if dtype == jnp.int32 else 2**36
    values = jnp.asarray(rng.integers(-largest, largest, size), dtype)
    gains = jnp.asarray(rng.integers(-largest, largest, (steps, size)) // 64, dtype)
    gains = (gains * (1 - least)).astype(dtype)
    numerators = jnp.asarray(numerators, jnp.uint32)

    def forward(carry, x):
        value, digit, bound = carry
        numerator, gain = x
        by = lossless.Factor(numerator, bound)
        product, digit = lossless.multiply(value, digit, by)
        exact = value.astype(jnp.float64) * numerator / lossless.ONE
        checks = jnp.max(jnp.abs(product - exact)), jnp.all(digit < by.grown), by.grown
        full, new = lossless.shortened(by, limit)
        kept = jnp.where(full, digit >> lossless.BITS, digit)
        return (product + gain, kept, new), (bound, digit, full, checks)

    def back(carry, x):
        value, digit = carry
        numerator, gain, bound, word, full = x
        word = word & (lossless.ONE - 1)
        digit = jnp.where(full, (digit << lossless.BITS) | word, digit)
        by = lossless.Factor(numerator, bound)
        return lossless.divide(value - gain, digit, by), None

    start = values, jnp.zeros(size, jnp.uint32), jnp.uint32(1)
    (value, digit, _), (bounds, words, full, checks) = jax.jit(
        lambda: jax.lax.scan(forward, start, (numerators, gains))
    )()
    errors, below, grown = checks
    assert np.max(errors) < 1 and np.all(below)
    assert np.max(grown) <= lossless.MOST
    xs = numerators, gains, bounds, words, full
    (value, digit), _ = jax.jit(
        lambda: jax.lax.scan(back, (value, digit), xs, reverse=True)
    )()
    np.testing.assert_array_equal(value, values)
    np.testing.assert_array_equal(digit, 0)
    # What Python's integers of any length say of the bounds.
    bound = 1
    for numerator, got in zip(np.asarray(numerators).tolist(), grown, strict=True):
        bound = -(-bound * lossless.ONE // numerator)
        assert int(got) == bound
        if bound > limit:
            bound = -(-bound // lossless.ONE)


@pytest.mark.parametrize("least", [0.1, 0.5, 0.9])
def test_memory_is_set_aside_for_every_schedule(least):
    rng = np.random.default_rng(1)
    steps, floor = 2000, int(least * lossless.ONE)
    limit = lossless.largest_bound(floor)
    most = lossless.num_words(steps, floor)
    for trial in range(60):
        # Now and then a step that stores nothing shifts when digits are shortened.
        numerators = np.full(steps, floor)
        idle = rng.random(steps) < 0.02 * trial / 60
        numerators[idle] = rng.integers(floor, lossless.ONE + 1, idle.sum())
        bound, words = 1, 0
        for numerator in numerators.tolist():
            bound = -(-bound * lossless.ONE // numerator)
            if bound > limit:
                bound, words = -(-bound // lossless.ONE), words + 1
        assert words <= most + 1


#
# Problems
#


def numbers(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def mean_square(params, batch):
    x, y = batch
    return jnp.mean((network(params, x) - y) ** 2)


def decayed(params, hyper, batch):
    decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return mean_square(params, batch) + jnp.exp(hyper["decay"]) * decay


PROBLEM = mo.BilevelProblem(
    decayed, lambda params, hyper, batch: mean_square(params, batch)
)


@ft.cache
def arrays(dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    params = {
        "in": 0.5 * numbers(0, 3, 6, dtype=dtype),
        "out": 0.5 * numbers(1, 6, 2, dtype=dtype),
    }
    x = numbers(2, 40, 3, dtype=dtype)
    y = jnp.sin(x @ numbers(3, 3, 2, dtype=dtype))
    return params, (x[:24], y[:24]), (x[24:], y[24:])


def scheduled_hyper(num_steps: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    time = np.linspace(0, 1, num_steps)
    return {
        "decay": jnp.asarray(-6.0, dtype),
        "log_rate": jnp.asarray(-2.5 - time, dtype),
        "momentum": jnp.asarray(0.9 + 0.05 * np.sin(9 * time), dtype),
    }


def scheduled(num_steps: int, **options: Any) -> mo.ReversibleSGD:
    options = {"min_momentum": 0.8} | options
    return mo.ReversibleSGD(
        lambda hyper: jnp.exp(hyper["log_rate"]),
        lambda hyper: hyper["momentum"],
        num_steps,
        **options,
    )


def constant(num_steps: int) -> mo.ReversibleSGD:
    return mo.ReversibleSGD(lambda hyper: jnp.exp(hyper["log_rate"]), 0.9, num_steps)


def constant_hyper() -> dict[str, jax.Array]:
    return {"decay": jnp.float32(-6.0), "log_rate": jnp.float32(-2.5)}


#
# Return to the start, and what it takes
#


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "num_steps, kind",
    [
        (1000, "constant"),
        (1000, "schedules"),
        (10_000, "constant"),
        (10_000, "schedules, minibatches"),
    ],
)
def test_steps_are_undone_to_the_last_bit(num_steps, kind):
    params, train, valid = arrays()
    hyper: Any = scheduled_hyper(num_steps)
    inner = scheduled(num_steps)
    momenta = np.asarray(hyper["momentum"], np.float64)
    if kind == "constant":
        hyper, inner, momenta = constant_hyper(), constant(num_steps), np.array(0.9)
    data = mo.Minibatches(train, 5) if "minibatches" in kind else train
    gradient, report = mo.hypergradient(
        PROBLEM,
        hyper,
        data,
        valid,
        params=params,
        inner=inner,
        adjoint=ADJOINT,
        throw=False,
    )
    # Steps can be undone where the derivative explodes.
    long = num_steps == 10_000 and kind != "constant"
    code = mo.RESULTS.path_exploded if long else mo.RESULTS.successful
    assert report.result == code
    assert bool(report.derivative.returned_to_start)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    # Words of 16 bits, and the logarithm of what the digits left over are below: what is
    # above the entropy is two bits while the bound is small, whatever the length.
    entropy = np.mean(np.log2(1 / momenta))
    assert report.derivative.stored_bits is not None
    overhead = float(report.derivative.stored_bits) / entropy - 1
    assert 0 < overhead < {1000: 0.05, 10_000: 0.01}[num_steps]
    rows = dict(re.split(r"  +", row.strip(), maxsplit=1) for row in rows_of(report))
    assert rows["returned to start"] == "yes, bit for bit"
    assert rows["bits per step and parameter"] == f"{report.derivative.stored_bits:.4g}"


def rows_of(report: mo.Report) -> list[str]:
    return str(report).splitlines()[1:-1]


def test_floats_are_not_undone():
    # The control: the same run in float32, undone by subtracting and dividing.
    params, train, _ = arrays()
    hyper, num_steps, momentum = constant_hyper(), 1000, jnp.float32(0.9)
    rate = jnp.exp(hyper["log_rate"])
    gradient = jax.grad(decayed)

    def step(carry, _):
        x, v = carry
        v = jax.tree.map(lambda v, g: momentum * v + g, v, gradient(x, hyper, train))
        return (jax.tree.map(lambda x, v: x - rate * v, x, v), v), None

    def undo(carry, _):
        x, v = carry
        x = jax.tree.map(lambda x, v: x + rate * v, x, v)
        g = gradient(x, hyper, train)
        return (x, jax.tree.map(lambda v, g: (v - g) / momentum, v, g)), None

    @jax.jit
    def there_and_back():
        start = params, jax.tree.map(jnp.zeros_like, params)
        end, _ = jax.lax.scan(step, start, None, num_steps)
        return jax.lax.scan(undo, end, None, num_steps)[0][0]

    back = flat(there_and_back())
    # Rounding is multiplied by 10 / 9 a thousand times.
    assert not np.linalg.norm(back - flat(params)) < 1e3 * np.linalg.norm(flat(params))


@pytest.mark.ci
@pytest.mark.parametrize(
    "way", ["hypergradient", pytest.param("solve_inner", marks=pytest.mark.slow)]
)
def test_memory_of_a_thousand_steps(way):
    num_steps, sizes = 1000, (784, 300, 100, 10)
    struct = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    rows = lambda n: (struct((n, 784)), struct((n,), jnp.int32))
    params = [(struct((a, b)), struct((b,))) for a, b in zip(sizes, sizes[1:])]
    hyper = {"decay": struct(()), "log_rate": struct((num_steps,))}

    def cross_entropy(params, batch):
        x, label = batch
        for weight, bias in params[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        weight, bias = params[-1]
        logits = x @ weight + bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def inner_loss(params, hyper, batch):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return cross_entropy(params, batch) + jnp.exp(hyper["decay"]) * squares

    problem = mo.BilevelProblem(inner_loss, lambda p, hyper, batch: cross_entropy(p, batch))
    settings: Any = {"adjoint": ADJOINT, "throw": False}

    def by_hypergradient(hyper, params, train, valid):
        data, inner = mo.Minibatches(train, 64), constant(num_steps)
        call = ft.partial(mo.hypergradient, problem, inner=inner, **settings)
        return call(hyper, data, valid, params=params)[0]

    def by_solve_inner(hyper, params, train, valid):
        data, inner = mo.Minibatches(train, 64), constant(num_steps)
        call = ft.partial(mo.solve_inner, problem.inner, solver=inner, **settings)
        outer = lambda hyper: cross_entropy(call(hyper, data, params=params).value, valid)
        return jax.grad(outer)(hyper)

    gradient = by_hypergradient if way == "hypergradient" else by_solve_inner
    lowered = jax.jit(gradient).lower(hyper, params, rows(4096), rows(64))
    used = lowered.compile().memory_analysis()
    assert used is not None
    size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    words = lossless.num_words(num_steps, int(0.9 * lossless.ONE)) + 2
    # Ten copies of the params, 1.07 MB each, and the words: 16 MB. All of the steps at
    # two copies each would take 2.1 GB.
    assert 2 * size * words < used.temp_size_in_bytes < 18e6


#
# The hypergradient is that of the steps taken
#


def value_of(
    hyper,
    params,
    train,
    shift,
    *,
    inner,
    adjoint,
    throw=True,
):
    """An outer loss of everything that a solution holds, as a function of everything."""

    def loss(params, hyper, batch, key):
        x, y = batch
        noise = 0.1 * jax.random.normal(key, x.shape, x.dtype)
        value = decayed(params, hyper, (x + noise, y + shift))
        return value, {"size": jnp.sum(params["out"] ** 2), "count": jnp.arange(2)}

    solution = mo.solve_inner(
        mo.InnerProblem(loss, has_aux=True),
        hyper,
        mo.Minibatches(train, 5),
        params=params,
        solver=inner,
        adjoint=adjoint,
        throw=throw,
    )
    return (
        sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(solution.value))
        + 0.1 * jnp.sum(solution.stats["losses"] ** 2)
        + 0.1 * solution.aux["size"]
    )


@pytest.mark.one_of(4)
@pytest.mark.parametrize(
    "dtype, rtol",
    [(jnp.float32, 1e-5), pytest.param(jnp.float64, 1e-13, marks=pytest.mark.slow)],
)
def test_derivatives_are_those_of_the_unrolled_steps(dtype, rtol):
    # In hyper by way of loss, rates and momenta; in initial params, in data, and in an
    # array that the loss closes over; of params, losses and auxiliary output.
    num_steps = 100
    params, train, _ = arrays(dtype)
    arguments = scheduled_hyper(num_steps, dtype), params, train, jnp.asarray(0.1, dtype)
    inner = scheduled(num_steps)

    def gradient(adjoint, shift):
        value = ft.partial(value_of, inner=inner, adjoint=adjoint)
        return jax.grad(value, argnums=(0, 1, 2, 3))(*arguments[:3], shift)

    got, want = (
        jax.jit(gradient, static_argnums=0)(a, arguments[3]) for a in (ADJOINT, UNROLLED)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == dtype
        assert relative_error(a, b) < rtol


def float_sgd(num_steps: int) -> mo.Descent:
    return mo.Descent(
        lambda hyper: optax.sgd(
            lambda step: jnp.exp(hyper["log_rate"])[step], hyper["momentum"]
        ),
        num_steps,
    )


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    # What is left is rounding to 2**-22 (2**-48), if the momentum is a multiple of 2**-16;
    # if not, it goes up and down by so much. This path multiplies changes of its momentum
    # by 400: always rounded down, 0.9 would come to an error of 2e-3.
    "dtype, rtol, on_grid",
    [(jnp.float32, 1e-4, False), (jnp.float64, 1e-5, False), (jnp.float64, 1e-11, True)],
)
def test_hypergradient_is_that_of_sgd_with_momentum(dtype, rtol, on_grid):
    num_steps = 200
    params, train, valid = arrays(dtype)
    hyper = scheduled_hyper(num_steps, dtype)
    # 0.875 is a multiple of 2**-16.
    hyper["momentum"] = jnp.asarray(0.875 if on_grid else 0.9, dtype)
    call = ft.partial(mo.hypergradient, PROBLEM, hyper, train, valid, params=params)
    got, report = call(inner=scheduled(num_steps), adjoint=ADJOINT)
    want, other = call(inner=float_sgd(num_steps), adjoint=UNROLLED)
    assert bool(report.derivative.returned_to_start)
    assert abs(report.outer.loss / other.outer.loss - 1) < rtol
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < rtol


def test_hypergradient_is_that_of_finite_differences():
    # Of the float64 dynamics: those in fixed point are a staircase.
    num_steps = 40
    params, train, valid = arrays(jnp.float64)
    hyper = scheduled_hyper(num_steps, jnp.float64)
    hyper["momentum"] = jnp.asarray(0.875, jnp.float64)
    call = ft.partial(mo.hypergradient, PROBLEM, params=params, train=train, valid=valid)
    got, _ = call(hyper, inner=scheduled(num_steps), adjoint=ADJOINT)

    @jax.jit
    def loss(hyper):
        inner, adjoint = float_sgd(num_steps), UNROLLED
        reached = mo.solve_inner(
            PROBLEM.inner, hyper, train, params=params, solver=inner, adjoint=adjoint
        )
        return mean_square(reached.value, valid)

    direction = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape), hyper)
    for name in hyper:
        along = {k: v if k == name else 0 * v for k, v in direction.items()}
        moved = lambda h: jax.tree.map(lambda a, d: a + h * d, hyper, along)
        slope = (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5
        assert abs(jnp.sum(got[name] * direction[name]) / slope - 1) < 1e-6


@pytest.mark.one_of(3)
@pytest.mark.parametrize("dtype, rtol", [(jnp.float64, 1e-10), (jnp.float32, 2e-4)])
@pytest.mark.parametrize(
    "case", [name for name in CASES if CASES[name](jnp.float64).kind == LOSS]
)
def test_hypergradient_at_the_solution_is_the_closed_form(case, dtype, rtol):
    case = CASES[case](dtype)
    # What a momentum of 0.5 makes a step of half the rate into is a step of the rate.
    inner = mo.ReversibleSGD(case.rate / 2, 0.5, 2 * case.num_steps)
    got, report = mo.hypergradient(
        case.problem,
        case.hyper,
        *case.data,
        params=case.params,
        inner=inner,
        adjoint=ADJOINT,
    )
    assert bool(report.derivative.returned_to_start)
    assert relative_error(got, case.reference().gradient()) < rtol


def test_gradients_that_are_no_gradients():
    # A loss that holds a part of itself constant has second derivatives that are not
    # symmetric: a product with them in forward mode is not the transposed one.
    def inner_loss(params, hyper, batch):
        held = jax.lax.stop_gradient(params)
        return jnp.sum((params - hyper) ** 2) + jnp.sum(params * held[::-1] * hyper)

    problem = mo.BilevelProblem(inner_loss, lambda params, *_: jnp.sum(params**3))
    inner = mo.ReversibleSGD(0.1, 0.5, 10)
    call = ft.partial(mo.hypergradient, problem, jnp.array([0.3, 0.7]), params=jnp.ones(2))
    got, want = (call(inner=inner, adjoint=adjoint)[0] for adjoint in (ADJOINT, UNROLLED))
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "adjoint",
    [
        mo.ForwardAdjoint(),
        mo.TruncatedAdjoint(60),
        mo.TruncatedAdjoint(5),
        mo.OneStepAdjoint(),
        mo.ImplicitAdjoint(inner_rtol=jnp.inf),
    ],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_other_adjoints_take_the_solver(adjoint):
    # Of the same dynamics in floating point.
    num_steps, case = 60, CASES["ridge"](jnp.float64)
    call = ft.partial(
        mo.hypergradient, case.problem, case.hyper, *case.data, params=case.params
    )
    reversible = mo.ReversibleSGD(0.05, 0.875, num_steps)
    descent = mo.Descent(optax.sgd(0.05, 0.875), num_steps)
    got, want = (call(inner=inner, adjoint=adjoint)[0] for inner in (reversible, descent))
    assert relative_error(got, want) < 1e-11


#
# Inputs of any kind
#


@pytest.mark.ci
def test_vmap_and_jit():
    case, num_steps, traced = CASES["ridge"](jnp.float32), 60, []
    inner = mo.ReversibleSGD(
        0.05, lambda hyper: hyper["momentum"], num_steps, min_momentum=0.8
    )

    def inner_loss(params, hyper, batch):
        traced.append(None)
        return loss(params, hyper["decay"], batch)

    problem = mo.BilevelProblem(inner_loss, case.problem.outer_loss)
    given = case.problem.inner
    assert isinstance(given, mo.extend.AbstractInnerProblem)
    loss = given.loss

    def gradient(hyper):
        return mo.hypergradient(
            problem, hyper, *case.data, params=case.params, inner=inner, adjoint=ADJOINT
        )

    def value(hyper):
        solution = mo.solve_inner(
            problem.inner,
            hyper,
            case.train,
            params=case.params,
            solver=inner,
            adjoint=ADJOINT,
        )
        return case.problem.outer_loss(solution.value, None, case.valid)

    first = {"decay": case.hyper, "momentum": jnp.linspace(0.85, 0.9, num_steps)}
    # Another momentum fills the digits at another time.
    second = {"decay": case.moved, "momentum": jnp.linspace(0.99, 0.81, num_steps)}
    apart = [gradient(first)]
    count = len(traced)
    apart.append(gradient(second))
    assert len(traced) == count
    both = jax.tree.map(lambda *a: jnp.stack(a), first, second)
    together, report = jax.jit(jax.vmap(gradient))(both)
    slopes = jax.jit(jax.vmap(jax.grad(value)))(both)
    of_sum = jax.jit(jax.grad(lambda both: jnp.sum(jax.vmap(value)(both))))(both)
    assert np.all(
        report.derivative.returned_to_start
    ) and report.derivative.stored_bits.shape == (2,)
    assert "2 of 2" in str(report)
    for i, (alone, one) in enumerate(apart):
        assert report.derivative.stored_bits[i] == one.derivative.stored_bits
        for batched in (together, slopes, of_sum):
            # Products of several matrices at once are rounded differently.
            got = jax.tree.map(lambda a, i=i: a[i], batched)
            assert relative_error(got, alone) < 1e-4


class Net(eqx.Module):
    """Params of several precisions, a tuple among them, and leaves that are not trained."""

    pair: tuple[jax.Array, jax.Array]
    half: jax.Array
    order: jax.Array
    activation: Any
    none: None = None


@pytest.mark.ci
def test_params_of_any_kind():
    net = Net(
        pair=(jnp.ones(2, jnp.float32), jnp.full((), 0.5, jnp.float64)),
        half=jnp.zeros(2, jnp.bfloat16),
        order=jnp.array([1, 0]),
        activation=jnp.tanh,
    )

    def inner_loss(net, hyper, batch):
        wide = net.activation(net.pair[0][net.order]) * net.pair[1]
        half = net.half.astype(jnp.float32)
        return jnp.sum((wide - hyper) ** 2) + jnp.sum((half - hyper) ** 2)

    def outer_loss(net, hyper, batch):
        return jnp.sum(net.pair[0]) + net.pair[1] + jnp.sum(net.half.astype(jnp.float32))

    problem = mo.BilevelProblem(inner_loss, outer_loss)
    inner = mo.ReversibleSGD(0.1, 0.5, 50)
    call = ft.partial(
        mo.hypergradient, problem, jnp.array([0.3, 0.6], jnp.float32), params=net
    )
    (got, report), (want, _) = (
        call(inner=inner, adjoint=adjoint) for adjoint in (ADJOINT, UNROLLED)
    )
    assert bool(report.derivative.returned_to_start)
    # Cotangents of half precision are summed in single here.
    assert relative_error(got, want) < 1e-2
    start = jax.tree.map(lambda a: a, net)
    reached = mo.solve_inner(
        problem.inner, jnp.array([0.3, 0.6]), params=start, solver=inner, adjoint=ADJOINT
    ).value
    assert reached.half.dtype == jnp.bfloat16
    # Steps below the resolution of the dtype add up: each of the last moves by less.
    np.testing.assert_allclose(reached.half.astype(float), [0.3, 0.6], rtol=2**-8)


def test_no_words_are_kept_without_derivative():
    # Nor is time: what does not record is the same loop.
    params, train, _ = arrays()

    def solve(params):
        return mo.solve_inner(
            PROBLEM.inner,
            hyper,
            train,
            params=params,
            solver=inner,
            adjoint=ADJOINT,
            throw=False,
        ).value

    hyper, inner = constant_hyper(), constant(4000)
    used = jax.jit(solve).lower(params).compile().memory_analysis()
    assert used is not None
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    words = lossless.num_words(4000, int(0.9 * lossless.ONE))
    assert used.temp_size_in_bytes < 2 * size * words + 4 * 4000 * 3 + 20_000


class Normalised(mo.extend.AbstractInnerProblem):
    has_state = True

    def init(self, hyper, key):
        return jnp.ones(2), jnp.array([0.5, 2.0]) + hyper**2

    def loss(self, params, hyper, batch, *, state):
        value = jnp.sum((params * state - hyper) ** 2)
        return value, 0.9 * state + 0.1 * params


@pytest.mark.ci
def test_model_state():
    def outer_loss(params, hyper, batch, *, state):
        return jnp.sum(params**2 * state)

    problem = mo.BilevelProblem(Normalised(), outer_loss)
    hyper = jnp.array([0.3, 0.6])
    for policy in (mo.nn.CarriedState(), mo.nn.PerStepState()):
        inner = mo.ReversibleSGD(0.05, 0.5, 30, state_policy=policy)
        with pytest.raises(ValueError, match="cannot undo .*FrozenState.*UnrolledAdj"):
            mo.hypergradient(problem, hyper, inner=inner, adjoint=ADJOINT)
    inner = mo.ReversibleSGD(0.05, 0.5, 30, state_policy=mo.nn.FrozenState())

    def value(state, adjoint):
        solution = mo.solve_inner(
            problem.inner,
            hyper,
            params=jnp.ones(2),
            solver=inner,
            adjoint=adjoint,
            model_state=state,
        )
        return jnp.sum(solution.value**2 * solution.model_state)

    got, want = (
        mo.hypergradient(problem, hyper, inner=inner, adjoint=adjoint)[0]
        for adjoint in (ADJOINT, UNROLLED)
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)
    state = jnp.array([0.5, 2.0])
    got, want = (jax.grad(value)(state, adjoint) for adjoint in (ADJOINT, UNROLLED))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_what_depends_on_hyper_is_reached():
    problem = mo.BilevelProblem(
        mo.InnerProblem(
            lambda params, hyper, batch: jnp.sum((params - 1.0) ** 2),
            init_fn=lambda hyper, key: hyper["start"],
        ),
        lambda params, hyper, batch: jnp.sum(params**2),
    )
    hyper = {
        "start": jnp.array([0.3, 0.2]),
        "rate": jnp.array(0.05),
        "idle": jnp.array(3.0),
    }
    inner = mo.ReversibleSGD(lambda hyper: hyper["rate"], 0.5, 10)
    got, report = mo.hypergradient(problem, hyper, inner=inner, adjoint=ADJOINT)
    want, _ = mo.hypergradient(problem, hyper, inner=inner, adjoint=UNROLLED)
    assert relative_error(got, want) < 1e-12
    assert report.outer.unreached == ("hyper['idle']",) and got["idle"] == 0
    rounded = mo.ReversibleSGD(lambda hyper: jnp.round(hyper["rate"], 3), 0.5, 10)
    with pytest.raises(ValueError, match="`hyper\\['rate'\\]` is zero by construction"):
        mo.hypergradient(problem, hyper, inner=rounded, adjoint=ADJOINT)


#
# Failures
#


def quadratic(inner: mo.extend.AbstractSolver, hyper: Any = 2.0, **options: Any):
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch: jnp.sum(params**2),
    )
    return mo.hypergradient(
        problem,
        hyper,
        params=jnp.ones(2, jnp.float32),
        inner=inner,
        adjoint=ADJOINT,
        **options,
    )


FAILURES = {
    "diverges": (lambda: quadratic(mo.ReversibleSGD(3.0, 0.9, 100)), "left the range"),
    "large target": (lambda: quadratic(mo.ReversibleSGD(0.1, 0.9, 9), 300.0), "left the"),
    "momentum too low": (
        lambda: quadratic(mo.ReversibleSGD(0.1, lambda hyper: 0.2 * hyper, 9)),
        r"left `\[min_momentum, 1\)`",
    ),
    "momentum too high": (
        lambda: quadratic(mo.ReversibleSGD(0.1, lambda hyper: 0.5 * hyper, 9)),
        r"left `\[min_momentum, 1\)`",
    ),
    "momentum NaN": (
        lambda: quadratic(mo.ReversibleSGD(0.1, lambda hyper: jnp.log(-hyper), 9)),
        r"left `\[min_momentum, 1\)`",
    ),
    "rate NaN": (
        lambda: quadratic(mo.ReversibleSGD(lambda hyper: jnp.log(-hyper), 0.9, 9)),
        "left the range",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures(name):
    call, text = FAILURES[name]
    with pytest.raises(mo.SolveError, match=text) as error:
        call()
    gradient, report = error.value.value
    assert np.all(np.isnan(gradient))
    assert report.inner.failed_step >= 0


def test_range_is_as_documented():
    inner = mo.ReversibleSGD(0.125, 0.5, 1)
    for start, fits in ((255.9, True), (256.1, False), (-255.8, True), (-255.9, False)):
        solution = mo.solve_inner(
            mo.InnerProblem(lambda params, hyper, batch: params * hyper),
            1.0,
            params=jnp.float32(start),
            solver=inner,
            adjoint=ADJOINT,
            throw=False,
        )
        assert bool(solution.result == mo.RESULTS.successful) == fits
        if fits:
            assert solution.value == jnp.float32(jnp.float32(start) - 0.125)
    # Fewer binary digits, a wider range.
    wide = mo.ReversibleSGD(0.125, 0.5, 1, fraction_bits=12)
    gradient, report = quadratic(wide, 300.0, throw=False)
    assert report.result == mo.RESULTS.successful and np.isfinite(gradient)


def test_nonfinite_gradients_are_named():
    problem = mo.InnerProblem(lambda params, hyper, batch: hyper * jnp.sqrt(params))
    solution = mo.solve_inner(
        problem,
        1.0,
        params=jnp.float32(0.0),
        solver=mo.ReversibleSGD(0.1, 0.5, 3),
        adjoint=ADJOINT,
        throw=False,
    )
    assert solution.result == mo.RESULTS.inner_nonfinite
    assert solution.stats["failed_step"] == 0


def one_digit_off(self, exact, words, *rest):
    digit = [exact.digit[0].at[(0,) * exact.digit[0].ndim].add(1), *exact.digit[1:]]
    exact = eqx.tree_at(lambda e: e.digit, exact, digit)
    return VELOCITY_BEFORE(self, exact, words, *rest)


def one_word_off(self, exact, words, *rest):
    words = [words[0].at[0, 0].add(1), *words[1:]]
    return VELOCITY_BEFORE(self, exact, words, *rest)


def gradient_off(self, exact, words, gradient, *rest):
    # In the last place, as where another order of summation rounds differently.
    gradient = jax.tree.map(lambda g: g * (1 + 2**-23), gradient)
    return VELOCITY_BEFORE(self, exact, words, gradient, *rest)


VELOCITY_BEFORE = mo.ReversibleSGD.velocity_before


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    # Each with a number of steps of its own, so that nothing compiled is used again.
    "num_steps, mutation",
    [(301, one_digit_off), (302, one_word_off), (303, gradient_off)],
)
def test_a_way_back_that_misses_the_start_is_no_hypergradient(
    num_steps, mutation, monkeypatch
):
    monkeypatch.setattr(mo.ReversibleSGD, "velocity_before", mutation)
    case = CASES["ridge"](jnp.float32)
    inner = mo.ReversibleSGD(0.05, 0.9, num_steps)
    call = ft.partial(
        mo.hypergradient, case.problem, case.hyper, *case.data, params=case.params
    )
    with pytest.raises(mo.SolveError, match="did not end where they began") as error:
        call(inner=inner, adjoint=ADJOINT)
    gradient, report = error.value.value
    assert report.result == mo.RESULTS.inner_not_reversed
    assert not report.derivative.returned_to_start
    assert any(re.fullmatch(r"  returned to start +NO", row) for row in rows_of(report))
    assert np.all(np.isnan(gradient))

    def value(hyper, throw):
        solution = mo.solve_inner(
            case.problem.inner,
            hyper,
            case.train,
            params=case.params,
            solver=inner,
            adjoint=ADJOINT,
            throw=throw,
        )
        return jnp.sum(solution.value)

    with pytest.raises(RuntimeError, match="did not end where they began"):
        eqx.filter_jit(jax.grad(value))(case.hyper, True)
    assert np.all(np.isnan(jax.grad(value)(case.hyper, False)))


def test_derivatives_that_it_does_not_give():
    case, inner = CASES["ridge"](jnp.float32), mo.ReversibleSGD(0.05, 0.9, 20)

    def value(hyper):
        solution = mo.solve_inner(
            case.problem.inner,
            hyper,
            case.train,
            params=case.params,
            solver=inner,
            adjoint=ADJOINT,
        )
        return jnp.sum(solution.value)

    def gradient(hyper):
        call = ft.partial(mo.hypergradient, case.problem, inner=inner, adjoint=ADJOINT)
        return jnp.sum(call(hyper, *case.data, params=case.params)[0])

    second = "a derivative of one was asked for. Use `metaopt.UnrolledAdjoint"
    for fn in (jax.hessian(value), jax.jacrev(jax.grad(value)), jax.grad(gradient)):
        with pytest.raises(ValueError, match=second):
            fn(case.hyper)
    with pytest.raises(RuntimeError, match="in reverse mode .*ForwardAdjoint"):
        eqx.filter_jit(jax.jacfwd(value))(case.hyper)


def momentum_off(value: Any, **options: Any):
    return lambda: mo.ReversibleSGD(0.1, value, 10, **options)


CONTRACTION = mo.BilevelProblem(
    mo.FixedPointProblem(lambda z, hyper, batch: 0.5 * z + hyper),
    lambda params, hyper, batch: jnp.sum(params),
)

REFUSED = {
    "another solver": (
        lambda: quadratic(mo.Descent(optax.sgd(0.1), 10)),
        "`ReversibleAdjoint` undoes .* `Descent` cannot be undone. Use `metaopt.Revers",
    ),
    "a fixed point": (
        lambda: mo.hypergradient(
            CONTRACTION,
            1.0,
            params=jnp.zeros(2),
            inner=mo.ReversibleSGD(0.1, 0.9, 10),
            adjoint=UNROLLED,
        ),
        "`ReversibleSGD` minimises a loss",
    ),
    "no momentum": (momentum_off(0.0), r"must lie in \[0.1, 1\); got 0.0"),
    "momentum of one": (momentum_off(1.0), r"`momentum` must lie in \[0, 1\); got 1.0"),
    "momentum of two": (
        momentum_off(np.linspace(0.5, 2.0, 10)),
        r"`momentum` must lie in \[0, 1\)",
    ),
    "momentum below the smallest": (
        momentum_off(0.7, min_momentum=0.8),
        "`min_momentum` is 0.8, and `momentum` is 0.7",
    ),
    "smallest momentum": (
        momentum_off(lambda hyper: hyper, min_momentum=1.0),
        r"must lie in \[0.1, 1\); got 1.0",
    ),
    "kind of smallest momentum": (
        momentum_off(lambda hyper: hyper, min_momentum="0.5"),
        "`min_momentum` must be a number; got '0.5'",
    ),
    "kind of momentum": (momentum_off("0.5"), "`momentum` must be a number, an array or"),
    "length of a schedule": (
        momentum_off(jnp.full(9, 0.9)),
        r"`momentum` has shape \(9,\).*\(10,\), with a value for each step",
    ),
    "length of a function's schedule": (
        lambda: quadratic(mo.ReversibleSGD(lambda hyper: jnp.ones(3) * hyper, 0.9, 10)),
        r"`learning_rate` has shape \(3,\)",
    ),
    "number of steps": (lambda: mo.ReversibleSGD(0.1, 0.9, 0), "`num_steps` must be at"),
    "fraction bits": (
        lambda: mo.ReversibleSGD(0.1, 0.9, 5, fraction_bits=0),
        "`fraction_bits` must be at least 1",
    ),
    "too many fraction bits": (
        lambda: quadratic(mo.ReversibleSGD(0.1, 0.9, 5, fraction_bits=40)),
        "`fraction_bits` is 40, which leaves no range for params of dtype float32",
    ),
    "state policy without state": (
        lambda: quadratic(mo.ReversibleSGD(0.1, 0.9, 5, state_policy=mo.nn.FrozenState())),
        "declares no model state",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        call()


def test_strict_promotion_is_for_users_and_not_for_integers_of_ours():
    problem = mo.BilevelProblem(
        lambda p, h, b: jnp.sum((p - h) ** 2), lambda p, h, b: jnp.sum(p)
    )
    args = problem, jnp.array([1.0, 2.0])
    with jax.numpy_dtype_promotion("strict"):
        found = [
            mo.hypergradient(*args, params=jnp.zeros(2), inner=inner, adjoint=adjoint)[0]
            for inner, adjoint in (
                (mo.Descent(optax.sgd(0.1, 0.5), 20), mo.UnrolledAdjoint()),
                (mo.ReversibleSGD(0.1, 0.5, num_steps=20), mo.ReversibleAdjoint()),
            )
        ]
        # The mode of the user is as before.
        with pytest.raises(jax.dtypes.TypePromotionError):
            jnp.add(jnp.ones(1, jnp.float32), jnp.ones(1, jnp.int32))
    np.testing.assert_allclose(*found, rtol=1e-4)
