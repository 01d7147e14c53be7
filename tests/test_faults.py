"""Numerical faults: a hypergradient that cannot be trusted never looks like one.

Each test names what other libraries were seen to return for the same input.
"""

import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import metaopt as mo


def inner_loss(params, hyper, batch):
    return jnp.sum((params - hyper) ** 2)


def outer_loss(params, hyper, batch):
    return jnp.sum((params - 0.5) ** 2)


PROBLEM = mo.BilevelProblem(inner_loss, outer_loss)
START, HYPER = jnp.zeros(3), jnp.ones(3)
DESCENT = mo.Descent(optax.sgd(0.1), num_steps=200)
DIVERGING = mo.Descent(optax.sgd(5.0), num_steps=400)
PATHS = {
    "unrolled": mo.UnrolledAdjoint(),
    "forward": mo.ForwardAdjoint(),
    "truncated": mo.TruncatedAdjoint(5),
    "one step": mo.OneStepAdjoint(),
    "implicit": mo.ImplicitAdjoint(),
}


def call(
    problem=PROBLEM,
    hyper: Any = HYPER,
    params: Any = START,
    *,
    throw=True,
    **options: Any,
):
    settings: dict[str, Any] = {"inner": DESCENT, "adjoint": mo.ImplicitAdjoint()} | options
    return mo.hypergradient(problem, hyper, params=params, throw=throw, **settings)


def code(report):
    """The name of the result."""
    names = [
        n for n in mo.RESULTS._name_to_item if bool(report.result == getattr(mo.RESULTS, n))
    ]
    return names[0]


# The inner problem


@pytest.mark.parametrize("name", PATHS)
def test_diverging_inner_solver(name):
    # Elsewhere: params of NaN, and then the gradient 1.99999.
    with pytest.raises(
        mo.SolveError, match="The inner solver diverged.*learning rate"
    ) as info:
        call(inner=DIVERGING, adjoint=PATHS[name])
    gradient, report = info.value.value
    assert code(report) == "inner_diverged"
    assert jnp.all(jnp.isnan(gradient))
    assert 0 < report.inner.failed_step < 400
    assert "failed at step" in str(report)


def test_diverging_inner_solver_stops_early_where_it_can():
    _, report = call(inner=mo.Descent(optax.sgd(5.0), 400, atol=1e-3), throw=False)
    assert report.inner.num_steps < 400


@pytest.mark.parametrize("name", ["unrolled", "implicit"])
def test_nan_at_the_first_step(name):
    problem = mo.BilevelProblem(lambda p, h, b: jnp.sum(jnp.sqrt(p - h)), outer_loss)
    with pytest.raises(mo.SolveError, match="At step 0 look for NaN") as info:
        call(problem, adjoint=PATHS[name])
    assert info.value.value[1].inner.failed_step == 0


@pytest.mark.parametrize("name", ["unrolled", "implicit"])
def test_nan_loss_of_a_finite_gradient(name):
    # The derivative of the logarithm is finite where the logarithm is not defined. The
    # steps look at gradients alone; the loss is looked at where they have led.
    problem = mo.BilevelProblem(lambda p, h, b: jnp.sum(jnp.log(p - h)), outer_loss)
    with pytest.raises(mo.SolveError, match="At step 0 look for NaN") as info:
        call(problem, adjoint=PATHS[name])
    report = info.value.value[1]
    assert jnp.isnan(report.inner.loss)
    assert report.inner.failed_step == report.inner.num_steps
    with pytest.raises(mo.SolveError, match="At step 0 look for NaN") as info:
        mo.solve_inner(
            problem.inner,
            HYPER,
            params=START,
            solver=mo.Descent(optax.sgd(0.1), 5),
            adjoint=PATHS[name],
        )
    assert info.value.value.stats["failed_step"] == 5
    plain = lambda h: jnp.sum(
        mo.solve_inner(
            problem.inner,
            h,
            params=START,
            solver=mo.Descent(optax.sgd(0.1), 5),
            adjoint=mo.ImplicitAdjoint(inner_rtol=jnp.inf),
            throw=False,
        ).value
    )
    assert jnp.all(jnp.isnan(jax.grad(plain)(HYPER)))


