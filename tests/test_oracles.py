"""Against other libraries, and with their solvers as inner solvers.

jaxopt and optimistix have implicit differentiation of their own, which shares no code
with ours.
"""

import importlib.util
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import metaopt as mo
from members import rows_and_cases, SOLVERS
from problems import CASES, flat, relative_error


needs_jaxopt = pytest.mark.skipif(
    importlib.util.find_spec("jaxopt") is None, reason="jaxopt is not installed"
)


def slow(*parameters: Any) -> Any:
    return pytest.param(*parameters, marks=pytest.mark.slow)


def import_jaxopt() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("jaxopt")


#
# Every solver that runs as a whole
#

_QUICK = ("ridge", "fixed point", "root")  # the cheapest of each kind


@pytest.mark.one_of(8)
@pytest.mark.parametrize(
    "name, case",
    [
        pytest.param(
            *row.values,
            id=row.id,
            marks=row.marks if row.values[1] in _QUICK else [*row.marks, pytest.mark.slow],
        )
        for row in rows_and_cases(SOLVERS)
        # The others are in the table of `test_agreement.py`.
        if row.values[0] not in ("descent", "momentum", "picard")
    ],
)
def test_solvers_reach_the_solution(name, case):
    case = CASES[case](jnp.float64)
    solver, twin = SOLVERS[name].make(case), case.reference()

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def outer_loss(hyper):
        solution = mo.solve_inner(
            case.problem.inner,
            hyper,
            case.train,
            params=case.params,
            solver=solver,
            adjoint=mo.ImplicitAdjoint(mo.Dense()),
        )
        params, key = solution.value, jax.random.key(0)
        value, _ = case.problem.evaluate_outer(params, hyper, case.valid, key, None)
        return value, solution

    (value, solution), gradient = outer_loss(case.hyper)
    # Some compare values of the loss, which tell points apart only to the square root of
    # rounding, 1e-8.
    assert relative_error(solution.value, twin.params) < 1e-6
    assert relative_error(gradient, twin.gradient()) < 1e-6
    assert abs(value - twin.outer_loss) < 1e-6
    assert solution.stats["num_steps"] > 0


#
# Their implicit differentiation
#


def logistic() -> tuple[Any, ...]:
    """Logistic regression on two classes: an inner loss, an outer loss, and the rest."""
    x = jnp.sin(jnp.arange(90.0) ** 2).reshape(30, 3)
    y = jnp.sign(x @ jnp.array([1.0, -2.0, 0.5]) + 0.5 * jnp.cos(jnp.arange(30.0)))

    def outer_loss(params, hyper, batch):
        x, y = batch
        return jnp.mean(jax.nn.softplus(-y * (x @ params)))

    def inner_loss(params, hyper, batch):
        penalty = jnp.sum(jnp.exp(hyper) * params**2)
        return outer_loss(params, hyper, batch) + 0.5 * penalty

    train, valid = (x[:20], y[:20]), (x[20:], y[20:])
    hyper, params = jnp.array([-2.0, -1.0, -3.0]), jnp.zeros(3)
    return inner_loss, outer_loss, hyper, params, train, valid


def regression(name: str) -> tuple[Any, ...]:
    if name == "logistic":
        return logistic()
    case = CASES[name](jnp.float64)
    problem: Any = case.problem
    return problem.inner.loss_fn, problem.outer_loss, case.hyper, case.params, *case.data


def ours(name: str) -> np.ndarray:
    inner_loss, outer_loss, hyper, params, train, valid = regression(name)
    gradient, _ = mo.hypergradient(
        mo.BilevelProblem(inner_loss, outer_loss),
        hyper,
        train,
        valid,
        params=params,
        inner=mo.OptimistixSolver(optx.Newton(rtol=1e-10, atol=1e-10)),
        adjoint=mo.ImplicitAdjoint(mo.CG(rtol=1e-10)),
    )
    return flat(gradient)


