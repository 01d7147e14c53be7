"""Coupled Picard iteration and its way back: the derivative of the steps taken, in the
memory of one, or a word that rounding was in the way."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from cells import contraction, INPUTS, normal, Scales, Tanh, value_of, WIDTH
from metaopt._solver._reversible import Coupling
from problems import CASES, relative_error


ADJOINT = mo.ReversibleAdjoint()
UNROLLED = mo.UnrolledAdjoint()

# The rounding of float64, and what up to a dozen undone steps make of it in a derivative:
# a factor of 4 ** 12 (6 ** 8 for the fastest) in the states, and little of that in what is
# pulled back.
RTOL = 1e-9


CELLS: dict[str, Any] = {
    "tanh": (Tanh, normal((WIDTH,), 3)),
    "two scales": (Scales, {"fine": normal((WIDTH,), 3), "coarse": normal((2,), 4)}),
}
X = normal((INPUTS,), 9)


def by_hand(cell, x, start, num_steps, beta):
    """The steps by plain JAX."""
    mixed = lambda old, new: jax.tree.map(lambda a, f: (1 - beta) * a + beta * f, old, new)
    y = z = start
    for _ in range(num_steps):
        y = mixed(y, cell(z, x))
        z = mixed(z, cell(y, x))
    return z


def gradient_and_steps(arguments, solver, adjoint):
    """The derivative in cell, input and start, by a layer."""

    def value(arguments):
        cell, x, start = arguments
        layer = mo.nn.Equilibrium(cell, solver=solver, adjoint=adjoint, throw=False)
        z, info = layer(x, start)
        return value_of(z), info.num_steps

    return eqx.filter_jit(eqx.filter_grad(value, has_aux=True))(arguments)


#
# The derivative is that of the steps taken
#


@pytest.mark.one_of(4)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    "solver, num_steps",
    [
        (mo.ReversiblePicard(), 6),
        (mo.ReversiblePicard(12, relaxation=0.3), 12),
        (mo.ReversiblePicard(12, rtol=0.03, relaxation=0.6), None),
        (mo.ReversiblePicard(12, budget=5), 5),
    ],
    ids=["defaults", "all steps", "tolerance", "budget"],
)
def test_derivative_is_that_of_the_steps_taken(name, solver, num_steps):
    make, start = CELLS[name]
    arguments = make(), X, start
    got, taken = gradient_and_steps(arguments, solver, ADJOINT)
    unrolled, also = gradient_and_steps(arguments, solver, UNROLLED)
    if num_steps is None:
        num_steps = int(taken)
        assert 1 < num_steps < solver.num_steps
    assert taken == also == num_steps
    plain = ft.partial(by_hand, num_steps=num_steps, beta=solver.relaxation)
    want = jax.grad(lambda arguments: value_of(plain(*arguments)))(arguments)
    for other in (unrolled, want):
        for a, b in zip(*map(jax.tree.leaves, (got, other)), strict=True):
            assert relative_error(a, b) < RTOL


def test_each_example_has_steps_of_its_own_under_vmap():
    cell, x = Tanh(0.9), normal((4, INPUTS))
    # The further from the fixed point, the more steps.
    start = normal((4, WIDTH), 3) * jnp.asarray([[1.0], [9.0], [90.0], [900.0]])
    solver = mo.ReversiblePicard(20, rtol=0.01, relaxation=0.6)

    def total(arguments, adjoint):
        cell, x, start = arguments
        layer = mo.nn.Equilibrium(cell, solver=solver, adjoint=adjoint)
        z, info = jax.vmap(layer)(x, start)
        return jnp.sum(jax.vmap(value_of)(z)), info.num_steps

    gradient = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    got, steps = gradient((cell, x, start), ADJOINT)
    want, _ = gradient((cell, x, start), UNROLLED)
    assert len(set(steps.tolist())) > 1
    assert relative_error(got, want) < RTOL
    for i, num_steps in enumerate(steps.tolist()):
        plain = ft.partial(by_hand, cell, num_steps=num_steps, beta=0.6)
        alone = jax.grad(lambda x, start, f=plain: value_of(f(x, start)), argnums=(0, 1))
        rows = got[1][i], got[2][i]
        for a, b in zip(rows, alone(x[i], start[i]), strict=True):
            assert relative_error(a, b) < RTOL


def layer_value(adjoint, num_steps=8, rtol: float | None = 0.1):
    """A number as a function of cell, input and start."""
    solver = mo.ReversiblePicard(num_steps, rtol=rtol)

    def value(cell, x, start):
        layer = mo.nn.Equilibrium(cell, solver=solver, adjoint=adjoint, throw=False)
        return value_of(layer(x, start)[0])

    return value


def of_sum(fn, *axes):
    """The derivative of a sum over one or two axes of examples."""
    for of_level in axes:
        fn = jax.vmap(fn, of_level)
    return jax.grad(lambda *args: jnp.sum(fn(*args) ** 2), argnums=(0, 1, 2))


CELL = Tanh(0.9)
MANY_CELLS = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a, 0.2 * a]), CELL)
MANY_X, MANY_STARTS = normal((3, 4, INPUTS), 1), 9 * normal((3, 4, WIDTH), 2)
SHARED: dict[str, Any] = {
    "one level": (
        lambda fn: of_sum(fn, (None, 1, 0)),
        (CELL, MANY_X[0].T, MANY_STARTS[0]),
    ),
    "two levels": (
        lambda fn: of_sum(fn, (None, 0, None), (None, 0, 0)),
        (CELL, MANY_X, MANY_STARTS[:, 0]),
    ),
    "what is shared differs": (
        lambda fn: of_sum(fn, (None, None, 0), (0, 0, None)),
        (MANY_CELLS, MANY_X[:, 0], MANY_STARTS[0]),
    ),
    "a derivative for each": (
        lambda fn: jax.vmap(jax.grad(fn, (0, 1, 2)), (None, 0, None)),
        (CELL, MANY_X[0], MANY_STARTS[0, 0]),
    ),
    "a derivative of many for each": (
        lambda fn: jax.vmap(of_sum(fn, (None, 0, 0)), (None, 0, 0)),
        (CELL, MANY_X, MANY_STARTS),
    ),
    "a Jacobian": (
        lambda fn: jax.jacrev(jax.vmap(fn, (None, 0, 0))),
        (CELL, MANY_X[0], MANY_STARTS[0]),
    ),
}


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", SHARED)
def test_derivatives_in_what_examples_share(name):
    # They are summed on the way back, and not kept for each example.
    form, arguments = SHARED[name]
    got, want = (
        jax.jit(lambda *args, a=adjoint: form(layer_value(a))(*args))(*arguments)
        for adjoint in (ADJOINT, UNROLLED)
    )
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.shape == b.shape and relative_error(a, b) < RTOL


def test_collective_operations_of_examples():
    class Centred(eqx.Module):
        weight: jax.Array

        def __call__(self, z, x):
            return jnp.tanh(self.weight @ (z - jax.lax.pmean(z, "batch") / 2) + x)

    def total(weight, x, adjoint):
        one = lambda x: layer_value(adjoint, 5, None)(Centred(weight), x, jnp.ones(WIDTH))
        return jnp.sum(jax.vmap(one, axis_name="batch")(x))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    arguments = contraction(), normal((4, WIDTH), 1)
    got, want = (gradient(*arguments, adjoint) for adjoint in (ADJOINT, UNROLLED))
    assert relative_error(got, want) < RTOL


def test_examples_of_one_state():
    # The slowest decides; each has to come back.
    weight, x = contraction(norm=0.9), normal((4, WIDTH), 1)
    x = x * jnp.asarray([[1e-6], [1.0], [2.0], [5.0]])

    def value(arguments, adjoint):
        weight, x = arguments
        problem = mo.FixedPointProblem(lambda z, hyper, _: jnp.tanh(z @ hyper.T + x))
        solver = mo.ReversiblePicard(20, rtol=0.01, per_example=True)
        start = jnp.zeros((4, WIDTH))
        solution = mo.solve_inner(
            problem, weight, params=start, solver=solver, adjoint=adjoint
        )
        return value_of(solution.value)

    gradient = jax.jit(jax.grad(value), static_argnums=1)
    got, want = (gradient((weight, x), adjoint) for adjoint in (ADJOINT, UNROLLED))
    assert relative_error(got, want) < RTOL


def everything(params, hyper, data, shift, adjoint, **options):
    """A number of all that has a derivative, as a function of everything."""

    def step(params, hyper, batch, key):
        noise = 0.1 * jax.random.normal(key, params["z"].shape)
        mean = jnp.mean(batch, axis=0)
        new = jnp.tanh(hyper["weight"] @ params["z"] + mean + noise + shift)
        return params | {"z": new}, {"size": jnp.sum(new**2), "count": jnp.arange(2)}

    solution = mo.solve_inner(
        mo.FixedPointProblem(step, has_aux=True),
        hyper,
        mo.Minibatches(data, 3),
        params=params,
        solver=mo.ReversiblePicard(5),
        adjoint=adjoint,
        **options,
    )
    return value_of(solution.value["z"]) + solution.aux["size"], solution


def test_derivatives_in_everything():
    # By way of batches, keys, closures and auxiliary output; with leaves of no derivative.
    params = {"z": normal((WIDTH,), 3), "order": jnp.arange(3)}
    hyper = {"weight": contraction(), "name": "none"}
    data, shift = normal((10, WIDTH), 5), normal((WIDTH,), 6)

    def value(floats, adjoint):
        z, weight, data, shift = floats
        full = {**params, "z": z}, {**hyper, "weight": weight}
        return everything(*full, data, shift, adjoint)[0]

    gradient = jax.jit(jax.grad(value), static_argnums=1)
    floats = params["z"], hyper["weight"], data, shift
    got, want = (gradient(floats, adjoint) for adjoint in (ADJOINT, UNROLLED))
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(b) > 1e-2
        assert relative_error(a, b) < RTOL


def tuned(hyper, adjoint, inner=mo.ReversiblePicard(), throw=True):
    """A hypergradient in what enters the map, the start and the outer loss."""
    problem = mo.BilevelProblem(
        mo.FixedPointProblem(
            lambda z, hyper, batch: jnp.tanh(hyper["weight"] @ z + batch),
            init_fn=lambda hyper, key: hyper["start"],
        ),
        lambda z, hyper, batch: value_of(z) * hyper["scale"],
    )
    data = jnp.linspace(-1, 1, WIDTH).astype(hyper["start"].dtype)
    return mo.hypergradient(problem, hyper, data, inner=inner, adjoint=adjoint, throw=throw)


def tuned_hyper(norm=0.9, dtype=jnp.float64):
    hyper = {
        "weight": contraction(norm=norm),
        "start": normal((WIDTH,), 3),
        "scale": jnp.asarray(2.0),
    }
    return jax.tree.map(lambda a: a.astype(dtype), hyper)


def drift_of(report: mo.Report) -> Any:
    assert report.derivative.drift is not None
    return report.derivative.drift


def rows_of(report: mo.Report) -> dict[str, str]:
    rows = [row.strip().split("  ", 1) for row in str(report).splitlines()[1:-1]]
    return {name: rest.strip() for name, rest in rows}


def test_hypergradient_and_report():
    hyper = tuned_hyper()
    (got, report), (want, other) = (tuned(hyper, a) for a in (ADJOINT, UNROLLED))
    for name in hyper:
        assert relative_error(got[name], want[name]) < RTOL
    assert 0 < drift_of(report) < 1e-11
    assert rows_of(report)["drift on the way back"] == f"{float(drift_of(report)):.4g}"
    assert report.derivative.returned_to_start is report.derivative.stored_bits is None
    assert not hasattr(other.derivative, "drift")
    assert "drift on the way back" not in rows_of(other)
    for inner in (mo.ReversiblePicard(12, rtol=0.02), mo.ReversiblePicard(12, budget=3)):
        # A budget that does not suffice is a failure of the solve, not of the derivative.
        (got, _), (want, report) = (
            tuned(hyper, adjoint, inner, throw=False) for adjoint in (ADJOINT, UNROLLED)
        )
        assert report.inner.num_steps < 12
        assert relative_error(got, want) < RTOL


def test_hypergradients_in_a_batch():
    hypers = [tuned_hyper(norm) for norm in (0.5, 0.9)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *hypers)
    inner = mo.ReversiblePicard(12, rtol=0.02)
    call = ft.partial(tuned, adjoint=ADJOINT, inner=inner)
    got, report = jax.jit(jax.vmap(call))(stacked)
    assert drift_of(report).shape == (2,)
    assert len(set(report.inner.num_steps.tolist())) == 2
    assert "2 values" in rows_of(report)["drift on the way back"]
    for i, hyper in enumerate(hypers):
        alone = call(hyper)[0]
        assert relative_error(jax.tree.map(lambda a, i=i: a[i], got), alone) < RTOL


def test_a_fixed_point_as_the_start():
    # What does not move is undone without drift, at zero as well.
    problem = mo.BilevelProblem(
        mo.FixedPointProblem(lambda z, hyper, _: jnp.sin(hyper * z)),
        lambda z, hyper, _: jnp.sum(z) + hyper,
    )
    inner = mo.ReversiblePicard()
    call = ft.partial(mo.hypergradient, problem, 0.5, params=jnp.zeros(3), inner=inner)
    got, report = call(adjoint=ADJOINT)
    assert drift_of(report) == 0 and got == 1


class Normalised(mo.extend.AbstractFixedPointProblem):
    has_state = True

    def init(self, hyper, key):
        return jnp.ones(2), jnp.array([0.5, 2.0]) + hyper**2

    def step(self, params, hyper, batch, *, state):
        return jnp.tanh(0.5 * params * state + hyper), 0.9 * state + 0.1 * params


def test_model_state():
    outer = lambda params, hyper, batch, *, state: jnp.sum(params**2 * state)
    problem = mo.BilevelProblem(Normalised(), outer)
    hyper = jnp.array([0.3, 0.6])
    for policy in (mo.nn.CarriedState(), mo.nn.PerStepState()):
        inner = mo.ReversiblePicard(state_policy=policy)
        with pytest.raises(ValueError, match="cannot undo .*FrozenState.*UnrolledAdj"):
            mo.hypergradient(problem, hyper, inner=inner, adjoint=ADJOINT)
    inner = mo.ReversiblePicard(state_policy=mo.nn.FrozenState())

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

    state = jnp.array([0.5, 2.0])
    for fn in (
        lambda adjoint: mo.hypergradient(problem, hyper, inner=inner, adjoint=adjoint)[0],
        lambda adjoint: jax.grad(value)(state, adjoint),
    ):
        np.testing.assert_allclose(fn(ADJOINT), fn(UNROLLED), rtol=1e-12)


#
# Other adjoints, and the solution
#


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "adjoint",
    [mo.ForwardAdjoint(), mo.UnrolledAdjoint(mo.memory.Blocks(1))],
    ids=["forward", "blocks"],
)
def test_other_adjoints_follow_the_same_steps(adjoint):
    got, want = (tuned(tuned_hyper(), a)[0] for a in (adjoint, ADJOINT))
    assert relative_error(got, want) < RTOL


def test_derivative_at_the_solution_is_the_closed_form():
    case = CASES["fixed point"](jnp.float64)
    call = ft.partial(
        mo.hypergradient, case.problem, case.hyper, *case.data, params=case.params
    )
    # As near to the solution as float64 lets the steps be undone.
    inner = mo.ReversiblePicard(60, relaxation=0.25)
    got, _ = call(inner=inner, adjoint=ADJOINT)
    assert relative_error(got, case.reference().gradient()) < 3e-3
    inner = mo.ReversiblePicard(case.num_steps, relaxation=0.9)
    got, _ = call(inner=inner, adjoint=mo.ImplicitAdjoint(mo.Dense()))
    assert relative_error(got, case.reference().gradient()) < 1e-10


#
# Drift
#


def test_drift_grows_with_the_steps():
    hyper = tuned_hyper(dtype=jnp.float32)
    eps = float(jnp.finfo(jnp.float32).eps)
    drifts = []
    for num_steps in (2, 6, 10):
        inner = mo.ReversiblePicard(num_steps)
        got, report = tuned(hyper, ADJOINT, inner=inner)
        want, _ = tuned(tuned_hyper(), UNROLLED, inner=inner)
        drifts.append(float(drift_of(report)))
        # Every undone step divides by a half at least, and by a quarter at most.
        assert drifts[-1] < eps * 4**num_steps
        # Beside what float32 leaves of any derivative.
        assert relative_error(got, want) < drifts[-1] + 10 * eps
    assert drifts[0] > 0 and drifts[2] > 4 * drifts[1] > 16 * drifts[0]
    # The defaults are accurate in float32.
    assert drifts[1] < 3e-4


def too_far(throw=True):
    """Rounding in float32, magnified by 10 ** 24 at most."""
    inner = mo.ReversiblePicard(12, relaxation=0.9)
    return tuned(tuned_hyper(dtype=jnp.float32), ADJOINT, inner, throw)


def test_too_much_drift_is_no_hypergradient():
    with pytest.raises(mo.SolveError, match="ended too far from where") as error:
        too_far()
    for gradient, report in (error.value.value, too_far(throw=False)):
        assert report.result == mo.RESULTS.inner_drifted
        assert drift_of(report) > 1e-2
        assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(gradient))
        assert np.isnan(report.outer.hypergradient_norm)
    text = mo.RESULTS[mo.RESULTS.inner_drifted]
    for remedy in ("float64", "fewer steps", "`relaxation`", "`UnrolledAdjoint`"):
        assert remedy in text


def test_too_much_drift_is_no_derivative():
    start = CELLS["tanh"][1].astype(jnp.float32)
    cell = jax.tree.map(lambda a: a.astype(jnp.float32), Tanh())
    x = X.astype(jnp.float32)

    def value(x, throw, max_drift=1e-2, relaxation=0.9):
        layer = mo.nn.Equilibrium(
            cell,
            solver=mo.ReversiblePicard(12, relaxation=relaxation),
            adjoint=mo.ReversibleAdjoint(max_drift),
            throw=throw,
        )
        return value_of(layer(x, start)[0])

    gradient = eqx.filter_jit(jax.grad(value))
    with pytest.raises(RuntimeError, match="ended too far from where"):
        gradient(x, True)
    assert np.all(np.isnan(gradient(x, False)))
    # By name, there is no limit; and what was asked for is what is measured by.
    assert np.all(np.isfinite(gradient(x, True, jnp.inf)))
    assert np.all(np.isfinite(gradient(x, True, 1e-2, 0.3)))
    assert np.all(np.isnan(gradient(x, False, 1e-8, 0.3)))
    # The answer itself is as good as ever.
    assert np.isfinite(eqx.filter_jit(value)(x, True))


def test_one_example_that_drifts_leaves_the_others_alone():
    # The slower a map contracts, the more its steps magnify when they are undone.
    solver = mo.ReversiblePicard(6, relaxation=0.8)

    def value(shared, slope):
        solution = mo.solve_inner(
            mo.FixedPointProblem(lambda z, hyper, _: slope * z + hyper),
            shared,
            params=jnp.zeros(2, jnp.float32),
            solver=solver,
            adjoint=ADJOINT,
            throw=False,
        )
        return jnp.sum(jnp.sin(solution.value))

    slopes = jnp.asarray([0.1, 1.0, 0.2], jnp.float32)
    shared = jnp.asarray([0.3, 0.7], jnp.float32)
    of_both = jax.grad(value, argnums=(0, 1))
    of_each = jax.jit(jax.vmap(of_both, (None, 0)))(shared, slopes)
    bad = [False, True, False]
    for leaf in of_each:
        assert np.isnan(leaf).reshape(3, -1).all(axis=1).tolist() == bad
        assert np.isnan(leaf).reshape(3, -1).any(axis=1).tolist() == bad
    total = lambda *args: jnp.sum(jax.vmap(value, (None, 0))(*args))
    of_shared, of_slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(shared, slopes)
    assert np.all(np.isnan(of_shared))
    assert np.isnan(of_slopes).tolist() == bad


def test_a_small_example_is_not_hidden_by_a_large_one():
    coupling = Coupling(relaxation=0.5, per_example=True)
    start = jnp.asarray([[1e-6], [1.0]])
    moved = start + jnp.asarray([[1e-7], [0.0]])
    drift = coupling.drift(start, (start, start), (moved, start))
    np.testing.assert_allclose(drift, 0.1, rtol=1e-6)


#
# Memory
#


def test_memory_does_not_grow_with_the_steps():
    def temporaries(adjoint, num_steps, **stop):
        solver = mo.ReversiblePicard(num_steps, **stop)
        layer = mo.nn.Equilibrium(
            Tanh(0.7, 64),
            lambda x: jnp.zeros(64),
            solver=solver,
            adjoint=adjoint,
            throw=False,
        )

        def value(layer, x):
            return jnp.sum(jax.vmap(layer)(x)[0])

        # In the arrays of the cell as well.
        arrays, static = eqx.partition(layer, eqx.is_array)
        gradient = jax.jit(jax.grad(lambda a, x: value(eqx.combine(a, static), x)))
        compiled = gradient.lower(arrays, normal((32, INPUTS))).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    few = temporaries(ADJOINT, 10)
    assert temporaries(ADJOINT, 800) <= 1.2 * few
    assert temporaries(ADJOINT, 800, rtol=1e-3) <= 1.2 * few
    assert temporaries(UNROLLED, 800) > 20 * temporaries(UNROLLED, 10)
    # Once there was a sum of the derivative in the weights for each of the examples,
    # which took more than ten steps of the unrolled loop.
    assert few < 32 * 64 * 64 * 8 / 2


#
# Errors
#


def test_another_budget_does_not_compile_again():
    traced = []

    def step(z, hyper, batch):
        traced.append(None)
        return jnp.tanh(hyper * z + 1)

    problem = mo.FixedPointProblem(step)

    @eqx.filter_jit
    @jax.grad
    def gradient(hyper, budget):
        solver = mo.ReversiblePicard(8, budget=budget)
        solution = mo.solve_inner(
            problem, hyper, params=jnp.zeros(2), solver=solver, adjoint=ADJOINT, throw=False
        )
        return jnp.sum(solution.value)

    first = gradient(jnp.asarray(0.5), jnp.asarray(2))
    count = len(traced)
    second = gradient(jnp.asarray(0.5), jnp.asarray(7))
    assert len(traced) == count and first != second


def test_what_is_not_finite_is_named():
    problem = mo.FixedPointProblem(lambda z, hyper, _: jnp.sqrt(z - hyper))
    solution = mo.solve_inner(
        problem,
        1.0,
        params=jnp.zeros(2),
        solver=mo.ReversiblePicard(),
        adjoint=ADJOINT,
        throw=False,
    )
    assert solution.result == mo.RESULTS.inner_nonfinite


def test_derivatives_that_it_does_not_give():
    def value(weight):
        cell = eqx.tree_at(lambda cell: cell.weight, Tanh(), weight)
        layer = mo.nn.Equilibrium(cell, solver=mo.ReversiblePicard(), adjoint=ADJOINT)
        return value_of(layer(X, CELLS["tanh"][1])[0])

    def hypergradient(weight):
        hyper = tuned_hyper() | {"weight": weight}
        return jnp.sum(tuned(hyper, ADJOINT)[0]["start"])

    weight = contraction()
    second = "a derivative of one was asked for. Use `metaopt.UnrolledAdjoint"
    for fn in (jax.hessian(value), jax.jacrev(jax.grad(value)), jax.grad(hypergradient)):
        with pytest.raises(ValueError, match=second):
            fn(weight)
    with pytest.raises(RuntimeError, match="in reverse mode .*ForwardAdjoint"):
        eqx.filter_jit(jax.jacfwd(value))(weight)


@pytest.mark.parametrize("throw", [True, False])
def test_losses_have_no_derivative(throw):
    # They are norms of residuals, which are held constant: a zero would be no answer.
    arguments = {"z": normal((WIDTH,), 3)}, {"weight": contraction()}
    rest = normal((10, WIDTH), 5), normal((WIDTH,), 6)

    def value(hyper):
        solution = everything(arguments[0], hyper, *rest, ADJOINT, throw=throw)[1]
        return jnp.sum(solution.stats["losses"])

    gradient = eqx.filter_jit(jax.grad(value))
    if throw:
        with pytest.raises(RuntimeError, match="norms of residuals"):
            gradient(arguments[1])
    else:
        assert np.all(np.isnan(gradient(arguments[1])["weight"]))


def solved(problem: Any, solver: mo.extend.AbstractSolver) -> Any:
    return mo.solve_inner(problem, 0.5, params=jnp.zeros(2), solver=solver, adjoint=ADJOINT)


MAP = mo.FixedPointProblem(lambda z, hyper, batch: jnp.sin(hyper * z))
LOSS = mo.InnerProblem(lambda z, hyper, batch: jnp.sum((z - hyper) ** 2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mo.ReversiblePicard(0), "`num_steps` must be at least 1"),
        (lambda: mo.ReversiblePicard(relaxation=1.0), r"in \(0, 1\).*undone; got 1.0"),
        (lambda: mo.ReversiblePicard(relaxation=1.5), r"`relaxation` must lie in \(0, 1\)"),
        (lambda: mo.ReversiblePicard(relaxation=0.0), r"`relaxation` must lie in \(0, 1\)"),
        (lambda: mo.ReversiblePicard(rtol=-1.0), "`rtol` must be"),
        (lambda: mo.ReversiblePicard(budget=1.5), "`budget` must be an integer"),
        (lambda: mo.ReversibleAdjoint(-1.0), "`max_drift` must be"),
        (lambda: mo.ReversibleAdjoint("1"), "`max_drift` must be"),  # pyright: ignore[reportArgumentType]
        (lambda: solved(LOSS, mo.ReversiblePicard()), "`ReversiblePicard` solves fixed-po"),
        (
            lambda: solved(MAP, mo.Picard()),
            "`Picard` cannot be undone. Use .*`metaopt.ReversiblePicard` for a fixed point",
        ),
        (
            lambda: solved(LOSS, mo.Descent(optax.sgd(0.1), 5)),
            "`Descent` cannot be undone. Use `metaopt.ReversibleSGD` for a loss",
        ),
        (
            lambda: solved(MAP, mo.ReversiblePicard(state_policy=mo.nn.FrozenState())),
            "declares no model state",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