def test_inner_loss_that_is_lost_with_the_last_outer_step():
    # Not defined at the hyper that is returned, for which there is no hypergradient.
    def loss(params, hyper, batch):
        lost = jax.lax.stop_gradient(jnp.sum(jnp.log(1.5 - hyper)))
        return jnp.sum((params - hyper) ** 2) + lost

    problem = mo.BilevelProblem(loss, lambda p, h, b: jnp.sum((p - 3.0) ** 2))
    solver = mo.NestedSolver(DESCENT, mo.ImplicitAdjoint(), optax.sgd(0.2))
    with pytest.raises(mo.SolveError, match="inner loss or its gradient"):
        mo.solve_bilevel(problem, HYPER, solver=solver, num_steps=1, params=START)


def test_losses_keep_their_precision():
    # More than single precision can hold, with gradients that it can.
    hyper = jnp.asarray(1e39, jnp.float64)
    solution = mo.solve_inner(
        mo.InnerProblem(lambda p, h, b: jnp.sum((p - 1) ** 2) + h),
        hyper,
        params=jnp.zeros(2, jnp.float32),
        solver=mo.Descent(optax.sgd(0.1), 3),
        adjoint=mo.UnrolledAdjoint(),
    )
    assert solution.stats["losses"].dtype == jnp.float64
    np.testing.assert_allclose(solution.stats["losses"], 1e39)


@pytest.mark.parametrize("name", ["unrolled", "implicit"])
def test_nan_gradient_of_a_finite_loss(name):
    # sqrt has an infinite slope at 0: the loss is finite there and its gradient is not.
    def loss(params, hyper, batch):
        return jnp.sum(jnp.sqrt(params**2)) + inner_loss(params, hyper, batch)

    with pytest.raises(mo.SolveError, match="guard its argument with `jnp.where`"):
        call(mo.BilevelProblem(loss, outer_loss), adjoint=PATHS[name])


def test_unconverged_inner_problem():
    # Elsewhere: 99.7 % wrong, without a word.
    short = mo.Descent(optax.sgd(0.01), num_steps=3)
    with pytest.raises(mo.SolveError, match="not solved accurately enough") as info:
        call(inner=short)
    report = info.value.value[1]
    assert code(report) == "inner_not_converged"
    assert report.inner.residual > 1 and report.derivative.inner_error > 0.1
    # The same by name, and the exact derivative of the three steps.
    accepted, _ = call(inner=short, adjoint=mo.ImplicitAdjoint(inner_rtol=jnp.inf))
    exact, _ = call(inner=short, adjoint=mo.UnrolledAdjoint())
    assert jnp.all(jnp.abs(accepted - exact) > 0.5 * jnp.abs(accepted))


def test_slow_direction_is_not_taken_for_solved():
    # The residual is small and 0.2 are missing where the curvature is 1e-4. One product
    # along the residual says 2.6e-4; the solution of the linear system knows.
    curvatures = jnp.array([1.0, 1e-4])
    problem = mo.BilevelProblem(
        lambda p, h, b: 0.5 * jnp.sum(curvatures * (p - h) ** 2),
        lambda p, h, b: jnp.sum(p**2),
    )
    inner = mo.Descent(optax.sgd(1.999), num_steps=8000)
    gradient, report = call(problem, jnp.ones(2), jnp.zeros(2), inner=inner, throw=False)
    assert code(report) == "inner_not_converged"
    error = jnp.linalg.norm(gradient / 2 - 1) / jnp.sqrt(2)
    assert 0.3 * error < report.derivative.inner_error < 2 * error

    def plain(hyper):
        solution = mo.solve_inner(
            problem.inner,
            hyper,
            params=jnp.zeros(2),
            solver=inner,
            adjoint=mo.ImplicitAdjoint(),
            throw=False,
        )
        return jnp.sum(solution.value**2)

    assert jnp.all(jnp.isnan(jax.grad(plain)(jnp.ones(2))))


@pytest.mark.parametrize(
    "loss, hyper, params",
    [
        # A leaf that the outer loss does not look at is large and solved.
        (
            lambda p, h, b: (p["a"] - 1e4) ** 2 + 1e-3 * (p["b"] - h) ** 2,
            2.0,
            {"a": jnp.array(0.0), "b": jnp.array(0.0)},
        ),
        # A start far away.
        (
            lambda p, h, b: 0.05 * (p["b"] - h) ** 2,
            1.0,
            {"a": jnp.array(0.0), "b": jnp.array(1e4)},
        ),
    ],
    ids=["large leaf", "far start"],
)
def test_what_the_outer_loss_looks_at_must_be_solved(loss, hyper, params):
    problem = mo.BilevelProblem(loss, lambda p, h, b: p["b"] ** 2)
    inner = mo.Descent(optax.sgd(0.4), num_steps=150)
    _, report = call(problem, hyper, params, inner=inner, throw=False)
    assert code(report) == "inner_not_converged"
    assert report.derivative.inner_error is not None and report.derivative.inner_error > 0.1


