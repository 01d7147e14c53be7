"""Preconditioners: what they approximate, what they save, and that they change nothing
else. Dense float64 matrices are the oracle."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import metaopt as mo
from metaopt._linear import prepare
from problems import flat, relative_error


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


#
# What they approximate
#


STRUCTURE = {
    "a": jax.ShapeDtypeStruct((3, 4), float),
    "b": jax.ShapeDtypeStruct((8,), float),
}
SIZE = 20


def definite(eigenvalues):
    basis = np.linalg.qr(numbers(0, len(eigenvalues), len(eigenvalues)))[0]
    return jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)


def operator_of(matrix, structure=STRUCTURE, tag=lx.positive_semidefinite_tag):
    unravel = ravel_pytree(jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), structure))[1]

    def product(x):
        return unravel(matrix @ ravel_pytree(x)[0].astype(matrix.dtype))

    return lx.FunctionLinearOperator(product, structure, tag)


def as_matrix(preconditioner, operator):
    """The approximate inverse, column by column, and what it cost."""
    structure = operator.in_structure()
    ready, _, num_products = prepare(mo.CG(preconditioner=preconditioner), operator)
    assert isinstance(ready, mo.CG) and callable(ready.preconditioner)
    made = lx.FunctionLinearOperator(ready.preconditioner, structure)
    return np.asarray(jax.jit(lambda: made.as_matrix())()), int(num_products)


def test_diagonal_estimate_tends_to_the_diagonal():
    matrix = definite(np.linspace(1, 2, SIZE)) * np.outer(*[np.logspace(0, 1, SIZE)] * 2)
    errors = []
    for count in (10, 1000):
        inverse, taken = as_matrix(mo.linear.DiagonalEstimate(count), operator_of(matrix))
        assert taken == count and np.count_nonzero(inverse - np.diag(np.diag(inverse))) == 0
        estimate = 1 / np.diag(inverse)
        expected = np.diag(matrix) / np.max(np.diag(matrix))
        errors.append(np.max(np.abs(estimate / expected - 1)))
    # Like one over the square root of the number of samples.
    assert errors[0] < 0.5 and errors[1] < 0.2 * errors[0] + 0.02


def test_diagonal_estimate_is_positive_where_samples_are_not():
    # Ones on the diagonal, and far more beside it: estimates are of any sign.
    beside = 3 * numbers(9, SIZE, SIZE)
    matrix = (beside + beside.T) / 2
    matrix[np.diag_indices(SIZE)] = 1
    inverse, _ = as_matrix(mo.linear.DiagonalEstimate(4), operator_of(jnp.asarray(matrix)))
    diagonal = np.diag(inverse)
    assert np.all(diagonal > 0)
    # Without the standard error 26: what is small by chance would be taken for small.
    assert np.max(diagonal) / np.min(diagonal) < 12


def test_diagonal_entry_of_zero_does_not_take_over():
    matrix = jnp.diag(jnp.ones(SIZE).at[3].set(0.0))
    for count in (1, 4):
        inverse, _ = as_matrix(mo.linear.DiagonalEstimate(count), operator_of(matrix))
        assert np.all(np.diag(inverse) > 0) and np.max(inverse) < 1e8
    nothing, _ = as_matrix(mo.linear.DiagonalEstimate(), operator_of(0 * matrix))
    np.testing.assert_array_equal(nothing, np.eye(SIZE))


def test_low_rank_brings_down_what_stands_out():
    eigenvalues = np.concatenate([[4e4, 1e3, 100.0], np.full(SIZE - 3, 1e-2)])
    matrix = definite(eigenvalues)
    inverse, taken = as_matrix(mo.linear.LowRank(4), operator_of(matrix))
    assert taken == 4
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-12)
    # Three large eigenvalues, of a condition number of 4e6.
    values = np.real(np.linalg.eigvals(inverse @ np.asarray(matrix)))
    assert np.max(values) < 4 * np.min(values)


def test_low_rank_shrinks_the_condition_number():
    matrix = definite(np.logspace(0, -4, SIZE))
    inverse, _ = as_matrix(mo.linear.LowRank(10), operator_of(matrix))
    values = np.sort(np.real(np.linalg.eigvals(inverse @ np.asarray(matrix))))
    assert values[0] > 0 and values[-1] / values[0] < 1e4 / 20
    assert np.min(np.linalg.eigvalsh((inverse + inverse.T) / 2)) > 0


def test_low_rank_of_a_matrix_with_less_rank_than_asked_for():
    # What rounding hides is left alone; more than all of the rank is cut to all.
    matrix = definite(np.concatenate([[2.0, 1.0], np.zeros(SIZE - 2)]))
    inverse, taken = as_matrix(mo.linear.LowRank(100), operator_of(matrix))
    assert taken == SIZE and np.all(np.isfinite(inverse))
    assert np.min(np.linalg.eigvalsh(inverse)) > 0.4


@pytest.mark.one_of(4)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("make", [mo.linear.DiagonalEstimate, mo.linear.LowRank])
def test_params_of_low_precision(make, dtype):
    structure = {"a": jax.ShapeDtypeStruct((12,), jnp.float32)} | {
        "b": jax.ShapeDtypeStruct((8,), dtype)
    }
    matrix = definite(np.concatenate([[100.0, 50.0, 20.0], np.linspace(1, 2, SIZE - 3)]))
    operator = operator_of(matrix.astype(jnp.float32), structure)
    ready, _, _ = prepare(mo.CG(preconditioner=make(6)), operator)
    assert isinstance(ready, mo.CG)
    vector = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), structure)
    image: Any = ready.preconditioner
    image = image(vector)
    assert jax.tree.map(lambda a: a.dtype, image) == jax.tree.map(lambda a: a.dtype, vector)
    along = np.vdot(flat(vector), flat(image))
    assert np.isfinite(along) and along > 0
    solution = mo.CG(rtol=0.1, preconditioner=make(6)).solve(operator, vector)
    assert solution.result == mo.RESULTS.successful


#
# What they save
#


COUNT, ROWS = 120, 360


class Logistic:
    """Logistic regression with features scaled from 1 to 1e-2 and a log penalty for each
    of the params, with its solution by Newton's method in NumPy."""

    def __init__(self, scales=None):
        scales = np.logspace(0, -2, COUNT) if scales is None else scales
        x = numbers(1, 2, ROWS, COUNT) * scales
        y = (x @ numbers(2, COUNT) + 0.5 * numbers(3, 2, ROWS) > 0).astype(float)
        self.train, self.valid = ((jnp.asarray(x[i]), jnp.asarray(y[i])) for i in (0, 1))
        self.hyper = jnp.full(COUNT, jnp.log(1e-4))
        self.params = jnp.asarray(self.solve(x[0], y[0], np.exp(flat(self.hyper))))
        self.problem = mo.BilevelProblem(self.inner_loss, self.outer_loss)

    @staticmethod
    def solve(x, y, penalty):
        params = np.zeros(COUNT)
        for _ in range(30):
            p = 1 / (1 + np.exp(-x @ params))
            gradient = x.T @ (p - y) / len(x) + penalty * params
            weights = (p * (1 - p) / len(x))[:, None]
            params -= np.linalg.solve(x.T @ (weights * x) + np.diag(penalty), gradient)
        return params

    @staticmethod
    def outer_loss(params, hyper, batch):
        del hyper
        x, y = batch
        return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(x @ params, y))

    @staticmethod
    def inner_loss(params, hyper, batch):
        penalty = 0.5 * jnp.sum(jnp.exp(hyper) * params**2)
        return Logistic.outer_loss(params, hyper, batch) + penalty

    def differentiate(self, preconditioner, train=None, inner=None, **settings) -> Any:
        linear_solver = mo.CG(rtol=1e-6, preconditioner=preconditioner)
        adjoint = mo.ImplicitAdjoint(linear_solver, **settings)
        return mo.hypergradient(
            self.problem,
            self.hyper,
            self.train if train is None else train,
            self.valid,
            params=self.params,
            inner=inner or STAYS,
            adjoint=adjoint,
        )


