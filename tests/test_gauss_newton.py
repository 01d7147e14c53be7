"""The Gauss-Newton operator, against the same matrix made from dense Jacobians."""

import functools as ft
import math
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
from jaxprs import operations
from metaopt._implicit._operators import gauss_newton_operator, jacobian_operator
from problems import flat, relative_error


NUM_ROWS, NUM_INPUTS, NUM_HIDDEN, NUM_CLASSES = 24, 3, 4, 3


#
# A small network with a criterion that couples its parts
#


def network(params, hyper, batch):
    """Predictions in a dictionary, one of them not of floating point."""
    del hyper
    x, label = batch
    hidden = jnp.tanh(x @ params["first"])
    logits = hidden @ params["second"].astype(x.dtype)
    return {"logits": logits, "size": jnp.sum(hidden**2), "label": label}


def coupled(predictions, params, hyper, batch):
    """Convex in predictions and params together, and not a sum of a term in each."""
    del batch
    logits = predictions["logits"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, predictions["label"]
    )
    square = sum(jnp.sum(leaf.astype(logits.dtype) ** 2) for leaf in params.values())
    tied = (jnp.sum(logits) / NUM_ROWS - jnp.sum(params["second"])) ** 2
    return jnp.mean(losses) + jnp.exp(hyper) * square + 0.1 * tied + predictions["size"]


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def example(dtype=jnp.float64, second_dtype=None):
    x = jnp.asarray(numbers(0, NUM_ROWS, NUM_INPUTS), dtype)
    label = jnp.asarray(np.arange(NUM_ROWS) % NUM_CLASSES)
    first = jnp.asarray(numbers(1, NUM_INPUTS, NUM_HIDDEN), dtype)
    second = jnp.asarray(numbers(2, NUM_HIDDEN, NUM_CLASSES), second_dtype or dtype)
    return {"first": first, "second": second}, (x, label)


def dense_gauss_newton(predict, criterion, params):
    """Written out: all four blocks of the criterion's Hessian between dense Jacobians."""
    flat_params, unravel = ravel_pytree(params)
    predictions = predict(params)
    floats, rest = eqx.partition(predictions, eqx.is_inexact_array)
    flat_predictions, unravel_predictions = ravel_pytree(floats)

    def of_model(p):
        return ravel_pytree(eqx.filter(predict(unravel(p)), eqx.is_inexact_array))[0]

    def of_both(both):
        z, p = jnp.split(both, [flat_predictions.size])
        return criterion(eqx.combine(unravel_predictions(z), rest), unravel(p))

    jacobian = jax.jit(jax.jacrev(of_model))(flat_params)
    both = jnp.concatenate([flat_predictions, flat_params])
    inner = jax.jit(jax.hessian(of_both))(both)
    outer = np.vstack([jacobian, np.eye(flat_params.size)])
    return outer.T @ np.asarray(inner) @ outer


def test_operator_is_the_dense_product():
    params, batch = example()
    predict = lambda p: network(p, -1.0, batch)
    criterion = lambda z, p: coupled(z, p, -1.0, batch)
    loss = lambda p: criterion(predict(p), p)

    @jax.jit
    def matrices(params):
        operator = gauss_newton_operator(predict, criterion, params)
        hessian = jacobian_operator(jax.grad(loss), params)[1]
        return operator.as_matrix(), hessian.as_matrix()

    matrix, hessian = matrices(params)
    dense = dense_gauss_newton(predict, criterion, params)
    np.testing.assert_allclose(matrix, dense, rtol=1e-12, atol=1e-12)
    # The control: the Hessian is another matrix.
    assert np.linalg.norm(hessian - dense) > 0.1 * np.linalg.norm(dense)
    assert np.linalg.eigvalsh(dense)[0] > 0


def test_operator_of_params_in_half_precision():
    params, batch = example(jnp.float32, jnp.bfloat16)
    predict = lambda p: network(p, jnp.float32(-1.0), batch)
    criterion = lambda z, p: coupled(z, p, jnp.float32(-1.0), batch)
    operator = gauss_newton_operator(predict, criterion, params)
    vector = jax.tree.map(lambda a: jnp.ones_like(a), params)
    product = operator.mv(vector)
    assert jax.tree.map(lambda a: a.dtype, product) == jax.tree.map(
        lambda a: a.dtype, params
    )
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    batch = batch[0].astype(jnp.float64), batch[1]
    dense = dense_gauss_newton(
        lambda p: network(p, -1.0, batch), lambda z, p: coupled(z, p, -1.0, batch), wide
    )
    assert relative_error(product, dense @ flat(vector)) < 0.02


