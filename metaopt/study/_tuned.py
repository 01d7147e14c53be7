"""Tuning by a bilevel solver."""

from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._bilevel import AbstractBilevelSolver
from .._core._results import RESULTS
from .._core._validate import check_count, check_kind
from .._report import BilevelSolution, INTERRUPT
from .._solve_bilevel import solve_bilevel
from ..callbacks import AbstractCallback
from ._method import AbstractMethod, checked_cost, least_work, work_of
from ._side_by_side import Call, can_stack, note_failures, SideBySide
from ._trace import too_small, Trace


class Tuned(AbstractMethod):
    """Tuning by a bilevel solver, whose settings are those of its last outer step.

    A bilevel solver that is handed over as a method becomes one of these. Steps that fail
    leave `hyper` alone where the hypergradient is not finite; their number is reported.

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

    def run_seeds(self, tasks, traces):
        """Run on several seeds as one compiled program, unless seconds are the budget or
        the data of the seeds differ in more than numbers."""
        budget = traces[0].budget
        if budget.cost(None, np.zeros(1)) is not None or not can_stack(tasks):
            return
        runs = SideBySide(self.solver, tasks, self.steps_per_call)
        left = list(range(len(tasks)))
        while left:
            call = runs.advance()
            going_on = [i for i in left if self._goes_on(runs, call, i, traces[i])]
            yield from (i for i in left if i not in going_on)
            left = going_on

    def _goes_on(self, runs: SideBySide, call: Call, index: int, trace: Trace) -> bool:
        """Add a call to the trace of one seed, and say whether it takes another."""
        each = call.seconds / len(call.losses)
        work = None if call.work is None else jax.tree.map(lambda x: x[index], call.work)
        cost, first = checked_cost(self.solver, trace, work, each), trace.spent == 0
        if not trace.add(work, each, float(call.losses[index]), runs.hyper(index)):
            if first:
                raise too_small(trace.budget, cost, "the first outer step")
            return False
        note_failures(trace, call.codes[:, index])
        return trace.fits(cost)


_MANY = 2**30  # outer steps; the budget ends the run before


def solve_whole(*args: Any, **options: Any) -> BilevelSolution:
    """Solve as [`metaopt.solve_bilevel`][], but let an interrupt through.

    The solution of a run that was cut is no result of a whole run.

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
        total = None if work is None else work.total()
        seconds = float(np.sum(columns["seconds"]))
        cost = checked_cost(self.solver, trace, total, seconds)
        first = trace.spent == 0
        if not trace.add(total, seconds, float(columns["outer_loss"][-1]), run.hyper):
            if first:
                raise too_small(trace.budget, cost, "the first outer step")
            return True
        if run.num_failed > trace.num_failed:
            trace.fail(RESULTS[run.result], run.num_failed - trace.num_failed)
        # As much as the last call: no step is taken in vain.
        return not trace.fits(cost)
