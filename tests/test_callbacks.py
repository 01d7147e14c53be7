"""Callbacks of the outer loop, and several outer steps in one compiled call."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


PROBLEM = mo.BilevelProblem(
    lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
    lambda params, hyper, batch: jnp.sum((params - 2.0) ** 2),
)
SOLVER = mo.NestedSolver(
    mo.Descent(optax.sgd(0.2), num_steps=30), mo.ImplicitAdjoint(), optax.adam(0.1)
)
ROWS = jax.random.normal(jax.random.key(1), (40, 2))
NOISY = mo.BilevelProblem(
    lambda params, hyper, batch: jnp.mean((params - hyper - batch) ** 2),
    lambda params, hyper, batch: jnp.mean((params - batch) ** 2),
)
STOCHASTIC = mo.NestedSolver(
    mo.Descent(optax.sgd(0.2), num_steps=3),
    mo.UnrolledAdjoint(),
    optax.adam(0.1),
    start=mo.WarmStart(),
)


def solve(num_steps=12, problem=PROBLEM, solver=SOLVER, data=(), **options: Any) -> Any:
    settings: dict[str, Any] = {"params": jnp.zeros(2)} | options
    hyper = jnp.array([0.0, 1.0])
    return mo.solve_bilevel(
        problem, hyper, *data, solver=solver, num_steps=num_steps, **settings
    )


def noisy(num_steps=11, **options: Any):
    data = mo.Minibatches(ROWS, 8), mo.Minibatches(ROWS, 10)
    return solve(num_steps, NOISY, STOCHASTIC, data, **options)


def assert_same_run(one, other):
    numbers = lambda solution: jax.tree.leaves(
        (solution.hyper, solution.params, solution.outer_loss, solution.history.hyper)
    )
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)
    columns, others = one.history.columns, other.history.columns
    assert columns.keys() == others.keys()
    for name in columns.keys() - {"seconds"}:
        np.testing.assert_array_equal(columns[name], others[name])


@pytest.mark.parametrize("steps_per_call", [4, 11, 100])
def test_cuts_of_a_run_change_no_bit(steps_per_call):
    assert_same_run(noisy(), noisy(steps_per_call=steps_per_call))


def test_steps_see_different_batches():
    # One key for all outer steps would draw the same rows again and again.
    frozen = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 3), mo.UnrolledAdjoint(), optax.sgd(0.0)
    )
    data = mo.Minibatches(ROWS, 8), ROWS
    losses = solve(8, NOISY, frozen, data, steps_per_call=4).history.outer_loss
    assert len(np.unique(losses)) == 8


def test_outer_steps_have_keys_of_their_own():
    # Where neither `hyper` nor the data move, a loss differs by what it draws.
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch, key: jnp.sum(params * jax.random.normal(key, (2,))),
    )
    frozen = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 1), mo.UnrolledAdjoint(), optax.sgd(0.0)
    )
    losses = solve(4, problem, frozen, steps_per_call=2).history.outer_loss
    assert len(np.unique(losses)) == 4


def test_iterators_feed_every_step_of_a_call():
    batches = lambda: ((ROWS[i : i + 5],) * 2 for i in itertools.cycle(range(30)))
    split = lambda: zip(*itertools.islice(batches(), 9))

    def run(steps_per_call):
        data = [iter(part) for part in split()]
        return solve(9, NOISY, STOCHASTIC, data, steps_per_call=steps_per_call)

    one, other = run(1), run(4)
    np.testing.assert_allclose(one.hyper, other.hyper, rtol=1e-6)
    np.testing.assert_allclose(one.history.outer_loss, other.history.outer_loss, rtol=1e-6)


def test_iterator_that_ends_within_a_call():
    data = iter([ROWS[:5]] * 6), ROWS
    solution = solve(9, NOISY, STOCHASTIC, data, steps_per_call=4, throw=False)
    assert solution.result == mo.RESULTS.outer_data_exhausted
    assert len(solution.history) == 6


@pytest.mark.ci
def test_calls_end_where_the_shapes_of_batches_change():
    sizes, seen = [5, 5, 6, 6, 6, 5], []

    def run(steps_per_call, *callbacks):
        data = iter([ROWS[:size] for size in sizes]), ROWS
        settings = {"steps_per_call": steps_per_call, "callbacks": callbacks}
        return solve(6, NOISY, STOCHASTIC, data, **settings)

    cut = run(4, lambda run: seen.append(run.num_steps))
    assert seen == [2, 5, 6]
    assert_same_run(cut, run(1))


@pytest.mark.one_of(2)
@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_stops_at_the_step_that_converged(steps_per_call):
    solution = solve(100, atol=0.5, steps_per_call=steps_per_call)
    norms = solution.history.hypergradient_norm
    assert norms[-1] <= 0.5 and np.all(norms[:-1] > 0.5)


def test_failed_step_of_a_call_is_undone():
    def loss(params, hyper, batch):
        return jnp.sum(jnp.where(hyper > 0.25, jnp.nan, params))

    problem = mo.BilevelProblem(PROBLEM.inner, lambda *args: -loss(*args))
    solver = mo.NestedSolver(SOLVER.inner, mo.ImplicitAdjoint(), optax.sgd(0.1))
    got = []
    for steps_per_call in (1, 8):
        with pytest.raises(mo.SolveError) as info:
            mo.solve_bilevel(
                problem,
                jnp.zeros(2),
                params=jnp.zeros(2),
                solver=solver,
                num_steps=8,
                steps_per_call=steps_per_call,
            )
        got.append(info.value.value)
    one, other = got
    assert len(one.history) == len(other.history) == 4
    np.testing.assert_array_equal(one.hyper, other.hyper)
    np.testing.assert_allclose(one.hyper, 0.3, rtol=1e-6)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_update_that_is_not_to_be_trusted_is_undone(steps_per_call):
    # Finite, and refused: the inner problem is not solved.
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 1), mo.ImplicitAdjoint(), optax.sgd(0.1)
    )
    with pytest.raises(mo.SolveError, match="not solved accurately enough") as info:
        solve(5, solver=solver, steps_per_call=steps_per_call)
    solution = info.value.value
    np.testing.assert_array_equal(solution.hyper, [0.0, 1.0])
    np.testing.assert_array_equal(solution.history.hyper, [[0.0, 1.0]])


# Checkpoints


@pytest.mark.parametrize("cut", [3, 8])
def test_run_goes_on_from_its_checkpoint(tmp_path, cut):
    checkpoint = lambda: [mo.callbacks.Checkpoint(tmp_path / "run" / "a.npz", every=2)]
    first = noisy(cut, callbacks=checkpoint())
    assert len(first.history) == cut
    second = noisy(11, callbacks=checkpoint(), steps_per_call=2)
    assert_same_run(noisy(11), second)
    again = noisy(11, callbacks=checkpoint())
    assert_same_run(second, again)  # nothing left to do


def test_checkpoint_is_written_where_a_callback_fails(tmp_path):
    def fails(run):
        if run.num_steps == 5:
            raise RuntimeError("mine")

    path = tmp_path / "a.npz"
    with pytest.raises(RuntimeError, match="mine") as info:
        noisy(callbacks=[mo.callbacks.Checkpoint(path, every=100), fails])
    assert len(info.value.solution.history) == 5  # pyright: ignore
    assert_same_run(noisy(), noisy(callbacks=[mo.callbacks.Checkpoint(path)]))


def test_checkpoints_of_other_runs_are_named(tmp_path):
    path = tmp_path / "a.npz"
    noisy(6, callbacks=[mo.callbacks.Checkpoint(path)])
    with pytest.raises(mo.CheckpointError, match="has 6 steps, and `num_steps` is 4"):
        noisy(4, callbacks=[mo.callbacks.Checkpoint(path)])
    with pytest.raises(mo.CheckpointError, match="another `key`"):
        noisy(8, callbacks=[mo.callbacks.Checkpoint(path)], key=jax.random.key(7))
    with pytest.raises(mo.CheckpointError, match="`problem.inner.loss_fn` was .*source"):
        solve(8, callbacks=[mo.callbacks.Checkpoint(path)])
    longer = dataclasses.replace(STOCHASTIC, inner=mo.Descent(optax.sgd(0.2), num_steps=30))
    with pytest.raises(
        mo.CheckpointError, match="`solver.inner.num_steps` was 3 and is 30"
    ):
        data = mo.Minibatches(ROWS, 8), mo.Minibatches(ROWS, 10)
        solve(8, NOISY, longer, data, callbacks=[mo.callbacks.Checkpoint(path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        noisy(2, callbacks=[mo.callbacks.Checkpoint(tmp_path / "file" / "b.npz")])


# The others


def test_best_step_is_kept():
    solver = mo.NestedSolver(SOLVER.inner, mo.ImplicitAdjoint(), optax.sgd(0.9))
    solution = solve(solver=solver, callbacks=[mo.callbacks.KeepBest()], throw=False)
    # The loss falls in every step, so that the last evaluation is the best.
    assert solution.best.step == 12 and solution.best.outer_loss == solution.outer_loss
    np.testing.assert_array_equal(solution.best.hyper, solution.hyper)
    np.testing.assert_array_equal(solution.best.params, solution.params)
    assert str(solution.best).startswith("Best step\n  outer step  12\n  outer loss")
    assert solve(2).best is None


@pytest.mark.one_of(2)
@pytest.mark.parametrize("steps_per_call", [1, 3, 11])
def test_best_step_may_lie_within_a_call(steps_per_call):
    def outer_loss(params, hyper, batch):
        return jnp.sum((params - 2.0) ** 2) + batch

    shifts = jnp.array([5.0, 0.0, 3.0, -9.0, 1.0, 2.0, 0.0, 8.0, 4.0, 6.0, 7.0, 50.0])
    problem = mo.BilevelProblem(PROBLEM.inner, outer_loss)
    solver = mo.NestedSolver(SOLVER.inner, mo.ImplicitAdjoint(), optax.sgd(0.1))
    solution = solve(
        11,
        problem,
        solver,
        data=(None, iter(shifts)),
        callbacks=[mo.callbacks.KeepBest()],
        steps_per_call=steps_per_call,
    )
    best, history = solution.best, solution.history
    assert best.step == np.argmin(history.outer_loss) == 3
    assert best.outer_loss == history.outer_loss[3]
    np.testing.assert_array_equal(best.hyper, np.asarray(history.hyper)[2])
    loss = jnp.sum((best.params - 2) ** 2) - 9
    np.testing.assert_allclose(loss, best.outer_loss, rtol=1e-6)


def test_best_step_outlives_a_cut_whoever_asks_for_it(tmp_path):
    solver = mo.NestedSolver(SOLVER.inner, mo.ImplicitAdjoint(), optax.sgd(-0.05))
    keep = mo.callbacks.KeepBest
    run = lambda num_steps, *callbacks: solve(
        num_steps,
        solver=solver,
        callbacks=[*callbacks, mo.callbacks.Checkpoint(tmp_path / "run")],
    )
    # The loss rises, so that the first step is the best.
    assert run(2, keep()).best.step == 0
    assert run(4).best.step == 0
    (tmp_path / "run").unlink()
    (tmp_path / "run.previous").unlink()
    run(2)
    with pytest.warns(UserWarning, match="without `metaopt.callbacks.KeepBest`"):
        assert run(4, keep()).best.step == 2
    # With no step to take, there is the evaluation.
    done = solve(4, solver=solver, state=solve(4, solver=solver).state, callbacks=[keep()])
    assert done.best.step == 4 and done.best.outer_loss == done.outer_loss


def test_end_of_a_run_is_named():
    early = lambda **options: [mo.callbacks.StopEarly(**options)]
    ends = {
        "`num_steps`": solve(3),
        "`atol`": solve(50, atol=1.0),
        "`StopEarly`": solve(50, callbacks=early(atol=1.0)),
        "`<lambda>`": solve(50, callbacks=[lambda run: True]),
        "the end of the data": solve(50, data=(None, iter([None] * 3)), throw=False),
    }
    for name, solution in ends.items():
        assert solution.ended_by == name and name in str(solution)


@pytest.mark.parametrize("swap", [False, True])
def test_order_of_callbacks_does_not_matter(tmp_path, swap):
    def run(num_steps, path, **options):
        callbacks = [
            mo.callbacks.StopEarly(patience=3, min_decrease=0.05),
            mo.callbacks.KeepBest(),
            mo.callbacks.Checkpoint(path, every=1),
        ]
        callbacks = callbacks[::-1] if swap else callbacks
        return solve(num_steps, callbacks=callbacks, **options)

    whole = run(50, tmp_path / "whole")
    assert 4 < len(whole.history) < 50 and whole.ended_by == "`StopEarly`"
    cut = tmp_path / "cut"
    run(len(whole.history) - 2, cut)
    for _ in range(2):  # a run that has ended takes no more steps
        again = run(50, cut)
        assert_same_run(again, whole)
        assert again.best.step == whole.best.step
        assert list(again.history.columns)[:2] == ["outer_loss", "hypergradient_norm"]


def test_a_converged_run_takes_no_more_steps(tmp_path):
    path = tmp_path / "run"
    run = lambda: solve(50, atol=1.0, callbacks=[mo.callbacks.Checkpoint(path)])
    first, second = run(), run()
    assert_same_run(first, second)
    assert second.ended_by == "`atol`" and second.result == mo.RESULTS.successful


def test_early_ends():
    still = mo.NestedSolver(SOLVER.inner, mo.ImplicitAdjoint(), optax.sgd(0.0))
    stop = lambda **options: [mo.callbacks.StopEarly(**options)]
    solution = solve(50, solver=still, callbacks=stop(patience=4))
    assert len(solution.history) == 5 and solution.result == mo.RESULTS.successful
    assert len(solve(50, callbacks=stop(atol=1.0)).history) == len(
        solve(50, atol=1.0).history
    )
    # The loss falls in every step, by less than is asked for.
    little = stop(patience=4, min_decrease=1e6)
    assert len(solve(50, callbacks=little).history) == 5
    assert len(solve(50, callbacks=stop(seconds=0.0)).history) == 1
    assert len(solve(50, callbacks=[lambda run: run.num_steps == 7]).history) == 7
    with pytest.raises(ValueError, match="has no limit"):
        mo.callbacks.StopEarly()


def test_logs_every_step_of_every_call():
    class Scalars:
        def __init__(self):
            self.rows = []

        def add_scalar(self, name, value, step):
            self.rows.append((name, value, step))

    class Dicts:
        def __init__(self):
            self.rows = []

        def log(self, row, *, step):
            self.rows.append((row, step))

    scalars, dicts = Scalars(), Dicts()
    logs = [mo.callbacks.Log(writer) for writer in (scalars, dicts)]
    history = solve(7, callbacks=logs, steps_per_call=3).history
    losses = [row[1:] for row in scalars.rows if row[0] == "outer_loss"]
    assert losses == list(zip(history.outer_loss.tolist(), range(7)))
    assert [step for _, step in dicts.rows] == list(range(7))
    assert [row["outer_loss"] for row, _ in dicts.rows] == history.outer_loss.tolist()
    with pytest.raises(ValueError, match="add_scalar"):
        mo.callbacks.Log(3)  # pyright: ignore


def test_progress_says_that_it_compiles(capsys):
    solve(4, callbacks=[mo.callbacks.Progress()])
    shown = capsys.readouterr().err
    assert "compiling" in shown and "with any compilation" in shown and "4/4" in shown


def test_callbacks_are_opened_and_closed_once():
    class Witness(mo.callbacks.AbstractCallback):
        def __init__(self):
            self.seen = []

        def open(self, run):
            self.seen.append(("open", run.num_steps))

        def see(self, run):
            self.seen.append(("see", run.num_steps))

        def close(self, run):
            self.seen.append(("close", run.num_steps))

    witness = Witness()
    solve(5, callbacks=[witness], steps_per_call=2)
    counts = [("open", 0), ("see", 2), ("see", 4), ("see", 5), ("close", 5)]
    assert witness.seen == counts


@pytest.mark.parametrize(
    "callbacks", [mo.callbacks.Progress(), [3], [mo.callbacks.Progress]]
)
def test_callbacks_of_the_wrong_kind_are_named(callbacks):
    with pytest.raises(ValueError, match="`callbacks` must"):
        solve(2, callbacks=callbacks)


def test_history_is_a_table():
    history = solve(30).history
    lines = str(history).splitlines()
    assert "30 outer steps" in lines[0] and len(lines) == 14
    assert lines[1].split()[:2] == ["step", "outer_loss"] and lines[-1].split()[0] == "29"
    with pytest.raises(AttributeError, match="no column `outer_lost`"):
        history.outer_lost


# Cuts, failures and files


def test_every_number_of_steps_is_one_program():
    traces = []

    def outer(params, hyper, batch):
        traces.append(None)
        return jnp.sum((params - 2.0) ** 2)

    problem = mo.BilevelProblem(PROBLEM.inner, outer)
    solve(10, problem, steps_per_call=4)  # 4, 4 and 2 steps
    once = len(traces)
    solve(100, problem, steps_per_call=4, atol=0.5)
    assert len(traces) == once


def test_data_of_steps_that_were_not_taken_stays():
    # The tolerance schedule takes a step again whose rough hypergradient vanishes, with
    # the data of that step, and the steps after it with theirs.
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 30),
        mo.ImplicitAdjoint(),
        optax.sgd(0.25),
        tolerance=mo.PolynomialTolerance(0.5),
    )
    shifts = [jnp.full(2, 0.1 * i) for i in range(12)]
    problem = mo.BilevelProblem(
        PROBLEM.inner, lambda params, hyper, batch: jnp.sum((params - batch) ** 2)
    )

    def run(steps_per_call):
        data = None, iter(shifts)
        return solve(
            12, problem, solver, data, steps_per_call=steps_per_call, atol=0.45, throw=False
        )

    one, other = run(1), run(5)
    assert 1 < len(one.history) < 12
    assert_same_run(one, other)


def _fails_later(throw, path, fails=True):
    def loss(params, hyper, batch):
        return -jnp.sum(jnp.where(fails & (hyper > 0.25), jnp.nan, params))

    problem = mo.BilevelProblem(PROBLEM.inner, loss)
    solver = mo.NestedSolver(SOLVER.inner, mo.ImplicitAdjoint(), optax.sgd(0.1))
    checkpoint = mo.callbacks.Checkpoint(path, every=10, allow_changes=not fails)
    callbacks = [checkpoint, mo.callbacks.KeepBest()]
    return mo.solve_bilevel(
        problem,
        jnp.zeros(2),
        params=jnp.zeros(2),
        solver=solver,
        num_steps=6,
        callbacks=callbacks,
        throw=throw,
    )


def test_checkpoint_holds_no_step_that_failed_under_throw(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(mo.SolveError):
        _fails_later(True, path)
    with pytest.warns(UserWarning, match="outer_loss.fails` was True and is False"):
        mended = _fails_later(True, path, fails=False)
    assert len(mended.history) == 6 and mended.num_skipped == 0
    assert np.all(np.isfinite(mended.history.outer_loss))


def test_failures_and_the_best_step_outlive_a_cut(tmp_path):
    path = tmp_path / "a.npz"
    first = _fails_later(False, path)
    assert first.num_skipped > 0 and first.result != mo.RESULTS.successful
    second = _fails_later(False, path)  # nothing left to do
    assert second.num_skipped == first.num_skipped and second.result == first.result
    assert first.best is not None and second.best is not None
    assert second.best.step == first.best.step
    np.testing.assert_array_equal(second.best.params, first.best.params)


def test_checkpoint_of_another_run_is_left_alone(tmp_path):
    path = tmp_path / "a.npz"
    noisy(6, callbacks=[mo.callbacks.Checkpoint(path)])
    content = path.read_bytes()
    state = solve(3).state
    with pytest.raises(ValueError, match="Both `state` and the checkpoint"):
        solve(8, state=state, callbacks=[mo.callbacks.Checkpoint(path)])
    with pytest.raises(mo.CheckpointError):
        solve(8, callbacks=[mo.callbacks.Checkpoint(path)])
    assert path.read_bytes() == content


def test_every_callback_is_closed_where_one_fails():
    closed = []

    class Witness(mo.callbacks.AbstractCallback):
        def __init__(self, name):
            self.name = name

        def close(self, run):
            closed.append(self.name)
            raise RuntimeError(self.name)

    with pytest.raises(RuntimeError):
        solve(2, callbacks=[Witness("a"), Witness("b")])
    assert closed == ["b", "a"]


def test_early_end_by_a_rough_hypergradient_is_refused():
    rough = dataclasses.replace(SOLVER, tolerance=mo.PolynomialTolerance())
    with pytest.raises(ValueError, match="rough hypergradient"):
        solve(5, solver=rough, callbacks=[mo.callbacks.StopEarly(atol=1e-3)])


def test_step_that_failed_is_logged_and_numbered():
    seen = []
    problem = mo.BilevelProblem(PROBLEM.inner, lambda p, h, b: jnp.sum(p) * jnp.nan)
    with pytest.raises(mo.SolveError):
        solve(4, problem, callbacks=[lambda run: seen.append(run.num_steps)])
    assert seen == [1]


# -- the end of a run


class Recorder(mo.callbacks.AbstractCallback):
    """A list of the calls, and an error in one of them."""

    def __init__(self, fails: str = ""):
        self.calls: list[str] = []
        self.fails = fails

    def note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise ZeroDivisionError(name)

    def open(self, run):
        self.note("open")

    def see(self, run):
        self.note(f"see {run.num_steps}")

    def close(self, run):
        self.note("close")

    def evaluate(self, run):
        self.note("evaluate")

    def end(self, run, solution):
        np.testing.assert_array_equal(solution.hyper, run.hyper)
        self.note("end")


CALLS = ["open", "see 2", "see 3", "close", "evaluate", "end"]


def test_order_of_the_calls():
    recorder = Recorder()
    solve(3, steps_per_call=2, callbacks=[recorder])
    assert recorder.calls == CALLS


@pytest.mark.parametrize("fails", ["see 3", "evaluate", "end"])
def test_error_of_a_callback_has_what_was_reached(fails):
    recorder = Recorder(fails)
    with pytest.raises(ZeroDivisionError) as caught:
        solve(3, steps_per_call=2, callbacks=[recorder])
    reached: Any = caught.value
    np.testing.assert_array_equal(reached.solution.hyper, solve(3).hyper)
    # Whatever fails, what was opened is closed.
    until = CALLS[: CALLS.index(fails) + 1]
    assert recorder.calls == (until if "close" in until else [*until, "close"])
