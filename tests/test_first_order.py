"""The first-order adjoint against loops written by hand, with their gradients held."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


NUM_STEPS = 4
DATA = jax.random.normal(jax.random.key(0), (6, 3)), jnp.linspace(-1, 1, 6)
START = jnp.array([0.3, -0.2, 0.5])


def squared_error(params, hyper, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params) - y) ** 2)


def by_hand(hyper, hold, momentum=0.0):
    params, velocity = hyper["start"], jnp.zeros(3)
    for _ in range(NUM_STEPS):
        gradient = hold(jax.grad(squared_error)(params, None, DATA))
        velocity = momentum * velocity + gradient
        params = params - hyper["rate"] * velocity
    return jnp.sum(jnp.sin(params) ** 2)


def ours(adjoint, momentum=0.0, loss=squared_error, hyper=None):
    problem = mo.BilevelProblem(
        mo.InnerProblem(loss, lambda hyper, key: hyper["start"]),
        lambda params, hyper, batch: jnp.sum(jnp.sin(params) ** 2),
    )
    inner = mo.Descent(
        lambda hyper: optax.sgd(hyper["rate"], momentum or None), num_steps=NUM_STEPS
    )
    hyper = {"start": START, "rate": jnp.array(0.3), **(hyper or {})}
    return mo.hypergradient(problem, hyper, train=DATA, inner=inner, adjoint=adjoint)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_it_is_a_loop_whose_gradients_are_held_constant(momentum):
    hyper = {"start": START, "rate": jnp.array(0.3)}
    gradient, report = ours(mo.FirstOrderAdjoint(), momentum)
    expected = jax.grad(by_hand)(hyper, jax.lax.stop_gradient, momentum)
    for name in hyper:
        np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-12)
    assert report.left_out == ("how the inner gradients change",)
    # The loss and the solution are those of the whole loop.
    np.testing.assert_allclose(
        report.outer.loss, by_hand(hyper, lambda g: g, momentum), rtol=1e-12
    )
    # The control: the whole derivative is another one.
    exact = ours(mo.UnrolledAdjoint(), momentum)[0]
    full = jax.grad(by_hand)(hyper, lambda g: g, momentum)
    for name in hyper:
        np.testing.assert_allclose(exact[name], full[name], rtol=1e-12)
        assert not np.allclose(gradient[name], full[name], rtol=1e-2)


def test_what_acts_through_the_inner_loss_alone_is_refused():
    def decayed(params, hyper, batch):
        return squared_error(params, hyper, batch) + hyper["decay"] * params @ params

    decay = {"decay": jnp.array(0.1)}
    with pytest.raises(ValueError, match=r"`hyper\['decay'\]` is zero by construction"):
        ours(mo.FirstOrderAdjoint(), loss=decayed, hyper=decay)
    assert ours(mo.UnrolledAdjoint(), loss=decayed, hyper=decay)[0]["decay"] != 0


def test_model_state_keeps_its_derivative():
    # As where losses on the way are summed up in it.
    class Summing(mo.extend.AbstractInnerProblem):
        has_state = True

        def init(self, hyper, key):
            return hyper["start"], jnp.zeros(())

        def loss(self, params, hyper, batch, *, state):
            return squared_error(params, hyper, batch), state + jnp.sum(params**2)

    def outer(params, hyper, batch, *, state):
        return jnp.sum(jnp.sin(params)) + state

    def expected(start):
        params, total = start, 0.0
        for _ in range(NUM_STEPS):
            total += jnp.sum(params**2)
            gradient = jax.grad(squared_error)(params, None, DATA)
            params -= 0.3 * jax.lax.stop_gradient(gradient)
        return jnp.sum(jnp.sin(params)) + total

    inner = mo.Descent(optax.sgd(0.3), NUM_STEPS, state_policy=mo.nn.CarriedState())
    gradient, _ = mo.hypergradient(
        mo.BilevelProblem(Summing(), outer),
        {"start": START},
        train=DATA,
        inner=inner,
        adjoint=mo.FirstOrderAdjoint(),
    )
    np.testing.assert_allclose(gradient["start"], jax.grad(expected)(START), rtol=1e-12)


def test_a_problem_without_a_loss_is_refused():
    problem = mo.FixedPointProblem(lambda params, hyper, batch: 0.5 * params + hyper)
    with pytest.raises(ValueError, match="a `FixedPointProblem` has none.*OneStepAdjoint"):
        mo.solve_inner(
            problem,
            jnp.array(1.0),
            params=jnp.array(0.0),
            solver=mo.Picard(num_steps=3),
            adjoint=mo.FirstOrderAdjoint(),
        )