@pytest.mark.parametrize("name", [slow("ridge"), "logistic", slow("softmax")])
def test_against_optimistix(name):
    inner_loss, outer_loss, hyper, params, train, valid = regression(name)

    @jax.jit
    @jax.grad
    def theirs(hyper):
        solution = optx.minimise(
            lambda params, hyper: inner_loss(params, hyper, train),
            optx.BFGS(rtol=1e-10, atol=1e-10),
            params,
            hyper,
            max_steps=1000,
            adjoint=optx.ImplicitAdjoint(lx.AutoLinearSolver(well_posed=True)),
        )
        return outer_loss(solution.value, hyper, valid)

    assert relative_error(ours(name), theirs(hyper)) < 1e-6


@needs_jaxopt
@pytest.mark.parametrize("name", [slow("ridge"), slow("logistic"), "softmax"])
def test_against_jaxopt(name):
    jaxopt = import_jaxopt()
    inner_loss, outer_loss, hyper, params, train, valid = regression(name)

    @jax.jit
    def theirs(hyper):
        optimality = jax.grad(lambda params, hyper: inner_loss(params, hyper, train))
        solution = params
        for _ in range(10):  # Newton's method
            product = jax.linearize(optimality, solution, hyper)[1]
            residual = optimality(solution, hyper)
            step = dense_solve(lambda v, f=product: f(v, 0 * hyper), residual)
            solution = solution - step
        cotangent = jax.grad(outer_loss)(solution, hyper, valid)
        return jaxopt.implicit_diff.root_vjp(
            optimality, solution, (hyper,), cotangent, solve=dense_solve
        )[0]

    assert relative_error(ours(name), theirs(hyper)) < 1e-6


def dense_solve(product, vector):
    """Solve with a matrix that is made from the product, for `jaxopt`."""
    columns = jax.vmap(lambda e: product(e.reshape(vector.shape)).ravel())
    matrix = columns(jnp.eye(vector.size)).T
    return jnp.linalg.solve(matrix, vector.ravel()).reshape(vector.shape)


#
# Solvers of jaxopt for what is not smooth or has constraints
#

_RNG = np.random.default_rng(0)
_WEIGHTS = np.array([2.0, -1.0, 0.0, 0.0, 0.3])
X = _RNG.standard_normal((30, 5))
Y = X @ _WEIGHTS + 0.1 * _RNG.standard_normal(30)
TRAIN, VALID = (X[:20], Y[:20]), (X[20:], Y[20:])


def squares(params, hyper, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ params - y) ** 2)


# Plain steps of a fixed length: the line search and the acceleration of jaxopt leave
# 1e-9 of the way, which is too much for finite differences.
PLAIN = {"tol": 1e-11, "maxiter": 2000, "stepsize": 0.3, "acceleration": False}
GMRES = mo.ImplicitAdjoint(mo.GMRES(rtol=1e-10))


def lasso_solver() -> mo.JaxoptSolver:
    return mo.JaxoptSolver(
        "ProximalGradient",
        {"prox": import_jaxopt().prox.prox_lasso, **PLAIN},
        lambda hyper, batch: {"hyperparams_prox": jnp.exp(hyper)},
    )


def box_solver() -> mo.JaxoptSolver:
    return mo.JaxoptSolver(
        "ProjectedGradient",
        {"projection": import_jaxopt().projection.projection_box, **PLAIN},
        lambda hyper, batch: {"hyperparams_proj": (-hyper, hyper)},
    )


@needs_jaxopt
def test_lasso():
    # Given which weights are zero, and the signs of the others, lasso is linear.
    hyper = -1.5
    arguments: dict[str, Any] = dict(
        problem=mo.BilevelProblem(squares, squares),
        hyper=hyper,
        params=jnp.zeros(5),
        train=TRAIN,
        valid=VALID,
        inner=lasso_solver(),
        adjoint=GMRES,
    )
    gradient, report = mo.hypergradient(**arguments)
    x, y = TRAIN
    weights = np.zeros(5)
    for _ in range(5000):  # coordinate descent
        for i in range(5):
            rest = y - x @ weights + x[:, i] * weights[i]
            slope, curvature = x[:, i] @ rest / 20, x[:, i] @ x[:, i] / 20
            shrunk = max(abs(slope) - np.exp(hyper), 0)
            weights[i] = np.sign(slope) * shrunk / curvature
    support = weights != 0
    assert 0 < support.sum() < 5
    hessian = x[:, support].T @ x[:, support] / 20
    moved = np.linalg.solve(hessian, -np.exp(hyper) * np.sign(weights[support]))
    error = VALID[0] @ weights - VALID[1]
    want = error @ VALID[0][:, support] @ moved / 10
    np.testing.assert_allclose(report.outer.loss, 0.5 * np.mean(error**2), rtol=1e-8)
    np.testing.assert_allclose(gradient, want, rtol=1e-8)
    mo.check_hypergradient(**arguments, num_directions=1)


