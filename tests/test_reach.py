"""Derivatives that are zero by construction are errors, wherever they are asked for.

Other libraries return the zero. Each case is one in which this library once did too.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


RATE, START = jnp.array(0.05), jnp.full(2, 0.3)
ZERO = "zero by construction"
SOLUTION_ONLY: dict[str, Any] = {
    "implicit": mo.ImplicitAdjoint(inner_rtol=jnp.inf),
    "truncated": mo.TruncatedAdjoint(3),
    "one step": mo.OneStepAdjoint(),
}
PATH: dict[str, Any] = {"unrolled": mo.UnrolledAdjoint(), "forward": mo.ForwardAdjoint()}


def quadratic(params, hyper, batch):
    return jnp.sum((params - 1.0) ** 2)


def tracking(params, hyper, batch):
    return jnp.sum((params - hyper) ** 2)


def outer_with_prior(params, hyper, batch):
    return jnp.sum(params**2) + 1e-3 * jnp.sum(hyper**2)


def descent(rate: Any = 0.1, **options: Any):
    return mo.Descent(optax.sgd(rate), num_steps=10, **options)


# In `hypergradient`: a leaf that the outer loss reads as well


def of_rate(adjoint):
    problem = mo.BilevelProblem(quadratic, outer_with_prior)
    inner = mo.Descent(lambda rate: optax.sgd(rate), num_steps=10)
    return mo.hypergradient(
        problem, RATE, params=jnp.zeros(2), inner=inner, adjoint=adjoint
    )[0]


def of_start(adjoint):
    problem = mo.BilevelProblem(
        mo.InnerProblem(quadratic, init_fn=lambda hyper, key: hyper), outer_with_prior
    )
    return mo.hypergradient(problem, START, inner=descent(), adjoint=adjoint)[0]


@pytest.mark.parametrize("name", SOLUTION_ONLY)
def test_prior_in_the_outer_loss_does_not_hide_an_unseen_start(name):
    with pytest.raises(ValueError, match=ZERO):
        of_start(SOLUTION_ONLY[name])


def test_prior_in_the_outer_loss_does_not_hide_an_unseen_rate():
    with pytest.raises(ValueError, match=ZERO):
        of_rate(SOLUTION_ONLY["implicit"])


@pytest.mark.parametrize("name", PATH)
def test_both_ways_add_up(name):
    shrink = 0.8**10
    params = 1 - shrink * (1 - START)
    expected = 2 * params * shrink + 2e-3 * START
    np.testing.assert_allclose(of_start(PATH[name]), expected, rtol=1e-9)


@pytest.mark.parametrize("name", SOLUTION_ONLY | PATH)
def test_what_is_held_constant_by_the_user_is_no_error(name):
    # In the inner loss only; the outer loss reads it too.
    problem = mo.BilevelProblem(
        lambda p, h, b: jnp.sum((p - jax.lax.stop_gradient(h)) ** 2),
        lambda p, h, b: jnp.sum(p**2 * h),
    )
    gradient, _ = mo.hypergradient(
        problem,
        START,
        params=jnp.zeros(2),
        inner=descent(),
        adjoint=(SOLUTION_ONLY | PATH)[name],
    )
    np.testing.assert_allclose(gradient, (START * (1 - 0.8**10)) ** 2, rtol=1e-9)


@pytest.mark.parametrize("name", PATH)
def test_update_without_derivative(name):
    problem = mo.BilevelProblem(tracking, lambda p, h, b: jnp.sum(p**2))
    inner = mo.Descent(optax.sign_sgd(0.1), num_steps=10)
    with pytest.raises(ValueError, match="have no derivative"):
        mo.hypergradient(
            problem, START, params=jnp.zeros(2), inner=inner, adjoint=PATH[name]
        )


# In a plain `jax.grad` through `solve_inner`


def value_by_rate(rate, adjoint):
    problem = mo.InnerProblem(quadratic)
    solution = mo.solve_inner(
        problem, 0.0, params=jnp.zeros(2), solver=descent(rate), adjoint=adjoint
    )
    return jnp.sum(solution.value)


def value_by_start(start, adjoint):
    problem = mo.InnerProblem(quadratic, init_fn=lambda hyper, key: start)
    solution = mo.solve_inner(problem, 0.0, solver=descent(), adjoint=adjoint)
    return jnp.sum(solution.value)


def with_state(params, hyper, batch, state):
    return jnp.sum((params - hyper + state) ** 2), 0.9 * state + 0.1 * jnp.sum(params)


def solve_with_state(hyper, state, adjoint):
    return mo.solve_inner(
        mo.InnerProblem(with_state, has_state=True),
        hyper,
        params=jnp.zeros(2),
        solver=descent(state_policy=mo.nn.CarriedState()),
        adjoint=adjoint,
        model_state=state,
    )


def value_by_state(state, adjoint):
    return jnp.sum(solve_with_state(START, state, adjoint).value)


@pytest.mark.parametrize("fn, x", [(value_by_rate, 0.05), (value_by_state, 0.2)])
def test_closed_over_array_is_seen_along_the_path(fn, x):
    step = 1e-6
    adjoint = mo.UnrolledAdjoint()
    expected = (fn(x + step, adjoint) - fn(x - step, adjoint)) / (2 * step)
    for adjoint in PATH.values():
        np.testing.assert_allclose(jax.grad(fn)(x, adjoint), expected, rtol=1e-6)


@pytest.mark.parametrize("name", SOLUTION_ONLY)
def test_closed_over_start_and_model_state_are_guarded(name):
    adjoint = SOLUTION_ONLY[name]
    with pytest.raises(ValueError, match="closed-over array.*" + ZERO):
        jax.grad(value_by_start)(START, adjoint)
    with pytest.raises(ValueError, match="closed-over array.*" + ZERO):
        jax.grad(value_by_state)(0.2, adjoint)


def test_closed_over_rate_is_guarded():
    with pytest.raises(ValueError, match="closed-over array.*" + ZERO):
        jax.grad(value_by_rate)(0.05, SOLUTION_ONLY["implicit"])


def test_closed_over_target_is_differentiated():
    # The guard must not stand in the way of what is within reach.
    def value(target):
        problem = mo.InnerProblem(lambda p, h, b: jnp.sum((p - target) ** 2))
        return jnp.sum(
            mo.solve_inner(
                problem,
                0.0,
                params=jnp.zeros(2),
                solver=mo.Descent(optax.sgd(0.1), num_steps=200),
                adjoint=mo.ImplicitAdjoint(),
            ).value
        )

    for transform in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(transform(value)(START), [1.0, 1.0], rtol=1e-5)


def with_aux(params, hyper, batch):
    return jnp.sum((params - hyper) ** 2), jnp.sum(params)


def beside(hyper, part, adjoint, throw):
    if part == "model_state":
        return jnp.sum(solve_with_state(hyper, jnp.array(0.0), adjoint).model_state)
    solution = mo.solve_inner(
        mo.InnerProblem(with_aux, has_aux=True),
        hyper,
        params=jnp.zeros(2),
        solver=descent(),
        adjoint=adjoint,
        throw=throw,
    )
    return solution.aux if part == "aux" else solution.stats["losses"][-1]


@pytest.mark.one_of(3)
@pytest.mark.parametrize("part", ["aux", "losses", "model_state"])
def test_what_comes_with_a_solution_has_no_implicit_derivative(part):
    adjoint = SOLUTION_ONLY["implicit"]
    with pytest.raises(RuntimeError, match="have no derivative under"):
        jax.block_until_ready(jax.grad(beside)(START, part, adjoint, True))
    if part != "model_state":
        assert jnp.all(jnp.isnan(jax.grad(beside)(START, part, adjoint, False)))
        assert jnp.all(jnp.isnan(jax.jacfwd(beside)(START, part, adjoint, False)))
    exact = jax.grad(beside)(START, part, mo.UnrolledAdjoint(), True)
    assert jnp.all(jnp.isfinite(exact)) and jnp.all(exact != 0)


def test_what_comes_with_a_solution_does_not_disturb_its_derivative():
    # The auxiliary output is looked at and not differentiated.
    def value(hyper):
        solution = mo.solve_inner(
            mo.InnerProblem(with_aux, has_aux=True),
            hyper,
            params=jnp.zeros(2),
            solver=mo.Descent(optax.sgd(0.1), num_steps=200),
            adjoint=mo.ImplicitAdjoint(),
        )
        return jnp.sum(solution.value), (solution.aux, solution.stats)

    for fn in (value, jax.vmap(value, in_axes=0)):
        hyper = START if fn is value else jnp.stack([START, 2 * START])
        gradient = jax.grad(lambda h: jnp.sum(fn(h)[0]))(hyper)
        np.testing.assert_allclose(gradient, jnp.ones_like(hyper), rtol=1e-5)
    gradient, _ = jax.grad(value, has_aux=True)(START)
    np.testing.assert_allclose(gradient, [1.0, 1.0], rtol=1e-5)


# -- influence without a derivative, which was once called none at all


def dropout_problem(drop):
    def inner(params, hyper, batch, *, key):
        kept = drop(hyper["rate"], jnp.ones(2), key)
        return jnp.sum((params - kept) ** 2) + hyper["decay"] * jnp.sum(params**2)

    return mo.BilevelProblem(inner, lambda params, hyper, batch: jnp.sum(params**2))


def of_dropout(drop, **hyper):
    return mo.hypergradient(
        dropout_problem(drop),
        {"rate": 0.3, "decay": 0.1} | hyper,
        params=jnp.zeros(2),
        inner=descent(),
        adjoint=mo.UnrolledAdjoint(),
    )


def test_dropout_rate_has_influence_and_no_derivative():
    def drop(rate, x, key):
        return eqx.nn.Dropout(rate)(x, key=key)

    gradient, report = of_dropout(drop)
    assert gradient["rate"] == 0
    assert report.outer.unreached == () and report.outer.held_constant == ("hyper['rate']",)
    assert "without derivative" in str(report) and "SelfTuningSolver" in str(report)

    only_rate = mo.BilevelProblem(
        lambda params, rate, batch, *, key: jnp.sum(
            (params - drop(rate, jnp.ones(2), key)) ** 2
        ),
        lambda params, rate, batch: jnp.sum(params**2),
    )
    with pytest.raises(ValueError, match="influence and no derivative.*SelfTuningSolver"):
        mo.hypergradient(
            only_rate, 0.3, params=START, inner=descent(), adjoint=mo.UnrolledAdjoint()
        )


WITHOUT_DERIVATIVE: dict[str, Any] = {
    "a draw that is compared": lambda h, x, key: x * (jax.random.uniform(key, (2,)) > h),
    "a number of layers": lambda h, x, key: x * jnp.asarray(10 * h, int),
    "a sign": lambda h, x, key: x * jnp.sign(h - 0.5),
    "a choice": lambda h, x, key: x[jnp.argmax(jnp.stack([h, 1 - h]))],
}


@pytest.mark.parametrize("name", WITHOUT_DERIVATIVE)
def test_influence_through_steps_alone_is_named(name):
    with pytest.raises(ValueError, match="rate.*no derivative.*SelfTuningSolver"):
        of_dropout(WITHOUT_DERIVATIVE[name])


def test_leaf_that_users_hold_constant_is_no_error():
    hold = lambda rate, x, key: x * jax.lax.stop_gradient(rate)
    gradient, report = of_dropout(hold)
    assert gradient["rate"] == 0 and report.outer.held_constant == ("hyper['rate']",)
    _, report = of_dropout(hold, idle=jnp.zeros(2))
    assert report.outer.unreached == ("hyper['idle']",)


# -- Python floats in the params


class Line(eqx.Module):
    weight: jax.Array
    offset: float = 0.5
    dropout: eqx.nn.Dropout = eqx.nn.Dropout(0.1, inference=True)


EVERY = [
    mo.UnrolledAdjoint(),
    mo.ForwardAdjoint(),
    mo.FirstOrderAdjoint(),
    mo.ImplicitAdjoint(),
    mo.TruncatedAdjoint(5),
    mo.OneStepAdjoint(),
]


@pytest.mark.parametrize("adjoint", EVERY, ids=lambda adjoint: type(adjoint).__name__)
def test_floats_in_the_params_are_settings(adjoint):
    solver = mo.Descent(optax.sgd(0.25), 60)

    def loss(params, hyper, batch):
        kept = params.dropout(params.weight) - hyper
        return kept**2 + (params.offset - 3.0) ** 2

    start = Line(jnp.zeros(()))
    drawn = mo.InnerProblem(loss, init_fn=lambda hyper, key: start)
    for problem, params in ((mo.InnerProblem(loss), start), (drawn, None)):
        found = mo.solve_inner(
            problem, 1.0, params=params, solver=solver, adjoint=adjoint
        ).value
        np.testing.assert_allclose(found.weight, 1.0)
        assert type(found.offset) is float and found.offset == 0.5


def test_floats_that_may_have_been_meant_as_params_are_named():
    def loss(params, hyper, batch):
        return (params["weights"][0] - hyper) ** 2 + (params["weights"][1] - 3.0) ** 2

    start = {"weights": (jnp.zeros(()), 0.5)}
    drawn = mo.InnerProblem(loss, init_fn=lambda hyper, key: start)
    options: Any = {
        "solver": mo.Descent(optax.sgd(0.25), 60),
        "adjoint": mo.ImplicitAdjoint(inner_rtol=jnp.inf),
    }
    for problem, params, root in (
        (mo.InnerProblem(loss), start, "params"),
        (drawn, None, r"init\(...\)"),
    ):
        with pytest.warns(UserWarning, match=rf"`{root}\['weights'\]\[1\]` = 0.5 is not"):
            found = mo.solve_inner(problem, 1.0, params=params, **options).value
        assert found["weights"][1] == 0.5
