"""Solvers of optimistix and transforms of optax that want more than a loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import optimistix as optx
import pytest

import metaopt as mo


ROOT = mo.RootProblem(lambda p, h, b: p + p**3 - h)  # at h = 2: p = 1 and dp/dh = 1/4
BOUNDS = {"lower": -5.0, "upper": 5.0}
TIGHT: Any = {"rtol": 1e-10, "atol": 1e-10}


def slope(
    problem,
    solver,
    hyper,
    params,
    adjoint: mo.extend.AbstractAdjoint = mo.ImplicitAdjoint(mo.Dense()),
):
    def total(hyper):
        solution = mo.solve_inner(
            problem, hyper, params=params, solver=solver, adjoint=adjoint
        )
        return jnp.sum(solution.value)

    return jax.value_and_grad(total)(hyper)


def test_options_reach_the_solver():
    bisection = optx.Bisection(rtol=1e-5, atol=1e-5)
    for options in (BOUNDS, lambda hyper: {"lower": -hyper, "upper": 2 * hyper}):
        solver = mo.OptimistixSolver(bisection, options=options)
        value, derivative = slope(ROOT, solver, 2.0, 0.5)
        np.testing.assert_allclose((value, derivative), (1, 0.25), rtol=1e-3)
    golden = optx.GoldenSearch(rtol=1e-4, atol=1e-4)
    loss = mo.InnerProblem(lambda p, h, b: (p - h) ** 2)
    solver = mo.OptimistixSolver(golden, options=BOUNDS)
    value, derivative = slope(loss, solver, 2.0, 0.5, mo.ImplicitAdjoint(inner_rtol=0.01))
    np.testing.assert_allclose((value, derivative), (2, 1), rtol=1e-2)


def test_options_that_are_missing_or_wrong():
    solver = mo.OptimistixSolver(optx.Bisection(rtol=1e-5, atol=1e-5))
    # Once a raw `KeyError: 'lower'`.
    with pytest.raises(ValueError, match=r"Bisection` needs the option `lower`: write"):
        slope(ROOT, solver, 2.0, 0.5)
    with pytest.raises(ValueError, match="`options` must be a dictionary"):
        mo.OptimistixSolver(optx.Newton(**TIGHT), options=[1.0])  # pyright: ignore


@pytest.mark.parametrize(
    "solver", [optx.GaussNewton, optx.LevenbergMarquardt], ids=lambda x: x.__name__
)
@pytest.mark.parametrize("curvature", [mo.linear.ExactCurvature(), mo.linear.GaussNewton()])
def test_least_squares(solver, curvature):
    # Residuals of other shapes than the params, with `hyper` in them: the normal equations
    # of ridge regression.
    x = jnp.arange(6.0).reshape(3, 2) / 5
    y = jnp.array([1.0, -1.0, 2.0])

    def residual(params, hyper, batch):
        return {"fit": x @ params - y, "prior": hyper * params}

    problem = mo.LeastSquaresProblem(residual)
    wanted = lambda h: jnp.sum(jnp.linalg.solve(x.T @ x + h**2 * jnp.eye(2), x.T @ y))
    found = slope(
        problem,
        mo.OptimistixSolver(solver(rtol=1e-6, atol=1e-6)),
        0.5,
        jnp.zeros(2),
        mo.ImplicitAdjoint(mo.CG(), curvature=curvature),
    )
    np.testing.assert_allclose(found, jax.value_and_grad(wanted)(0.5), rtol=1e-3)


def test_least_squares_are_a_loss_and_a_loss_is_none():
    residual = mo.LeastSquaresProblem(lambda p, h, b: jnp.stack([p - h, p * h]))
    # The optimality is the gradient of half the sum of squares, curved residuals or not.
    value, derivative = slope(residual, mo.Descent(optax.sgd(0.5), 60), 0.5, 0.0)
    wanted = jax.value_and_grad(lambda h: h / (1 + h**2))(0.5)
    np.testing.assert_allclose((value, derivative), wanted, rtol=1e-3)
    loss = mo.InnerProblem(lambda p, h, b: (p - h) ** 2)
    solver = mo.OptimistixSolver(optx.GaussNewton(**TIGHT))
    with pytest.raises(ValueError, match="write the loss as a `metaopt.LeastSquares"):
        slope(loss, solver, 0.5, 0.0)


def quartic(p):
    return p**2 / 2 + p**4 / 4 - 2 * p


def steps_of(transform, num_steps, **extra):
    params: Any = jnp.array(0.5)
    state = transform.init(params)
    for _ in range(num_steps):
        gradient = jax.grad(quartic)(params)
        updates, state = transform.update(gradient, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.one_of(2)
@pytest.mark.parametrize("name", ["sam", "sophia"])
def test_transforms_that_ask_for_the_loss_under_other_names(name):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    gradient = lambda params, i: jax.grad(quartic)(params)
    transform, extra = {
        "sam": (
            optax.contrib.sam(optax.sgd(0.15), adversary, sync_period=2, opaque_mode=True),
            {"grad_fn": gradient},
        ),
        "sophia": (optax.contrib.sophia(0.01), {"obj_fn": quartic}),
    }[name]
    problem = mo.InnerProblem(lambda p, h, b: p**2 / 2 + p**4 / 4 - h * p)
    value, derivative = slope(
        problem, mo.Descent(transform, 3), 2.0, 0.5, mo.UnrolledAdjoint()
    )
    np.testing.assert_allclose(value, steps_of(transform, 3, **extra), rtol=1e-5)
    assert jnp.isfinite(derivative)


@pytest.mark.filterwarnings("ignore")
def test_lookahead_is_refused():
    # Once an `AttributeError` about a tracer.
    transform = optax.lookahead(optax.sgd(0.1), 3, 0.5)
    problem = mo.InnerProblem(lambda p, h, b: (p - h) ** 2)
    with pytest.raises(ValueError, match="Hand over its fast optimizer alone"):
        slope(problem, mo.Descent(transform, 3), 2.0, 0.5, mo.UnrolledAdjoint())


def test_state_of_a_transform_after_the_solve():
    transform = optax.contrib.schedule_free_sgd(0.1)
    problem = mo.InnerProblem(lambda p, h, b: (p - h) ** 2)
    solution = mo.solve_inner(
        problem,
        2.0,
        params=0.5,
        solver=mo.Descent(transform, 5),
        adjoint=mo.UnrolledAdjoint(),
    )
    evaluated: Any = optax.contrib.schedule_free_eval_params(
        solution.solver_state, solution.value
    )
    params: Any = jnp.array(0.5)
    state = transform.init(params)
    for _ in range(5):
        updates, state = transform.update(2 * (params - 2), state, params)
        params = optax.apply_updates(params, updates)
    wanted = optax.contrib.schedule_free_eval_params(state, params)
    np.testing.assert_allclose(evaluated, wanted, rtol=1e-5)
    assert abs(evaluated - solution.value) > 1e-3
