"""Derivatives that explode along the path of the inner solver are named, and those of a
healthy path of the same length are not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


CHAOTIC, STABLE = 4.0, 2.5  # of z -> h z (1 - z); at 4 the Lyapunov exponent is log(2)
LOGISTIC = mo.BilevelProblem(
    mo.FixedPointProblem(lambda z, hyper, batch: hyper * z * (1 - z)),
    lambda z, hyper, batch: z,
)


def logistic(hyper, num_steps, dtype, adjoint=mo.UnrolledAdjoint(), throw=False) -> Any:
    return mo.hypergradient(
        LOGISTIC,
        jnp.asarray(hyper, dtype),
        params=jnp.asarray(0.3, dtype),
        inner=mo.Picard(num_steps, rtol=None),
        adjoint=adjoint,
        throw=throw,
    )


@pytest.mark.parametrize("dtype, num_steps", [("float32", 40), ("float64", 100)])
def test_chaotic_map_is_named_and_its_exponent_found(dtype, num_steps):
    gradient, report = logistic(CHAOTIC, num_steps, dtype)
    assert report.result == mo.RESULTS.path_exploded
    # The derivative stays: it is exact for the numbers computed.
    assert jnp.isfinite(gradient) and abs(gradient) > 1e6
    exponent = np.log(report.derivative.growth.factor) / num_steps
    np.testing.assert_allclose(exponent, np.log(2), rtol=0.1)
    for row in ("growth along the path", "effect of one rounding", "fewer inner steps"):
        assert row in str(report)

    _, report = logistic(STABLE, num_steps, dtype)
    assert report.result == mo.RESULTS.successful
    np.testing.assert_allclose(report.derivative.growth.factor, 1, rtol=1e-6)
    # The params, 0.6, are rounded once.
    np.testing.assert_allclose(
        report.derivative.growth.rounding_effect, 0.6 * np.finfo(dtype).eps, rtol=1e-3
    )


def test_rounding_effect_is_that_of_a_rounding():
    # The effect of moving the params by one rounding, at the step where it is largest.
    num_steps, eps = 30, np.finfo("float64").eps
    _, report = logistic(CHAOTIC, num_steps, "float64")
    path = [0.3]
    for _ in range(num_steps):
        path.append(CHAOTIC * path[-1] * (1 - path[-1]))
    slopes = [CHAOTIC * (1 - 2 * z) for z in path[:-1]]
    onward = np.cumprod(np.append(1.0, slopes[:0:-1]))[::-1]  # of z_1, ..., z_n
    effects = np.abs(onward) * np.abs(path[1:]) * eps
    np.testing.assert_allclose(
        report.derivative.growth.rounding_effect, np.max(effects), rtol=1e-9
    )
    assert report.result == mo.RESULTS.successful


def test_failure_is_raised_with_the_derivative():
    with pytest.raises(mo.SolveError, match="explodes along the path") as e:
        logistic(CHAOTIC, 40, "float32", throw=True)
    gradient, _ = e.value.value
    assert jnp.isfinite(gradient)


def test_each_lane_is_judged_by_itself():
    hyper = jnp.array([STABLE, CHAOTIC])
    _, report = jax.vmap(lambda h: logistic(h, 100, "float64"))(hyper)
    codes = report.result == mo.RESULTS.path_exploded
    np.testing.assert_array_equal(codes, [False, True])


# A loss whose gradient step, at rate one, is the logistic map.
def cubic(params, hyper, batch):
    return jnp.sum(params**2 / 2 - hyper * (params**2 / 2 - params**3 / 3))


PLANS = [
    mo.UnrolledAdjoint(mo.memory.StoreUpdates()),
    mo.UnrolledAdjoint(mo.memory.RecomputeSteps()),
    mo.UnrolledAdjoint(mo.memory.Blocks()),
    mo.UnrolledAdjoint(mo.memory.OnlineCheckpoints()),
    mo.TruncatedAdjoint(40),
]


@pytest.mark.one_of(2)
@pytest.mark.parametrize("adjoint", PLANS, ids=lambda a: repr(a)[:40])
def test_every_plan_measures_the_same(adjoint):
    def measured(adjoint) -> Any:
        problem = mo.BilevelProblem(cubic, lambda params, *_: jnp.sum(jnp.sin(params)))
        inner = mo.Descent(optax.sgd(1.0), num_steps=40)
        start = jnp.array([0.3, 0.2])
        return mo.hypergradient(
            problem, CHAOTIC, params=start, inner=inner, adjoint=adjoint, throw=False
        )[1]

    expected, report = measured(mo.UnrolledAdjoint()), measured(adjoint)
    np.testing.assert_allclose(
        report.derivative.growth.factor, expected.derivative.growth.factor, rtol=1e-3
    )
    np.testing.assert_allclose(
        report.derivative.growth.rounding_effect,
        expected.derivative.growth.rounding_effect,
        rtol=1e-3,
    )
    assert report.derivative.growth.factor > 1e9


def test_momentum_through_relu_for_a_thousand_steps():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) / s[0] ** 0.5 for s in ((4, 16), (16, 16), (16, 1))]
    params = [jnp.asarray(a, jnp.float32) for a in arrays]
    x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)

    def loss(params, hyper, x):
        z = jax.nn.relu(jax.nn.relu(x @ params[0]) @ params[1]) @ params[2]
        return jnp.mean((z[:, 0] - jnp.sin(x.sum(1))) ** 2)

    descent = lambda hyper: optax.sgd(jnp.exp(hyper), momentum=0.98)
    inner = mo.Descent(descent, num_steps=1000)

    def report(hyper) -> Any:
        return mo.hypergradient(
            mo.BilevelProblem(loss, loss),
            hyper,
            x[:16],
            x[16:],
            params=params,
            inner=inner,
            adjoint=mo.UnrolledAdjoint(),
            throw=False,
        )[1]

    # Rounding decides at which of the high rates the units die, and with them the path.
    rates = jnp.array([0.02, 0.05, 0.15, 0.2, 0.25, 0.45])
    reports = jax.vmap(report)(jnp.log(rates).astype(jnp.float32))
    exploded = reports.result == mo.RESULTS.path_exploded
    assert not exploded[:2].any() and jnp.all(reports.derivative.growth.factor[:2] < 20)
    assert exploded[2:].any() and jnp.max(reports.derivative.growth.factor[2:]) > 1e4


def test_offset_of_the_outer_loss_hides_nothing():
    # Beside a large constant, any effect of rounding is small.
    problem = mo.BilevelProblem(LOGISTIC.inner, lambda z, hyper, batch: z + 1e6)
    report: Any = mo.hypergradient(
        problem,
        jnp.asarray(CHAOTIC),
        params=jnp.asarray(0.3),
        inner=mo.Picard(60, rtol=None),
        adjoint=mo.UnrolledAdjoint(),
        throw=False,
    )[1]
    assert report.result == mo.RESULTS.path_exploded
    assert report.derivative.growth.rounding_effect < 1e-3 * 1e6


def test_start_at_the_solution_is_no_explosion():
    # The outer loss changes by nothing, and a map that is not normal makes the derivative
    # grow for a while.
    matrix = jnp.array([[0.5, 500.0], [0.0, 0.5]])
    problem = mo.BilevelProblem(
        mo.FixedPointProblem(lambda z, hyper, batch: matrix @ z + hyper),
        lambda z, hyper, batch: z[0],
    )
    hyper = jnp.array([1.0, 0.1])
    report: Any = mo.hypergradient(
        problem,
        hyper,
        params=jnp.linalg.solve(jnp.eye(2) - matrix, hyper),
        inner=mo.Picard(60, rtol=None),
        adjoint=mo.UnrolledAdjoint(),
    )[1]
    assert report.derivative.growth.factor > 400
    assert report.result == mo.RESULTS.successful


@pytest.mark.parametrize("rate, explodes", [(1.0, True), (0.1, False)])
def test_undone_steps_are_measured_as_unrolled_ones(rate, explodes):
    def report(adjoint) -> Any:
        return mo.hypergradient(
            mo.BilevelProblem(cubic, lambda params, *_: jnp.sum(jnp.sin(params))),
            3.8,  # momentum makes 4 diverge
            params=jnp.array([0.3, 0.35]),
            inner=mo.ReversibleSGD(rate, 0.1, num_steps=200),
            adjoint=adjoint,
            throw=False,
        )[1]

    expected, got = report(mo.UnrolledAdjoint()), report(mo.ReversibleAdjoint())
    code = mo.RESULTS.path_exploded if explodes else mo.RESULTS.successful
    assert got.result == expected.result == code
    # In chaos the two add up roundings of their own.
    logs = lambda report: np.log(
        [report.derivative.growth.factor, report.derivative.growth.rounding_effect]
    )
    np.testing.assert_allclose(logs(got), logs(expected), atol=10 if explodes else 1e-3)
    assert not explodes or got.derivative.growth.factor > 1e9


# The squares of Adam overflow, and would leave `hyper` where it is for ever.


def overflowing(outer: Any, throw: bool) -> mo.BilevelSolution:
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: 0.5 * hyper.value * params**2,
        lambda params, hyper, batch: params**2,
    )
    return mo.solve_bilevel(
        problem,
        mo.hyper.Positive(jnp.float32(25.0)),  # where 20 is stable
        params=jnp.float32(1.0),
        solver=mo.NestedSolver(
            mo.Descent(optax.sgd(0.1), num_steps=60), mo.UnrolledAdjoint(), outer
        ),
        num_steps=3,
        throw=throw,
    )


def test_an_outer_optimizer_that_overflows_is_named():
    adam = optax.adam(0.3)
    with pytest.raises(mo.SolveError, match="The outer optimizer overflowed.*clip"):
        overflowing(adam, throw=True)
    solution = overflowing(adam, throw=False)
    assert solution.result == mo.RESULTS.outer_step_nonfinite
    assert solution.num_skipped == 3
    np.testing.assert_allclose(solution.hyper.value, 25.0, rtol=1e-6)
    moments = jax.tree.leaves(solution.state.outer_state)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in moments)


def test_the_remedy_moves_on():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.3))
    solution = overflowing(clipped, throw=True)
    assert float(solution.hyper.value) < 20 and float(solution.outer_loss) < 1