@pytest.mark.parametrize(
    "linear_solver", [mo.CG(), mo.Dense(), mo.Neumann(50)], ids=lambda x: type(x).__name__
)
def test_saddle_beside_the_outer_gradient(linear_solver):
    def loss(p, h, b):
        return (
            0.5 * (p[0] - h) ** 2 + p[1] ** 4 / 4 - 0.5 * p[1] ** 2 + 0.7 * p[1] * (h - 1)
        )

    problem = mo.BilevelProblem(loss, lambda p, h, b: p[0] + 0.5 * p[1])
    adjoint = mo.ImplicitAdjoint(linear_solver, inner_rtol=jnp.inf)
    _, report = call(problem, 1.0, jnp.zeros(2), adjoint=adjoint, throw=False)
    assert code(report) in ("linear_indefinite", "linear_diverged")


@pytest.mark.ci
def test_preconditioner_of_arrays_that_are_traced():
    # It was a constant of the rule before, which neither `jit` nor `vmap` could lift.
    def value(hyper, curvatures):
        problem = mo.InnerProblem(lambda p, h, b: jnp.sum(curvatures * (p - h) ** 2))
        for preconditioner in (
            lambda v: v / curvatures,
            lx.DiagonalLinearOperator(1 / curvatures),
        ):
            solution = mo.solve_inner(
                problem,
                hyper,
                params=jnp.zeros(3),
                solver=mo.Descent(optax.sgd(0.02), num_steps=2000),
                adjoint=mo.ImplicitAdjoint(
                    mo.CG(preconditioner=preconditioner), error=None
                ),
            )
            hyper = solution.value
        return jnp.sum(hyper**2)

    curvatures = jnp.array([1.0, 5.0, 20.0])
    for transform in (jax.grad, jax.jacfwd):
        gradient = jax.jit(transform(value))(HYPER, curvatures)
        np.testing.assert_allclose(gradient, 2.0, rtol=1e-6)
    batch = jnp.stack([curvatures, curvatures / 2])
    gradients = jax.vmap(jax.grad(value), (None, 0))(HYPER, batch)
    np.testing.assert_allclose(gradients, 2.0, rtol=1e-6)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("scale", [1e-170, 1.0, 1e170])
def test_scale_of_the_loss_does_not_matter(scale):
    # The square of the residual is zero, or infinite, at the ends.
    problem = mo.BilevelProblem(
        lambda p, h, b: scale * jnp.sum((p - h) ** 2), lambda p, h, b: jnp.sum(p**2)
    )
    for num_steps, expected in ((3, "inner_not_converged"), (300, "successful")):
        inner = mo.Descent(optax.sgd(0.1 / scale), num_steps=num_steps)
        gradient, report = call(problem, inner=inner, throw=False)
        assert code(report) == expected
        assert report.inner.residual is not None
        assert jnp.isfinite(report.inner.residual)
        assert (num_steps == 300) or report.inner.residual > 0
        np.testing.assert_allclose(gradient, 2 * (1 - 0.8**num_steps), rtol=1e-9)


def test_solution_near_zero_is_a_solution():
    # Relative to params of 1e-10 nothing is converged; relative to the way it is.
    gradient, _ = call(hyper=jnp.zeros(3), params=jnp.ones(3))
    np.testing.assert_allclose(gradient, -1.0, rtol=1e-9)


@pytest.mark.parametrize("name", ["unrolled", "forward"])
def test_slope_of_what_users_compute_from_hyper_is_their_own(name):
    # Not masked to zero as those inside of an update are: it is infinite at 0.
    problem = mo.BilevelProblem(lambda p, h, b: jnp.sum((p - 1) ** 2), outer_loss)
    inner = mo.Descent(lambda h: optax.sgd(jnp.sqrt(h)), num_steps=5)
    with pytest.raises(mo.SolveError, match="hypergradient is infinite or NaN"):
        call(problem, 0.0, inner=inner, adjoint=PATHS[name])


