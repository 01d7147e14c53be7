"""Checks of a hypergradient in the precision that people use, and of the smoothness of a
training."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


def relu_network(cast=lambda x: x) -> dict[str, Any]:
    """Tune the rate and the decay of a relu network, all of it in float32."""
    rng = np.random.default_rng(0)
    single = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, params = single(32, 4), [single(4, 16) / 2, single(16, 1) / 4]

    def fit(params, x):
        z = cast(jax.nn.relu(x @ params[0])) @ params[1]
        return jnp.mean((z[:, 0] - jnp.sin(3 * x.sum(1))) ** 2)

    def inner(params, hyper, x):
        return fit(params, x) + jnp.exp(hyper["decay"]) * jnp.sum(params[0] ** 2)

    hyper = {"rate": jnp.float32(-2.0), "decay": jnp.float32(-5.0)}
    return dict(
        problem=mo.BilevelProblem(inner, lambda params, hyper, x: fit(params, x)),
        hyper=hyper,
        train=x[:16],
        valid=x[16:],
        params=params,
        inner=mo.Descent(lambda h: optax.sgd(jnp.exp(h["rate"])), num_steps=100),
    )


def test_float32_through_relu_is_checked_in_float64():
    # In float32 this once said that the two do not agree, by a factor of two.
    arguments = relu_network()
    check = mo.check_hypergradient(**arguments, adjoint=mo.UnrolledAdjoint())
    assert check.passed and check.dtype == "float64" and check.relative_error < 1e-6
    assert check.report.outer.loss.dtype == jnp.float64
    assert arguments["params"][0].dtype == jnp.float32


def test_what_is_biased_is_found_in_float32_too():
    arguments: dict[str, Any] = relu_network()
    arguments["adjoint"] = mo.TruncatedAdjoint(5)
    arguments["inner"] = mo.Descent(optax.sgd(0.1), num_steps=100)
    arguments["hyper"] = {"decay": jnp.float32(-3.0)}
    for widen in (True, False):
        check = mo.check_hypergradient(**arguments, widen=widen, throw=False)
        assert not check.passed
    # In float64 it is said for certain.
    with pytest.raises(mo.SolveError, match="do NOT agree"):
        mo.check_hypergradient(**arguments)


def test_check_that_cannot_tell_says_so():
    # A program that insists on float32 is compared in float32.
    @jax.custom_jvp
    def only_float32(x):
        if x.dtype != jnp.float32:
            raise TypeError("float32 only")
        return x

    only_float32.defjvp(lambda x, t: (only_float32(*x), t[0]))
    arguments = relu_network(only_float32)
    check = mo.check_hypergradient(**arguments, adjoint=mo.UnrolledAdjoint(), throw=False)
    assert check.dtype == "float32"
    assert check.passed or (not check.decisive and "Cannot tell" in str(check))

    # A chaotic map: a derivative of 1e29 and differences of anything.
    logistic = mo.BilevelProblem(
        mo.FixedPointProblem(lambda z, h, b: h * z * (1 - z)), lambda z, h, b: z
    )
    check = mo.check_hypergradient(
        logistic,
        3.9,
        params=0.3,
        inner=mo.Picard(100, rtol=None),
        adjoint=mo.TruncatedAdjoint(3),
        throw=False,
    )
    assert not check.passed and not check.decisive and "Cannot tell" in str(check)


def test_smooth_float32_is_checked_in_float32():
    square = lambda params, hyper, batch: jnp.sum((params - hyper) ** 2)
    check = mo.check_hypergradient(
        mo.BilevelProblem(square, lambda params, hyper, batch: jnp.sum(params**2)),
        jnp.ones(3, jnp.float32),
        params=jnp.zeros(3, jnp.float32),
        inner=mo.Descent(optax.sgd(0.1), num_steps=50),
        adjoint=mo.UnrolledAdjoint(),
        widen=False,
    )
    assert check.passed and check.dtype == "float32" and check.relative_error < 1e-2


# -- smoothness


def test_smooth_training_scores_one():
    problem = mo.InnerProblem(lambda params, hyper, data: jnp.sum((params - hyper) ** 2))
    solver = mo.Descent(optax.sgd(0.1), num_steps=20)
    score = ft.partial(
        mo.diagnostics.check_smoothness, problem, jnp.ones(3), params=jnp.zeros(3)
    )
    check = score(solver=solver)
    np.testing.assert_allclose(check.score, 1, rtol=1e-12)
    # The solution moves by 1 - 0.8^20 times as much as `hyper`.
    np.testing.assert_allclose(check.movements, 1e-2 * (1 - 0.8**20), rtol=1e-9)
    assert "1.0000" in str(check) and "Successful" in str(check)

    along = jnp.array([0.0, 3.0, 0.0])
    check = score(solver=solver, direction=along, step=1.0)
    np.testing.assert_allclose(check.movements, 1 - 0.8**20, rtol=1e-9)
    with pytest.raises(ValueError, match="`direction` must have the structure"):
        score(solver=solver, direction=jnp.ones(2))
    with pytest.raises(ValueError, match="`direction` must be finite and not zero"):
        score(solver=solver, direction=jnp.zeros(3))
    with pytest.raises(ValueError, match="`step` must be positive"):
        score(solver=solver, step=0.0)


def test_params_that_move_far_count_for_more():
    # One step of the whole way to a target: the first of the params moves by 4 and by 4,
    # and the second by 1 and back.
    def loss(params, hyper, data):
        target = jnp.stack([4 * hyper, 1 - (1 - hyper) ** 2])
        return 0.5 * jnp.sum((params - target) ** 2)

    check = mo.diagnostics.check_smoothness(
        mo.InnerProblem(loss),
        0.0,
        params=jnp.zeros(2),
        solver=mo.Descent(optax.sgd(1.0), num_steps=1),
        direction=1.0,
        step=1.0,
    )
    np.testing.assert_allclose(check.score, (4 - 1) / 5, rtol=1e-12)
    np.testing.assert_allclose(check.movements, 17**0.5, rtol=1e-12)


def test_chaotic_training_scores_about_zero():
    problem = mo.FixedPointProblem(lambda z, hyper, data: hyper * z * (1 - z))
    starts = jnp.linspace(0.1, 0.9, 400)
    check = mo.diagnostics.check_smoothness(
        problem,
        3.98,
        params=starts,
        solver=mo.Picard(60, rtol=None),
        direction=1.0,
        step=1e-3,
    )
    # Two movements between three independent points: mostly there and back.
    assert -0.8 < check.score < 0.0


def test_failed_training_is_said():
    problem = mo.InnerProblem(lambda params, hyper, data: jnp.sum((params - hyper) ** 4))
    with pytest.raises(mo.SolveError, match="diverged"):
        mo.diagnostics.check_smoothness(
            problem,
            1.0,
            params=jnp.zeros(2),
            solver=mo.Descent(optax.sgd(9.0), num_steps=20),
        )
