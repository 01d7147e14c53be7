"""New values are not traced again: a loop that compiles at every step is a hundred times
slower, and nothing else shows it."""

import gc
import weakref
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import metaopt as mo
from jaxprs import operations
from metaopt._core._anew import Programs
from metaopt._core._static import Static
from problems import CASES


class Counted:
    """A function that counts how often Python runs it: a few times for each trace."""

    def __init__(self, fn):
        self.fn, self.count = fn, 0

    def __call__(self, params, hyper, batch):
        self.count += 1
        return self.fn(params, hyper, batch)


def counted_problem() -> tuple[mo.BilevelProblem, Counted, Counted]:
    case = CASES["ridge"](jnp.float64)
    problem: Any = case.problem
    inner, outer = Counted(problem.inner.loss_fn), Counted(problem.outer_loss)
    return mo.BilevelProblem(inner, outer), inner, outer


DESCENT = mo.Descent(optax.sgd(0.5), num_steps=30)
NEWTON = mo.OptimistixSolver(optx.Newton(rtol=1e-8, atol=1e-8))


@pytest.mark.parametrize(
    "inner, adjoint, start",
    [
        (DESCENT, mo.UnrolledAdjoint(), mo.ColdStart()),
        (DESCENT, mo.TruncatedAdjoint(5), mo.WarmStart()),
        (DESCENT, mo.UnrolledAdjoint(), mo.Windows(restart_every=2)),
        (DESCENT, mo.ForwardAdjoint(), mo.ColdStart()),
        (DESCENT, mo.OneStepAdjoint(), mo.WarmStart()),
        (NEWTON, mo.ImplicitAdjoint(), mo.WarmStart()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_outer_steps_trace_once(inner, adjoint, start):
    case = CASES["ridge"](jnp.float64)
    problem, inner_loss, outer_loss = counted_problem()
    counts, hypers = [], []

    def callback(run):
        counts.append((inner_loss.count, outer_loss.count))
        hypers.append(np.asarray(run.hyper))

    mo.solve_bilevel(
        problem,
        case.hyper,
        *case.data,
        params=case.params,
        solver=mo.NestedSolver(inner, adjoint, optax.adam(0.1), start),
        num_steps=20,
        callbacks=[callback],
    )
    assert counts[0] > (0, 0)
    assert counts == 20 * counts[:1]
    assert len({hyper.tobytes() for hyper in hypers}) == 20


@pytest.mark.parametrize("adjoint", [mo.ImplicitAdjoint(), mo.UnrolledAdjoint()], ids=repr)
def test_a_loss_is_traced_few_times(adjoint):
    case = CASES["ridge"](jnp.float64)
    problem, inner_loss, outer_loss = counted_problem()
    mo.hypergradient(
        problem, case.hyper, *case.data, params=case.params, inner=DESCENT, adjoint=adjoint,
        throw=False,
    )  # fmt: skip
    assert inner_loss.count == outer_loss.count == 1


def test_minibatches_from_an_iterator_trace_once():
    case = CASES["ridge"](jnp.float64)
    problem, inner_loss, _ = counted_problem()
    counts = []

    def feed():
        x, y = case.train
        for shift in range(3):
            yield mo.Minibatches((x + 0.1 * shift, np.asarray(y)), batch_size=8)

    mo.solve_bilevel(
        problem,
        case.hyper,
        feed(),
        case.valid,
        params=case.params,
        solver=mo.NestedSolver(DESCENT, mo.OneStepAdjoint(), optax.sgd(0.1)),
        num_steps=3,
        callbacks=[lambda run: counts.append(inner_loss.count)],
    )
    assert counts == 3 * counts[:1]


def one_hypergradient(hyper: Any, problem: mo.BilevelProblem) -> tuple[Any, Any]:
    case = CASES["ridge"](jnp.float64)
    gradient, report = mo.hypergradient(
        problem,
        hyper,
        *case.data,
        params=case.params,
        inner=DESCENT,
        adjoint=mo.UnrolledAdjoint(),
    )
    return gradient, report.outer.loss


def test_numbers_of_any_type_are_one_trace():
    # Elsewhere, and once here, a Python float is a static argument and a 0-d array has a
    # weak type: each gives a trace of its own, and a float one for every new value.
    problem, inner_loss, _ = counted_problem()
    counts, results = [], []
    for hyper in (
        -1.0,
        np.float64(-1.0),
        np.array(-1.0),
        jnp.asarray(-1.0),
        jnp.array(-1.0, jnp.float64),
    ):
        results.append(one_hypergradient(hyper, problem))
        counts.append(inner_loss.count)
    assert counts == len(counts) * counts[:1]
    for gradient, outer_loss in results:
        assert gradient.dtype == jnp.float64 and not gradient.weak_type
        np.testing.assert_array_equal(gradient, results[0][0])
        np.testing.assert_array_equal(outer_loss, results[0][1])


def test_a_hundred_hypergradients_are_one_trace():
    problem, inner_loss, outer_loss = counted_problem()
    losses = {float(one_hypergradient(-1.0, problem)[1])}
    counts = inner_loss.count, outer_loss.count
    for value in np.linspace(-3.0, 0.0, 99):
        losses.add(float(one_hypergradient(float(value), problem)[1]))
    assert (inner_loss.count, outer_loss.count) == counts
    assert len(losses) == 100


def test_equal_solvers_made_anew_are_one_trace():
    # Settings are compared by value, and so are plain functions that are the same object.
    problem, inner_loss, _ = counted_problem()
    case, transform = CASES["ridge"](jnp.float64), optax.sgd(0.5)
    counts = []
    for _ in range(3):
        mo.hypergradient(
            problem,
            case.hyper,
            *case.data,
            params=case.params,
            inner=mo.Descent(transform, num_steps=30),
            adjoint=mo.ImplicitAdjoint(mo.CG(rtol=1e-3)),
        )
        counts.append(inner_loss.count)
    assert counts == 3 * counts[:1]


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "adjoint",
    [
        mo.UnrolledAdjoint(),
        mo.UnrolledAdjoint(mo.memory.Blocks()),
        mo.TruncatedAdjoint(5),
        mo.ForwardAdjoint(),
        mo.ImplicitAdjoint(),
    ],
    ids=repr,
)
def test_more_steps_are_not_more_to_compile(adjoint):
    # Elsewhere steps are written out in a Python loop: 60 of them compile for a minute.
    case = CASES["ridge"](jnp.float64)

    def num_operations(num_steps):
        def gradient(hyper):
            return mo.hypergradient(
                case.problem,
                hyper,
                *case.data,
                params=case.params,
                inner=mo.Descent(optax.sgd(0.5), num_steps),
                adjoint=adjoint,
                throw=False,
            )[0]

        return len(operations(gradient, case.hyper))

    # Both are squares, which `Blocks` cuts evenly.
    assert num_operations(16) == num_operations(100)


@pytest.mark.parametrize(
    "adjoint",
    [mo.UnrolledAdjoint(), mo.ImplicitAdjoint()],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_solve_inner_traces_once(adjoint):
    case = CASES["ridge"](jnp.float64)
    problem, inner_loss, _ = counted_problem()
    counts = []
    for value in (-1.0, -0.5, np.float64(0.0)):
        solution = mo.solve_inner(
            problem.inner,
            value,
            case.train,
            params=case.params,
            solver=DESCENT,
            adjoint=adjoint,
        )
        counts.append(inner_loss.count)
    assert solution.value.dtype == jnp.float64
    assert counts == 3 * counts[:1]


def test_a_run_traces_each_loss_once():
    case = CASES["ridge"](jnp.float64)
    problem, inner_loss, outer_loss = counted_problem()
    for _ in range(2):  # transforms of optax that are made anew are told for the same
        mo.solve_bilevel(
            problem,
            case.hyper,
            *case.data,
            params=case.params,
            solver=mo.NestedSolver(
                mo.Descent(optax.adam(0.1), 5), mo.UnrolledAdjoint(), optax.sgd(0.1)
            ),
            num_steps=2,
        )
        assert inner_loss.count == outer_loss.count == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adam(1e-3),
        lambda: optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)),
        lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 10)),
    ],
)
def test_transforms_made_anew_are_equal(make):
    assert Static(make()) == Static(make())
    assert hash(Static(make())) == hash(Static(make()))