@pytest.mark.ci
def test_line_search_under_reverse_mode_names_the_remedy():
    # Elsewhere: that reverse mode does not work for a loop, and no more.
    inner = mo.Descent(optax.lbfgs(), num_steps=5)
    with pytest.raises(ValueError, match="loop of unknown length.*ForwardAdjoint"):
        call(inner=inner, adjoint=mo.UnrolledAdjoint())
    gradient, _ = call(inner=inner, adjoint=mo.ForwardAdjoint())
    np.testing.assert_allclose(gradient, 2 * 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "transform",
    [
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01)),
        optax.MultiSteps(optax.sgd(0.1), 2),
    ],
    ids=["sam", "MultiSteps"],
)
def test_transforms_of_other_kinds(transform):
    # The first takes no extra arguments; the second is no transform but makes one.
    inner = mo.Descent(transform, num_steps=12)
    unrolled, _ = call(inner=inner, adjoint=mo.UnrolledAdjoint())
    forward, _ = call(inner=inner, adjoint=mo.ForwardAdjoint())
    # optax accumulates in float32.
    np.testing.assert_allclose(unrolled, forward, rtol=1e-6)
    assert jnp.all(jnp.abs(unrolled) > 0.01)


def test_last_state_after_an_early_stop():
    # Slots after the last step still hold what they began with.
    def inner(params, hyper, batch, state):
        return jnp.sum((params - hyper) ** 2), jnp.sum(params)

    solver = mo.Descent(
        optax.sgd(0.4), num_steps=50, atol=1e-3, state_policy=mo.nn.PerStepState()
    )
    for adjoint in (mo.UnrolledAdjoint(), mo.OneStepAdjoint()):
        solution = mo.solve_inner(
            mo.InnerProblem(inner, has_state=True),
            HYPER,
            params=START,
            solver=solver,
            adjoint=adjoint,
            model_state=jnp.array(-7.0),
        )
        assert solution.stats["num_steps"] < 20
        np.testing.assert_allclose(solution.model_state, 3.0, rtol=1e-2)
        losses = solution.stats["losses"][: solution.stats["num_steps"]]
        assert jnp.all(jnp.isfinite(losses))


def test_the_tolerance_of_descent_is_that_of_the_gradient_and_not_of_the_step():
    # A gradient of 2 (params - 1), each step leaving 0.8 of it; steps are a tenth of it.
    _, report = call(
        inner=mo.Descent(optax.sgd(0.1), 50, atol=0.5), adjoint=mo.UnrolledAdjoint()
    )
    sizes = 2 * np.sqrt(3) * 0.8 ** np.arange(50)
    assert report.inner.num_steps == 1 + np.argmax(sizes <= 0.5)


def test_unmet_tolerance_of_the_inner_solver():
    for adjoint in (mo.ImplicitAdjoint(), mo.UnrolledAdjoint()):
        with pytest.raises(mo.SolveError, match="reached its step limit before its toler"):
            call(inner=mo.Descent(optax.sgd(0.01), 20, atol=1e-8), adjoint=adjoint)


@pytest.mark.parametrize(
    "step, num_steps, expected",
    [
        # z -> 2 z + h. Elsewhere: an iterate of 6.8e14 and the "perfect" gradient -2.
        (lambda z, h, b: 2 * z + h, 50, "inner_max_steps"),
        (lambda z, h, b: 2 * z + h, 5000, "inner_diverged"),
        # Circles between two points for ever.
        (lambda z, h, b: h - z, 50, "inner_max_steps"),
    ],
)
def test_fixed_point_that_is_not_reached(step, num_steps, expected):
    problem = mo.BilevelProblem(mo.FixedPointProblem(step), outer_loss)
    adjoint = mo.ImplicitAdjoint(mo.GMRES())
    gradient, report = call(
        problem, inner=mo.Picard(num_steps), adjoint=adjoint, throw=False
    )
    assert code(report) == expected
    if expected == "inner_diverged":
        assert jnp.all(jnp.isnan(gradient))


def test_degenerate_minimum():
    # The Hessian of the quartic vanishes at its minimum, which descent only creeps up to.
    problem = mo.BilevelProblem(lambda p, h, b: jnp.sum((p - h) ** 4), outer_loss)
    with pytest.raises(mo.SolveError, match="not solved accurately enough"):
        call(problem, inner=mo.Descent(optax.sgd(0.1), num_steps=2000))


def test_flat_direction():
    # Nothing holds the sum of the params: over-parameterised and without a ridge.
    def loss(params, hyper, batch):
        return (params[0] + params[1] - hyper) ** 2

    problem = mo.BilevelProblem(loss, lambda p, h, b: (p[0] - 2.0 * p[1]) ** 2)
    with pytest.raises(
        mo.SolveError, match="zero or negative curvature.*`damping`"
    ) as info:
        call(problem, 1.0, jnp.zeros(2))
    assert code(info.value.value[1]) == "linear_indefinite"
    damped = mo.ImplicitAdjoint(mo.CG(damping=1e-3))
    gradient, report = call(problem, 1.0, jnp.zeros(2), adjoint=damped)
    assert jnp.isfinite(gradient)
    assert report.derivative.linear_residual is not None
    assert report.derivative.linear_residual > 0.1  # of the system without the damping


