"""The memory plan that `UnrolledAdjoint()` chooses from shapes."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt._adjoint._memory import _automatic, _budget
from metaopt._adjoint._memory._automatic import plan_for
from problems import relative_error


MIB = 2**20
STORED = mo.memory.StoreAll()


@pytest.fixture
def small_limits(monkeypatch):
    # Limits at which problems of a few numbers are cut into blocks.
    monkeypatch.setattr(_automatic, "_WHOLE", 64)
    monkeypatch.setattr(_automatic, "_BLOCKS", 64)
    monkeypatch.setattr(_automatic, "_STEPS", 4)
    monkeypatch.setattr(_automatic, "_AT_MOST", 64)
    jax.clear_caches()  # a solve that was traced before is not traced again
    plans = []

    def spy(*sizes):
        plans.append(plan_for(*sizes))
        return plans[-1]

    monkeypatch.setattr(_automatic, "plan_for", spy)
    yield
    # Else the test compares a plan with itself.
    assert plans and all(isinstance(plan, mo.memory.Blocks) for plan in plans)


@pytest.mark.parametrize(
    "tape, state, num_steps, plan",
    [
        (MIB, MIB // 2, 5, STORED),
        (MIB, MIB // 2, 384, STORED),
        (4 * MIB, 2 * MIB, 100, mo.memory.Blocks(1, STORED)),
        (4 * MIB, 2 * MIB, 1000, mo.memory.Blocks(1, STORED)),
        (4 * MIB, 2 * MIB, 10_000, mo.memory.Blocks(2, STORED)),
        (3 * MIB // 10, MIB // 14, 10_000, mo.memory.Blocks(2, STORED)),
        (3 * MIB // 10, MIB // 14, 100_000, mo.memory.Blocks(3, STORED)),
        # Nothing is small enough.
        (200 * MIB, 100 * MIB, 10**6, mo.memory.Blocks(3, STORED)),
    ],
)
def test_plan_from_sizes(tape, state, num_steps, plan):
    assert plan_for(tape, state, num_steps) == plan


def test_a_few_steps_are_stored_however_large():
    struct = jax.ShapeDtypeStruct((10**8,), jnp.float32)
    fn = ft.partial(gradient, adjoint=AUTO, num_steps=16)
    _, report = jax.eval_shape(fn, STRUCTS[0], struct)
    assert report.adjoint == "UnrolledAdjoint"
    _, report = jax.eval_shape(ft.partial(fn, num_steps=17), STRUCTS[0], struct)
    assert "Blocks" in report.adjoint


def loss(params, hyper, batch):
    return jnp.sum(jnp.cosh(params - hyper["target"])) + jnp.sum(params**4)


HYPER = {"target": jnp.array(0.3), "rates": jnp.linspace(-3.0, -2.0, 30)}
OPTIMIZERS = {
    "sgd": lambda hyper: optax.sgd(lambda step: jnp.exp(hyper["rates"])[step]),
    "momentum": lambda hyper: optax.sgd(jnp.exp(hyper["rates"][0]), 0.9),
    "adam": lambda hyper: optax.adam(jnp.exp(hyper["rates"][0])),
}


def solved(hyper, adjoint, optimizer="sgd", atol=None):
    solution = mo.solve_inner(
        mo.InnerProblem(loss),
        hyper,
        params=jnp.array([1.0, -0.5, 2.0]),
        solver=mo.Descent(OPTIMIZERS[optimizer], 30, atol=atol),
        adjoint=adjoint,
    )
    return jnp.sum(solution.value**3)


AUTO, ALL = mo.UnrolledAdjoint(), mo.UnrolledAdjoint(STORED)


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "optimizer, atol", [("sgd", None), ("momentum", None), ("adam", None), ("sgd", 1.0)]
)
def test_same_hypergradient_in_blocks(small_limits, optimizer, atol):
    fn = ft.partial(solved, optimizer=optimizer, atol=atol)
    got = jax.jit(jax.grad(lambda h: fn(h, AUTO)))(HYPER)
    want = jax.jit(jax.grad(lambda h: fn(h, ALL)))(HYPER)
    # The same operations in float64, in another program.
    assert relative_error(got, jax.tree.leaves(want)) < 1e-12


def test_second_derivative_and_batches(small_limits):
    def slope(target, adjoint):
        fn = lambda target: solved({**HYPER, "target": target}, adjoint)
        return jax.grad(fn)(target)

    points = jnp.array([0.1, 0.3])
    second = lambda adjoint: jax.jit(jax.vmap(jax.grad(lambda t: slope(t, adjoint))))
    got, want = second(AUTO)(points), second(ALL)(points)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_model_state(small_limits):
    class Counting(mo.extend.AbstractInnerProblem):
        has_state = True

        def init(self, hyper, key):
            return jnp.ones(3), jnp.zeros(())

        def loss(self, params, hyper, batch, *, state):
            return jnp.sum((params - hyper + state) ** 2), state / 2 + jnp.mean(params)

    def value(hyper, adjoint):
        solution = mo.solve_inner(
            Counting(),
            hyper,
            solver=mo.Descent(optax.sgd(0.1), 12, state_policy=mo.nn.CarriedState()),
            adjoint=adjoint,
        )
        return jnp.sum(solution.value**2)

    got, want = (jax.grad(value)(jnp.array(0.5), adjoint) for adjoint in (AUTO, ALL))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def gradient(hyper, params, adjoint, num_steps, count=None):
    def inner(params, hyper, batch):
        if count is not None:
            count.append(1)
        return jnp.sum(jnp.cosh(params - hyper))

    return mo.hypergradient(
        mo.BilevelProblem(inner, lambda params, hyper, batch: jnp.sum(params**2)),
        hyper,
        params=params,
        inner=mo.Descent(optax.sgd(0.01, momentum=0.9), num_steps),
        adjoint=adjoint,
        throw=False,
    )


def loss_of_target(params, hyper, batch):
    return jnp.sum(jnp.cosh(params - hyper))


STRUCTS = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((1000,), jnp.float32)


def lowered(adjoint, num_steps, count=None) -> Any:
    fn = ft.partial(gradient, adjoint=adjoint, num_steps=num_steps, count=count)
    return jax.jit(fn).lower(*STRUCTS)


def test_small_problems_store_all():
    auto, stored = lowered(AUTO, 100), lowered(ALL, 100)
    assert auto.as_text() == stored.as_text()
    assert auto.out_info[1].adjoint == stored.out_info[1].adjoint == "UnrolledAdjoint"


def test_long_runs_keep_little():
    # Stored whole, the params alone would take 763 MiB.
    program = lowered(AUTO, 200_000)
    chosen = program.out_info[1].adjoint
    assert chosen.startswith("UnrolledAdjoint(memory=Blocks(")
    # A few numbers for each step are the losses and the numbers of the steps.
    few = 6 * 8 * 200_000
    assert program.compile().memory_analysis().temp_size_in_bytes < 16 * MIB + few


def test_memory_report_names_the_choice():
    report = mo.memory.memory_report(
        mo.BilevelProblem(loss_of_target, lambda params, hyper, batch: jnp.sum(params**2)),
        0.3,
        params=jnp.zeros(1000),
        inner=mo.Descent(optax.sgd(0.01, momentum=0.9), 200_000),
        adjoints={"blocks": mo.UnrolledAdjoint(mo.memory.Blocks(2))},
    )
    assert report.automatic is not None and "Blocks" in report.automatic
    assert report.automatic in str(report)


def test_nothing_is_compiled_and_the_loss_is_traced_few_times(monkeypatch):
    def refuse(*args):
        raise AssertionError("a plan was compiled")

    monkeypatch.setattr(_budget, "temporary_bytes", refuse)
    counts = {"auto": [], "all": []}
    lowered(AUTO, 200_000, counts["auto"])
    lowered(ALL, 200_000, counts["all"])
    assert len(counts["auto"]) == len(counts["all"]) <= 4


def test_a_budget_compiles_one_plan(monkeypatch):
    sizes, measure = [], _budget.temporary_bytes

    def spy(*args):
        sizes.append(measure(*args))
        return sizes[-1]

    monkeypatch.setattr(_budget, "temporary_bytes", spy)
    # Stored whole, the params alone would take 7.6 MiB.
    chosen = lowered(mo.UnrolledAdjoint("1MiB"), 2000).out_info[1].adjoint
    assert "Blocks(" in chosen and len(sizes) == 1
    assert MIB / 5 < sizes[0] <= MIB


def test_a_budget_compiles_what_is_estimated_as_too_large_last(monkeypatch):
    needs, seen = {"large": 90, "small": 80}, []

    def measure(name):
        seen.append(name)
        return needs[name]

    monkeypatch.setattr(_budget, "temporary_bytes", measure)
    candidates = [_budget.Candidate("large", 1, 1000), _budget.Candidate("small", 1, 150)]
    program: Any = lambda name: name
    choose = lambda: _budget.MemoryBudget(100).choose(candidates, program)
    assert choose() == "small" and seen == ["small"]
    needs["small"] = 101
    assert choose() == "large" and seen == ["small", "small", "large"]


def test_a_tiny_problem_is_not_traced_for_the_choice(monkeypatch):
    def refuse(*args):
        raise AssertionError("a step was traced")

    monkeypatch.setattr(_automatic, "step_bytes", refuse)
    run = lambda num_steps: jax.eval_shape(
        ft.partial(gradient, adjoint=AUTO, num_steps=num_steps),
        STRUCTS[0],
        jax.ShapeDtypeStruct((5,), jnp.float32),
    )
    assert run(200)[1].adjoint == "UnrolledAdjoint"
    with pytest.raises(AssertionError, match="a step was traced"):
        run(201)


def test_data_are_not_counted_for_each_step():
    # They would be 2 MB for each of the steps.
    rows = jnp.ones((1000, 500), jnp.float32)

    def inner(params, hyper, batch):
        return jnp.mean(jnp.tanh(batch @ params) ** 2) + hyper * jnp.sum(params**2)

    _, report = eqx.filter_eval_shape(
        mo.hypergradient,
        mo.BilevelProblem(inner, lambda params, hyper, batch: jnp.sum(params**2)),
        jnp.array(0.1, jnp.float32),
        rows,
        params=jnp.ones(500, jnp.float32),
        inner=mo.Descent(optax.sgd(0.1), 1000),
        throw=False,
        adjoint=AUTO,
    )
    assert report.adjoint == "UnrolledAdjoint"


def test_error_names_auto():
    with pytest.raises(ValueError, match='or `"auto"`; got None'):
        mo.UnrolledAdjoint(None)  # pyright: ignore[reportArgumentType]