@needs_jaxopt
def test_box():
    # One bound for each weight; those that do not bind have no influence.
    hyper = np.array([1.0, 0.5, 0.25, 2.0, 0.1])
    arguments: dict[str, Any] = dict(
        problem=mo.BilevelProblem(squares, squares),
        hyper=hyper,
        params=jnp.zeros(5),
        train=TRAIN,
        valid=VALID,
        inner=box_solver(),
        adjoint=mo.ImplicitAdjoint(mo.Dense()),
    )
    result = mo.check_hypergradient(**arguments)
    assert np.all(np.abs(result.finite_difference) > 1e-6)
    gradient, _ = mo.hypergradient(**arguments)
    solution = mo.solve_inner(
        arguments["problem"].inner,
        hyper,
        TRAIN,
        params=jnp.zeros(5),
        solver=arguments["inner"],
        adjoint=arguments["adjoint"],
    )
    binding = np.abs(np.asarray(solution.value)) > hyper - 1e-9
    assert 0 < binding.sum() < 5
    np.testing.assert_array_equal(np.asarray(gradient) != 0, binding)


Q = np.array([[2.0, 0.5], [0.5, 1.0]])


def quadratic_program(name: str) -> tuple[mo.BilevelProblem, mo.JaxoptSolver, Any, Any]:
    """A quadratic program, of which one inequality binds, in the form of each solver."""
    import_jaxopt()
    solution = importlib.import_module("jaxopt.base").KKTSolution

    def primal(params):
        return params[0][0] if name == "BoxOSQP" else params[0]

    def objective(params, hyper, batch):
        x = primal(params)
        return 0.5 * x @ Q @ x + hyper["linear"] @ x

    def outer_loss(params, hyper, batch):
        return jnp.sum((primal(params) - jnp.array([0.5, 0.25])) ** 2)

    rows = np.array([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]])

    def upper(hyper):
        return jnp.append(jnp.zeros(2), hyper["sum"])

    zeros, options = jnp.zeros(3), {"tol": 1e-9, "maxiter": 20000}
    if name == "OSQP":
        start = solution(jnp.zeros(2), None, zeros)
        constraints = lambda hyper: {"params_ineq": (rows, upper(hyper))}
    elif name == "BoxOSQP":
        start = solution((jnp.zeros(2), zeros), zeros, (zeros, zeros))
        # Far away, but there: the dual of a bound at infinity is not determined.
        lower = jnp.full(3, -10.0)
        constraints = lambda hyper: {
            "params_eq": rows,
            "params_ineq": (lower, upper(hyper)),
        }
    else:
        start, options = solution(jnp.zeros(2), jnp.zeros(1), None), {"tol": 1e-12}
        constraints = lambda hyper: {"params_eq": (rows[2:], hyper["sum"][None])}

    def arguments(hyper, batch):
        return {"params_obj": (Q, hyper["linear"]), **constraints(hyper)}

    problem = mo.BilevelProblem(objective, outer_loss)
    return problem, mo.JaxoptSolver(name, options, arguments), start, outer_loss