def test_saddle():
    # Descent stays on the ridge in the second coordinate, where it has no slope.
    # Elsewhere: conjugate gradients on an indefinite matrix, "successful".
    def loss(params, hyper, batch):
        return (params[0] - hyper) ** 2 - params[1] ** 2

    with pytest.raises(mo.SolveError, match="a saddle, a flat direction") as info:
        call(mo.BilevelProblem(loss, outer_loss), 1.0, jnp.zeros(2))
    report = info.value.value[1]
    assert code(report) == "linear_indefinite" and report.derivative.min_curvature <= 0


def test_non_smooth_inner_loss_without_a_proximal_solver():
    target = jnp.array([2.0, 0.1, 3.0])

    def lasso(params, hyper, batch):
        return jnp.sum((params - target) ** 2) / 2 + jnp.exp(hyper) * jnp.sum(
            jnp.abs(params)
        )

    with pytest.raises(mo.SolveError, match="not solved accurately enough"):
        call(mo.BilevelProblem(lasso, outer_loss), -1.0)


def test_stochastic_inner_loss_has_no_solution():
    # A fresh draw at every step; the optimality is that of one frozen draw.
    def noisy(params, hyper, batch, *, key):
        return inner_loss(params, hyper + jax.random.normal(key, params.shape), batch)

    problem = mo.BilevelProblem(noisy, outer_loss)
    with pytest.raises(mo.SolveError, match="not solved accurately enough"):
        call(problem)
    first, _ = call(problem, adjoint=mo.UnrolledAdjoint())
    second, _ = call(problem, adjoint=mo.UnrolledAdjoint())
    assert jnp.array_equal(first, second)


# The linear system and the hypergradient


CURVATURES = jnp.logspace(-8, 0, 50)


def badly_conditioned(params, hyper, batch):
    return jnp.sum(CURVATURES * (params - hyper) ** 2)


@pytest.mark.parametrize(
    "linear_solver, expected, text",
    [
        (mo.CG(max_steps=1), "linear_max_steps", "set `rtol=None` to ask"),
        (mo.CG(max_steps=3), "linear_max_steps", "so the hypergradient is not accurate"),
        (mo.Neumann(50, scale=3.0), "linear_diverged", "lower `scale` below 2 over"),
    ],
)
def test_linear_solver_that_does_not_get_there(linear_solver, expected, text):
    # Elsewhere: a relative residual of 5.2 without a flag; 3e58 after 100 terms.
    problem = mo.BilevelProblem(badly_conditioned, outer_loss)
    with pytest.raises(mo.SolveError, match=text) as info:
        call(problem, jnp.ones(50), jnp.ones(50), adjoint=mo.ImplicitAdjoint(linear_solver))
    report = info.value.value[1]
    assert code(report) == expected
    assert report.derivative.linear_residual > 1e-3


def test_one_lane_of_many_fails_alone():
    # Elsewhere one element that fails takes the whole batch with it.
    def lane(curvature):
        problem = mo.InnerProblem(lambda p, h, b: jnp.sum(curvature * (p - h) ** 2))
        value = lambda h: (
            mo.solve_inner(
                problem,
                h,
                params=jnp.ones(2),  # which is the solution: only the linear system matters
                solver=mo.Descent(optax.sgd(0.0), 1),
                adjoint=mo.ImplicitAdjoint(mo.CG(max_steps=1, rtol=1e-6)),
                throw=False,
            ).value
        )
        return jax.grad(lambda h: jnp.sum(value(h) * jnp.array([1.0, 2.0])))(jnp.ones(2))

    easy = jnp.ones((64, 2))
    hard = easy.at[7].set(jnp.array([1.0, 1e-6]))
    together = jax.jit(jax.vmap(lane))(hard)
    alone = jax.jit(lane)(easy[0])
    assert jnp.all(jnp.isnan(together[7]))
    others = jnp.delete(together, 7, axis=0)
    np.testing.assert_allclose(others, jnp.broadcast_to(alone, others.shape), rtol=1e-6)


def test_zero_outer_gradient():
    gradient, report = call(hyper=jnp.full(3, 0.5), params=jnp.full(3, 0.5))
    assert jnp.array_equal(gradient, jnp.zeros(3))
    assert (
        report.derivative.num_linear_steps == 0 and report.derivative.linear_residual == 0
    )


