"""`solve_bilevel`, which tunes the outer variables of a bilevel problem."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ._bilevel import AbstractBilevelSolver, BilevelEvaluation
from ._core._compiled import compiled
from ._core._results import first_failure, mask_result, RESULTS
from ._core._trace_once import tracing_once
from ._core._tree import same_structs
from ._core._types import Hyper, Key, ModelState, Params
from ._core._validate import (
    canonical_hyper,
    canonical_key,
    canonical_params,
    check_count,
    check_kind,
    check_not_compiled,
    check_tolerance,
)
from ._data import AbstractData
from ._outer import AbstractBody, as_callbacks, data_feed, drive, Run, StepRecord
from ._problem import BilevelProblem
from ._report import Best, BilevelSolution, raise_on_failure
from .callbacks import AbstractCallback


@tracing_once()
def solve_bilevel(
    problem: BilevelProblem,
    hyper: Hyper,
    train: Any = None,
    valid: Any = None,
    *,
    solver: AbstractBilevelSolver,
    num_steps: int,
    params: Params | None = None,
    model_state: ModelState = None,
    key: Key | None = None,
    state: Any = None,
    atol: float | None = None,
    steps_per_call: int = 1,
    callbacks: Sequence[AbstractCallback | Callable[[Run], Any]] = (),
    throw: bool = True,
) -> BilevelSolution:
    """Solve a bilevel problem: tune `hyper` for the outer loss.

    Outer steps are one compiled function, compiled once. Ctrl-C stops the run after the
    call it is in and returns what was reached.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `hyper`: where the outer variables start: any pytree with a floating-point array
        in it. Python floats become arrays.
    - `train`, `valid`: what the inner and the outer loss are evaluated on: arrays, a
        source of batches such as [`metaopt.Minibatches`][], or an iterable that yields
        either for each *outer* step (each shape is compiled once). A loader that can be
        started anew is, whenever it is exhausted. For one batch for each *inner* step
        write [`metaopt.InnerBatches`][]`(loader, num_steps)`.
    - `solver`: how the outer problem is driven, such as [`metaopt.NestedSolver`][].
    - `num_steps`: the number of outer steps, those of `state` included.
    - `params`: where the inner solve starts; by default the inner problem's `init`.
    - `model_state`: where the model state starts; with `params` only.
    - `key`: for everything random, from `jax.random.key`; by default key 0.
    - `state`: the `state` of a solution, to go on from, in place of `key`, `model_state`
        and what is in `hyper` and `params`. Hand over the same problem, solver and data;
        of an iterator one that goes on where it was. A loader is started anew, and the
        batches of the steps already taken are passed over. The history is that of the new
        steps.
    - `atol`: stop once the Euclidean norm of the hypergradient is at most this; under a
        single-loop solver that of the change of the params and of its own variables, too.
    - `steps_per_call`: how many outer steps are compiled into one call, without a word to
        Python in between. More of them save the time between steps, which counts where a
        step takes less than a few milliseconds; callbacks see the last of each call. The
        numbers are the same bit for bit. Of an iterator the data of a whole call is pulled
        before it; a call ends where its shapes change.
    - `callbacks`: called between calls, such as [`metaopt.callbacks.Checkpoint`][]; a
        function is called with the [`metaopt.extend.Run`][] after each call. One ends the
        run by returning `True` or raising `StopIteration`. Any other error that it raises
        has what was reached as its attribute `solution`.
    - `throw`: whether a failure raises. If not, the run goes on past steps that fail,
        leaves `hyper` alone where the hypergradient is not finite, and says so.

    **Returns:**

    A [`metaopt.BilevelSolution`][].

    **Raises:**

    `ValueError` and `TypeError` for arguments that do not fit and for a derivative that
    is zero by construction; [`metaopt.SolveError`][] for a numerical failure under
    `throw`, whose `value` is the solution as far as it was reached.
    """
    check_kind(problem, BilevelProblem, "problem", "metaopt.BilevelProblem(...)")
    check_kind(solver, AbstractBilevelSolver, "solver", "metaopt.NestedSolver(...)")
    check_count(num_steps, "num_steps")
    check_tolerance(atol, "atol")
    check_count(steps_per_call, "steps_per_call")
    watching = as_callbacks(callbacks)
    check_not_compiled(hyper, params)
    hyper = canonical_hyper(hyper)
    if params is not None:
        params = canonical_params(params)
    if state is not None and (key is not None or model_state is not None):
        raise ValueError(
            "`state` has the key and the model state of its run: hand over no others."
        )
    key = canonical_key(key)
    feeds = data_feed(train, "train"), data_feed(valid, "valid")
    start = solver.init(
        problem,
        hyper,
        *(feed.now for feed in feeds),
        params=params,
        model_state=model_state,
        key=key,
    )
    if state is not None:
        _check_goes_on(state, start)
        start = state
    run = Run(_Body(problem, solver), feeds, start, num_steps)
    reached = lambda: _solution(problem, solver, run, *(feed.now for feed in feeds))
    solution = drive(
        run,
        steps_per_call=steps_per_call,
        atol=atol,
        callbacks=watching,
        throw=throw,
        solution=reached,
        evaluates=True,
    )
    return raise_on_failure(solution, solution.result, throw and not run.interrupted)


class _Body(AbstractBody):
    """The step of a bilevel solver."""

    problem: BilevelProblem
    solver: AbstractBilevelSolver

    def exact(self, info):
        return _Body(self.problem, info.exact)

    def step(self, state, *data):
        state, info = self.solver.step(self.problem, state, *data)
        report = info.report
        return state, StepRecord(
            report.scalars(),
            result=report.result,
            reason=report.result,
            updated=info.updated,
            is_rough=info.exact is not None,
            info=info,
        )

    def hyper(self, state):
        return self.solver.hyper(state)

    def solution(self, state):
        return self.solver.solution(state)


def _check_goes_on(state: Any, start: Any) -> None:
    """Raise a `ValueError` unless a `state` could have come from the run that begins."""
    if type(state) is not type(start):
        raise ValueError(
            "`state` must be the `state` of a `metaopt.BilevelSolution` of the same "
            f"solver, as in `state=solution.state`; got {type(state).__name__}."
        )
    arrays = (eqx.filter(x, eqx.is_array) for x in (state, start))
    if not same_structs(*arrays):
        raise ValueError(
            "`state` is of another run: its arrays have other names, shapes or dtypes than "
            "those of this `hyper`, `params`, data and solver."
        )


def _solution(
    problem: BilevelProblem,
    solver: AbstractBilevelSolver,
    run: Run,
    train: AbstractData,
    valid: AbstractData,
) -> BilevelSolution:
    """The solution as far as it was reached."""
    state = run.state
    last = _evaluate(solver, problem, state, train, valid)
    # The last `hyper` has not been solved for before.
    lost = mask_result(~jnp.isfinite(last.outer_loss), RESULTS.outer_nonfinite)
    best, loss = run.best, float(last.outer_loss)
    solved = bool(jnp.isfinite(loss) & (last.result == RESULTS.successful))
    if run.keeps_best and solved and (best is None or loss < best.outer_loss):
        best = Best(run.hyper, last.params, loss, run.num_steps)
    return BilevelSolution(
        hyper=run.hyper,
        params=last.params,
        model_state=last.model_state,
        outer_loss=last.outer_loss,
        history=run.history,
        result=first_failure(run.result, last.result, lost),
        report=None if run.info is None else run.info.report,
        state=state,
        num_skipped=run.num_skipped,
        warm_started=last.warm_started,
        best=best,
        ended_by=run.ended_by,
    )


@compiled
def _evaluate(
    solver: AbstractBilevelSolver,
    problem: BilevelProblem,
    state: Any,
    train: AbstractData,
    valid: AbstractData,
) -> BilevelEvaluation:
    return solver.evaluate(problem, state, train, valid)