STAYS = mo.Descent(optax.sgd(0.0), 1)  # for a start that is the solution


@ft.cache
def logistic():
    return Logistic()


@ft.cache
def plain():
    return logistic().differentiate(None)


@pytest.mark.one_of(8)
@pytest.mark.parametrize(
    "preconditioner, share",
    [
        (mo.linear.DiagonalEstimate(), 0.7),
        (mo.linear.DiagonalEstimate(40), 0.6),
        (mo.linear.LowRank(40), 0.9),
    ],
    ids=repr,
)
def test_steps_saved_and_nothing_else_changed(preconditioner, share):
    expected, before = plain()
    gradient, report = logistic().differentiate(preconditioner)
    derivative, before = report.derivative, before.derivative
    print(
        f"{preconditioner}: {derivative.num_linear_steps} steps and "
        f"{derivative.num_products} products, {before.num_linear_steps} and "
        f"{before.num_products} without"
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-8)
    assert report.derivative.linear_residual <= 1e-6 and report.left_out == ()
    assert report.derivative.num_linear_steps < share * before.num_linear_steps
    # A check at the end and one each 50 steps, and the probes.
    probes = vars(preconditioner).get("num_samples", vars(preconditioner).get("rank"))
    checks = report.derivative.num_products - report.derivative.num_linear_steps - probes
    assert 1 <= checks <= 1 + report.derivative.num_linear_steps // 50 + 1


