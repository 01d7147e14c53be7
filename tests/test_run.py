"""The outer loop: what it returns, when it stops, and what it survives."""

import csv
import gc
import io
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import metaopt as mo


PROBLEM = mo.BilevelProblem(
    lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
    lambda params, hyper, batch: jnp.sum((params - 2.0) ** 2),
)
DESCENT = mo.Descent(optax.sgd(0.2), num_steps=60)
SOLVER = mo.NestedSolver(DESCENT, mo.ImplicitAdjoint(), optax.sgd(0.25))


def solve(problem=PROBLEM, hyper=(0.0, 1.0), solver=SOLVER, num_steps=25, **options: Any):
    hyper = jnp.asarray(hyper)
    settings: dict[str, Any] = {"params": jnp.zeros(2)} | options
    return mo.solve_bilevel(problem, hyper, solver=solver, num_steps=num_steps, **settings)


def test_finds_the_minimum_and_reports_it():
    solution = solve()
    np.testing.assert_allclose(solution.hyper, 2.0, atol=1e-6)
    np.testing.assert_allclose(solution.params, solution.hyper, atol=1e-9)
    assert solution.outer_loss < 1e-12
    history = solution.history
    assert len(history) == 25
    assert np.all(np.diff(history.outer_loss) < 0)
    assert history.num_inner_steps.sum() == 25 * 60
    text = str(solution)
    for part in ("outer steps", "outer loss, final", "linear steps", "Successful."):
        assert part in text


def test_params_belong_to_the_hyper_that_is_returned():
    # One outer step: the inner solution used for it belongs to the hyper before.
    solution = solve(num_steps=1)
    np.testing.assert_allclose(solution.params, solution.hyper, atol=1e-9)
    np.testing.assert_allclose(solution.outer_loss, jnp.sum((solution.hyper - 2) ** 2))


def test_history_is_written_as_csv(tmp_path):
    history = solve(num_steps=4).history
    history.to_csv(tmp_path / "history.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "history.csv").read_text())))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    losses = [float(row["outer_loss"]) for row in rows]
    assert losses == history.to_dict()["outer_loss"]


def test_success_has_a_text():
    # It was empty, and `print(solution.result)` showed no word.
    result = solve(num_steps=1).result
    assert mo.RESULTS[result] == "Successful." and "Successful" in str(result)
    assert result == mo.RESULTS.promote(optx.RESULTS.successful)


def test_stops_on_tolerance():
    solution = solve(atol=1e-3, num_steps=100)
    assert 3 < len(solution.history) < 40
    assert solution.history.hypergradient_norm[-1] <= 1e-3
    assert "Successful" in str(solution)


def test_says_that_the_tolerance_was_not_met():
    with pytest.raises(mo.SolveError, match="before the tolerance on the norm") as info:
        solve(atol=1e-12, num_steps=3)
    assert len(info.value.value.history) == 3  # nothing is lost


def stopped(run):
    raise StopIteration


@pytest.mark.parametrize(
    "callback",
    [lambda run: run.num_steps >= 2, lambda run: run.num_steps >= 2 and stopped(run)],
    ids=["returns True", "raises StopIteration"],
)
def test_callback_ends_the_run(callback):
    # A tolerance that was not met is no failure of a run that was ended on purpose.
    solution = solve(callbacks=[callback], num_steps=5, atol=1e-12)
    assert len(solution.history) == 2 and "Successful" in str(solution)
    # What else a callback returns means nothing.
    assert len(solve(callbacks=[lambda run: [1]], num_steps=3).history) == 3


def test_callback_that_raises_loses_nothing():
    def callback(run):
        if run.num_steps == 2:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as info:
        solve(callbacks=[callback], num_steps=4)
    error: Any = info.value
    assert len(error.solution.history) == 2
    assert "attribute `solution`" in error.__notes__[0]
    again = solve(num_steps=4, state=error.solution.state)
    assert jnp.array_equal(again.hyper, solve(num_steps=4).hyper)
    assert len(again.history) == 2
    assert len(solve(num_steps=2, state=again.state).history) == 0

    def batches():
        yield jnp.ones(1)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk") as info:
        solve(train=batches(), num_steps=4)
    error = info.value
    assert len(error.solution.history) == 1


def test_state_of_another_run():
    state = solve(num_steps=1).state
    with pytest.raises(ValueError, match="`state` is of another run"):
        solve(hyper=[0.0, 1.0, 2.0], params=jnp.zeros(3), state=state)
    with pytest.raises(ValueError, match="`state` must be the `state` of"):
        solve(state=solve(num_steps=1))
    with pytest.raises(ValueError, match="hand over no others"):
        solve(state=state, key=jax.random.key(1))


def test_failure_keeps_what_was_reached():
    # From the fourth step on the data holds a value at which the loss is not defined.
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch: jnp.sum((params - 2.0) ** 2) + jnp.log(batch[0]),
    )
    feed = (jnp.array([1.0 if i < 3 else -1.0]) for i in itertools.count())
    with pytest.raises(mo.SolveError, match="The outer loss is infinite or NaN") as info:
        solve(problem, valid=feed, num_steps=10)
    solution = info.value.value
    assert len(solution.history) == 4
    assert jnp.all(jnp.isfinite(solution.hyper))
    np.testing.assert_allclose(solution.hyper, solve(num_steps=3).hyper)


