"""Loops of unknown length in what users hand over: forward mode passes them."""

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import metaopt as mo


START = jnp.array(0.5)
SGD = mo.Descent(optax.sgd(0.15), num_steps=100)
NEWTON = mo.OptimistixSolver(optx.Newton(1e-10, 1e-10))


def mean_of_three(x):
    """`x`, computed by a loop whose length is not known."""
    total = jax.lax.fori_loop(0, jnp.asarray(3), lambda i, a: a + x, 0 * x)
    return total / 3


def inner_loss(p, h, b):  # at h = 2: p = 1, dp/dh = 1/4
    return p**2 / 2 + p**4 / 4 - h * p


def square(p, h, b):
    return p**2


ROOT = mo.RootProblem(lambda p, h, b: mean_of_three(p + p**3 - h))
FIXED_POINT = mo.FixedPointProblem(lambda p, h, b: 0.25 * mean_of_three(p + h))  # h / 3


def slope(inner, outer, solver, adjoint):
    problem = mo.BilevelProblem(inner, outer)
    return mo.hypergradient(problem, 2.0, params=START, inner=solver, adjoint=adjoint)[0]


def test_root_with_a_loop_has_a_value_and_forward_derivatives():
    # A loop that was linearised could not be differentiated, not even for its value.
    adjoint = mo.ImplicitAdjoint(mo.Dense())

    def solution(h):
        return mo.solve_inner(ROOT, h, params=START, solver=NEWTON, adjoint=adjoint).value

    h = jnp.array(2.0)
    np.testing.assert_allclose(solution(h), 1, rtol=1e-8)
    np.testing.assert_allclose(jax.jacfwd(solution)(h), 1 / 4, rtol=1e-6)
    # p + p**3 = h, so p' (1 + 3 p**2) = 1 and p'' (1 + 3 p**2) = -6 p p'**2
    np.testing.assert_allclose(jax.jacfwd(jax.jacfwd(solution))(h), -6 / 64, rtol=1e-6)
    with pytest.raises(RuntimeError, match="residual.*loop of unknown length.*jacfwd"):
        jax.grad(solution)(h)


@pytest.mark.parametrize("solver", [mo.Picard(60), mo.NewtonKrylov(10)])
def test_fixed_point_with_a_loop_has_forward_derivatives(solver):
    for adjoint in (mo.ForwardAdjoint(), mo.ImplicitAdjoint(mo.GMRES(rtol=1e-12))):

        def solution(h):
            return mo.solve_inner(
                FIXED_POINT, h, params=START, solver=solver, adjoint=adjoint
            ).value

        got = jax.jvp(solution, (jnp.array(2.0),), (jnp.array(1.0),))
        np.testing.assert_allclose(got, (2 / 3, 1 / 3), rtol=1e-6)


def test_layer_with_a_loop_in_its_cell():
    cell = lambda z, x: 0.25 * mean_of_three(z + x)
    layer = mo.nn.Equilibrium(cell, lambda x: jnp.zeros(()), solver=mo.Picard(rtol=1e-12))
    value = lambda x: layer(x)[0]
    np.testing.assert_allclose(value(jnp.array(3.0)), 1, rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(value)(jnp.array(3.0)), 1 / 3, rtol=1e-6)
    with pytest.raises(RuntimeError, match="cell.*loop of unknown length"):
        jax.grad(value)(jnp.array(3.0))


def test_forward_adjoint_passes_a_loop_in_the_outer_loss():
    outer = lambda p, h, b: h["a"] + 3 * mean_of_three(p)
    hyper = {"a": jnp.array(2.0), "idle": jnp.array(1.0)}
    gradient, report = mo.hypergradient(
        mo.BilevelProblem(lambda p, h, b: inner_loss(p, h["a"], b), outer),
        hyper,
        params=START,
        inner=SGD,
        adjoint=mo.ForwardAdjoint(),
    )
    np.testing.assert_allclose(gradient["a"], 1 + 3 / 4, rtol=1e-7)
    assert gradient["idle"] == 0 and report.outer.unreached == ("hyper['idle']",)


def test_forward_adjoint_sees_what_has_no_derivative_in_a_loop():
    outer = lambda p, h, b: mean_of_three(p) + 0 * jnp.round(h["rounded"])
    inner = lambda p, h, b: inner_loss(p, h["a"], b)
    hyper = {"a": jnp.array(2.0), "rounded": jnp.array(1.0)}
    with pytest.raises(ValueError, match=r"`hyper\['rounded'\]` is zero by construction"):
        mo.hypergradient(
            mo.BilevelProblem(inner, outer),
            hyper,
            params=START,
            inner=SGD,
            adjoint=mo.ForwardAdjoint(),
        )


WITH_LOOP = lambda p, h, b: inner_loss(mean_of_three(p), h, b)


@pytest.mark.parametrize(
    ("inner", "outer", "solver", "adjoint", "text"),
    [
        (inner_loss, lambda p, h, b: mean_of_three(p), SGD, adjoint, text)
        for adjoint, text in (
            (mo.UnrolledAdjoint(), "The outer loss holds.*ForwardAdjoint"),
            (
                mo.UnrolledAdjoint(mo.memory.StoreUpdates()),
                "The outer loss holds.*ForwardAdj",
            ),
            (mo.ImplicitAdjoint(), "The outer loss holds.*ForwardAdjoint"),
        )
    ]
    + [
        (ROOT, lambda p, h, b: mean_of_three(p), NEWTON, mo.ImplicitAdjoint(mo.Dense()), t)
        for t in ("The residual holds.*forward mode, with `jax.jacfwd`",)
    ]
    + [
        (WITH_LOOP, square, SGD, adjoint, "The inner loss holds.*scan")
        for adjoint in (mo.UnrolledAdjoint(), mo.ForwardAdjoint(), mo.ImplicitAdjoint())
    ]
    + [
        (FIXED_POINT, square, mo.Picard(60), adjoint, "The step of the fixed-point problem")
        for adjoint in (mo.UnrolledAdjoint(), mo.ImplicitAdjoint(mo.GMRES()))
    ],
)
def test_error_names_the_function_with_the_loop(inner, outer, solver, adjoint, text):
    with pytest.raises(ValueError, match=text) as caught:
        slope(inner, outer, solver, adjoint)
    message = str(caught.value)
    assert f"{type(adjoint).__name__}()" not in message  # no remedy is what failed
    assert "step of the inner solver" not in message


def test_value_of_an_inner_loss_with_a_loop_names_it():
    problem = mo.InnerProblem(WITH_LOOP)
    with pytest.raises(ValueError, match="The inner loss holds a loop"):
        mo.solve_inner(problem, 2.0, params=START, solver=SGD, adjoint=mo.ForwardAdjoint())


def test_loops_of_equinox_in_an_inner_loss():
    def loss(kind):
        def loop(x):
            go = lambda s: s[0] < 3
            body = lambda s: (s[0] + 1, s[1] + x / 3)
            return eqxi.while_loop(go, body, (0, 0 * x), max_steps=4, kind=kind)[1]

        return lambda p, h, b: inner_loss(loop(p), h, b)

    got = slope(loss("checkpointed"), square, SGD, mo.ForwardAdjoint())
    np.testing.assert_allclose(got, 1 / 2, rtol=1e-7)
    got = slope(loss("bounded"), square, SGD, mo.UnrolledAdjoint())
    np.testing.assert_allclose(got, 1 / 2, rtol=1e-7)
    with pytest.raises(ValueError, match="The gradient of the inner loss.*ForwardAdjoint"):
        slope(loss("checkpointed"), square, SGD, mo.UnrolledAdjoint())