def test_the_same_key_gives_the_same_probes():
    made = [logistic().differentiate(mo.linear.DiagonalEstimate())[0] for _ in range(2)]
    np.testing.assert_array_equal(*made)


@pytest.mark.ci
def test_second_moment_of_minibatches_costs_nothing_and_saves_half():
    case = logistic()
    minibatches = mo.Minibatches(case.train, 16)
    adam = optax.adam(optax.exponential_decay(1e-2, 300, 0.5))
    settings = dict(
        train=minibatches, inner=mo.Descent(adam, 1500), inner_rtol=float("inf")
    )
    expected, before = case.differentiate(None, **settings)
    gradient, report = case.differentiate(mo.linear.SecondMoment(), **settings)
    before = before.derivative
    print(
        f"SecondMoment: {report.derivative.num_products} products, {before.num_products} "
        "without"
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-8)
    assert report.derivative.num_products < 0.6 * before.num_products
    # Not an estimate from products.
    assert report.derivative.num_products - report.derivative.num_linear_steps <= 2


NEWTON = mo.OptimistixSolver(optx.Newton(rtol=1e-10, atol=1e-10))


def outer_steps(preconditioner):
    """The history of ten outer steps, each of them from the last one's solutions."""
    case = logistic()
    adjoint = mo.ImplicitAdjoint(mo.CG(rtol=1e-6, preconditioner=preconditioner))
    solver = mo.NestedSolver(NEWTON, adjoint, optax.adam(0.03), mo.WarmStart())
    return mo.solve_bilevel(
        case.problem,
        case.hyper,
        case.train,
        case.valid,
        solver=solver,
        num_steps=10,
        params=case.params,
    ).history


@pytest.mark.slow
def test_low_rank_is_used_again_over_outer_steps():
    without = outer_steps(None)
    reused = outer_steps(mo.linear.LowRank(40, refresh_every=8))
    print("without", without.num_products, "with", reused.num_products)
    # Made at the first step and the ninth; in between there are steps and checks.
    extra = reused.num_products - reused.num_linear_steps
    made = np.isin(np.arange(10), [0, 8])
    assert np.all(extra[made] > 40) and np.all(extra[~made] < 4)
    assert reused.num_products[~made].sum() < 0.5 * without.num_products[~made].sum()
    assert reused.num_products.sum() < 0.7 * without.num_products.sum()
    np.testing.assert_allclose(reused.outer_loss, without.outer_loss, rtol=1e-6)


#
# In every way in which a derivative is taken
#


QUADRATIC = jnp.asarray(np.logspace(0, 2, 6))