def test_operator_is_the_hessian_of_a_linear_model():
    params = {"w": jnp.asarray(numbers(3, 4)), "b": jnp.asarray(0.3)}
    x, y = jnp.asarray(numbers(4, 12, 4)), jnp.asarray(numbers(5, 12) > 0, float)
    predict = lambda p: x @ p["w"] + p["b"]

    def criterion(z, p):
        fit = jnp.mean(optax.losses.sigmoid_binary_cross_entropy(z, y))
        return fit + 0.1 * jnp.sum(p["w"] ** 4)

    operator = gauss_newton_operator(predict, criterion, params)
    hessian = jacobian_operator(jax.grad(lambda p: criterion(predict(p), p)), params)[1]
    np.testing.assert_allclose(operator.as_matrix(), hessian.as_matrix(), atol=1e-14)


def multiplications(fn, *args):
    """Those of the matrix products in a function that runs once."""
    total = 0
    eqn: Any
    for eqn in operations(fn, *args):
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            summed = math.prod(left[axis] for axis in contracting)
            total += math.prod(eqn.outvars[0].aval.shape) * summed
    return total


def test_products_of_a_deep_network_cost_less_than_with_the_hessian():
    widths = (32,) * 7
    params = [jnp.asarray(numbers(i, *s)) for i, s in enumerate(zip(widths, widths[1:]))]
    x, y = jnp.asarray(numbers(8, 16, 32)), jnp.asarray(numbers(9, 16, 32))

    def predict(params):
        out = x
        for weight in params:
            out = jnp.tanh(out @ weight)
        return out

    criterion = lambda z, p: jnp.mean((z - y) ** 2)
    gradient = jax.grad(lambda p: criterion(predict(p), p))
    unit = multiplications(gradient, params)
    gauss_newton = gauss_newton_operator(predict, criterion, params)
    hessian = jacobian_operator(gradient, params)[1]
    # Of F multiplications for the network, a gradient takes 3 but for the first layer's
    # in the data; the rest is 4 and 6 likewise.
    assert multiplications(gauss_newton.mv, params) / unit < 1.35
    assert multiplications(hessian.mv, params) / unit > 1.85


#
# Hypergradients
#


def penalised_network(params, hyper, batch):
    del hyper
    return jnp.tanh(batch[0] @ params["w"]) @ params["v"]


def penalised_squares(predictions, params, hyper, batch):
    penalty = sum(
        jnp.sum(jnp.exp(hyper) * jnp.sum(leaf**2)) for leaf in jax.tree.leaves(params)
    )
    return 0.5 * jnp.mean((predictions - batch[1]) ** 2) + penalty


def outer_loss(params, hyper, batch):
    return jnp.mean((penalised_network(params, hyper, batch) - batch[1]) ** 2)


PREDICTION = mo.PredictionProblem(penalised_network, penalised_squares)
PROBLEM = mo.BilevelProblem(PREDICTION, outer_loss)
NEWTON = mo.OptimistixSolver(optx.Newton(rtol=1e-12, atol=1e-12))
BFGS = mo.OptimistixSolver(optx.BFGS(rtol=1e-11, atol=1e-11), max_steps=2000)
STAYS = mo.Descent(optax.sgd(0.0), 1)  # for a start that is the solution
HYPER = jnp.array([-7.0, -6.5])


def implicit(curvature, **settings):
    return mo.ImplicitAdjoint(mo.CG(rtol=1e-12), curvature=curvature, **settings)


GAUSS_NEWTON = implicit(
    mo.linear.GaussNewton(), error=mo.accuracy.DualWeighted(), inner_rtol=jnp.inf
)
EXACT = implicit(mo.linear.ExactCurvature())


def data(noise):
    """Data that a network of this shape fits, but for `noise`."""
    x = jnp.asarray(numbers(0, 2, 30, NUM_INPUTS))
    params = {"w": jnp.asarray(numbers(1, NUM_INPUTS, 2)), "v": jnp.asarray(numbers(2, 2))}
    y = jax.vmap(lambda x: penalised_network(params, 0.0, (x, None)))(x)
    y = y + noise * numbers(3, 2, 30)
    return params, (x[0], y[0]), (x[1], y[1])


@ft.cache
def solved(noise):
    """The solution at `HYPER`, from where the data came from, and the data."""
    params, train, valid = data(noise)
    solution = mo.solve_inner(
        PREDICTION, HYPER, train, params=params, solver=BFGS, adjoint=EXACT
    )
    return solution.value, train, valid