def test_goes_on_without_throw():
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch: jnp.sum((params - 2.0) ** 2) + jnp.log(batch[0]),
    )
    feed = (jnp.array([-1.0 if i == 3 else 1.0]) for i in itertools.count())
    solution = solve(problem, valid=feed, num_steps=25, throw=False)
    assert solution.num_skipped == 1
    assert np.isnan(solution.history.outer_loss[3])
    assert "updates skipped" in str(solution) and "outer loss is infinite" in str(solution)
    np.testing.assert_allclose(solution.hyper, 2.0, atol=1e-5)


def test_last_inner_solve_counts():
    # The last update of `hyper` made the inner loss overflow.
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum(jnp.exp(hyper * 1e3) * params**2 + params),
        lambda params, hyper, batch: jnp.sum((params - 2.0) ** 2) - hyper,
    )
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.1), num_steps=9), mo.UnrolledAdjoint(), optax.sgd(1e3)
    )
    options = {"solver": solver, "num_steps": 1, "params": jnp.zeros(2)}
    with pytest.raises(mo.SolveError, match="infinite or NaN|diverged") as info:
        mo.solve_bilevel(problem, -0.01, **options)
    solution = info.value.value
    assert len(solution.history) == 1 and bool(jnp.isfinite(solution.hyper))
    assert "Successful" not in str(solution)


def test_iterator_that_ends_loses_nothing():
    feed = iter([jnp.zeros(2), jnp.zeros(2)])
    with pytest.raises(mo.SolveError, match="ended before `num_steps`.*cycle") as info:
        solve(valid=feed, num_steps=5)
    solution = info.value.value
    assert len(solution.history) == 2
    np.testing.assert_allclose(solution.hyper, solve(num_steps=2).hyper)
    with pytest.raises(
        ValueError, match="`train` is an iterator or loader that yields nothing"
    ):
        solve(train=iter([]))


def test_iterator_of_data_is_pulled_once_for_each_step():
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch: jnp.sum((params - batch) ** 2),
    )
    pulled = []

    def feed():
        for i in itertools.count():
            pulled.append(i)
            yield jnp.full(2, float(i))

    solution = solve(problem, valid=feed(), num_steps=3)
    assert pulled == [0, 1, 2]
    assert len(solution.history) == 3


def test_callback_sees_every_step():
    seen = []
    see = lambda run: seen.append((run.num_steps, float(run.hyper[0])))
    solve(num_steps=3, callbacks=[see])
    assert [i for i, _ in seen] == [1, 2, 3]
    assert seen[0][1] != seen[1][1]


def test_progress_bar(capsys):
    solve(num_steps=3, callbacks=[mo.callbacks.Progress()])
    error = capsys.readouterr().err
    assert "3/3" in error and "loss=" in error
    first, last = error.index("The first call"), error.index("The evaluation")
    assert first < error.index("Evaluating the last outer variables") < last
    solve(num_steps=3)
    assert capsys.readouterr().err == ""


def test_by_hand():
    train = valid = mo.FullBatch(None)
    state = SOLVER.init(
        PROBLEM,
        jnp.array([0.0, 1.0]),
        train,
        valid,
        params=jnp.zeros(2),
        model_state=None,
        key=jax.random.key(0),
    )
    step = jax.jit(lambda state: SOLVER.step(PROBLEM, state, train, valid)[0])
    for _ in range(5):
        state = step(state)
    np.testing.assert_allclose(state.hyper, solve(num_steps=5).hyper, rtol=1e-12)