def quadratic(params, hyper, batch):
    del batch
    w, b = params["w"], params["b"]
    target = jnp.concatenate([w, b]) - hyper
    return 0.5 * jnp.sum(QUADRATIC * jnp.exp(hyper) * target**2) + 0.1 * jnp.sum(w) ** 2


PROBLEM = mo.BilevelProblem(
    quadratic, lambda p, h, b: jnp.sum(p["w"] ** 3) + jnp.sum(p["b"] ** 2)
)
START = {"w": jnp.zeros(4), "b": jnp.ones(2)}
ADAM = mo.Descent(optax.chain(optax.clip(1e3), optax.adam(0.1)), 1)
EVERY = [mo.linear.DiagonalEstimate(4), mo.linear.LowRank(3), mo.linear.SecondMoment()]


@ft.cache
def plain_gradients(preconditioner):
    """Through a Newton step and the solution, for two lanes."""
    linear_solver = mo.CG(rtol=1e-12, preconditioner=preconditioner)
    adjoint = mo.ImplicitAdjoint(linear_solver, inner_rtol=jnp.inf, newton_steps=1)

    def outer(hyper):
        solution = mo.solve_inner(
            PROBLEM.inner, hyper, params=START, solver=ADAM, adjoint=adjoint
        )
        return PROBLEM.outer_loss(solution.value, hyper, None)

    hypers = 0.1 * jnp.asarray(numbers(5, 2, 6))
    return jax.jit(jax.vmap(jax.grad(outer)))(hypers)


@pytest.mark.one_of(8)
@pytest.mark.parametrize("preconditioner", EVERY, ids=repr)
def test_plain_gradients_agree(preconditioner):
    expected = plain_gradients(None)
    np.testing.assert_allclose(plain_gradients(preconditioner), expected, rtol=1e-8)


@pytest.mark.one_of(3)
@pytest.mark.parametrize("preconditioner", EVERY, ids=repr)
def test_outer_steps_trace_once(preconditioner):
    counts = []
    calls = [0]

    def counted(params, hyper, batch):
        calls[0] += 1
        return quadratic(params, hyper, batch)

    mo.solve_bilevel(
        mo.BilevelProblem(counted, PROBLEM.outer_loss),
        0.1 * jnp.ones(6),
        solver=mo.NestedSolver(
            inner=ADAM,
            adjoint=mo.ImplicitAdjoint(
                mo.CG(preconditioner=preconditioner), inner_rtol=jnp.inf
            ),
            outer=optax.sgd(1e-3),
        ),
        num_steps=3,
        params=START,
        callbacks=[lambda run: counts.append(calls[0])],
    )
    assert counts[0] == counts[-1] > 0


#
# What must not pass
#


class Negative(mo.extend.AbstractPreconditioner):
    """Minus the identity."""

    def init(self, vector):
        return None

    def update(self, operator, state, key, solver_state):
        return None, jnp.zeros((), int)

    def apply(self, state, vector):
        return jax.tree.map(jnp.negative, vector)


def test_a_preconditioner_that_is_not_definite_is_found_out():
    with pytest.raises(mo.SolveError, match="`preconditioner` .* not positive definite"):
        logistic().differentiate(Negative())


@pytest.mark.one_of(2)
@pytest.mark.parametrize("make", [mo.linear.DiagonalEstimate, mo.linear.LowRank])
def test_negative_curvature_is_found_out(make):
    matrix = definite(np.linspace(-1, 1, SIZE))
    vector = jax.tree.map(lambda s: jnp.ones(s.shape), STRUCTURE)
    for preconditioner in (make(5), make(SIZE)):
        linear_solver = mo.CG(preconditioner=preconditioner)
        solution = linear_solver.solve(operator_of(matrix), vector)
        assert solution.result == mo.RESULTS.linear_indefinite