@eqx.filter_jit
def differentiate(hyper, problem, adjoint) -> Any:
    params, train, valid = problem
    return mo.hypergradient(
        PROBLEM,
        hyper,
        train,
        valid,
        params=params,
        inner=STAYS,
        adjoint=adjoint,
        throw=False,
    )


@pytest.mark.ci
def test_hypergradient_is_that_of_the_dense_operator():
    params, train, valid = solved(0.3)
    gradient, report = differentiate(HYPER, solved(0.3), GAUSS_NEWTON)
    flat_params, unravel = ravel_pytree(params)
    loss = lambda p, h: PREDICTION.loss(unravel(p), h, train)
    cross = jax.jacfwd(jax.grad(loss), 1)(flat_params, HYPER)
    dense = dense_gauss_newton(
        lambda p: penalised_network(p, HYPER, train),
        lambda z, p: penalised_squares(z, p, HYPER, train),
        params,
    )
    in_params = jax.grad(lambda p: outer_loss(unravel(p), HYPER, valid))(flat_params)
    expected = -cross.T @ np.linalg.solve(dense, in_params)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7)
    assert report.left_out == ("the curvature of the model",)
    assert "(biased)" in str(report) and report.result == mo.RESULTS.successful
    # The control: what was left out matters here.
    exact, complete = differentiate(HYPER, solved(0.3), EXACT)
    assert relative_error(exact, expected) > 0.05 and complete.left_out == ()


@pytest.mark.slow
def test_plain_gradients_agree():
    params, train, valid = solved(0.3)

    def outer(hyper):
        solution = mo.solve_inner(
            PREDICTION, hyper, train, params=params, solver=STAYS, adjoint=GAUSS_NEWTON
        )
        return outer_loss(solution.value, hyper, valid)

    expected, _ = differentiate(HYPER, solved(0.3), GAUSS_NEWTON)
    hypers = jnp.stack([HYPER, HYPER + 0.1])
    both = jax.jit(jax.vmap(jax.grad(outer)))(hypers)
    np.testing.assert_allclose(both[0], expected, rtol=1e-8)
    forward = jax.jit(jax.jacfwd(outer))(hypers[1])
    np.testing.assert_allclose(both[1], forward, rtol=1e-8)
    lanes = lambda h: differentiate(h, solved(0.3), GAUSS_NEWTON)[0]
    np.testing.assert_allclose(both, eqx.filter_vmap(lanes)(hypers), rtol=1e-8)


@ft.cache
def true_and_estimated_error(noise):
    exact, _ = differentiate(HYPER, solved(noise), EXACT)
    gradient, report = differentiate(HYPER, solved(noise), GAUSS_NEWTON)
    return jnp.linalg.norm(gradient - exact), report.derivative.error


@pytest.mark.parametrize("noise", [0.03, 0.3])
def test_estimate_knows_what_was_left_out(noise):
    # With the residual of the system that was solved it would be 1e-9, and wrong.
    true, estimate = true_and_estimated_error(noise)
    assert true > 1e-5
    assert 0.5 < estimate / true < 2


def test_error_vanishes_with_the_slope_of_the_criterion():
    errors = [true_and_estimated_error(noise)[0] for noise in (0.3, 0.03)]
    assert errors[1] < 0.3 * errors[0]


def test_bound_holds_for_what_was_left_out():
    # One parameter, so that the curvature is known: a' ** 2 + a'' (a - t) + penalty.
    def predict(params, hyper, batch):
        return params + 0.2 * params**2

    def criterion(predictions, params, hyper, batch):
        return 0.5 * (predictions - 2.0) ** 2 + 0.5 * jnp.exp(hyper) * params**2

    problem = mo.BilevelProblem(
        mo.PredictionProblem(predict, criterion), lambda p, h, b: 0.5 * p**2
    )

    def run(curvature, error) -> Any:
        return mo.hypergradient(
            problem,
            0.0,
            params=1.0,
            inner=NEWTON,
            adjoint=implicit(curvature, error=error),
            throw=False,
        )

    exact, _ = run(mo.linear.ExactCurvature(), None)
    params = mo.solve_inner(
        problem.inner, 0.0, params=1.0, solver=NEWTON, adjoint=EXACT
    ).value
    residual = params + 0.2 * params**2 - 2
    curvature = (1 + 0.4 * params) ** 2 + 0.4 * residual + 1
    bound = lambda curvature: mo.accuracy.StrongConvexity(
        curvature, hessian_lipschitz=1.0, cross_lipschitz=1.0, outer_lipschitz=1.0
    )
    gradient, report = run(mo.linear.GaussNewton(), bound(curvature))
    true = jnp.abs(gradient - exact)
    assert true > 0.01 and true <= report.derivative.error < 3 * true
    # The Hessian is less than the operator that was solved with, and contradicts.
    _, report = run(mo.linear.GaussNewton(), bound(curvature + 0.02))
    assert report.result == mo.RESULTS.curvature_contradicted


