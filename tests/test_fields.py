"""The field of each kind of inner problem, and descent along it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import metaopt as mo
from problems import CASES, flat, LOSS, relative_error


KEY = jax.random.key(0)


@pytest.mark.parametrize("name", CASES)
def test_the_field_is_zero_at_the_solution_and_has_its_jacobian(name):
    case = CASES[name](jnp.float64)
    problem, twin = case.problem.inner, case.reference()
    at = case.like_params(twin.params)

    def vector(numbers):
        out, _ = problem.field(case.like_params(numbers), case.hyper, case.train, KEY, None)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(out)])

    assert np.linalg.norm(vector(flat(at))) < 1e-12
    jacobian = np.asarray(jax.jacfwd(vector)(flat(at)))
    assert relative_error(jacobian, twin.jacobian) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_the_evaluation_has_the_loss_or_none(name):
    case = CASES[name](jnp.float64)
    problem = case.problem.inner
    arguments = case.params, case.hyper, case.train, KEY, None
    vector, out = problem.field(*arguments)
    assert problem.has_loss == (case.kind == LOSS)
    if problem.has_loss:
        assert out.value == problem.evaluate(*arguments).value
    else:
        assert out.value is None
    structs = [jax.tree.map(jnp.shape, tree) for tree in (vector, case.params)]
    assert structs[0] == structs[1]
    for a, b in zip(
        *map(jax.tree.leaves, (vector, problem.optimality(*arguments))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_aux_and_state_come_with_the_field():
    def step(params, hyper, batch, *, state):
        return 0.5 * params, state + 1, {"name": "half", "value": 2 * params}

    def residual(params, hyper, batch, *, state):
        return params - 1, state + 2, params

    def loss(params, hyper, batch, *, state):
        return params**2, state + 3, {"name": "square"}

    settings: Any = {"has_aux": True, "has_state": True}
    for problem, vector, state in (
        (mo.FixedPointProblem(step, **settings), 1.5, 1.0),
        (mo.RootProblem(residual, **settings), 2.0, 2.0),
        (mo.InnerProblem(loss, **settings), 6.0, 3.0),
    ):
        at, model_state = jnp.array(3.0), jnp.array(0.0)
        got, out = problem.field(at, None, None, KEY, model_state)
        assert got == vector and out.state == state
        same = problem.evaluate(at, None, None, KEY, model_state)
        assert out.aux == same.aux and out.aux is not None


def test_each_function_is_called_once():
    calls = []

    def counted(params, hyper, batch):
        calls.append(None)
        return 0.5 * jnp.sum(params**2)

    mo.InnerProblem(counted).field(jnp.ones(2), None, None, KEY, None)
    assert len(calls) == 1


def solve(problem, transform, num_steps, params, **kwargs):
    return mo.solve_inner(
        problem,
        jnp.array(1.0),
        params=params,
        solver=mo.Descent(transform, num_steps, **kwargs),
        adjoint=mo.UnrolledAdjoint(),
    )


def test_descent_of_a_fixed_point_is_relaxed_picard():
    case = CASES["fixed point"](jnp.float64)
    for rate, num_steps in ((1.0, 7), (0.5, 20)):
        solvers = (
            mo.Descent(optax.sgd(rate), num_steps),
            mo.Picard(num_steps, rtol=None, relaxation=rate),
        )
        values, gradients = zip(
            *(
                jax.value_and_grad(
                    lambda hyper, solver=solver: jnp.sum(
                        mo.solve_inner(
                            case.problem.inner,
                            hyper,
                            case.train,
                            params=case.params,
                            solver=solver,
                            adjoint=mo.UnrolledAdjoint(),
                        ).value
                        ** 2
                    )
                )(case.hyper)
                for solver in solvers
            )
        )
        assert relative_error(*map(flat, values)) < 1e-13
        assert relative_error(*gradients) < 1e-13


@pytest.mark.parametrize(
    "transform",
    [optax.sgd(0.1), optax.sgd(0.1, 0.5), optax.adam(0.05)],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.parametrize("name", ["fixed point", "root"])
def test_implicit_derivatives_at_what_descent_reaches(name, transform):
    case = CASES[name](jnp.float64)
    # Descent needs eigenvalues of positive real part.
    assert np.linalg.eigvals(case.reference().jacobian).real.min() > 0
    gradient, report = mo.hypergradient(
        case.problem,
        case.hyper,
        *case.data,
        params=case.params,
        inner=mo.Descent(transform, 6000, atol=1e-9),
        adjoint=mo.ImplicitAdjoint(mo.GMRES(rtol=1e-12)),
    )
    assert relative_error(gradient, case.reference().gradient()) < 1e-6
    assert report.inner.loss is None


def test_descent_of_a_root_along_the_path():
    problem = mo.BilevelProblem(
        mo.RootProblem(lambda p, h, b: p**3 - h), lambda p, h, b: jnp.sum(p**2)
    )
    check = mo.check_hypergradient(
        problem,
        jnp.array([1.0, 8.0]),
        params=jnp.ones(2),
        inner=mo.Descent(optax.sgd(0.05), 30),
        adjoint=mo.UnrolledAdjoint(),
    )
    assert check.passed


def test_tolerance_and_divergence_are_those_of_the_field():
    root = mo.RootProblem(lambda p, h, b: p - h)
    solution = solve(root, optax.sgd(0.5), 100, jnp.zeros(3), atol=1e-6)
    assert 10 < solution.stats["num_steps"] < 40
    # Along minus the field: away from a root whose Jacobian is negative.
    repelled = mo.RootProblem(lambda p, h, b: 10 * (h - p))
    with pytest.raises(mo.SolveError, match="diverged"):
        solve(repelled, optax.sgd(10.0), 1000, jnp.zeros(3))


#
# Transforms that ask for a loss
#

ASK_FOR_A_LOSS = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "polyak": optax.polyak_sgd(),
    "plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "momo": optax.contrib.momo(),
    "sophia": optax.contrib.sophia(0.1),
}


@pytest.mark.parametrize("name", ASK_FOR_A_LOSS)
def test_transforms_that_ask_for_a_loss_are_named(name):
    root = mo.RootProblem(lambda p, h, b: p - h)
    with pytest.raises(
        ValueError, match="asks for a loss, and `RootProblem` has none.*`optax.sgd`"
    ):
        solve(root, ASK_FOR_A_LOSS[name], 3, jnp.zeros(2))


def test_other_errors_of_a_transform_are_its_own():
    def asks_for_the_loss(updates, state, params=None, *, value, **extra):
        return updates, state

    def asks_for_more(updates, state, params=None, *, other):
        return updates, state

    def transform(update: Any) -> Any:
        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    start, root = jnp.zeros(2), mo.RootProblem(lambda p, h, b: p - h)
    loss = mo.InnerProblem(lambda p, h, b: jnp.sum((p - h) ** 2))
    with pytest.raises(ValueError, match="asks for a loss"):
        solve(root, transform(asks_for_the_loss), 1, start)
    # One step of length one: there is no rate in it, and no sign.
    np.testing.assert_allclose(
        solve(loss, transform(asks_for_the_loss), 1, start).value, -2.0
    )
    for problem in (root, loss):
        with pytest.raises(TypeError, match="'other'"):
            solve(problem, transform(asks_for_more), 1, start)


def test_sharpness_aware_steps_look_along_the_field():
    # Opaque mode evaluates the gradient again, at other params.
    sam = optax.contrib.sam(
        optax.sgd(0.5), optax.chain(optax.contrib.normalize(), optax.sgd(0.01)),
        sync_period=2, opaque_mode=True,
    )  # fmt: skip
    root = mo.RootProblem(lambda p, h, b: p - h)
    found = solve(root, sam, 60, jnp.zeros(2)).value
    np.testing.assert_allclose(found, 1.0, atol=0.02)


def test_jaxopt_minimisers_need_a_loss():
    pytest.importorskip("jaxopt", exc_type=ImportError)
    root = mo.RootProblem(lambda p, h, b: p - h)
    with pytest.raises(
        ValueError, match="`jaxopt.LBFGS` minimises a loss, and `RootProblem` has none"
    ):
        mo.solve_inner(
            root,
            jnp.array(1.0),
            params=jnp.zeros(2),
            solver=mo.JaxoptSolver("LBFGS"),
            adjoint=mo.ImplicitAdjoint(mo.GMRES()),
        )


#
# A kind of one's own
#


class Stated(mo.extend.AbstractProblem):
    """A gradient field that is stated, and has no loss."""

    def init(self, hyper, key):
        return jnp.zeros(2)

    def evaluate(self, params, hyper, batch, key, state):
        return mo.extend.Evaluation(None, None, None)

    def field(self, params, hyper, batch, key, state):
        return 2 * (params - hyper), mo.extend.Evaluation(None, None, None)

    @property
    def tags(self):
        return mo.InnerProblem(lambda *_: 0.0).tags


@pytest.mark.parametrize(
    "adjoint", [mo.ImplicitAdjoint(), mo.UnrolledAdjoint(mo.memory.Blocks())], ids=repr
)
def test_a_stated_gradient_is_descended_like_one_that_is_computed(adjoint):
    outer_loss = lambda params, hyper, batch: jnp.sum(params**3)
    got, want = (
        mo.hypergradient(
            mo.BilevelProblem(inner, outer_loss),
            jnp.array([1.0, -2.0]),
            params=jnp.zeros(2),
            inner=mo.Descent(optax.sgd(0.3), 100),
            adjoint=adjoint,
        )[0]
        for inner in (Stated(), lambda p, h, b: jnp.sum((p - h) ** 2))
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)
