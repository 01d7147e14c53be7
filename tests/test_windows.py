"""Outer steps as windows of one inner run, and solves that go on from earlier ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


# The gradient is one everywhere, so that the path is that of the optimizer.
RAMP = mo.BilevelProblem(lambda p, h, b: p + 0 * h, lambda p, h, b: h**2 + 0 * p)
QUADRATIC = mo.InnerProblem(lambda p, h, b: jnp.sum((p - h) ** 2 * jnp.arange(1.0, 3.0)))
CURVED = mo.BilevelProblem(QUADRATIC, lambda p, h, b: jnp.sum((p - 1.0) ** 2))


def path(
    inner, start, num_steps=4, adjoint: mo.extend.AbstractAdjoint = mo.UnrolledAdjoint()
):
    seen = []
    solver = mo.NestedSolver(inner, adjoint, optax.sgd(0.0), start)
    solution = mo.solve_bilevel(
        RAMP,
        1.0,
        params=0.0,
        solver=solver,
        num_steps=num_steps,
        callbacks=[lambda run: seen.append(float(run.state.params))],
    )
    return seen, solution


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "transform, wanted",
    [
        (optax.sgd(1.0, momentum=0.5), [-1, -2.5, -4.25, -6.125]),
        (optax.sgd(lambda step: 0.5**step), [-1, -1.5, -1.75, -1.875]),
    ],
    ids=["momentum", "schedule"],
)
def test_windows_go_on_with_the_optimizer(transform, wanted):
    # Once the optimizer began anew in every outer step without a word.
    inner = mo.Descent(transform, 1)
    seen, solution = path(inner, mo.Windows())
    np.testing.assert_allclose(seen, wanted, rtol=1e-6)
    assert "inner optimizer, with its count" in str(solution)
    assert solution.report is not None
    assert solution.report.left_out == ("the path in earlier outer steps",)
    seen, _ = path(inner, mo.Windows(restart_every=2))
    np.testing.assert_allclose(seen, 2 * wanted[:2], rtol=1e-6)


def test_warm_start_says_that_the_optimizer_begins_anew():
    seen, solution = path(mo.Descent(optax.sgd(1.0, momentum=0.5), 1), mo.WarmStart())
    assert seen == [-1, -2, -3, -4]
    assert "optimizer begins anew" in str(solution)
    assert "optimizer begins anew" in str(solution.report)
    # Plain descent remembers nothing.
    _, solution = path(mo.Descent(optax.scale(-1.0), 1), mo.WarmStart(), 1)
    assert "optimizer" not in str(solution)


@pytest.mark.parametrize(
    "inner",
    [
        lambda n: mo.Descent(lambda hyper: optax.adam(0.1 * jnp.abs(hyper[0])), n),
        lambda n: mo.ReversibleSGD(0.1, 0.5, n),
    ],
    ids=["adam", "reversible"],
)
def test_solve_goes_on_bit_for_bit(inner):
    hyper, params = jnp.array([1.0, 2.0]), jnp.zeros(2)

    def solve(n, params, solver_state=None):
        return mo.solve_inner(
            QUADRATIC,
            hyper,
            params=params,
            solver=inner(n),
            adjoint=mo.UnrolledAdjoint(),
            solver_state=solver_state,
        )

    whole = solve(4, params)
    half = solve(2, params)
    again = solve(2, half.value, half.solver_state)
    assert jnp.array_equal(again.value, whole.value)
    assert not jnp.array_equal(solve(2, half.value).value, whole.value)


def test_derivative_passes_a_state_and_a_window_holds_it_constant():
    solver = mo.Descent(lambda hyper: optax.sgd(0.1, momentum=hyper[1] / 4), 2)

    def solve(hyper, params, solver_state=None, n=2):
        return mo.solve_inner(
            QUADRATIC,
            hyper,
            params=params,
            solver=mo.Descent(solver.transform, n),
            adjoint=mo.UnrolledAdjoint(),
            solver_state=solver_state,
        )

    hyper, params = jnp.array([1.0, 2.0]), jnp.array([0.5, -1.0])
    outer = lambda solution: CURVED.outer_loss(solution.value, None, None)

    def twice(hyper):
        half = solve(hyper, params)
        return outer(solve(hyper, half.value, half.solver_state))

    wanted = jax.grad(lambda hyper: outer(solve(hyper, params, n=4)))(hyper)
    np.testing.assert_allclose(jax.grad(twice)(hyper), wanted, rtol=1e-5)

    half = solve(hyper, params)
    window = jax.grad(lambda h: outer(solve(h, half.value, half.solver_state)))(hyper)
    found = []

    def callback(run):
        found.append(np.asarray(run.hyper))

    def held(step):  # a rate of zero for the first step
        return jnp.where(step == 0, 0.0, 1.0)

    nested = mo.NestedSolver(solver, mo.UnrolledAdjoint(), optax.sgd(held), mo.Windows())
    mo.solve_bilevel(
        CURVED, hyper, params=params, solver=nested, num_steps=2, callbacks=[callback]
    )
    np.testing.assert_allclose(found[0] - found[1], window, rtol=1e-5)


def test_settings_that_optax_keeps_in_its_state_follow_hyper():
    # Carried over, a rate in the state would be that of the first `hyper` for good.
    def transform(hyper):
        return optax.inject_hyperparams(optax.sgd)(hyper, momentum=0.5)

    problem = mo.InnerProblem(lambda p, h, b: p)
    solve = lambda hyper, **options: mo.solve_inner(
        problem,
        hyper,
        solver=mo.Descent(transform, 1),
        adjoint=mo.UnrolledAdjoint(),
        **options,
    )
    first = solve(jnp.array(1.0), params=jnp.array(0.0))
    rest: Any = dict(params=first.value, solver_state=first.solver_state)
    value, slope = jax.value_and_grad(lambda h: solve(h, **rest).value)(jnp.array(2.0))
    assert (value, slope) == (-1 - 2 * 1.5, -1.5)


def test_implicit_adjoint_hands_the_state_on():
    solver, adjoint = mo.Descent(optax.adam(0.3), 200), mo.ImplicitAdjoint()
    arguments: Any = dict(solver=solver, adjoint=adjoint)
    first = mo.solve_inner(QUADRATIC, jnp.ones(2), params=jnp.zeros(2), **arguments)
    solve = lambda h: mo.solve_inner(
        QUADRATIC, h, params=first.value, solver_state=first.solver_state, **arguments
    )
    counts = optax.tree_utils.tree_get(solve(jnp.ones(2)).solver_state, "count")
    assert counts == 400
    slope = jax.grad(lambda h: jnp.sum(solve(h).value))(jnp.ones(2))
    np.testing.assert_allclose(slope, 1, rtol=1e-3)
    momenta = lambda h: jnp.sum(optax.tree_utils.tree_get(solve(h).solver_state, "mu"))
    with pytest.raises(Exception, match="solver state of an inner solution have no"):
        jax.grad(momenta)(jnp.ones(2))


def test_states_that_do_not_fit():
    arguments: Any = dict(adjoint=mo.UnrolledAdjoint())
    descent = mo.Descent(optax.sgd(0.1, momentum=0.5), 2)
    first = mo.solve_inner(
        QUADRATIC, jnp.ones(2), params=jnp.zeros(2), solver=descent, **arguments
    )
    state = first.solver_state
    with pytest.raises(ValueError, match="`solver_state` does not fit the solver"):
        other = mo.Descent(optax.adam(0.1), 2)
        mo.solve_inner(
            QUADRATIC,
            jnp.ones(2),
            params=jnp.zeros(2),
            solver=other,
            solver_state=state,
            **arguments,
        )
    with pytest.raises(ValueError, match="pass `params=solution.value`"):
        mo.solve_inner(
            QUADRATIC, jnp.ones(2), solver=descent, solver_state=state, **arguments
        )
    fixed = mo.FixedPointProblem(lambda p, h, b: p / 2 + h)
    with pytest.raises(ValueError, match="`Picard` remembers nothing"):
        mo.solve_inner(
            fixed, 1.0, params=0.0, solver=mo.Picard(2), solver_state=state, **arguments
        )
    with pytest.raises(ValueError, match="`restart_every` must be"):
        mo.Windows(restart_every=0)
    solver = mo.ReversibleSGD(0.1, 0.5, 2)
    with pytest.raises(ValueError, match="goes on from the state of an earlier one"):
        path(solver, mo.Windows(), 1, mo.ReversibleAdjoint())