@needs_jaxopt
@pytest.mark.parametrize(
    "name",
    ["OSQP", slow("BoxOSQP"), slow("EqualityConstrainedQP")],
)
def test_quadratic_program(name):
    # `OSQP` was once refused, as having no optimality, and the inner loss was handed to
    # the others as a function of other arguments.
    problem, solver, start, outer_loss = quadratic_program(name)
    linear, total = np.array([-2.0, -2.0]), 1.0
    hyper = {"linear": linear, "sum": total}
    result = mo.check_hypergradient(
        problem,
        hyper,
        params=start,
        inner=solver,
        adjoint=mo.ImplicitAdjoint(mo.Dense()),
    )
    # The sum binds and nothing else: three linear equations.
    system = np.block([[Q, np.ones((2, 1))], [np.ones((1, 2)), np.zeros((1, 1))]])
    x = np.linalg.solve(system, np.append(-linear, total))[:2]
    assert np.all(x > 0.1)
    np.testing.assert_allclose(
        result.report.outer.loss, np.sum((x - [0.5, 0.25]) ** 2), rtol=1e-6
    )


@needs_jaxopt
def test_quadratic_program_needs_its_duals():
    problem, solver, start, _ = quadratic_program("OSQP")
    with pytest.raises(ValueError, match="KKTSolution"):
        mo.hypergradient(
            problem,
            {"linear": np.array([-2.0, -2.0]), "sum": 1.0},
            params=tuple(start),
            inner=solver,
            adjoint=GMRES,
        )


# Batched, two of these solvers once never returned: see `test_loops.py`.
@pytest.mark.one_of(2)
@needs_jaxopt
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [slow("lasso"), "box", "OSQP", slow("GradientDescent")])
def test_sixteen_lanes_return(name):
    lanes = jnp.linspace(-3.0, -0.5, 16)
    adjoint = mo.ImplicitAdjoint(mo.Dense())
    params, data = jnp.zeros(5), (TRAIN, VALID)
    problem = mo.BilevelProblem(squares, squares)
    to_hyper = lambda lane: lane
    if name == "lasso":
        jaxopt = import_jaxopt()
        # With the line search, whose loop is the one that hung.
        solver = mo.JaxoptSolver(
            "ProximalGradient",
            {"prox": jaxopt.prox.prox_lasso, "tol": 1e-6},
            lambda hyper, batch: {"hyperparams_prox": jnp.exp(hyper)},
        )
    elif name == "box":
        jaxopt = import_jaxopt()
        solver = mo.JaxoptSolver(
            "ProjectedGradient",
            {"projection": jaxopt.projection.projection_box, "tol": 1e-6},
            lambda hyper, batch: {"hyperparams_proj": (-hyper, hyper)},
        )
        to_hyper = lambda lane: jnp.exp(lane) * jnp.ones(5)
    elif name == "OSQP":
        problem, solver, params, _ = quadratic_program(name)
        data = None, None
        to_hyper = lambda lane: {"linear": jnp.array([-2.0, -2.0]), "sum": jnp.exp(lane)}
    else:
        solver = mo.JaxoptSolver("GradientDescent", {"tol": 1e-6})
        problem = mo.BilevelProblem(
            lambda params, hyper, batch: (
                squares(params, hyper, batch) + jnp.exp(hyper) * params @ params
            ),
            squares,
        )

    def gradient(lane):
        return mo.hypergradient(
            problem, to_hyper(lane), *data, params=params, inner=solver, adjoint=adjoint
        )[0]

    batched = jax.vmap(gradient)(lanes)
    for i in (0, 15):
        alone = gradient(lanes[i])
        lane = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
        # Solved to 1e-6, by other roundings.
        assert relative_error(lane, alone) < 1e-3


@needs_jaxopt
def test_unmet_tolerance_is_a_failure():
    # A solver of quadratic programs has no attribute `tol` to compare with.
    problem, solver, start, _ = quadratic_program("OSQP")
    solver = mo.JaxoptSolver("OSQP", {"tol": 1e-9, "maxiter": 5}, solver.arguments)
    with pytest.raises(mo.SolveError, match="step limit"):
        mo.hypergradient(
            problem,
            {"linear": np.array([-2.0, -2.0]), "sum": 1.0},
            params=start,
            inner=solver,
            adjoint=GMRES,
        )
