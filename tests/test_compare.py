"""Adjoints beside each other: against closed forms, and where some cannot serve."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import metaopt as mo


RATE, NUM_STEPS = 0.1, 12

# params_n = (1 - q^n) hyper with q = 1 - 2 rate, and the outer loss is their square.
PROBLEM = mo.BilevelProblem(
    lambda params, hyper, batch: jnp.sum((params - hyper["target"]) ** 2),
    lambda params, hyper, batch: jnp.sum(params**2),
)
HYPER = {"target": jnp.array([3.0, -1.0])}
ADJOINTS = {
    "exact": mo.ForwardAdjoint(),
    "last step": mo.OneStepAdjoint(),
    "at the solution": mo.ImplicitAdjoint(inner_rtol=jnp.inf),
}


def test_columns_are_the_closed_forms():
    comparison = mo.compare_hypergradients(
        PROBLEM,
        HYPER,
        params=jnp.zeros(2),
        inner=mo.Descent(optax.sgd(RATE), NUM_STEPS),
        adjoints=ADJOINTS,
    )
    left = (1 - 2 * RATE) ** NUM_STEPS
    errors = {"exact": 0.0, "last step": 1 - 2 * RATE / (1 - left), "at the solution": left}
    errors["at the solution"] = left / (1 - left)
    for name, row in comparison.rows.items():
        assert row.report is not None and row.failure is None
        np.testing.assert_allclose(row.relative_error, errors[name], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(row.cosine, 1, rtol=1e-12)
        assert row.num_inner_steps == NUM_STEPS
        assert row.seconds > 0 and row.temporary_bytes > 0
    # One step, and the check that it led to the solution.
    assert comparison.rows["at the solution"].num_products == 2
    assert comparison.rows["exact"].num_products == 0
    text = str(comparison)
    assert "last step: leaves out all steps but the last" in text
    assert "reference: UnrolledAdjoint" in text


def test_adjoint_that_cannot_serve_has_a_row_that_says_so():
    comparison = mo.compare_hypergradients(
        PROBLEM,
        {**HYPER, "rate": jnp.array(RATE)},
        params=jnp.zeros(2),
        inner=mo.Descent(lambda hyper: optax.sgd(hyper["rate"]), NUM_STEPS),
        adjoints=ADJOINTS,
    )
    row = comparison.rows["at the solution"]
    assert row.report is None and np.isnan(row.relative_error)
    assert row.failure is not None and "zero by construction" in row.failure
    assert "zero by construction" in str(comparison)
    assert comparison.rows["exact"].relative_error < 1e-12


def test_adjoint_that_fails_is_named():
    comparison = mo.compare_hypergradients(
        PROBLEM,
        HYPER,
        params=jnp.zeros(2),
        inner=mo.Descent(optax.sgd(RATE), NUM_STEPS),
        adjoints={"strict": mo.ImplicitAdjoint()},
    )
    assert "strict: The inner problem was not solved accurately" in str(comparison)


def test_reference_of_a_solver_that_runs_as_a_whole():
    root = mo.BilevelProblem(
        mo.RootProblem(lambda z, h, batch: z**3 - h), lambda z, h, batch: z**2
    )
    comparison = mo.compare_hypergradients(
        root,
        jnp.array(8.0),
        params=jnp.array(1.5),
        inner=mo.OptimistixSolver(optx.Newton(rtol=1e-10, atol=1e-10)),
        adjoints={"dense": mo.ImplicitAdjoint(mo.Dense())},
    )
    # z = h^(1/3), so the derivative of its square is 2/3 h^(-1/3).
    row = comparison.rows["dense"]
    assert row.report is not None and row.relative_error < 1e-10
    np.testing.assert_allclose(row.report.outer.hypergradient_norm, 1 / 3, rtol=1e-9)
    assert "newton_steps=1" in repr(comparison.reference)


def test_reference_that_fails_and_bad_arguments():
    call: Any = dict(params=jnp.zeros(2), inner=mo.Descent(optax.sgd(RATE), NUM_STEPS))
    with pytest.raises(ValueError, match="The reference .* failed"):
        mo.compare_hypergradients(
            PROBLEM, HYPER, adjoints=ADJOINTS, reference=mo.ImplicitAdjoint(), **call
        )
    with pytest.raises(ValueError, match="nothing to compare"):
        mo.compare_hypergradients(PROBLEM, HYPER, adjoints={}, **call)
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        mo.compare_hypergradients(PROBLEM, HYPER, adjoints=ADJOINTS, repeats=0, **call)
    not_adjoints: Any = {"last": "one step"}
    with pytest.raises((ValueError, TypeError), match="last"):
        mo.compare_hypergradients(PROBLEM, HYPER, adjoints=not_adjoints, **call)