def test_reproducible_by_key():
    class Noisy(mo.extend.AbstractInnerProblem):
        def init(self, hyper, key):
            return jax.random.normal(key, (2,))

        def loss(self, params, hyper, batch, *, key):
            return jnp.sum((params - hyper + 0.1 * jax.random.normal(key, (2,))) ** 2)

    problem = mo.BilevelProblem(Noisy(), PROBLEM.outer_loss)
    solver = mo.NestedSolver(DESCENT, mo.UnrolledAdjoint(), optax.sgd(0.25))
    run = lambda seed: (
        solve(
            problem, solver=solver, num_steps=3, params=None, key=jax.random.key(seed)
        ).hyper
    )
    assert jnp.array_equal(run(1), run(1))
    assert not jnp.array_equal(run(1), run(2))


@pytest.mark.parametrize("start, steps", [(mo.ColdStart(), 2), (mo.WarmStart(), 3 * 2)])
def test_model_state_is_carried_over_with_the_params(start, steps):
    # Model state that counts inner steps, of which each outer step takes two.
    problem = mo.BilevelProblem(
        mo.InnerProblem(
            lambda params, hyper, batch, state: (jnp.sum((params - hyper) ** 2), state + 1),
            has_state=True,
        ),
        lambda params, hyper, batch, state: jnp.sum(params) * state,
    )
    inner = mo.Descent(optax.sgd(0.2), 2, state_policy=mo.nn.CarriedState())
    solver = mo.NestedSolver(inner, mo.UnrolledAdjoint(), optax.sgd(0.0), start)
    solution = solve(problem, solver=solver, num_steps=3, model_state=jnp.array(0.0))
    assert solution.state.model_state == steps


@pytest.mark.parametrize("start", [mo.ColdStart(), mo.WarmStart()])
def test_warm_start_goes_on_from_the_last_solution(start):
    # Five steps are not enough from scratch; warm starts get there together.
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.1), num_steps=5),
        mo.ImplicitAdjoint(inner_rtol=jnp.inf),
        optax.sgd(0.05),
        start,
    )
    solution = solve(solver=solver, num_steps=60)
    residuals = solution.history.inner_residual
    # Params that owe something to earlier outer steps are not passed off as what `hyper`
    # leads to.
    assert solution.warm_started == isinstance(start, mo.WarmStart)
    assert ("from warm starts" in str(solution)) == solution.warm_started
    if isinstance(start, mo.WarmStart):
        assert residuals[-1] < 1e-2 * residuals[0]
    else:
        assert residuals[-1] > 0.5 * residuals[0]


@pytest.mark.parametrize("start", [mo.ColdStart(), mo.WarmStart()])
@pytest.mark.parametrize("adjoint", [mo.UnrolledAdjoint(), mo.ImplicitAdjoint()])
def test_path_that_began_in_an_earlier_outer_step_is_reported(start, adjoint):
    # Unrolled derivatives of a warm-started run are those of its last window.
    inner = mo.Descent(optax.sgd(0.3), num_steps=100)
    solver = mo.NestedSolver(inner, adjoint, optax.sgd(0.05), start)
    report = solve(solver=solver, num_steps=2).report
    assert report is not None
    cut = isinstance(start, mo.WarmStart) and isinstance(adjoint, mo.UnrolledAdjoint)
    assert ("earlier" in "".join(report.left_out)) == cut


@pytest.mark.ci
def test_outer_steps_leave_nothing_behind():
    # Elsewhere the state of an optimizer keeps all that it was computed from.
    size, counts = 1237, []  # a shape that no other test has

    def callback(run):
        if run.num_steps in (2, 6):
            gc.collect()
            counts.append(sum(array.shape == (size,) for array in jax.live_arrays()))

    solver = mo.NestedSolver(
        mo.Descent(optax.adam(0.1), num_steps=5),
        mo.UnrolledAdjoint(),
        optax.adam(0.1),
        mo.WarmStart(),
    )
    zeros, options = jnp.zeros(size), {"num_steps": 6, "callbacks": [callback]}
    solve(hyper=zeros, params=zeros, solver=solver, **options)
    assert counts[0] > 0 and counts[1] == counts[0]


