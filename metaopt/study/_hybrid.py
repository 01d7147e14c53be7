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
from ._search import AbstractSearch, AbstractSession
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
        best_loss, best_hyper, number = np.inf, task.hyper, 0

        def add(hyper: Hyper, loss: float, work: Work | None, seconds: float) -> bool:
            nonlocal best_loss, best_hyper, number
            number += 1
            if loss < best_loss:
                best_loss, best_hyper = loss, hyper
            return trace.add(work, seconds, best_loss, best_hyper)

        while all(add(*trial) for trial in session.news()):
            if not trace.fits(trace.spent / number if number else 0.0):
                return
            asked = session.ask(1)
            if not asked:
                return
            [(token, start)] = asked
            begin = time.perf_counter()
            hyper, loss, work, failure = self._tune(task, start, number)
            seconds = time.perf_counter() - begin
            checked_cost(self.solver, trace, work, seconds)
            if failure:
                trace.fail(failure)
            nothing = Work(np.zeros(()), np.zeros(()))
            session.tell(token, loss, nothing if work is None else work, hyper)
            if not add(hyper, loss, work, seconds):
                return

    def _session(self, task: Task) -> AbstractSession:
        return self.search.session(task, (self.solver, self.num_steps))

    def _tune(
        self, task: Task, start: Hyper, number: int
    ) -> tuple[Hyper, float, Work | None, str]:
        """The tuned settings, their outer loss, the work, and a failure in words."""
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
        return _as_given(start, solution.hyper), loss, work, failure


def _as_given(start: Hyper, tuned: Hyper) -> Hyper:
    """Tuned outer variables, with all that is not tuned as in the start."""
    stays = lambda node: isinstance(node, Integer | Frozen)
    return jax.tree.map(
        lambda node, new: node if stays(node) else new, start, tuned, is_leaf=stays
    )
