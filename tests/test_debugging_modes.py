"""The debugging modes of JAX stop at the NaNs of a user, and at none of ours."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


PROBLEM = mo.BilevelProblem(
    lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
    lambda params, hyper, batch: jnp.sum((params - 1) ** 2),
)
STEPS = mo.Descent(optax.sgd(0.3), 3)
STOPS = mo.Descent(optax.sgd(0.3), 30, atol=1e-4)  # after 9 steps


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "inner, adjoint",
    [
        (STEPS, mo.UnrolledAdjoint()),
        (STEPS, mo.OneStepAdjoint()),
        (STOPS, mo.ImplicitAdjoint()),
        (STOPS, mo.UnrolledAdjoint(mo.memory.OnlineCheckpoints(4))),
        (mo.ReversibleSGD(0.1, 0.9, 3), mo.ReversibleAdjoint()),
    ],
    ids=["unrolled", "one step", "implicit", "online", "reversible"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_hypergradients_that_are_finite(inner, adjoint, compiled):
    arguments: Any = dict(params=jnp.zeros(2), inner=inner, adjoint=adjoint)
    mode = contextlib.nullcontext() if compiled else jax.disable_jit()
    with jax.debug_nans(True), mode:
        found, _ = mo.hypergradient(PROBLEM, jnp.full(2, 2.0), **arguments)
    assert jnp.all(jnp.isfinite(found))


@pytest.mark.ci
def test_losses_after_an_early_stop():
    solve = lambda: mo.solve_inner(
        PROBLEM.inner, 2.0, params=0.0, solver=STOPS, adjoint=mo.ImplicitAdjoint()
    )
    losses = np.asarray(solve().stats["losses"])
    jax.clear_caches()
    with jax.debug_nans(True):
        again = np.asarray(solve().stats["losses"])
    taken = np.isfinite(losses)
    assert 0 < taken.sum() < 30 and np.isnan(losses[~taken]).all()
    assert np.array_equal(losses[taken], again[taken]) and np.isinf(again[~taken]).all()


def test_nan_of_the_user_is_found():
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum(jnp.log(params - 5) + hyper * params),
        PROBLEM.outer_loss,
    )
    arguments: Any = dict(params=0.0, inner=STEPS, adjoint=mo.UnrolledAdjoint())
    with jax.debug_nans(True), jax.disable_jit():
        with pytest.raises(FloatingPointError, match="nan"):
            mo.hypergradient(problem, 2.0, **arguments)