def test_outer_loss_nan():
    problem = mo.BilevelProblem(inner_loss, lambda p, h, b: jnp.log(-jnp.sum(p**2)))
    with pytest.raises(mo.SolveError, match="The outer loss is infinite or NaN") as info:
        call(problem)
    assert jnp.all(jnp.isnan(info.value.value[0]))
    solver = mo.NestedSolver(DESCENT, mo.ImplicitAdjoint(), optax.adam(0.1))
    solution = mo.solve_bilevel(
        problem, HYPER, params=START, solver=solver, num_steps=3, throw=False
    )
    assert jnp.array_equal(solution.hyper, HYPER)  # left alone
    assert solution.num_skipped == 3
    assert "updates skipped" in str(solution)


def test_exploding_hypergradient():
    # Chaos: the losses are finite, the derivative through 3,000 steps is not.
    def loss(params, hyper, batch):
        return jnp.sum(jnp.cos(8.0 * params) + params**2 * hyper)

    problem = mo.BilevelProblem(loss, outer_loss)
    inner = mo.Descent(optax.sgd(0.2), num_steps=3000)
    with pytest.raises(mo.SolveError, match="Long unrolled runs can explode"):
        call(problem, 1.0, jnp.full(3, 0.3), inner=inner, adjoint=mo.UnrolledAdjoint())


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "linear_solver",
    [mo.Dense(), mo.GMRES(), mo.linear.BiCGStab(), mo.CG(), mo.Neumann(5)],
    ids=lambda x: type(x).__name__,
)
def test_maximum_is_not_taken_for_a_minimum(linear_solver):
    # The linear system has a solution there, which is the response of nothing.
    problem = mo.BilevelProblem(
        lambda p, h, b: -jnp.sum((p - h) ** 2), lambda p, h, b: jnp.sum(p**2)
    )
    adjoint = mo.ImplicitAdjoint(linear_solver)
    inner = mo.Descent(optax.sgd(0.1), num_steps=3)
    gradient, report = call(
        problem, params=HYPER, inner=inner, adjoint=adjoint, throw=False
    )
    assert code(report) in ("linear_indefinite", "linear_diverged")
    assert jnp.all(jnp.isnan(gradient))


def test_indefinite_system_moves_nothing():
    # With `throw=False` the direct part alone would be walked along.
    problem = mo.BilevelProblem(
        lambda p, h, b: -jnp.sum((p - h) ** 2), lambda p, h, b: jnp.sum(p**2 + 0.1 * h)
    )
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.1), 3), mo.ImplicitAdjoint(), optax.adam(0.1)
    )
    solution = mo.solve_bilevel(
        problem, HYPER, params=HYPER, solver=solver, num_steps=3, throw=False
    )
    assert solution.num_skipped == 3
    np.testing.assert_array_equal(solution.hyper, HYPER)


@pytest.mark.parametrize(
    "linear_solver, words",
    [
        (mo.Neumann(3), "3 terms of the Neumann series"),
        (mo.CG(damping=0.1), "damping of 0.1"),
        (mo.CG(rtol=None, max_steps=2), "2 steps of the linear solver"),
        (mo.GMRES(rtol=None, max_steps=2), "2 steps of the linear solver"),
        (mo.linear.BiCGStab(rtol=None, max_steps=2), "2 steps of the linear solver"),
    ],
)
def test_bias_of_the_linear_solver_is_reported(linear_solver, words):
    # Elsewhere neither damping nor a sum cut short is mentioned with the result.
    _, report = call(adjoint=mo.ImplicitAdjoint(linear_solver))
    assert words in report.left_out[0] and words in str(report)


def test_entries_that_are_exactly_zero_are_counted():
    # Reach is known for each leaf, so that one entry within a leaf can be out of it.
    problem = mo.BilevelProblem(lambda p, h, b: jnp.sum((p - h[1]) ** 2), outer_loss)
    inner = mo.Descent(lambda h: optax.sgd(h[0]), num_steps=200)
    gradient, report = call(problem, jnp.array([0.1, 1.0]), inner=inner)
    assert gradient[0] == 0 and report.outer.num_zeros == 1
    assert "entries exactly zero" in str(report)


def test_norm_of_a_huge_hypergradient_is_finite():
    problem = mo.BilevelProblem(inner_loss, lambda p, h, b: 1e200 * jnp.sum(p))
    _, report = call(problem)
    np.testing.assert_allclose(
        report.outer.hypergradient_norm, 1e200 * np.sqrt(3), rtol=1e-9
    )