def test_warm_start_of_the_linear_system():
    # The right-hand side hardly changes near the end, and nor does the solution.
    curvatures = jnp.logspace(-2, 0, 30)
    problem = mo.BilevelProblem(
        lambda p, h, b: jnp.sum(curvatures * (p - h) ** 2),
        lambda p, h, b: jnp.sum((p - 2.0) ** 2 * curvatures[::-1]),
    )
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.5), num_steps=3000),
        mo.ImplicitAdjoint(mo.CG(rtol=1e-3), rtol=1e-2),
        optax.sgd(0.01),
        mo.WarmStart(),
    )
    counts = solve(
        problem, jnp.zeros(30), solver, num_steps=10, params=jnp.zeros(30)
    ).history.num_linear_steps
    assert counts[0] >= 10 and np.all(counts[1:] <= 0.6 * counts[0])


def test_outer_key_reaches_the_outer_loss():
    problem = mo.BilevelProblem(
        PROBLEM.inner,
        lambda p, h, b, *, key: jnp.sum((p - jax.random.normal(key, (2,))) ** 2),
    )
    losses = solve(problem, num_steps=3).history.outer_loss
    assert len(set(losses.tolist())) == 3


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_interrupt_returns_what_was_reached():
    program = textwrap.dedent(
        """
        import signal
        # A background job inherits that interrupts are ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import jax
        jax.config.update("jax_platforms", "cpu")
        import jax.numpy as jnp, optax
        import metaopt as mo
        problem = mo.BilevelProblem(
            lambda p, h, b: jnp.sum((p - h) ** 2), lambda p, h, b: jnp.sum((p - 2) ** 2)
        )
        solver = mo.NestedSolver(
            mo.Descent(optax.sgd(0.2), 60), mo.ImplicitAdjoint(), optax.sgd(0.01)
        )
        tell = lambda run: run.num_steps == 6 and print("step 5", flush=True)
        solution = mo.solve_bilevel(
            problem, jnp.zeros(2), params=jnp.zeros(2), solver=solver,
            num_steps=10**9, callbacks=[tell, mo.callbacks.Progress()],
        )
        print(len(solution.history) >= 6, bool(jnp.all(jnp.isfinite(solution.hyper))))
        print(solution)
        """
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "step 5\n"
    run.send_signal(signal.SIGINT)
    output, error = run.communicate(timeout=60)
    assert run.returncode == 0, error
    assert output.startswith("True True\n")
    assert "interrupted from the keyboard" in output


def test_callback_of_a_failed_step_sees_what_is_returned():
    # It saw the state after an update that is taken back.
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch: jnp.sum(params**2),
    )
    inner = mo.Descent(optax.sgd(1e-3), 2)
    seen = []
    with pytest.raises(mo.SolveError) as caught:
        mo.solve_bilevel(
            problem,
            jnp.ones(2),
            params=jnp.zeros(2),
            solver=mo.NestedSolver(inner, mo.ImplicitAdjoint(), optax.sgd(0.1)),
            num_steps=3,
            callbacks=[lambda run: seen.append(run.hyper)],
        )
    np.testing.assert_array_equal(seen, [caught.value.value.state.hyper])
    np.testing.assert_array_equal(seen, [jnp.ones(2)])


class Unhashable:
    __hash__ = None  # pyright: ignore

    def __call__(self, params, hyper, batch):
        return jnp.sum((params - 1) ** 2)


def test_what_cannot_be_hashed_is_named():
    with pytest.raises(TypeError, match="cannot be hashed .*Unhashable.*equinox.Module"):
        mo.solve_bilevel(
            mo.BilevelProblem(lambda p, h, b: jnp.sum((p - h) ** 2), Unhashable()),
            jnp.zeros(2),
            params=jnp.zeros(2),
            solver=mo.NestedSolver(
                mo.Descent(optax.sgd(0.1), 2), mo.UnrolledAdjoint(), optax.sgd(0.1)
            ),
            num_steps=1,
        )


def test_errors_of_equinox_are_raised_in_their_own_words():
    def outer_loss(params, hyper, batch):
        loss = jnp.sum((params - 2.0) ** 2)
        return eqx.error_if(loss, loss < 7.0, "the loss is below seven")

    problem = mo.BilevelProblem(PROBLEM.inner, outer_loss)
    calls = (
        lambda: solve(problem, num_steps=5),
        lambda: mo.hypergradient(
            problem,
            jnp.ones(2),
            params=jnp.zeros(2),
            inner=DESCENT,
            adjoint=mo.ImplicitAdjoint(),
        ),
    )
    for call in calls:
        with pytest.raises(
            eqx.EquinoxRuntimeError, match="the loss is below seven"
        ) as caught:
            call()
        assert "do not appear to be using" not in str(caught.value)
