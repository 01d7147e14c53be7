"""The interface of whole methods, and the tuning by a bilevel solver."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import numpy as np

from .._bilevel import AbstractBilevelSolver, NestedSolver
from .._core._results import RESULTS
from .._core._tree import split_trainable, tree_size
from .._core._types import Hyper, Key, ModelState, Params
from .._core._validate import check_count, check_kind
from .._data import AbstractData
from .._problem import BilevelProblem
from .._report import BilevelSolution, Columns, CountsWork, INTERRUPT, Work
from .._solve_bilevel import solve_bilevel
from .._solver import AbstractIterativeSolver, AbstractSolver
from ..callbacks import AbstractCallback
from ._trace import endless, too_small, Trace


@dataclasses.dataclass(frozen=True)
class Task:
    """The task of every method: one problem, one start, one split, one seed.

    **Attributes:**

    - `problem`, `hyper`, `train`, `valid`, `params`, `model_state`: as in
        [`metaopt.solve_bilevel`][].
    - `inner`: the inner solver that settings are trained with.
    - `key`: the randomness of the method.
    """

    problem: BilevelProblem
    hyper: Hyper
    train: AbstractData
    valid: AbstractData
    params: Params | None
    model_state: ModelState
    inner: AbstractSolver
    key: Key


class AbstractMethod(eqx.Module):
    """A whole method of tuning `hyper`: a bilevel solver, a search, a control.

    To write one, add to the trace after each step or trial, until it says that the budget
    is spent.
    """

    @abc.abstractmethod
    def check(self, task: Task, trace: Trace) -> None:
        """Check the settings of the method before the first step of any.

        **Arguments:**

        - `task`, `trace`: as for `run`.

        **Raises:**

        `ValueError` where the method cannot run, or the budget does not pay for a step.
        """

    @abc.abstractmethod
    def run(self, task: Task, trace: Trace) -> None:
        """Run until the budget is spent.

        **Arguments:**

        - `task`: a [`metaopt.study.Task`][].
        - `trace`: the [`metaopt.study.Trace`][] to add points to.
        """


class Tuned(AbstractMethod):
    """Tuning by a bilevel solver, whose settings are those of its last outer step.

    A bilevel solver in the place of a method becomes one of these. Steps that fail leave
    `hyper` alone where the hypergradient is not finite; their number is reported.

    **Arguments:**

    - `solver`: the bilevel solver.
    - `steps_per_call`: as in [`metaopt.solve_bilevel`][]; a budget is kept to within one
        call.
    """

    solver: AbstractBilevelSolver
    steps_per_call: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        example = "metaopt.NestedSolver(...)"
        check_kind(self.solver, AbstractBilevelSolver, "solver", example)
        check_count(self.steps_per_call, "steps_per_call")

    def check(self, task, trace):
        """Check that the budget pays for a step, as far as that is known before one."""
        least = least_work(self.solver, task.hyper)
        cost = trace.budget.cost(least, np.zeros(1))
        if cost is not None and not trace.fits(float(cost[0]) * self.steps_per_call):
            step = "one outer step" if self.steps_per_call == 1 else "one compiled call"
            raise too_small(trace.budget, float(cost[0]) * self.steps_per_call, step)

    def run(self, task, trace):
        solve = lambda num_steps, callbacks: solve_whole(
            task.problem,
            task.hyper,
            task.train,
            task.valid,
            solver=self.solver,
            num_steps=num_steps,
            params=task.params,
            model_state=task.model_state,
            key=task.key,
            steps_per_call=self.steps_per_call,
            callbacks=callbacks,
            throw=False,
        )
        if trace.budget.cost(None, np.zeros(1)) is not None:
            solve(self.steps_per_call, ())  # compiles, which the budget leaves out
        solve(_MANY, [_Follow(self.solver, trace)])


_MANY = 2**30  # outer steps; the budget ends the run before


def solve_whole(*args: Any, **options: Any) -> BilevelSolution:
    """Solve as [`metaopt.solve_bilevel`][], but let an interrupt through.

    It returns what was reached, which is no result of a whole run.

    **Raises:**

    `KeyboardInterrupt` where one has ended the run.
    """
    solution = solve_bilevel(*args, **options)
    if solution.ended_by == INTERRUPT:
        raise KeyboardInterrupt
    return solution


class _Follow(AbstractCallback):
    """Adds the steps of a run to a trace, and ends the run with the budget."""

    def __init__(self, solver: AbstractBilevelSolver, trace: Trace):
        self.solver = solver
        self.trace = trace

    def see(self, run):
        columns, trace = run.last, self.trace
        work = work_of(self.solver, columns, run.hyper)
        costs = trace.budget.cost(work, columns["seconds"])
        if costs is None:
            raise ValueError(unknown_work(self.solver, trace))
        total = None if work is None else work.total()
        seconds = float(np.sum(columns["seconds"]))
        cost, first = float(np.sum(costs)), trace.spent == 0
        if not trace.add(total, seconds, float(columns["outer_loss"][-1]), run.hyper):
            if first:
                raise too_small(trace.budget, cost, "the first outer step")
            return True
        if not cost:
            raise endless(type(self.solver).__name__, trace.budget)
        if run.num_failed > trace.num_failed:
            trace.fail(RESULTS[run.result], run.num_failed - trace.num_failed)
        # As much as the last call: no step is taken in vain.
        return not trace.fits(cost)


def unknown_work(solver: AbstractBilevelSolver, trace: Trace) -> str:
    """The text of an error about a solver that does not count its work."""
    return (
        f"`{type(solver).__name__}` does not say how many {trace.budget.unit} its steps "
        "take. Define its method `work` (under `metaopt.NestedSolver`, that of its "
        "adjoint), or give `budget=metaopt.study.TimeBudget(seconds)`."
    )


def work_of(solver: AbstractBilevelSolver, columns: Columns, hyper: Hyper) -> Work | None:
    """The work of outer steps, or `None` for a solver that does not count it."""
    if not isinstance(solver, CountsWork):
        return None
    return solver.work(columns, tree_size(split_trainable(hyper)[0]))


def least_work(solver: AbstractBilevelSolver, hyper: Hyper) -> Work | None:
    """The least work of one outer step, where that is known before it; else `None`."""
    if not isinstance(solver, NestedSolver):
        return None
    # The counts of a history are sums over seeds.
    steps = solver.num_seeds * least_steps(solver.inner)
    columns = {"num_inner_steps": np.array([steps]), "num_products": np.zeros(1)}
    return work_of(solver, columns, hyper)


def least_steps(inner: AbstractSolver) -> int:
    """The least number of steps of an inner solve."""
    if isinstance(inner, AbstractIterativeSolver) and not inner.stops_early:
        return inner.num_steps
    return 1
