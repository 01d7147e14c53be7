"""Runs that go back where a step fails, and on at a lower outer rate."""

import csv
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


# The learning rate is pulled to 1.8. Beyond 2 the inner steps diverge.
TARGET = float(np.log(1.8))


def outer_loss(params, hyper, batch):
    pull = (hyper.raw - TARGET) ** 2
    return jnp.mean(batch) * pull + 1e-12 * params**2


PROBLEM = mo.BilevelProblem(
    lambda params, hyper, batch: 0.5 * (params - 1e-3) ** 2, outer_loss
)
START = mo.hyper.Positive(0.5)
FAILS = "Step 1 failed. .* goes back to step 0, at an outer rate of 0.45"


def solve(rate: float = 0.9, num_steps: int = 6, **options: Any) -> Any:
    inner = mo.Descent(lambda hyper: optax.sgd(hyper.value), num_steps=2500)
    solver = mo.NestedSolver(
        inner, mo.UnrolledAdjoint(), optax.inject_hyperparams(optax.sgd)(rate)
    )
    options = {"valid": jnp.ones(2)} | options
    valid = options.pop("valid")
    return mo.solve_bilevel(
        PROBLEM,
        START,
        jnp.zeros(1),
        valid,
        params=jnp.asarray(1.0),
        solver=solver,
        num_steps=num_steps,
        **options,
    )


@pytest.fixture(scope="module")
def slow() -> Any:
    """The run at the lower rate, from its first step."""
    return solve(0.45)


def check_same(solution: Any, slow: Any) -> None:
    assert mo.RESULTS[solution.result] == mo.RESULTS[mo.RESULTS.successful]
    np.testing.assert_array_equal(solution.history.outer_loss, slow.history.outer_loss)
    np.testing.assert_array_equal(solution.history.hyper.raw, slow.history.hyper.raw)
    np.testing.assert_array_equal(solution.hyper.raw, slow.hyper.raw)
    assert int(solution.state.num_steps) == len(solution.history) == 6


@pytest.mark.one_of(3)
@pytest.mark.parametrize("throw", [True, False])
@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_a_run_goes_back_and_on_at_a_lower_rate(steps_per_call, throw):
    # Another program may round otherwise: the same one is compared.
    slow = solve(0.45, steps_per_call=steps_per_call, throw=throw)
    callbacks = [mo.callbacks.RollBack()]
    with pytest.warns(UserWarning, match=FAILS):
        solution = solve(steps_per_call=steps_per_call, callbacks=callbacks, throw=throw)
    check_same(solution, slow)
    assert solution.num_skipped == 0 and solution.ended_by == "`num_steps`"


def test_without_it_the_run_fails():
    with pytest.raises(mo.SolveError):
        solve()


def test_no_rate_helps_a_first_step_that_fails():
    inner = mo.Descent(lambda hyper: optax.sgd(hyper.value), num_steps=2500)
    outer = optax.inject_hyperparams(optax.sgd)(0.1)
    with pytest.raises(mo.SolveError, match="diverged"):  # and no warning
        mo.solve_bilevel(
            PROBLEM,
            mo.hyper.Positive(5.0),
            jnp.zeros(1),
            jnp.ones(2),
            params=jnp.asarray(1.0),
            solver=mo.NestedSolver(inner, mo.UnrolledAdjoint(), outer),
            num_steps=3,
            callbacks=[mo.callbacks.RollBack()],
        )