def test_transforms_of_other_numbers_are_not_equal():
    rates = [0.1, 0.2, 1, 1.0]
    keys = [Static(optax.sgd(rate)) for rate in rates]
    assert len(set(keys)) == len(rates)
    # A function of the user may read globals.
    made = lambda rate: lambda step: rate
    assert Static(optax.sgd(made(0.1))) != Static(optax.sgd(made(0.1)))
    schedule = made(0.1)
    assert Static(optax.sgd(schedule)) == Static(optax.sgd(schedule))
    # ... and an array has no hash.
    rate = jnp.asarray(0.1)
    assert Static(optax.sgd(rate)) != Static(optax.sgd(rate))


# -- functions made anew


def solve_anew(rate: float) -> None:
    problem = mo.BilevelProblem(kept_loss, lambda params, hyper, batch: jnp.sum(params**2))
    mo.solve_bilevel(
        problem,
        jnp.ones(2),
        params=jnp.zeros(2),
        solver=mo.NestedSolver(
            mo.Descent(optax.sgd(rate), 1), mo.UnrolledAdjoint(), optax.sgd(0.1)
        ),
        num_steps=1,
    )


def kept_loss(params, hyper, batch):
    return jnp.sum((params - hyper) ** 2)


def test_a_function_made_anew_is_named_once(caplog):
    solve_anew(0.1)
    solve_anew(0.1)
    assert not caplog.records  # two programs may be what somebody wants
    solve_anew(0.1)
    (record,) = caplog.records
    assert record.name == "metaopt" and record.levelname == "WARNING"
    assert (
        "compiles the same program again" in record.message
        and "test_compiled_once.py" in record.message
    )
    assert "<lambda>" in record.message and "kept_loss" not in record.message
    solve_anew(0.1)
    assert len(caplog.records) == 1


def test_programs_that_differ_in_more_are_no_matter(caplog):
    loss = lambda params, hyper, batch: jnp.sum(params**2)
    problem = mo.BilevelProblem(kept_loss, loss)
    for num_steps in (1, 2, 3, 4):
        descent = mo.Descent(optax.sgd(0.1), num_steps)
        mo.hypergradient(
            problem,
            jnp.ones(2),
            params=jnp.zeros(2),
            inner=descent,
            adjoint=mo.UnrolledAdjoint(),
        )
    assert not caplog.records


def test_functions_are_not_kept_alive():
    def scaled(x):
        return 2 * x

    programs = Programs()
    programs.see(Static.split((scaled, jnp.ones(2)))[1])
    reference = weakref.ref(scaled)
    del scaled
    gc.collect()
    assert reference() is None