# Zero by construction


def test_initial_params_under_an_adjoint_that_does_not_see_them():
    # Elsewhere: exactly 0, silently, so that meta-learning never learns.
    def outer(start, adjoint):
        solution = mo.solve_inner(
            PROBLEM.inner, HYPER, params=start, solver=DESCENT, adjoint=adjoint
        )
        return jnp.sum(solution.value)

    for adjoint in (mo.ImplicitAdjoint(), mo.TruncatedAdjoint(5), mo.OneStepAdjoint()):
        with pytest.raises(ValueError, match="initial params is zero by construction"):
            jax.grad(outer)(START, adjoint)
        assert jnp.isfinite(outer(START, adjoint))  # without a derivative all is well
    for adjoint in (mo.UnrolledAdjoint(), mo.ForwardAdjoint()):
        np.testing.assert_allclose(jax.grad(outer)(START, adjoint), 0.8**200, rtol=1e-6)


@pytest.mark.parametrize("name", ["implicit", "truncated", "one step"])
def test_leaf_that_only_starts_the_inner_solver(name):
    problem = mo.BilevelProblem(
        mo.InnerProblem(
            lambda p, h, b: inner_loss(p, h["target"], b), lambda h, key: h["start"]
        ),
        outer_loss,
    )
    hyper = {"target": HYPER, "start": START}
    with pytest.raises(ValueError, match=r"`hyper\['start'\]` is zero by construction"):
        call(problem, hyper, None, adjoint=PATHS[name])
    gradient, _ = call(problem, hyper, None, adjoint=mo.UnrolledAdjoint())
    np.testing.assert_allclose(gradient["start"], 0.8**200, rtol=1e-6)