def test_after_some_times_the_run_fails():
    callbacks = [mo.callbacks.RollBack(factor=0.99, max_times=3)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(mo.SolveError) as error:
            solve(callbacks=callbacks)
    rates = [float(str(w.message).split("rate of ")[1][:-1]) for w in seen]
    np.testing.assert_allclose(rates, [0.9 * 0.99**i for i in (1, 2, 3)], rtol=1e-3)
    assert len(error.value.value.history) == 2  # with the step that failed


@pytest.mark.one_of(3)
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_cut_run_goes_back_as_the_whole_one(tmp_path, slow, cut):
    """Cut right before the step that fails, and after the run has gone back."""

    def stop(run):
        if run.num_steps == cut:
            raise KeyboardInterrupt

    def part(*callbacks):
        checkpoint = mo.callbacks.Checkpoint(tmp_path / "run", every=1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            out = solve(callbacks=[*callbacks, mo.callbacks.RollBack(), checkpoint])
        return out, len(seen)

    _, before = part(stop)
    solution, after = part()
    # Cut at the step that fails, it has said so, and fails once more.
    assert (before, after) == {1: (0, 1), 2: (1, 1)}.get(cut, (1, 0))
    check_same(solution, slow)


def test_a_loader_is_called_back(slow):
    class Loader:
        def __iter__(self):
            return iter([jnp.full(2, 1.0), jnp.full(2, 0.9), jnp.full(2, 0.8)])

    expected = solve(0.45, valid=Loader())
    with pytest.warns(UserWarning, match=FAILS):
        solution = solve(valid=Loader(), callbacks=[mo.callbacks.RollBack()])
    check_same(solution, expected)
    assert np.any(expected.history.outer_loss != slow.history.outer_loss)


def test_a_step_that_is_undone_is_not_the_best():
    # It once was, under the number of the step in its place.
    values = [1.0, 1.0, 1.05, 1e3, 1.0]  # two that are undone, two that are not
    valid = iter([jnp.full(2, value) for value in values])
    callbacks = [mo.callbacks.RollBack(), mo.callbacks.KeepBest()]
    options: Any = {"num_steps": 2, "steps_per_call": 2, "throw": False}
    with pytest.warns(UserWarning, match=FAILS):
        solution = solve(valid=valid, callbacks=callbacks, **options)
    losses = solution.history.outer_loss
    assert losses[0] == pytest.approx(1.05 * losses[1] / 1e3 / 0.055**2, rel=1e-3)
    assert solution.best.step == 0 and solution.best.outer_loss == losses[0]


@pytest.mark.parametrize("first", [True, False])
def test_steps_that_are_undone_do_not_end_a_run(slow, first):
    # A step that failed and the same step again once used up the patience.
    patience, back = mo.callbacks.StopEarly(patience=1), mo.callbacks.RollBack()
    with pytest.warns(UserWarning, match=FAILS):
        solution = solve(callbacks=[back, patience] if first else [patience, back])
    assert solution.ended_by == "`num_steps`"
    check_same(solution, slow)


@pytest.mark.parametrize("first", [True, False])
def test_rows_of_a_log_are_replaced(tmp_path, slow, first):
    log = mo.callbacks.Log(mo.callbacks.CSV(tmp_path / "history.csv"))
    back = mo.callbacks.RollBack()
    with pytest.warns(UserWarning, match=FAILS):
        solve(callbacks=[back, log] if first else [log, back])
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(6))
    losses = [float(row["outer_loss"]) for row in rows]
    np.testing.assert_array_equal(losses, slow.history.outer_loss)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (optax.sgd(0.1), r"Write `optax.inject_hyperparams\(optax.adam\)\(0.01\)`"),
        (
            optax.inject_hyperparams(optax.sgd)(optax.constant_schedule(0.1)),
            "follows a schedule",
        ),
    ],
)
def test_rates_that_cannot_be_lowered_are_refused(outer, message):
    solver = mo.NestedSolver(
        mo.Descent(lambda hyper: optax.sgd(hyper.value), num_steps=3),
        mo.UnrolledAdjoint(),
        outer,
    )
    seen = []
    with pytest.raises(ValueError, match=message):
        mo.solve_bilevel(
            PROBLEM,
            START,
            jnp.zeros(1),
            jnp.ones(2),
            params=jnp.asarray(1.0),
            solver=solver,
            num_steps=2,
            callbacks=[mo.callbacks.RollBack(), seen.append],
        )
    assert not seen


@pytest.mark.parametrize("factor", [0.0, 1.0, -0.5, "half", True, float("nan")])
def test_a_factor_is_between_0_and_1(factor):
    with pytest.raises(ValueError, match="`factor` must be between 0 and 1"):
        mo.callbacks.RollBack(factor)


# Learning over tasks


CLASSES = mo.datasets.ClassData(
    1.0 + np.linspace(0.0, 0.1, 12, dtype=np.float32).reshape(3, 4)
)
EPISODES = mo.few_shot.HostEpisodes(CLASSES, 2, 1, 1, num_tasks=2)


def drawn_tasks(key):
    x = 1.0 + 0.1 * jax.random.uniform(key, (2, 3))
    return mo.few_shot.Task(x, x)


class TaskLoader:
    """Three batches of tasks."""

    def __iter__(self):
        return (EPISODES.batch(index) for index in range(3))


def learn(rate: float, tasks: Any, **options: Any) -> Any:
    def loss(model, batch):
        x = batch[0] if isinstance(batch, tuple) else batch
        w = model["w"]
        return jnp.mean(x) * (w - 0.1 * jnp.log(w))  # not a number where w is negative

    return mo.few_shot.train(
        mo.few_shot.MAML(loss, mo.Descent(optax.sgd(1e-3), num_steps=1)),
        {"w": jnp.asarray(1.0)},
        tasks,
        outer=optax.inject_hyperparams(optax.sgd)(rate),
        num_steps=6,
        **options,
    )


@pytest.mark.one_of(4)
@pytest.mark.parametrize("steps_per_call", [1, 3])
@pytest.mark.parametrize("tasks", [drawn_tasks, EPISODES, TaskLoader()])
def test_learning_over_tasks_goes_back(tasks, steps_per_call, tmp_path):
    slow = learn(0.125, tasks, steps_per_call=steps_per_call)
    with pytest.raises(mo.SolveError):
        learn(2.0, tasks, steps_per_call=steps_per_call)
    callbacks = [
        mo.callbacks.StopEarly(patience=3),
        mo.callbacks.RollBack(factor=0.0625),
        mo.callbacks.KeepBest(),
        mo.callbacks.Checkpoint(tmp_path / "run", every=1),
    ]
    with pytest.warns(UserWarning, match="back to step 0, at an outer rate of 0.125"):
        solution = learn(2.0, tasks, steps_per_call=steps_per_call, callbacks=callbacks)
    assert mo.RESULTS[solution.result] == mo.RESULTS[mo.RESULTS.successful]
    np.testing.assert_array_equal(solution.history.outer_loss, slow.history.outer_loss)
    np.testing.assert_array_equal(solution.meta["w"], slow.meta["w"])
    assert len(solution.history) == int(solution.state.num_steps) == 6
    assert solution.best.outer_loss == np.min(slow.history.outer_loss)
    assert float(solution.meta["w"]) < 0.7
    # The file is of the run that went back.
    again = learn(2.0, tasks, steps_per_call=steps_per_call, callbacks=callbacks)
    np.testing.assert_array_equal(again.meta["w"], slow.meta["w"])
    np.testing.assert_array_equal(again.history.outer_loss, slow.history.outer_loss)
