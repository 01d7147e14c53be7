"""How wrong a hypergradient is: estimates, bounds and Newton steps, against true errors."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import metaopt as mo
from metaopt._implicit._accuracy import Accuracy


ROWS, SIZE = 30, 6


def ridge(params, hyper, batch):
    x, y = batch
    fit = 0.5 * jnp.mean((x @ params - y) ** 2)
    return fit + 0.5 * jnp.sum(jnp.exp(hyper) * params**2)


def logistic(params, hyper, batch):
    x, y = batch
    fit = jnp.mean(optax.losses.sigmoid_binary_cross_entropy(x @ params, y))
    return fit + 0.5 * jnp.sum(jnp.exp(hyper) * params**2)


def softmax(params, hyper, batch):
    x, y = batch
    logits = x @ params.reshape(SIZE, 3)
    fit = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))
    return fit + 0.5 * jnp.sum(jnp.exp(hyper) * params**2)


def network(params, hyper, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params[: SIZE * 3].reshape(SIZE, 3))
    fit = jnp.mean((hidden @ params[SIZE * 3 :] - y) ** 2)
    return fit + 0.5 * jnp.sum(jnp.exp(hyper) * params**2)


def log_cosh(params, hyper, batch):
    """An outer loss that is not quadratic, for ridge regression."""
    x, y = batch
    return jnp.mean(jnp.log(jnp.cosh(x @ params - y)))


def without_penalty(loss):
    return lambda params, hyper, batch: loss(params, jnp.full_like(hyper, -1e3), batch)


FAMILIES: dict[str, Any] = {
    "ridge": (ridge, log_cosh, SIZE),
    "logistic": (logistic, without_penalty(logistic), SIZE),
    "softmax": (softmax, without_penalty(softmax), 3 * SIZE),
    "network": (network, without_penalty(network), 3 * SIZE + 3),
}


def draw(family, key):
    """A random problem: hyper and params to start from, training and validation data."""
    size = FAMILIES[family][2]
    keys = jax.random.split(key, 6)
    rows = jax.random.normal(keys[0], (2, ROWS, SIZE)) * jnp.linspace(0.3, 1.5, SIZE)
    noise = jax.random.normal(keys[1], (2, ROWS))
    scores = rows @ jax.random.normal(keys[2], (SIZE,)) + noise
    if family == "logistic":
        scores = (scores > 0).astype(float)
    if family == "softmax":
        scores = jnp.clip(jnp.round(scores) + 1, 0, 2).astype(int)
    hyper = jax.random.uniform(keys[3], (size,), minval=-4.0, maxval=-1.5)
    start = 0.5 * jax.random.normal(keys[4], (size,))
    return hyper, start, (rows[0], scores[0]), (rows[1], scores[1])


def solver(family, num_steps):
    # Slow enough to leave an error that varies from problem to problem.
    rate = 0.02 if family == "network" else 0.2
    return mo.Descent(optax.sgd(rate), num_steps)


EXACT = mo.OptimistixSolver(optx.Newton(rtol=1e-13, atol=1e-13), max_steps=100)
QUASI_NEWTON = mo.OptimistixSolver(optx.BFGS(rtol=1e-6, atol=1e-6), max_steps=2000)
DIRECT = mo.ImplicitAdjoint(mo.Dense(), inner_rtol=jnp.inf)


def differentiate(family, problem, inner, adjoint):
    inner_loss, outer_loss, _ = FAMILIES[family]
    hyper, start, train, valid = problem
    return mo.hypergradient(
        mo.BilevelProblem(inner_loss, outer_loss),
        hyper,
        train,
        valid,
        params=start,
        inner=inner,
        adjoint=adjoint,
        throw=False,
    )


def errors(family, make_adjoint, num_steps, count=80):
    """The true errors of the hypergradients of random problems, and those reported."""

    def one(key):
        hyper, start, train, valid = draw(family, key)
        inner_loss = FAMILIES[family][0]
        minimum = start
        if family == "network":
            minimum = mo.solve_inner(
                mo.InnerProblem(inner_loss),
                hyper,
                train,
                params=start,
                solver=QUASI_NEWTON,
                adjoint=mo.ImplicitAdjoint(),
                throw=False,
            ).value
            noise = jax.random.normal(jax.random.key(7), start.shape)
            start = minimum + 1e-2 * noise
        problem = hyper, start, train, valid
        inner = solver(family, num_steps)
        gradient, report = differentiate(family, problem, inner, make_adjoint(problem))
        problem = hyper, minimum, train, valid
        exact, reference = differentiate(family, problem, EXACT, DIRECT)
        # Where the network's curvature is negative there is no hypergradient, and the
        # report says so.
        indefinite = report.result == mo.RESULTS.linear_indefinite
        solved = (reference.result == mo.RESULTS.successful) & ~indefinite
        return jnp.linalg.norm(gradient - exact), report.derivative.error, solved

    keys = jax.random.split(jax.random.key(0), count)
    true, error, solved = jax.jit(jax.vmap(one))(keys)
    keep = np.asarray(solved)
    assert keep.sum() >= 50
    return np.asarray(true)[keep], np.asarray(error)[keep]


#
# Estimates
#


@pytest.mark.one_of(5)
@pytest.mark.parametrize(
    "family, num_steps, linear_steps",
    [
        # The inner solution is at fault, the linear system, or both.
        ("ridge", 30, 30),
        ("ridge", 2000, 3),
        ("logistic", 60, 4),
        ("softmax", 80, 6),
        ("network", 20, 15),
    ],
)
def test_estimate_is_within_a_factor_of_two(family, num_steps, linear_steps):
    linear_solver = mo.CG(rtol=None, max_steps=linear_steps)
    adjoint = mo.ImplicitAdjoint(
        linear_solver, inner_rtol=jnp.inf, error=mo.accuracy.DualWeighted()
    )
    true, estimate = errors(family, lambda problem: adjoint, num_steps)
    ratio = estimate / true
    good = np.mean((ratio > 0.5) & (ratio < 2))
    assert good >= 0.9
    assert np.median(true) > 1e-8  # there is something to estimate


#
# Bounds
#


def spectral(x):
    return jnp.linalg.eigvalsh(x.T @ x / ROWS)


def constants(family, problem):
    """Constants by hand: sigmoids have slopes below 1/4 and curvatures below 1/(6 sqrt 3);
    the Hessian of softmax is below 1/2 and changes by less than its own spread."""
    hyper, _, (x, _), (valid_x, _) = problem
    penalty = jnp.exp(hyper)
    cubes = jnp.mean(jnp.linalg.norm(x, axis=1) ** 3)
    least, slope, bend = {
        "ridge": (spectral(x)[0], 1.0, 0.0),
        "logistic": (0.0, 0.25, 1 / (6 * 3**0.5)),
        "softmax": (0.0, 0.5, 0.5**0.5),
    }[family]
    return mo.accuracy.StrongConvexity(
        least + jnp.min(penalty),
        hessian_lipschitz=bend * cubes,
        cross_lipschitz=jnp.max(penalty),
        outer_lipschitz=slope * spectral(valid_x)[-1],
    )


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "family, num_steps, linear_steps",
    [
        ("ridge", 30, 30),
        pytest.param("ridge", 2000, 2, marks=pytest.mark.slow),
        ("logistic", 60, 3),
        pytest.param("logistic", 1000, 30, marks=pytest.mark.slow),
        ("softmax", 200, 5),
    ],
)
def test_bound_is_never_below_the_error(family, num_steps, linear_steps):
    linear_solver = mo.CG(rtol=None, max_steps=linear_steps)

    def make_adjoint(problem):
        bound = constants(family, problem)
        return mo.ImplicitAdjoint(linear_solver, inner_rtol=jnp.inf, error=bound)

    true, bound = errors(family, make_adjoint, num_steps)
    assert np.all(np.isfinite(bound)) and np.all(bound >= true)
    # It would be easy to be right with a bound that says nothing. One over the square of
    # the smallest curvature is in it, which is some thousands here.
    assert np.median(bound / true) < 2e4 and np.median(true) > 1e-12


def test_bound_covers_the_steps_that_its_corrections_stop_short_of():
    # The derivatives of the optimality are constant, so that the corrected params are wrong
    # in nothing but the right-hand side of the linear system.
    values = jnp.geomspace(1e-2, 1.0, 6)
    bound = mo.accuracy.StrongConvexity(
        1e-2, hessian_lipschitz=0.0, cross_lipschitz=0.0, outer_lipschitz=1.0
    )
    adjoint = mo.ImplicitAdjoint(mo.CG(rtol=1e-10), inner_rtol=jnp.inf, error=bound)

    def one(key):
        *basis, hyper, wish = jax.random.normal(key, (8, 6))
        basis = jnp.linalg.qr(jnp.stack(basis))[0]
        matrix = (basis * values) @ basis.T
        gradient, report = mo.hypergradient(
            mo.BilevelProblem(
                lambda p, h, batch: 0.5 * p @ matrix @ p - p @ h,
                lambda p, h, batch: 0.5 * jnp.sum((p - wish) ** 2),
            ),
            hyper,
            params=jnp.zeros(6),
            inner=mo.Descent(optax.sgd(0.5), 5),
            adjoint=adjoint,
            throw=False,
        )
        inverse = (basis / values) @ basis.T
        exact = inverse @ (inverse @ hyper - wish)
        return jnp.linalg.norm(gradient - exact), report.derivative.error

    true, bound = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 40))
    assert np.all(bound >= true) and np.median(bound / true) < 3


def test_wrong_curvature_is_contradicted():
    hyper, start, train, valid = draw("ridge", jax.random.key(1))
    bound = mo.accuracy.StrongConvexity(
        100.0, hessian_lipschitz=0.0, cross_lipschitz=1.0, outer_lipschitz=10.0
    )
    adjoint = mo.ImplicitAdjoint(error=bound)
    problem = hyper, start, train, valid
    _, report = differentiate("ridge", problem, EXACT, adjoint)
    assert report.result == mo.RESULTS.curvature_contradicted
    assert report.derivative.error == jnp.inf and "smaller `curvature`" in str(report)


#
# Truncation
#


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_bias_of_truncation_is_bounded(num_steps):
    # Gradient descent from anywhere on ridge regression, where the constants are known.
    problem = draw("ridge", jax.random.key(4))
    hyper, start, (x, _), _ = problem
    curvature = spectral(x)[0] + jnp.exp(jnp.min(hyper))
    rate, largest = 0.2, 2 * jnp.max(jnp.abs(start))
    bound = mo.accuracy.TruncationBound(
        lambda hyper: 1 - rate * curvature,
        # The mixed derivative is diag(exp(hyper) params).
        lambda hyper: rate * jnp.exp(jnp.max(hyper)) * largest,
    )
    inner = mo.Descent(optax.sgd(rate), 100)
    adjoint = mo.TruncatedAdjoint(num_steps, mo.memory.RecomputeSteps(), bound)
    gradient, report = differentiate("ridge", problem, inner, adjoint)
    exact, _ = differentiate("ridge", problem, inner, mo.UnrolledAdjoint())
    bias = jnp.linalg.norm(gradient - exact)
    assert report.derivative.error is not None and report.derivative.error_is_bound
    assert bias <= report.derivative.error < 1e3 * bias
    assert "at most" in str(report) and "(biased)" in str(report)


def test_steps_that_do_not_contract_have_no_bound():
    problem = draw("ridge", jax.random.key(4))
    adjoint = mo.TruncatedAdjoint(
        5, bound=mo.accuracy.TruncationBound(lambda hyper: 1.5, 1.0)
    )
    _, report = differentiate("ridge", problem, solver("ridge", 10), adjoint)
    assert report.derivative.error == jnp.inf


#
# Newton steps
#


@ft.cache
def residuals_and_errors(family, newton_steps):
    """Ever nearer to the solution: the residual without Newton steps, and the error."""
    hyper, _, train, valid = draw(family, jax.random.key(3))
    exact = mo.solve_inner(
        mo.InnerProblem(FAMILIES[family][0]),
        hyper,
        train,
        params=jnp.zeros_like(hyper),
        solver=EXACT,
        adjoint=DIRECT,
    ).value
    adjoint = mo.ImplicitAdjoint(
        mo.CG(rtol=1e-12), inner_rtol=jnp.inf, newton_steps=newton_steps
    )

    def one(distance, adjoint):
        start = exact + distance * jnp.sin(jnp.arange(len(exact)) + 1.0)
        problem = hyper, start, train, valid
        return differentiate(family, problem, mo.Descent(optax.sgd(1e-9), 1), adjoint)

    @jax.jit
    def rows(distances):
        truth, _ = one(0.0, DIRECT)
        _, plain = jax.vmap(lambda d: one(d, DIRECT))(distances)
        gradients, _ = jax.vmap(lambda d: one(d, adjoint))(distances)
        return plain.inner.residual, jnp.linalg.norm(gradients - truth, axis=1)

    residual, error = rows(jnp.array([1e-2, 3e-3, 1e-3, 3e-4, 1e-4]))
    return np.log(residual), np.log(error)


@pytest.mark.ci
@pytest.mark.one_of(5)
@pytest.mark.parametrize("family", ["logistic", "softmax"])
@pytest.mark.parametrize("newton_steps", [0, 1])
def test_error_is_quadratic_in_the_residual_after_a_newton_step(family, newton_steps):
    slope = np.polyfit(*residuals_and_errors(family, newton_steps), 1)[0]
    assert abs(slope - 1 - newton_steps) < 0.2


@pytest.mark.ci
def test_newton_step_solves_a_quadratic_problem():
    # A nonlinear outer loss, so that a correction of the hypergradient to first order
    # would leave an error.
    residual, plain = residuals_and_errors("ridge", 0)
    _, corrected = residuals_and_errors("ridge", 1)
    assert np.all(corrected < plain - np.log(1e6)) and np.all(residual > np.log(1e-6))


def test_newton_step_that_leads_away_is_not_taken():
    # The gradient is arctan: Newton's method diverges from 3.
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: (
            params * jnp.arctan(params) - 0.5 * jnp.log1p(params**2) + hyper * 0
        ),
        lambda params, hyper, batch: params * hyper,
    )
    adjoint = mo.ImplicitAdjoint(inner_rtol=jnp.inf, newton_steps=2)
    inner = mo.Descent(optax.sgd(1e-6), 1)
    solution = mo.solve_inner(problem.inner, 1.0, params=3.0, solver=inner, adjoint=adjoint)
    np.testing.assert_allclose(solution.value, 3.0, rtol=1e-5)


@pytest.mark.slow
def test_newton_step_in_a_plain_gradient():
    problem = draw("logistic", jax.random.key(5))
    hyper, start, train, valid = problem
    inner = solver("logistic", 200)
    adjoint = mo.ImplicitAdjoint(mo.CG(rtol=1e-10), newton_steps=1, rtol=1e-2)
    inner_loss, outer_loss, _ = FAMILIES["logistic"]

    def outer(hyper):
        solution = mo.solve_inner(
            mo.InnerProblem(inner_loss),
            hyper,
            train,
            params=start,
            solver=inner,
            adjoint=adjoint,
        )
        return outer_loss(solution.value, hyper, valid)

    gradient, report = differentiate("logistic", problem, inner, adjoint)
    np.testing.assert_allclose(jax.jit(jax.grad(outer))(hyper), gradient, rtol=1e-8)
    np.testing.assert_allclose(outer(hyper), report.outer.loss, rtol=1e-12)


#
# Reports and settings
#


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "error, says",
    [
        (mo.accuracy.DualWeighted(), "about"),
        (
            mo.accuracy.StrongConvexity(
                lambda hyper: jnp.exp(jnp.min(hyper)),
                hessian_lipschitz=0,
                cross_lipschitz=lambda hyper: jnp.exp(jnp.max(hyper)),
                outer_lipschitz=100.0,
            ),
            "at most",
        ),
    ],
    ids=["estimate", "bound"],
)
def test_report_says_how_wrong(error, says):
    problem = draw("ridge", jax.random.key(2))
    adjoint = mo.ImplicitAdjoint(error=error)
    gradient, report = differentiate("ridge", problem, EXACT, adjoint)
    exact, _ = differentiate("ridge", problem, EXACT, DIRECT)
    assert report.derivative.error is not None
    assert report.derivative.error >= 0.5 * jnp.linalg.norm(gradient - exact)
    assert report.derivative.error < 1e-3 * report.outer.hypergradient_norm
    row = next(line for line in str(report).splitlines() if "hypergradient error" in line)
    assert says in row


def test_estimate_for_a_fixed_point():
    # The operator is not symmetric, so that the two solves are with different ones.
    matrix = jnp.array([[0.2, 0.9], [-0.3, 0.4]])
    problem = mo.BilevelProblem(
        mo.FixedPointProblem(lambda z, h, batch: jnp.tanh(matrix @ z + h)),
        lambda z, h, batch: jnp.sum(z**3),
    )

    def run(num_steps, adjoint):
        return mo.hypergradient(
            problem,
            jnp.array([0.5, -0.2]),
            params=jnp.zeros(2),
            inner=mo.Picard(num_steps=num_steps, rtol=None),
            adjoint=adjoint,
        )

    linear_solver = mo.GMRES(rtol=1e-10)
    rough = mo.ImplicitAdjoint(
        linear_solver, inner_rtol=jnp.inf, error=mo.accuracy.DualWeighted()
    )
    gradient, report = run(10, rough)
    exact, _ = run(200, mo.ImplicitAdjoint(linear_solver))
    true = jnp.linalg.norm(gradient - exact)
    assert true > 1e-5 and report.derivative.error is not None
    np.testing.assert_allclose(report.derivative.error, true, rtol=0.1)


def _any(x: Any) -> Any:
    return x


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: mo.ImplicitAdjoint(error=_any(0.1)), "`error` must be"),
        (lambda: mo.accuracy.TruncationBound(1.0, 1.0), "`contraction` must be below 1"),
        (
            lambda: mo.accuracy.TruncationBound(0.5, -1.0),
            "`sensitivity` must be a non-negative",
        ),
        (lambda: mo.TruncatedAdjoint(5, bound=_any(0.5)), "`bound` must be a"),
        (lambda: mo.TruncatedAdjoint(5, _any("1GB")), "`memory` must be a memory plan"),
        (lambda: mo.ImplicitAdjoint(newton_steps=-1), "`newton_steps` must be at least 0"),
        (
            lambda: mo.accuracy.StrongConvexity(
                0.0, hessian_lipschitz=0, cross_lipschitz=0, outer_lipschitz=0
            ),
            "`curvature` must be positive",
        ),
        (
            lambda: mo.accuracy.StrongConvexity(
                1.0, hessian_lipschitz=-1, cross_lipschitz=0, outer_lipschitz=0
            ),
            "`hessian_lipschitz` must be a non-negative",
        ),
    ],
)
def test_settings_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bound_needs_a_loss_and_few_outer_variables():
    bound = mo.accuracy.StrongConvexity(
        1.0, hessian_lipschitz=0, cross_lipschitz=1, outer_lipschitz=1
    )
    fixed_point = mo.BilevelProblem(
        mo.FixedPointProblem(lambda z, h, batch: 0.5 * z + h), lambda z, h, batch: z**2
    )
    adjoint = mo.ImplicitAdjoint(mo.GMRES(), error=bound)
    with pytest.raises(ValueError, match="for an inner loss that is minimised"):
        mo.hypergradient(fixed_point, 1.0, params=0.0, inner=mo.Picard(), adjoint=adjoint)
    many = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch: jnp.sum(params**2),
    )
    with pytest.raises(ValueError, match="there are 600. Give\n?.*`cross_norm"):
        mo.hypergradient(
            many,
            jnp.ones(600),
            params=jnp.zeros(600),
            inner=mo.Descent(optax.sgd(0.5), 1),
            adjoint=mo.ImplicitAdjoint(error=bound),
        )


# -- linear solves that stop improving


@pytest.mark.parametrize(
    "residual, error, passes",
    [(9e-5, mo.accuracy.DualWeighted(), True), (2e-4, mo.accuracy.DualWeighted(), False)]
    + [(9e-5, None, False)],
)
def test_a_stagnated_solve_passes_where_the_error_is_judged(residual, error, passes):
    # A tenth of `rtol` is all that the judgement of the error needs.
    accuracy = Accuracy(rtol=1e-3, inner_rtol=None, error=error, is_biased=False)

    def passed(result):
        vector, zero = jnp.ones(2, jnp.float32), jnp.asarray(0)
        residuals = jnp.asarray(residual), jnp.asarray(1.0)
        linear = mo.linear.LinearSolution(
            vector, result, residuals[0], zero, zero, residuals[1]
        )
        return accuracy.passed(linear, vector).result

    stagnated, exhausted = mo.RESULTS.linear_stagnation, mo.RESULTS.linear_max_steps
    assert (passed(stagnated) == mo.RESULTS.successful) == passes
    assert passes or passed(stagnated) == stagnated
    assert passed(exhausted) == exhausted