def test_definite_where_the_hessian_is_not():
    # Short of the minimum of a network the Hessian has negative eigenvalues.
    params, train, valid = data(1.0)
    params = jax.tree.map(lambda leaf: 0.1 * leaf, params)
    inner = mo.Descent(optax.sgd(1e-6), 1)

    def run(curvature) -> Any:
        adjoint = implicit(curvature, inner_rtol=jnp.inf)
        return mo.hypergradient(
            PROBLEM,
            HYPER,
            train,
            valid,
            params=params,
            inner=inner,
            adjoint=adjoint,
            throw=False,
        )[1]

    assert run(mo.linear.ExactCurvature()).result == mo.RESULTS.linear_indefinite
    report = run(mo.linear.GaussNewton())
    assert report.result == mo.RESULTS.successful and report.derivative.min_curvature > 0


def test_gauss_newton_steps_approach_the_solution():
    exact, train, _ = solved(0.03)
    start = jax.tree.map(lambda leaf: leaf + 0.005, exact)
    adjoint = implicit(mo.linear.GaussNewton(), newton_steps=1)
    inner = mo.Descent(optax.sgd(1e-9), 1)
    near = mo.solve_inner(
        PREDICTION, HYPER, train, params=start, solver=inner, adjoint=adjoint
    )
    assert relative_error(near.value, exact) < 0.5 * relative_error(start, exact)


def test_float32():
    params, train, valid = jax.tree.map(lambda a: a.astype(jnp.float32), solved(0.3))
    report: Any
    gradient, report = mo.hypergradient(
        PROBLEM,
        HYPER.astype(jnp.float32),
        train,
        valid,
        params=params,
        inner=STAYS,
        adjoint=mo.ImplicitAdjoint(mo.CG(rtol=1e-5), curvature=mo.linear.GaussNewton()),
    )
    assert gradient.dtype == jnp.float32 and report.derivative.linear_residual < 1e-5
    expected, _ = differentiate(HYPER, solved(0.3), GAUSS_NEWTON)
    assert relative_error(gradient, expected) < 1e-3


#
# The kind of problem
#


def test_loss_is_the_composition():
    params, train, _ = data(0.3)
    expected = penalised_squares(
        penalised_network(params, HYPER, train), params, HYPER, train
    )
    out = PREDICTION.evaluate(params, HYPER, train, jax.random.key(0), None)
    np.testing.assert_allclose(out.value, expected)
    assert out.aux is None and out.state is None


def test_keys_state_and_aux():
    seen: dict[str, Any] = {}

    def predict(params, hyper, batch, *, key, state):
        seen["predict"] = key
        return params * state + hyper, state + 1

    def criterion(predictions, params, hyper, batch, *, key):
        seen["criterion"] = key
        return jnp.sum((predictions - batch) ** 2), {"predictions": predictions}

    problem = mo.PredictionProblem(
        predict,
        criterion,
        lambda hyper, key: (jnp.zeros(2), jnp.array(1.0)),
        has_aux=True,
        has_state=True,
    )
    out = problem.evaluate(jnp.ones(2), 0.5, 3.0, jax.random.key(3), jnp.array(2.0))
    np.testing.assert_allclose(out.value, 0.5)
    np.testing.assert_allclose(out.aux["predictions"], 2.5)
    assert out.state == 3
    first, second = (jax.random.key_data(seen[k]) for k in ("predict", "criterion"))
    assert not np.array_equal(first, second)

    _, report = mo.hypergradient(
        mo.BilevelProblem(problem, lambda params, hyper, batch: jnp.sum(params**2)),
        0.5,
        train=jnp.array(3.0),
        inner=mo.Descent(optax.sgd(0.1), 100, state_policy=mo.nn.FrozenState()),
        adjoint=mo.ImplicitAdjoint(curvature=mo.linear.GaussNewton()),
    )
    assert report.result == mo.RESULTS.successful


