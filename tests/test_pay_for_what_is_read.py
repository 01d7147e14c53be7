"""Hypergradients at params that are a solution already, and without the checks."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


CURVATURE = jnp.linspace(0.5, 2.0, 6)
TARGET = jnp.sin(jnp.arange(6.0))
FIXED = mo.ImplicitAdjoint(mo.CG(rtol=None, max_steps=6), inner_rtol=jnp.inf, error=None)


def inner_loss(params, hyper, batch):
    fit = jnp.sum(CURVATURE * (params - TARGET) ** 2)
    return 0.5 * fit + 0.5 * jnp.sum(jnp.exp(hyper) * params**2)


def outer_loss(params, hyper, batch):
    return 0.5 * jnp.sum((params - 1) ** 2)


PROBLEM = mo.BilevelProblem(inner_loss, outer_loss)


def solution(hyper):
    return CURVATURE * TARGET / (CURVATURE + jnp.exp(hyper))


def exact(hyper):
    return jax.grad(lambda hyper: outer_loss(solution(hyper), hyper, None))(hyper)


def hypergradient(hyper, params, adjoint: Any = FIXED, problem=PROBLEM, **kwargs):
    return mo.hypergradient(
        problem, hyper, params=params, inner=mo.Solved(), adjoint=adjoint, **kwargs
    )


@pytest.mark.parametrize("adjoint", [FIXED, mo.ImplicitAdjoint(), mo.OneStepAdjoint()])
def test_params_that_are_a_solution_need_no_step(adjoint):
    hyper = jnp.linspace(-2, 0, 6)
    if isinstance(adjoint, mo.OneStepAdjoint):
        with pytest.raises(ValueError, match="`Solved` runs as a whole"):
            hypergradient(hyper, solution(hyper), adjoint)
        return
    gradient, report = hypergradient(hyper, solution(hyper), adjoint)
    np.testing.assert_allclose(gradient, exact(hyper), rtol=1e-4)
    assert report.inner.num_steps == 0
    assert report.inner.loss == inner_loss(solution(hyper), hyper, None)


def test_params_that_are_no_solution_are_refused():
    hyper = jnp.zeros(6)
    with pytest.raises(mo.SolveError, match="not solved accurately enough"):
        hypergradient(hyper, jnp.zeros(6) + 3, mo.ImplicitAdjoint())
    # Known to be no numbers when the program runs, and not before.
    run = eqx.filter_jit(lambda params: hypergradient(hyper, params, throw=False))
    gradient, report = run(jnp.full(6, jnp.nan))
    assert np.all(np.isnan(gradient))
    assert report.result == mo.RESULTS.inner_nonfinite
    assert report.inner.failed_step == 0


def test_a_formula_for_the_solution_is_an_init():
    class Ridge(mo.extend.AbstractInnerProblem):
        has_aux = True

        def init(self, hyper, key):
            return solution(hyper)

        def loss(self, params, hyper, batch, key):
            return inner_loss(params, hyper, batch), {"size": jnp.sum(params**2)}

    hyper = jnp.linspace(-2, 0, 6)
    problem = mo.BilevelProblem(Ridge(), outer_loss)
    gradient, _ = hypergradient(hyper, None, problem=problem)
    np.testing.assert_allclose(gradient, exact(hyper), rtol=1e-4)


def saddle(params, hyper, batch):
    signs = jnp.array([1.0, -1.0])
    return 0.5 * jnp.sum(signs * params**2) - jnp.sum(hyper * params)


def test_without_guard_the_numbers_stay_and_the_report_says_what_they_are():
    problem = mo.BilevelProblem(saddle, lambda p, h, b: jnp.sum(p * jnp.array([1.0, 2.0])))
    hyper = jnp.array([1.0, 1.0])
    at = jnp.array([1.0, -1.0])
    run = lambda guard: hypergradient(hyper, at, problem=problem, throw=False, guard=guard)
    guarded, report = run(True)
    assert np.all(np.isnan(guarded))
    assert report.result == mo.RESULTS.linear_indefinite
    plain, report = run(False)
    assert np.all(np.isfinite(plain))
    assert report.result == mo.RESULTS.linear_indefinite
    with pytest.raises(mo.SolveError) as raised:
        hypergradient(hyper, at, problem=problem, guard=False)
    np.testing.assert_array_equal(raised.value.value[0], plain)


def num_reductions(read, adjoint=FIXED, **kwargs):
    """The sums over vectors in the compiled program, those of a loop's body once."""

    @jax.jit
    def run(hyper, params):
        return read(*hypergradient(hyper, params, adjoint, throw=False, **kwargs))

    hyper = jnp.linspace(-2, 0, 6)
    text = run.lower(hyper, solution(hyper)).compile().as_text()
    assert text is not None
    return text.count(" reduce(")


def test_checks_that_nobody_reads_are_no_part_of_the_program():
    alone = num_reductions(lambda gradient, _: gradient, guard=False)
    verdict = num_reductions(lambda gradient, _: gradient)
    whole = num_reductions(lambda gradient, report: (gradient, report.scalars()))
    # The right-hand side twice, for its scale; curvature and residual in each step.
    assert alone == 4
    # The losses, the params and the hypergradient must be finite.
    assert alone < verdict <= alone + 6
    assert verdict < whole


def test_the_gradient_alone_is_the_same_number():
    hyper = jnp.linspace(-2, 0, 6)
    inner = mo.Descent(optax.adam(0.1), 5)

    def run(guard):
        return eqx.filter_jit(
            lambda hyper: mo.hypergradient(
                *(PROBLEM, hyper),
                params=jnp.zeros(6),
                inner=inner,
                adjoint=mo.UnrolledAdjoint(),
                throw=False,
                guard=guard,
            )[0]
        )(hyper)

    np.testing.assert_allclose(run(False), run(True), rtol=1e-5)


@pytest.mark.parametrize("max_steps", [4, 60])
def test_a_preconditioner_that_is_not_a_number_leaves_a_finite_value(max_steps):
    hyper = jnp.zeros(6)
    solver = mo.CG(rtol=None, max_steps=max_steps, preconditioner=lambda r: r * jnp.nan)
    system = mo.linear.ImplicitSystem.at(
        PROBLEM.inner, hyper, solution(hyper), jnp.zeros(1)
    ).prepare(solver)
    found = system.solve(jnp.ones(6))
    assert np.all(np.isfinite(found.value))
    assert found.result == mo.RESULTS.linear_preconditioner
