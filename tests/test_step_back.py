"""An outer optimizer that turns back where hypergradients explode."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


HYPER = {"rate": jnp.array([1.0, 2.0]), "decay": jnp.array(3.0)}


def gradient(size):
    """A gradient of that Euclidean norm."""
    return {"rate": jnp.array([size, 0.0]), "decay": jnp.array(0.0)}


def steps(outer, sizes):
    """The outer variables along steps with gradients of these norms."""
    hyper: Any = HYPER
    path = [hyper]
    state = outer.init(hyper)
    update = jax.jit(outer.update)
    for size in sizes:
        updates, state = update(gradient(size), state, hyper)
        hyper = optax.apply_updates(hyper, updates)
        path.append(hyper)
    return path


def assert_equal(tree, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), tree, other)


def test_small_hypergradients_are_those_of_the_optimizer_within():
    sizes = [0.5, 0.3, 0.9, 0.1]
    adam = optax.adam(0.1)
    within = steps(adam, sizes)
    assert_equal(steps(mo.step_back(adam, max_norm=1.0), sizes), within)


@pytest.mark.parametrize("size", [1.1, 1e30, float("inf"), float("nan")])
def test_an_exploded_one_leads_back_to_the_mean_and_leaves_no_trace(size):
    adam = optax.adam(0.1)
    outer = mo.step_back(adam, max_norm=1.0, memory=0.5)
    path = steps(outer, [0.5, 0.4, size, 0.3])
    # The means of the variables at which a gradient was small enough, by hand.
    first, second, _, back, after = (p["rate"][0] for p in path)
    mean = 0.5 * first + 0.5 * second
    np.testing.assert_allclose(back, mean, rtol=1e-12)
    # Adam goes on as if there had been no gradient between.
    within = steps(adam, [0.5, 0.4, 0.3])
    taken = within[3]["rate"][0] - within[2]["rate"][0]
    np.testing.assert_allclose(after - back, 0.5 * taken, rtol=1e-9)
    assert_equal(path[3]["decay"], HYPER["decay"])


def test_a_run_that_would_explode_comes_back():
    """The derivative of the last distance in a rate beyond 2 / curvature is huge."""

    def run(outer):
        distance = lambda params, hyper, batch: jnp.sum(params**2)
        return mo.solve_bilevel(
            mo.BilevelProblem(distance, lambda p, h, b: jnp.sum(p**2) - 0.1 * h),
            jnp.array(0.9),
            params=jnp.ones(1),
            solver=mo.NestedSolver(
                mo.Descent(lambda rate: optax.sgd(rate), num_steps=30),
                mo.UnrolledAdjoint(),
                outer,
            ),
            num_steps=30,
            throw=False,
        )

    adam = optax.adam(0.2)
    lost = run(optax.chain(optax.clip(1.0), adam)).history.outer_loss
    kept = run(mo.step_back(adam, max_norm=10.0)).history.outer_loss
    # The second step of both is far beyond: 5.6e4. The one finds its way back to rates
    # with a loss near -0.094, the least, and the other does not.
    assert lost[1] == kept[1] > 1e4
    assert np.mean(kept[4:]) < -0.08 < -0.07 < np.mean(lost[4:])


def test_a_limit_that_no_hypergradient_meets_shows():
    def run(max_norm):
        return mo.solve_bilevel(
            mo.BilevelProblem(
                lambda params, hyper, batch: jnp.sum((params - hyper["shift"]) ** 2),
                lambda params, hyper, batch: jnp.sum((params - 2.0) ** 2),
            ),
            {"shift": jnp.zeros(2)},
            params=jnp.zeros(2),
            solver=mo.NestedSolver(
                mo.Descent(optax.sgd(0.2), num_steps=3),
                mo.UnrolledAdjoint(),
                mo.step_back(optax.adam(0.1), max_norm),
            ),
            num_steps=3,
        )

    row = "outer variables     not moved by any step"
    assert row in str(run(1e-3)) and row not in str(run(100.0))


def test_float32_stays_float32():
    hyper = jnp.ones(2, jnp.float32)
    outer = mo.step_back(optax.sgd(0.1), max_norm=1.0)
    state = outer.init(hyper)
    for size in (0.1, 5.0):
        updates, after = jax.jit(outer.update)(size * hyper, state, hyper)
        assert updates.dtype == jnp.float32
        dtypes = [[leaf.dtype for leaf in jax.tree.leaves(x)] for x in (state, after)]
        assert dtypes[0] == dtypes[1]
        state = after


def test_other_arguments_are_refused():
    adam = optax.adam(0.1)
    with pytest.raises(ValueError, match="`outer` must be"):
        mo.step_back(0.1, max_norm=1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`max_norm` must be a number, positive; got 0"):
        mo.step_back(adam, max_norm=0)
    with pytest.raises(ValueError, match="`memory` must be a number, at least 0 and less"):
        mo.step_back(adam, 1.0, memory=1.0)
    with pytest.raises(
        ValueError, match="`factor` must be a number, above 0 and at most 1"
    ):
        mo.step_back(adam, 1.0, factor=1.5)
    with pytest.raises(ValueError, match="`step_back` needs the variables"):
        outer = mo.step_back(adam, 1.0)
        outer.update(gradient(0.1), outer.init(HYPER))