def test_learning_rate_under_implicit_differentiation():
    # Elsewhere: exactly 0, silently, so that it is never tuned.
    problem = mo.InnerProblem(lambda p, h, b: jnp.sum((p - 1.0) ** 2))

    def outer(rate, adjoint):
        solver = mo.Descent(lambda rate: optax.sgd(rate), num_steps=20)
        solution = mo.solve_inner(
            problem, rate, params=START, solver=solver, adjoint=adjoint
        )
        return jnp.sum(solution.value)

    with pytest.raises(ValueError, match="the inner solver's settings"):
        jax.grad(outer)(0.1, mo.ImplicitAdjoint(inner_rtol=jnp.inf))
    exact = 3 * 40 * 0.8**19  # of 3 (1 - (1 - 2 rate)^20)
    np.testing.assert_allclose(jax.grad(outer)(0.1, mo.UnrolledAdjoint()), exact, rtol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_unused_leaf_has_derivative_zero_and_is_listed(name):
    problem = mo.BilevelProblem(
        lambda p, h, b: inner_loss(p, h["used"], b), lambda p, h, b: jnp.sum(p**2)
    )
    gradient, report = call(problem, {"used": HYPER, "idle": 2.0}, adjoint=PATHS[name])
    assert gradient["idle"] == 0
    assert jnp.all(gradient["used"] > 0)
    assert report.outer.unreached == ("hyper['idle']",)
    assert "hyper['idle']" in str(report)


def test_model_state_that_an_implicit_adjoint_does_not_see():
    # The outer loss reads a running mean of the params: half of the hypergradient goes
    # through it, and the implicit function theorem says nothing about it.
    def inner(params, hyper, batch, state):
        return jnp.sum((params - hyper) ** 2), 0.9 * state + 0.1 * params

    def outer(params, hyper, batch, state):
        return jnp.sum(params) + jnp.sum(state)

    options: Any = {"model_state": START}
    policies = [(mo.nn.CarriedState(), 6.0, True), (mo.nn.FrozenState(), 3.0, False)]
    for policy, exact, misses in policies:
        solver = mo.Descent(optax.sgd(0.1), num_steps=200, state_policy=policy)
        problem = mo.BilevelProblem(mo.InnerProblem(inner, has_state=True), outer)
        options = {"inner": solver, "model_state": START}
        unrolled, report = call(problem, adjoint=mo.UnrolledAdjoint(), **options)
        np.testing.assert_allclose(jnp.sum(unrolled), exact, rtol=1e-5)
        assert report.left_out == ()
        implicit, report = call(problem, adjoint=mo.ImplicitAdjoint(), **options)
        np.testing.assert_allclose(jnp.sum(implicit), 3.0, rtol=1e-5)
        assert report.left_out == (("what `hyper` does through the model state",) * misses)
        assert ("model state" in str(report)) == misses


@pytest.mark.parametrize("name", PATHS)
def test_biased_adjoints_say_what_they_leave_out(name):
    _, report = call(adjoint=PATHS[name])
    expected = {
        "truncated": ("all steps but the last 5",),
        "one step": ("all steps but the last",),
    }
    assert report.left_out == expected.get(name, ())
    assert ("biased" in str(report)) == (name in expected)


def test_hyper_of_the_outer_loss_alone():
    problem = mo.BilevelProblem(
        lambda p, h, b: jnp.sum((p - 1.0) ** 2), lambda p, h, b: h * jnp.sum(p**2)
    )
    for name in ("unrolled", "implicit"):
        gradient, _ = call(problem, 3.0, adjoint=PATHS[name])
        np.testing.assert_allclose(gradient, 3.0, rtol=1e-6)


def test_two_leaves_that_share_an_array():
    problem = mo.BilevelProblem(
        lambda p, h, b: inner_loss(p, h["a"] + 2.0 * h["b"], b), outer_loss
    )
    shared = jnp.full(3, 0.5)
    gradient, _ = call(problem, {"a": shared, "b": shared})
    np.testing.assert_allclose(gradient["a"], 2.0, rtol=1e-5)
    np.testing.assert_allclose(gradient["b"], 4.0, rtol=1e-5)


# Inside plain derivatives


def through(inner, adjoint, throw):
    def outer(hyper):
        solution = mo.solve_inner(
            PROBLEM.inner, hyper, params=START, solver=inner, adjoint=adjoint, throw=throw
        )
        return jnp.sum(solution.value**2)

    return outer


@pytest.mark.parametrize(
    "inner, adjoint",
    [
        (mo.Descent(optax.sgd(0.01), num_steps=3), mo.ImplicitAdjoint()),
        (DIVERGING, mo.ImplicitAdjoint()),
        (DESCENT, mo.ImplicitAdjoint(mo.Neumann(30, scale=3.0))),
    ],
    ids=["unconverged", "diverged", "linear"],
)
def test_plain_derivative_that_fails_is_nan_or_raises(inner, adjoint):
    # Elsewhere a linear solve that fails in the derivative raises whatever `throw` says.
    gradient = jax.jit(jax.grad(through(inner, adjoint, False)))(HYPER)
    assert jnp.all(jnp.isnan(gradient))
    with pytest.raises(RuntimeError, match="inner|Neumann"):
        jax.block_until_ready(
            eqx.filter_jit(jax.grad(through(inner, adjoint, True)))(HYPER)
        )


# Settings of JAX


@pytest.mark.ci
@pytest.mark.one_of(6)
@pytest.mark.parametrize(
    "setting",
    [
        "jax_debug_nans=True",
        "jax_numpy_rank_promotion='raise'",
        "jax_numpy_dtype_promotion='strict'",
        pytest.param(
            "jax_check_tracer_leaks=True",
            marks=pytest.mark.xfail(
                jax.__version_info__ >= (0, 11),
                reason="a cache of Equinox keeps jaxprs, which hold their constants now",
                strict=True,
            ),
        ),
        "jax_disable_jit=True",
    ],
)
def test_under_settings_of_jax(setting):
    program = f"""
import jax
jax.config.update("jax_platforms", "cpu")
name, value = "{setting.split("=")[0]}", {setting.split("=")[1]}
jax.config.update(name, value)
import jax.numpy as jnp, optax
import metaopt as mo
problem = mo.BilevelProblem(
    lambda p, h, b: jnp.sum((p - jnp.exp(h)) ** 2), lambda p, h, b: jnp.sum(p**2)
)
steps = 8 if name == "jax_disable_jit" else 60
for adjoint in (
    mo.UnrolledAdjoint(), mo.ForwardAdjoint(), mo.ImplicitAdjoint(inner_rtol=jnp.inf)
):
    gradient, _ = mo.hypergradient(
        problem, jnp.zeros(2), params=jnp.ones(2) * 0.9,
        inner=mo.Descent(optax.sgd(jnp.float32(0.02), jnp.float32(0.9)), steps),
        adjoint=adjoint,
    )
    assert bool(jnp.all(jnp.isfinite(gradient)))
solution = mo.solve_bilevel(
    problem, jnp.zeros(2), params=jnp.ones(2),
    solver=mo.NestedSolver(
        mo.Descent(optax.sgd(jnp.float32(0.1)), steps), mo.UnrolledAdjoint(),
        optax.sgd(jnp.float32(0.1)),
    ),
    num_steps=2,
)
print(float(solution.outer_loss))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
