"""How exact hypergradients are, on real data and on closed forms; each claim beside a
control that fails it: the identity in the place of the inverse Hessian.

The claims are those of Domke (2012), Maclaurin et al. (2015), Franceschi et al. (2017),
Pedregosa (2016), Shaban et al. (2019) and Grazzi et al. (2020).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from members import inner_solver
from problems import Case, CASES, FIXED_POINT, flat, LOSS, relative_error, softmax_twin


class Identity(mo.extend.AbstractLinearSolver):
    """The control: takes the inverse for the identity (Luketina et al., 2016)."""

    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = False

    @property
    def left_out(self):
        return ("the inverse of the Hessian",)

    def check(self, operator):
        del operator

    def solve(self, operator, vector, start=None, tolerance=None):
        del operator, start
        successful: Any = mo.RESULTS.successful
        return mo.linear.LinearSolution(
            value=vector,
            result=successful,
            residual=jnp.zeros(()),
            num_steps=jnp.zeros((), int),
            num_products=jnp.zeros((), int),
            min_curvature=jnp.asarray(jnp.inf),
        )


def error_after_rescaling(got: Any, want: Any) -> float:
    """The relative error of the best multiple of `got`."""
    a, b = np.ravel(got), np.ravel(want)
    return float(np.sqrt(1 - (a @ b) ** 2 / ((a @ a) * (b @ b))))


#
# Softmax regression on handwritten digits, with one log penalty for each of 650 weights
#


class Digits:
    """The problem, its inner solution by Newton's method in NumPy, and what it takes to
    measure errors there."""

    def __init__(self):
        datasets = pytest.importorskip("sklearn.datasets")
        x, label = datasets.load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))[:600]
        x = np.concatenate([np.ones((600, 1)), x[order] / 16], axis=1)
        (x, xv), (label, label_v) = np.split(x, 2), np.split(label[order], 2)
        self.twin_data: Any = (x, label), (xv, label_v), 10
        indicator = np.eye(10)
        self.train = jnp.asarray(x), jnp.asarray(indicator[label])
        self.valid = jnp.asarray(xv), jnp.asarray(indicator[label_v])
        self.hyper = jnp.full((65, 10), jnp.log(1e-2))
        self.reference = softmax_twin(flat(self.hyper), *self.twin_data)
        self.params = jnp.asarray(self.reference.params).reshape(65, 10)
        eigenvalues = np.linalg.eigvalsh(self.reference.jacobian)
        self.least, self.largest = eigenvalues[0], eigenvalues[-1]
        self.rate = float(1 / self.largest)
        self.problem = mo.BilevelProblem(self.inner_loss, self.outer_loss)
        self.exact = self.reference.gradient()

    @staticmethod
    def outer_loss(params, hyper, batch):
        del hyper
        x, indicator = batch
        logits = x @ params
        return jnp.mean(jax.nn.logsumexp(logits, 1) - jnp.sum(indicator * logits, 1))

    @staticmethod
    def inner_loss(params, hyper, batch):
        penalty = 0.5 * jnp.sum(jnp.exp(hyper) * params**2)
        return Digits.outer_loss(params, hyper, batch) + penalty

    def gradient(
        self, adjoint: mo.extend.AbstractAdjoint, num_steps: int = 1
    ) -> np.ndarray:
        """The hypergradient after gradient descent that starts at the solution."""
        gradient, _ = mo.hypergradient(
            self.problem,
            self.hyper,
            self.train,
            self.valid,
            params=self.params,
            inner=mo.Descent(optax.sgd(self.rate), num_steps=num_steps),
            adjoint=adjoint,
        )
        return flat(gradient)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def implicit(digits) -> np.ndarray:
    return digits.gradient(mo.ImplicitAdjoint(mo.CG(rtol=1e-12)))


@pytest.fixture(scope="module")
def without_hessian(digits) -> np.ndarray:
    return digits.gradient(mo.ImplicitAdjoint(Identity()))


def test_digits_implicit_against_finite_differences(digits, implicit, without_hessian):
    directions = np.random.default_rng(1).standard_normal((3, 650))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    step, h = 1e-3, flat(digits.hyper)

    def outer_loss(shift):
        # Solves the inner problem anew; only the start is used again.
        start = digits.reference.params
        train, valid, classes = digits.twin_data
        return softmax_twin(h + shift, train, valid, classes, start).outer_loss

    for direction in directions:
        difference = (outer_loss(step * direction) - outer_loss(-step * direction)) / (
            2 * step
        )
        assert abs(direction @ implicit / difference - 1) < 1e-6
    # The control is wrong by more than four orders of magnitude more in every direction.
    best = (without_hessian @ digits.exact) / (without_hessian @ without_hessian)
    slopes = directions @ digits.exact
    assert np.min(np.abs(best * directions @ without_hessian / slopes - 1)) > 1e-2


def test_digits_implicit_against_the_dense_solve(digits, implicit, without_hessian):
    assert relative_error(implicit, digits.exact) < 1e-10
    # The control. Measured: 0.59.
    assert error_after_rescaling(without_hessian, digits.exact) > 0.3


@pytest.mark.ci
def test_digits_forward_against_reverse(digits):
    # From zero, with nothing converged. `ForwardAdjoint` pushes one tangent for each
    # number: here for one penalty for each class, spread over the weights.
    by_class = digits.hyper[0] + jnp.linspace(-1.0, 1.0, 10)

    def value(hyper, adjoint):
        solution = mo.solve_inner(
            digits.problem.inner,
            hyper,
            digits.train,
            params=jnp.zeros((65, 10)),
            solver=mo.Descent(optax.sgd(digits.rate), num_steps=60),
            adjoint=adjoint,
        )
        return digits.outer_loss(solution.value, hyper, digits.valid)

    def spread(by_class):
        return jnp.tile(by_class, (65, 1))

    def by_forward_adjoint(by_class):
        return value(spread(by_class), mo.ForwardAdjoint())

    def unrolled(hyper):
        return value(hyper, mo.UnrolledAdjoint())

    reverse = jax.jit(jax.grad(unrolled))(spread(by_class))
    direction = jax.random.normal(jax.random.key(0), reverse.shape)
    push = jax.jit(lambda point, direction: jax.jvp(unrolled, (point,), (direction,)))
    _, slope = push(spread(by_class), direction)
    assert abs(slope / jnp.sum(reverse * direction) - 1) < 1e-10
    forward = jax.jit(jax.grad(by_forward_adjoint))(by_class)
    assert relative_error(forward, reverse.sum(axis=0)) < 1e-10


def test_digits_unrolled_against_implicit(digits, implicit, without_hessian):
    unrolled = digits.gradient(mo.UnrolledAdjoint(mo.memory.Blocks()), num_steps=2000)
    assert relative_error(unrolled, implicit) < 1e-8
    # The control. Measured: 0.59.
    assert error_after_rescaling(without_hessian, unrolled) > 0.3


@pytest.mark.one_of(2)
@pytest.mark.parametrize("k", [1, 10, 50, 200])
def test_digits_truncation_is_the_neumann_series(digits, k):
    truncated = digits.gradient(mo.TruncatedAdjoint(k), num_steps=k)
    want = digits.reference.gradient(num_terms=k - 1, scale=digits.rate)
    assert relative_error(truncated, want) < 1e-8
    if k in (1, 10):
        neumann = mo.Neumann(num_terms=k - 1, scale=digits.rate)
        series = digits.gradient(mo.ImplicitAdjoint(neumann))
        assert relative_error(truncated, series) < 1e-8
        # The control: one term more (measured: 0.08 and 0.47), or a missing rate.
        longer = digits.reference.gradient(num_terms=k, scale=digits.rate)
        assert relative_error(truncated, longer) > 1e-3
        assert relative_error(truncated / digits.rate, series) > 1e-4
    error = relative_error(truncated, digits.exact)
    assert error <= (1 - digits.rate * digits.least) ** k
    if k == 1:
        assert truncated @ digits.exact > 0.5 * np.linalg.norm(truncated) * np.linalg.norm(
            digits.exact
        )


def test_digits_conjugate_gradients_beat_the_neumann_series(digits):
    cg = digits.gradient(mo.ImplicitAdjoint(mo.CG(rtol=None, max_steps=20)))
    neumann = mo.Neumann(num_terms=19, scale=digits.rate)
    series = digits.gradient(mo.ImplicitAdjoint(neumann))
    # Measured: 8e-5 and 0.63.
    assert relative_error(cg, digits.exact) < 1e-3
    assert relative_error(series, digits.exact) > 0.3


#
# The same on closed forms
#


def gradient_of(case: Case, adjoint: mo.extend.AbstractAdjoint, inner: Any = None) -> Any:
    gradient, _ = mo.hypergradient(
        case.problem,
        case.hyper,
        *case.data,
        params=case.params,
        inner=inner_solver(case) if inner is None else inner,
        adjoint=adjoint,
    )
    return flat(gradient)


@pytest.mark.parametrize("name", CASES)
def test_twins_against_their_own_finite_differences(name):
    case, step = CASES[name](jnp.float64), 1e-5
    for hyper in (case.hyper, case.moved):
        h = flat(hyper)
        differences = [
            (case.twin(h + e).outer_loss - case.twin(h - e).outer_loss) / (2 * step)
            for e in step * np.eye(len(h))
        ]
        assert relative_error(np.stack(differences), case.twin(h).gradient()) < 1e-8


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", ["ridge", "quadratic", "fixed point"])
def test_forward_against_reverse(name):
    # Three steps, with nothing converged.
    case = CASES[name](jnp.float64)
    inner: Any = mo.Descent(optax.sgd(case.rate), num_steps=3)
    if case.kind == FIXED_POINT:
        inner = mo.Picard(num_steps=3, rtol=None)
    reverse = gradient_of(case, mo.UnrolledAdjoint(), inner)
    forward = gradient_of(case, mo.ForwardAdjoint(), inner)
    assert relative_error(forward, reverse) < 1e-10
    # It is not that of the solution. Measured: 0.3 and more.
    assert relative_error(reverse, case.reference().gradient()) > 1e-3


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", ["ridge", "quadratic", "fixed point"])
def test_unrolled_against_implicit(name):
    case = CASES[name](jnp.float64)
    unrolled = gradient_of(case, mo.UnrolledAdjoint())
    implicit = gradient_of(case, mo.ImplicitAdjoint(mo.Dense()))
    identity = gradient_of(case, mo.ImplicitAdjoint(Identity()))
    assert relative_error(unrolled, implicit) < 1e-8
    # The control. Measured: 0.08 and more.
    assert error_after_rescaling(identity, implicit) > 0.05


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", ["ridge", "quadratic", "fixed point"])
def test_truncation_is_the_neumann_series(name):
    case = CASES[name](jnp.float64)
    twin, exact = case.reference(), case.reference().gradient()
    neumann = mo.Neumann(num_terms=3, scale=case.rate)
    series = gradient_of(case, mo.ImplicitAdjoint(neumann))
    truncated = gradient_of(case, mo.TruncatedAdjoint(4))
    assert relative_error(truncated, series) < 1e-8
    # The control: one term more. Measured: 0.04 and more.
    assert relative_error(twin.gradient(4, case.rate), series) > 1e-3
    if case.kind == LOSS:
        # The error is measured in what the linear system gives, and `cross` has a
        # condition number of its own.
        shrink = (1 - case.rate * np.linalg.eigvalsh(twin.jacobian)[0]) ** 4
        scale = np.linalg.cond(twin.cross @ twin.cross.T) ** 0.5
        bound = shrink * scale * np.linalg.norm(exact - twin.direct)
        assert np.linalg.norm(truncated - exact) <= bound


@pytest.mark.parametrize(
    "name, adjoint",
    [
        ("ridge", mo.ImplicitAdjoint(mo.CG(rtol=1e-10))),
        ("quadratic", mo.UnrolledAdjoint()),
        ("fixed point", mo.ForwardAdjoint()),
        ("root", mo.ImplicitAdjoint(mo.GMRES(rtol=1e-10))),
    ],
    ids=["ridge", "quadratic", "fixed point", "root"],
)
def test_check_passes_what_is_right(name, adjoint):
    result = check(CASES[name](jnp.float64), adjoint)
    assert result.passed and result.relative_error < 1e-6
    assert "The two agree." in str(result)


def test_check_looks_along_each_leaf():
    # A direct slope of 1000 hid that the other leaf was wrong by 80 %.
    problem = mo.BilevelProblem(
        lambda p, h, b: jnp.sum((p - h["a"]) ** 2),
        lambda p, h, b: jnp.sum(p**2) + 1000 * h["b"],
    )
    hyper = {"a": jnp.ones(3), "b": jnp.array(0.5)}
    inner = mo.Descent(optax.sgd(0.1), num_steps=200)
    with pytest.raises(mo.SolveError, match="do NOT agree"):
        mo.check_hypergradient(
            problem,
            hyper,
            params=jnp.zeros(3),
            inner=inner,
            adjoint=mo.TruncatedAdjoint(2),
            rtol=1e-2,
        )
    check = mo.check_hypergradient(
        problem, hyper, params=jnp.zeros(3), inner=inner, adjoint=mo.ImplicitAdjoint()
    )
    assert len(check.hypergradient) == 5 and check.relative_error < 1e-6


def test_check_does_not_pass_on_noise():
    # The differences of a loss of 1e12 are rounding, which agrees with anything.
    problem = mo.BilevelProblem(
        lambda p, h, b: jnp.sum((p - h) ** 2), lambda p, h, b: 1e12 + jnp.sum(p**2)
    )
    check = mo.check_hypergradient(
        problem,
        jnp.ones(3),
        params=jnp.zeros(3),
        inner=mo.Descent(optax.sgd(0.1), num_steps=200),
        adjoint=mo.ImplicitAdjoint(),
        throw=False,
    )
    assert not check.passed
    assert np.all(check.difference_error > 0.1 * np.max(np.abs(check.finite_difference)))


@pytest.mark.parametrize(
    "name, adjoint",
    [
        ("ridge", mo.OneStepAdjoint()),
        ("quadratic", mo.TruncatedAdjoint(5)),
        ("root", mo.ImplicitAdjoint(Identity())),
    ],
    ids=["ridge", "quadratic", "root"],
)
def test_check_raises_for_what_is_biased(name, adjoint):
    with pytest.raises(mo.SolveError, match="The two do NOT agree") as error:
        check(CASES[name](jnp.float64), adjoint)
    assert error.value.value.relative_error > 1e-4


def check(
    case: Case, adjoint: mo.extend.AbstractAdjoint
) -> mo.diagnostics.HypergradientCheck:
    return mo.check_hypergradient(
        case.problem,
        case.hyper,
        *case.data,
        params=case.params,
        inner=inner_solver(case),
        adjoint=adjoint,
    )
