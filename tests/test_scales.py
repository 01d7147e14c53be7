"""Verdicts at extreme scales, and in the later steps of a run."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


CURVATURES = jnp.array([1.0, 0.01, 9e-4, 1e-4]) + 1e-3


def quadratic(params, hyper, batch):
    return jnp.sum(CURVATURES * params**2) / 2 - jnp.sum(hyper * params)


def distance(params, hyper, scale):
    return scale * jnp.sum((params - 1) ** 2) / 2


def run(scales, **options) -> list[Any]:
    """The reports of outer steps that leave `hyper` alone, the outer loss times a scale
    in each."""
    reports = []
    adjoint = mo.ImplicitAdjoint(mo.CG(rtol=1e-7), **options)
    mo.solve_bilevel(
        mo.BilevelProblem(quadratic, distance),
        jnp.ones(4),
        None,
        iter([jnp.asarray(scale) for scale in scales]),
        params=jnp.zeros(4),
        num_steps=len(scales),
        solver=mo.NestedSolver(
            mo.Descent(optax.sgd(0.5), 20), adjoint, optax.sgd(0.0), start=mo.ColdStart()
        ),
        throw=False,
        callbacks=[lambda run: reports.append(run.info.report)],
    )
    return reports


def test_estimate_is_as_good_in_later_steps():
    # The guess from the step before solves the linear system at once, so that there are
    # no search directions to correct with. The estimate was a quarter of the error.
    curvatures, target = CURVATURES - 1e-3, jnp.arange(1.0, 5.0)
    reports = []

    def inner(params, hyper, batch):
        fit = jnp.sum(curvatures * (params - target) ** 2)
        return (fit + 1e-3 * jnp.exp(hyper) * jnp.sum(params**2)) / 2

    mo.solve_bilevel(
        mo.BilevelProblem(inner, lambda p, h, b: jnp.sum((p - target) ** 2) / 2),
        jnp.zeros(()),
        params=jnp.zeros(4),
        num_steps=3,
        solver=mo.NestedSolver(
            mo.Descent(optax.sgd(0.5), 200),
            mo.ImplicitAdjoint(),
            optax.sgd(0.0),
            start=mo.ColdStart(),
        ),
        throw=False,
        callbacks=[lambda run: reports.append(run.info.report)],
    )
    solution = curvatures * target / CURVATURES
    params = solution * (1 - (1 - 0.5 * CURVATURES) ** 200)
    slope = lambda params: -jnp.sum((params - target) / CURVATURES * 1e-3 * params)
    error = abs(slope(params) - slope(solution))
    for report in reports:
        assert 0.5 * error < report.derivative.error < 3 * error
    assert (
        reports[1].derivative.num_products < reports[0].derivative.num_products
    )  # its guess is good


def test_refused_hypergradient_is_no_measure_of_the_next():
    large, small = run([1e6, 1.0])
    alone = run([1.0])[0]
    assert large.result == small.result == alone.result != mo.RESULTS.successful
    np.testing.assert_allclose(
        small.derivative.allowed_error, alone.derivative.allowed_error, rtol=1e-3
    )


@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e22])
def test_saddle_is_named_at_any_scale(scale):
    curvatures = jnp.array([2.0, 1.0, -1.0], jnp.float32)
    problem = mo.BilevelProblem(
        lambda p, h, _: jnp.sum(curvatures * p**2) / 2 - jnp.sum(h * p),
        lambda p, h, _: scale * jnp.sum(p * jnp.array([3.0, 3.0, 1.0])),
    )
    adjoint = mo.ImplicitAdjoint(mo.GMRES(), error=None, inner_rtol=jnp.inf)
    gradient, report = mo.hypergradient(
        problem,
        jnp.ones(3, jnp.float32),
        params=jnp.zeros(3, jnp.float32),
        inner=mo.Descent(optax.sgd(0.1), 2),
        adjoint=adjoint,
        throw=False,
    )
    assert report.result == mo.RESULTS.linear_indefinite
    assert jnp.all(jnp.isnan(gradient))


@pytest.mark.parametrize("hyper, explodes", [(3.9, True), (2.5, False)])
@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_explosion_is_named_at_any_scale(scale, hyper, explodes):
    # The squares of such derivatives are no numbers, in float64 either.
    problem = mo.BilevelProblem(
        mo.FixedPointProblem(lambda z, h, _: h * z * (1 - z)), lambda z, h, _: scale * z
    )
    _, report = mo.hypergradient(
        problem,
        jnp.float64(hyper),
        params=jnp.float64(0.3),
        inner=mo.Picard(80, rtol=None),
        adjoint=mo.UnrolledAdjoint(),
        throw=False,
    )
    assert (report.result == mo.RESULTS.path_exploded) == explodes


def test_ridge_bound_knows_no_more_curvature_than_there_is():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 3)).astype(np.float32)
    for weights in ([1e8, 0.7e8, 1e-3], [1e8, 1e-3, 1e-3], [1e4, 1e-3, 1e-3]):
        bound = mo.accuracy.ridge_bound(rows, rows, lambda hyper: hyper)
        gram = rows.astype(np.float64).T @ rows.astype(np.float64) / 200
        exact = np.asarray(weights, np.float32).astype(np.float64)
        true = np.linalg.eigvalsh(gram + np.diag(exact))[0]
        curvature: Any = bound.curvature
        assert curvature(jnp.asarray(weights, jnp.float32)) <= true


def test_bound_from_a_negative_penalty_is_none():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 3)), (rng.normal(size=30) > 0).astype(float)

    def cross_entropy(params, batch):
        logits = batch[0] @ params
        return jnp.mean(jnp.logaddexp(0, logits) - batch[1] * logits)

    problem = mo.BilevelProblem(
        lambda p, h, b: cross_entropy(p, b) + jnp.sum(jnp.exp(h) * p**2) / 2,
        lambda p, h, b: cross_entropy(p, b),
    )
    bound = mo.accuracy.logistic_bound(
        x, x, lambda hyper: hyper
    )  # the logarithm of the penalty
    _, report = mo.hypergradient(
        problem,
        jnp.full(3, -2.0),
        (x, y),
        (x, y),
        params=jnp.zeros(3),
        inner=mo.Descent(optax.sgd(0.5), 200),
        adjoint=mo.ImplicitAdjoint(error=bound),
        throw=False,
    )
    assert report.result == mo.RESULTS.curvature_contradicted
    assert report.derivative.error == jnp.inf


def test_array_that_is_empty_is_the_one_named():
    params = {"mask": jnp.ones(3, bool), "w": jnp.zeros((0, 3))}
    with pytest.raises(ValueError, match=r"`params\['w'\]` is an empty array"):
        mo.solve_inner(
            mo.InnerProblem(lambda p, h, b: jnp.sum(p["w"])),
            1.0,
            params=params,
            solver=mo.Descent(optax.sgd(0.1), 1),
            adjoint=mo.UnrolledAdjoint(),
        )