@pytest.mark.parametrize("make", [mo.linear.DiagonalEstimate, mo.linear.LowRank])
def test_nan_is_not_kept(make):
    # An operator that is not finite: nothing is known of it, and the next one is asked.
    preconditioner = make(4, refresh_every=100)
    linear_solver = mo.CG(preconditioner=preconditioner)
    broken = operator_of(jnp.full((SIZE, SIZE), jnp.nan))
    matrix = definite(np.linspace(1, 100, SIZE))
    _, state, taken = prepare(linear_solver, broken)
    assert taken == 4
    vector = jax.tree.map(lambda s: jnp.ones(s.shape), STRUCTURE)
    same = preconditioner.apply(state, vector)
    np.testing.assert_array_equal(flat(same), flat(vector))
    _, state, taken = prepare(linear_solver, operator_of(matrix), state)
    assert taken == 4 and relative_error(preconditioner.apply(state, vector), vector) > 0.1
    _, _, taken = prepare(linear_solver, operator_of(matrix), state)
    assert taken == 0


@pytest.mark.parametrize("make", [mo.linear.DiagonalEstimate, mo.linear.LowRank])
def test_an_approximation_serves_as_many_solves_as_asked_for(make):
    linear_solver = mo.CG(preconditioner=make(4, refresh_every=3))
    operator = operator_of(definite(np.linspace(1, 100, SIZE)))
    prepared = jax.jit(lambda state: prepare(linear_solver, operator, state)[1:])
    state, counts = None, []
    for _ in range(5):
        state, taken = prepared(state)
        counts.append(int(taken))
    assert counts == [4, 0, 0, 4, 0]


def test_damping_is_part_of_what_is_approximated():
    matrix = definite(np.full(SIZE, 1.0))
    vector = jax.tree.map(lambda s: jnp.arange(1.0, 1 + s.size).reshape(s.shape), STRUCTURE)
    linear_solver = mo.CG(damping=0.5, preconditioner=mo.linear.DiagonalEstimate(2))
    damped = linear_solver.damped(operator_of(matrix))
    np.testing.assert_allclose(flat(damped.mv(vector)), 1.5 * flat(vector))
    solution = linear_solver.solve(operator_of(matrix), vector)
    np.testing.assert_allclose(flat(solution.value), flat(vector) / 1.5, rtol=1e-6)


@pytest.mark.parametrize(
    "inner, kept",
    [
        (mo.Descent(optax.sgd(0.1, momentum=0.9), 1), "keeps none"),
        (
            mo.Descent(optax.chain(optax.adam(0.1), optax.scale_by_rms()), 1),
            "keeps 2 of them",
        ),
    ],
    ids=["none", "two"],
)
def test_second_moment_needs_one(inner, kept):
    with pytest.raises(ValueError, match=f"(?s){kept}.*optax.adam.*DiagonalEstimate"):
        logistic().differentiate(mo.linear.SecondMoment(), inner=inner)


def test_second_moment_is_found_by_its_place_and_not_its_name():
    # Params with a key of that name are no second moment.
    params = {"nu": jnp.ones(3)}
    state = optax.adam(0.1).init(params)
    moment = {"nu": jnp.array([1.0, 4.0, 0.0])}
    state = eqx.tree_at(lambda s: s[0].nu, state, moment)
    preconditioner = mo.linear.SecondMoment(eps=0.5)
    operator: Any = None
    known, taken = preconditioner.update(
        operator, preconditioner.init(params), jax.random.key(0), state
    )
    np.testing.assert_allclose(known["nu"], np.array([1.0, 2.0, 0.0]) + 1.0)
    assert taken == 0


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: mo.linear.DiagonalEstimate(0), "`num_samples` must be at least 1"),
        (lambda: mo.linear.LowRank(0), "`rank` must be at least 1"),
        (
            lambda: mo.linear.LowRank(3, refresh_every=0),
            "`refresh_every` must be at least 1",
        ),
        (lambda: mo.linear.SecondMoment(-1.0), "`eps` must be a non-negative"),
        (
            lambda: mo.CG(preconditioner=mo.linear.LowRank),
            "such as `metaopt.linear.DiagonalEstimate",
        ),
        (lambda: mo.CG(preconditioner=_any(3)), "`preconditioner` must be one of"),
    ],
)
def test_settings_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def _any(x: Any) -> Any:
    return x
