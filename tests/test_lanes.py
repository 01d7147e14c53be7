"""Outer steps that average over seeds, and over folds of a cross-validation."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


def inner_loss(params, hyper, batch):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2) + hyper["l2"].value * jnp.sum(params**2)


def outer_loss(params, hyper, batch):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2)


PROBLEM = mo.BilevelProblem(
    mo.InnerProblem(inner_loss, lambda hyper, key: jax.random.normal(key, (3,))),
    outer_loss,
)
X = jax.random.normal(jax.random.key(0), (12, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5]) + 0.3 * jax.random.normal(jax.random.key(1), (12,))
HYPER = {"l2": mo.hyper.Positive(0.1)}
ADJOINTS: dict[str, Any] = {
    "unrolled": mo.UnrolledAdjoint(),
    "implicit": mo.ImplicitAdjoint(rtol=jnp.inf, inner_rtol=jnp.inf),
    "forward": mo.ForwardAdjoint(),
}


def nested(adjoint: Any, num_steps: int = 5, **changes: Any) -> mo.NestedSolver:
    # A step of one in `raw`, so that its change is the hypergradient.
    inner = mo.Descent(optax.sgd(0.1), num_steps=num_steps)
    return mo.NestedSolver(inner, adjoint, optax.sgd(1.0), **changes)


@pytest.mark.one_of(3)
@pytest.mark.parametrize("start", [mo.ColdStart(), mo.WarmStart()], ids=["cold", "warm"])
@pytest.mark.parametrize("adjoint", ["unrolled", "implicit"])
def test_a_step_is_the_mean_of_steps_by_themselves(adjoint, start):
    batches, full = mo.Minibatches((X, Y), 4), mo.FullBatch((X, Y))
    several = nested(ADJOINTS[adjoint], start=start, num_seeds=3)
    single = nested(ADJOINTS[adjoint], start=start)
    state = several.init(
        PROBLEM, HYPER, batches, full, params=None, model_state=None, key=jax.random.key(3)
    )
    assert state.num_lanes == 3 and state.params.shape == (3, 3)
    assert not np.allclose(state.params[0], state.params[1])
    step = eqx.filter_jit(several.step)
    alone = eqx.filter_jit(single.step)
    for _ in range(2):
        new, info = step(PROBLEM, state, batches, full)
        expected, losses, steps = [], [], 0
        for lane in range(3):
            names = "params", "model_state", "solver_state", "carry", "cursors"
            parts = {
                name: jax.tree.map(lambda leaf: leaf[lane], vars(state)[name])
                for name in names
            }
            own = dataclasses.replace(
                state,
                num_lanes=1,
                key=jax.random.fold_in(state.key, lane),
                first_model_state=None,
                **parts,
            )
            other, report = alone(PROBLEM, own, batches, full)
            expected.append(other.hyper["l2"].raw - own.hyper["l2"].raw)
            losses.append(report.report.outer.loss)
            steps += int(report.report.inner.num_steps)
            np.testing.assert_allclose(new.params[lane], other.params, rtol=1e-8)
        assert np.std(expected) > 1e-3  # seeds differ
        change = new.hyper["l2"].raw - state.hyper["l2"].raw
        np.testing.assert_allclose(change, np.mean(expected), rtol=1e-8)
        np.testing.assert_allclose(info.report.outer.loss, np.mean(losses), rtol=1e-8)
        norm = abs(np.mean(expected))
        np.testing.assert_allclose(info.report.outer.hypergradient_norm, norm, rtol=1e-8)
        assert info.report.inner.num_steps == steps
        state = new


def ridge_loss(raw, train, valid):
    """The validation loss of ridge regression, in closed form."""
    (x, y), (xv, yv) = train, valid
    matrix = x.T @ x / len(x) + jnp.exp(raw) * jnp.eye(3)
    return jnp.mean((xv @ jnp.linalg.solve(matrix, x.T @ y / len(x)) - yv) ** 2)


def folds() -> tuple[list[Any], list[Any]]:
    parts = [np.arange(12) % 3 == fold for fold in range(3)]
    return [(X[~p], Y[~p]) for p in parts], [(X[p], Y[p]) for p in parts]


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_folds_give_the_hypergradient_of_cross_validation(adjoint):
    trains, valids = folds()
    solution = mo.solve_bilevel(
        PROBLEM,
        HYPER,
        mo.Folds(trains),
        mo.Folds(valids),
        solver=nested(ADJOINTS[adjoint], num_steps=300),
        num_steps=1,
    )

    def mean(raw):
        losses = [ridge_loss(raw, *pair) for pair in zip(trains, valids)]
        return jnp.mean(jnp.stack(losses))

    value, slope = jax.value_and_grad(mean)(HYPER["l2"].raw)
    np.testing.assert_allclose(solution.history.outer_loss[0], value, rtol=1e-6)
    change = solution.hyper["l2"].raw - HYPER["l2"].raw
    np.testing.assert_allclose(change, -slope, rtol=1e-5)
    # Evaluated at the new value, on all folds.
    np.testing.assert_allclose(solution.outer_loss, mean(solution.hyper["l2"].raw))
    assert solution.params.shape == (3,)  # those of the first fold


def test_folds_of_minibatches():
    trains, valids = folds()
    sources = [mo.Minibatches(part, 4) for part in trains]
    solution = mo.solve_bilevel(
        PROBLEM,
        HYPER,
        mo.Folds(sources),
        mo.Folds(valids),
        solver=nested(ADJOINTS["unrolled"]),
        num_steps=2,
    )
    assert len(solution.history) == 2 and np.isfinite(solution.outer_loss)


def test_a_run_over_seeds_goes_on_from_its_checkpoint(tmp_path):
    def run(num_steps, *callbacks):
        return mo.solve_bilevel(
            PROBLEM,
            HYPER,
            mo.Minibatches((X, Y), 4),
            (X, Y),
            solver=nested(ADJOINTS["unrolled"], num_seeds=2),
            num_steps=num_steps,
            callbacks=callbacks,
        )

    whole = run(4)
    run(2, mo.callbacks.Checkpoint(tmp_path / "run"))
    again = run(4, mo.callbacks.Checkpoint(tmp_path / "run"))
    np.testing.assert_array_equal(again.hyper["l2"].raw, whole.hyper["l2"].raw)
    np.testing.assert_array_equal(again.history.outer_loss, whole.history.outer_loss)
    np.testing.assert_array_equal(again.params, whole.params)


def test_one_seed_that_fails_voids_the_step():
    def exploding(hyper, key):
        # One of the two seeds starts where the loss overflows.
        return jnp.where(jax.random.uniform(key) < 0.5, jnp.inf, 1.0) * jnp.ones(3)

    problem = mo.BilevelProblem(mo.InnerProblem(inner_loss, exploding), outer_loss)
    seeds = [jax.random.key(seed) for seed in range(6)]
    results = []
    for key in seeds:
        solution = mo.solve_bilevel(
            problem,
            HYPER,
            (X, Y),
            (X, Y),
            solver=nested(ADJOINTS["unrolled"], num_seeds=2),
            num_steps=1,
            key=key,
            throw=False,
        )
        changed = bool(solution.hyper["l2"].raw != HYPER["l2"].raw)
        assert solution.report is not None
        failed = bool(solution.report.result != mo.RESULTS.successful)
        assert changed != failed
        results.append(failed)
    assert any(results) and not all(results)


def test_seeds_that_are_all_the_same_are_named():
    with pytest.warns(UserWarning, match="`num_seeds` is 2, and all inner solves start at"):
        mo.solve_bilevel(
            PROBLEM,
            HYPER,
            (X, Y),
            (X, Y),
            params=jnp.zeros(3),
            solver=nested(ADJOINTS["unrolled"], num_seeds=2),
            num_steps=1,
        )


def test_work_of_several_seeds():
    solver = nested(mo.TruncatedAdjoint(2), num_seeds=3)
    work = solver.work({"num_inner_steps": np.array([15])}, 1)
    assert work is not None
    assert work.gradients.tolist() == [18] and work.products.tolist() == [6]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t, v: (mo.Folds(t[:1]), v[0]), "two folds or more"),
        (lambda t, v: (mo.Folds([t[0], v[0]]), v[0]), r"`folds\[1\]` has other shapes"),
        (lambda t, v: (mo.Folds(t), v[0]), "`train` has 3 folds: .*both"),
        (lambda t, v: (mo.Folds(t), mo.Folds(v[:2])), "3 folds and `valid` has 2 folds"),
    ],
)
def test_folds_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        train, valid = make(*folds())
        mo.solve_bilevel(
            PROBLEM, HYPER, train, valid, solver=nested(ADJOINTS["unrolled"]), num_steps=1
        )


def test_folds_are_for_the_nested_solver():
    trains, valids = map(mo.Folds, folds())
    with pytest.raises(ValueError, match=r"metaopt.NestedSolver.*averages"):
        mo.hypergradient(
            PROBLEM,
            HYPER,
            trains,
            valids,
            inner=mo.Descent(optax.sgd(0.1), num_steps=5),
            adjoint=mo.UnrolledAdjoint(),
        )
    with pytest.raises(ValueError, match="`num_seeds` is 2"):
        solver = nested(ADJOINTS["unrolled"], num_seeds=2)
        mo.solve_bilevel(PROBLEM, HYPER, trains, valids, solver=solver, num_steps=1)
    with pytest.raises(ValueError, match="num_seeds"):
        nested(ADJOINTS["unrolled"], num_seeds=0)


def counted_loss(params, hyper, batch, state):
    x, y = batch
    mean = 0.9 * state["mean"] + 0.1 * jnp.mean(x, axis=0)
    loss = jnp.mean(((x - state["mean"]) @ params - y) ** 2)
    return loss + hyper["l2"].value * jnp.sum(params**2), {"mean": mean}


def counted_error(params, hyper, batch, state):
    x, y = batch
    return jnp.mean(((x - state["mean"]) @ params - y) ** 2)


@pytest.mark.one_of(4)
@pytest.mark.parametrize("num_seeds", [1, 2])
@pytest.mark.parametrize(
    "start", [mo.ColdStart(), mo.WarmStart(), mo.Windows(restart_every=2)]
)
def test_params_and_state_of_an_init_are_those_that_are_given(start, num_seeds):
    # A run that started from scratch at each step was refused, as if a state were given.
    first = jnp.ones(3), {"mean": jnp.zeros(3)}
    inner = mo.InnerProblem(counted_loss, lambda hyper, key: first, has_state=True)
    descent = mo.Descent(optax.sgd(0.1), 3, state_policy=mo.nn.CarriedState())
    solver = mo.NestedSolver(
        descent, mo.UnrolledAdjoint(), optax.sgd(0.1), start=start, num_seeds=num_seeds
    )

    def solve(params, model_state):
        return mo.solve_bilevel(
            mo.BilevelProblem(inner, counted_error),
            HYPER,
            mo.Minibatches((X, Y), 4),
            (X, Y),
            params=params,
            model_state=model_state,
            solver=solver,
            num_steps=4,
        )

    drawn, given = solve(None, None), solve(*first)
    np.testing.assert_array_equal(drawn.history.outer_loss, given.history.outer_loss)
    np.testing.assert_array_equal(drawn.hyper["l2"].raw, given.hyper["l2"].raw)
    np.testing.assert_array_equal(drawn.model_state["mean"], given.model_state["mean"])