class SubclassedFit(mo.extend.AbstractPredictionProblem):
    def init(self, hyper, key):
        return jnp.zeros(NUM_INPUTS)

    def predict(self, params, hyper, batch):
        return batch[0] @ params

    def criterion(self, predictions, params, hyper, batch):
        return jnp.mean((predictions - batch[1]) ** 2) + jnp.exp(hyper) * params @ params


def test_subclass_and_a_module_for_params():
    _, train, valid = data(0.3)
    outer = lambda params, hyper, batch: jnp.mean((batch[0] @ params - batch[1]) ** 2)

    def run(curvature):
        return mo.hypergradient(
            mo.BilevelProblem(SubclassedFit(), outer),
            -1.0,
            train,
            valid,
            inner=NEWTON,
            adjoint=implicit(curvature),
        )[0]

    # Linear in the params: nothing is left out.
    np.testing.assert_allclose(
        run(mo.linear.GaussNewton()), run(mo.linear.ExactCurvature()), rtol=1e-9
    )


class OwnOptimality(mo.extend.AbstractDirectSolver):
    """A solver that states an optimality of its own."""

    def check(self, problem, data):
        del problem, data

    def optimality(self, problem, params, hyper, batch, key, state):
        residual = lambda p, h: problem.optimality(p, h, batch, key, state)
        return mo.extend.Optimality(residual, problem.tags)

    def solve(self, problem, params, hyper, batch, key, model_state):
        del problem, hyper, batch, key
        successful: Any = mo.RESULTS.successful
        none = jnp.zeros((), int)
        return mo.extend.Outcome(
            params, model_state, None, successful, none, None, none - 1
        )


@pytest.mark.parametrize(
    "inner_problem, solver",
    [
        (mo.InnerProblem(PREDICTION.loss), NEWTON),
        (PREDICTION, OwnOptimality()),
        (mo.RootProblem(lambda p, h, b: p), mo.OptimistixSolver(optx.Newton(1e-6, 1e-6))),
    ],
    ids=["loss", "own optimality", "root"],
)
def test_what_is_no_criterion_of_predictions_is_refused(inner_problem, solver):
    params, train, valid = data(0.3)
    adjoint = mo.ImplicitAdjoint(mo.GMRES(), curvature=mo.linear.GaussNewton())
    with pytest.raises(ValueError, match="(?s)metaopt.PredictionProblem.*ExactCurvature"):
        mo.hypergradient(
            mo.BilevelProblem(inner_problem, outer_loss),
            HYPER,
            train,
            valid,
            params=params,
            inner=solver,
            adjoint=adjoint,
        )


@pytest.mark.parametrize(
    "predict, criterion, match",
    [
        (lambda p, h, b: 3, lambda z, p, h, b: jnp.sum(p), "`predict` returned 3"),
        (lambda p, h, b: p, lambda z, p, h, b: z, "`criterion` returned an array of"),
        (lambda p, h, b: p, lambda z, p, h, b: (jnp.sum(z), z), "declare `has_aux=True`"),
    ],
)
def test_what_the_functions_return_is_checked(predict, criterion, match):
    problem = mo.PredictionProblem(predict, criterion)
    with pytest.raises(ValueError, match=match):
        problem.evaluate(jnp.ones(2), 0.0, None, jax.random.key(0), None)


def test_settings_are_checked():
    curvature: Any = "gauss-newton"
    with pytest.raises(
        ValueError, match="`curvature` must be `metaopt.linear.ExactCurvature"
    ):
        mo.ImplicitAdjoint(curvature=curvature)
    has_state = mo.PredictionProblem(
        lambda p, h, b, state: p, lambda z, p, h, b: jnp.sum(z), has_state=True
    )
    with pytest.raises(ValueError, match=r"the tuple \(predictions, state\)"):
        has_state.evaluate(jnp.ones(2), 0.0, None, jax.random.key(0), jnp.ones(()))


def test_operator_promises_what_the_condition_does():
    params, train, _ = data(0.3)
    condition = NEWTON.optimality(PREDICTION, params, HYPER, train, jax.random.key(0), None)
    residual, operator, jacobian = mo.linear.GaussNewton().linearise(
        condition, params, HYPER
    )
    assert lx.is_positive_semidefinite(operator) and lx.is_symmetric(jacobian)
    np.testing.assert_allclose(
        flat(residual), flat(jax.grad(PREDICTION.loss)(params, HYPER, train)), rtol=1e-12
    )
    _, hessian, same = mo.linear.ExactCurvature().linearise(condition, params, HYPER)
    assert hessian is same
    np.testing.assert_allclose(jacobian.as_matrix(), hessian.as_matrix(), atol=1e-12)
