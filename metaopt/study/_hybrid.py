"""Searches whose trials tune the rest by gradients."""

import time

import equinox as eqx
import jax
import numpy as np

from .._bilevel import AbstractBilevelSolver
from .._core._results import RESULTS
from .._core._types import Hyper
from .._core._validate import check_count, check_kind
from .._report import Work
from ..hyper import freeze, Frozen, Integer
from ._method import AbstractMethod, checked_cost, least_work, Task, work_of
from ._search import AbstractSearch, AbstractSession, Best, Trial
from ._trace import too_small
from ._tuned import solve_whole


class Hybrid(AbstractMethod):
    """A search over whole numbers and starts, each trial of which tunes the rest.

    The search draws what its space names. Every [`metaopt.hyper.Integer`][] is then frozen
    at what was drawn, and all other leaves are tuned by the bilevel solver for a few outer
    steps. The search is told the outer loss that these reach.

    **Arguments:**

    - `search`: the search, such as [`metaopt.study.OptunaSearch`][].
    - `solver`: the bilevel solver.
    - `num_steps`: the outer steps of each trial.
    """

    search: AbstractSearch
    solver: AbstractBilevelSolver
    num_steps: int = eqx.field(static=True)

    def __check_init__(self):
        check_kind(self.search, AbstractSearch, "search", "metaopt.study.RandomSearch()")
        example = "metaopt.NestedSolver(...)"
        check_kind(self.solver, AbstractBilevelSolver, "solver", example)
        check_count(self.num_steps, "num_steps")

    def check(self, task, trace):
        """Check the space, and that the budget pays for a trial."""
        self._session(task)
        least = least_work(self.solver, task.hyper)
        cost = trace.budget.cost(least, np.zeros(1))
        if cost is not None and not trace.fits(float(cost[0]) * self.num_steps):
            step = f"a trial of {self.num_steps} outer steps"
            raise too_small(trace.budget, float(cost[0]) * self.num_steps, step)

    def run(self, task, trace):
        session = self._session(task)
        if trace.budget.cost(None, np.zeros(1)) is not None:
            self._tune(task, task.hyper, 0)  # compiles, which the budget leaves out
        best, number = Best(task.hyper), 0

        def add(trial: Trial) -> bool:
            nonlocal number
            number += 1
            return best.add(trial, trace)

        while all(map(add, session.news())):
            if not trace.fits(trace.spent / number if number else 0.0):
                return
            asked = session.ask(1)
            if not asked:
                return
            [(token, start)] = asked
            trial = self._tune(task, start, number)
            checked_cost(self.solver, trace, trial.work, trial.seconds)
            session.tell(token, trial)
            if not add(trial):
                return

    def _session(self, task: Task) -> AbstractSession:
        return self.search.session(task, (self.solver, self.num_steps))

    def _tune(self, task: Task, start: Hyper, number: int) -> Trial:
        begin = time.perf_counter()
        solution = solve_whole(
            task.problem,
            freeze(start, Integer),
            task.train,
            task.valid,
            solver=self.solver,
            num_steps=self.num_steps,
            params=task.params,
            model_state=task.model_state,
            key=jax.random.fold_in(task.key, number),
            steps_per_call=self.num_steps,
            throw=False,
        )
        columns = solution.history.columns
        work = work_of(self.solver, columns, solution.hyper)
        if work is not None:
            # The inner solve that the loss is evaluated at.
            last = Work(np.asarray(columns["num_inner_steps"][-1:], float), np.zeros(1))
            work = work.total() + last.total()
        loss = float(solution.outer_loss)
        loss = loss if np.isfinite(loss) else np.inf
        failed = bool(solution.result != RESULTS.successful)
        failure = RESULTS[solution.result] if failed else ""
        seconds = time.perf_counter() - begin
        return Trial(_as_given(start, solution.hyper), loss, work, seconds, failure)


def _as_given(start: Hyper, tuned: Hyper) -> Hyper:
    """Tuned outer variables, with all that is not tuned as in the start."""
    stays = lambda node: isinstance(node, Integer | Frozen)
    return jax.tree.map(
        lambda node, new: node if stays(node) else new, start, tuned, is_leaf=stays
    )
