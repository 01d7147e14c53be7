"""Tuning from several starts at once, in one compiled program."""

import dataclasses

import equinox as eqx
import jax
import numpy as np

from .._bilevel import AbstractBilevelSolver
from .._core._types import PyTree
from .._core._validate import check_count, check_kind
from ._method import AbstractMethod, checked_cost, least_work, Task
from ._search import numpy_seed
from ._side_by_side import note_failures, SideBySide
from ._space import Space
from ._trace import too_small


class MultiStart(AbstractMethod):
    """Tuning by a bilevel solver from several starts at once, vectorised over them.

    The first start is `hyper` as it is given, the others are drawn. The settings are those
    of the start whose last outer loss is lowest. For outer losses with several minima; all
    starts together are one compiled program, whose memory grows with their number.

    **Arguments:**

    - `solver`: the bilevel solver.
    - `space`: the ranges that starts are drawn from, as for
        [`metaopt.study.RandomSearch`][].
    - `num_starts`: the number of starts.
    - `steps_per_call`: how many outer steps are compiled into one call.
    """

    solver: AbstractBilevelSolver
    space: PyTree = None
    num_starts: int = eqx.field(default=4, static=True)
    steps_per_call: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        example = "metaopt.NestedSolver(...)"
        check_kind(self.solver, AbstractBilevelSolver, "solver", example)
        check_count(self.num_starts, "num_starts", minimum=2)
        check_count(self.steps_per_call, "steps_per_call")

    def check(self, task, trace):
        """Check the space, and that the budget pays for a step of each start."""
        Space(self.space, task.hyper)
        least = least_work(self.solver, task.hyper)
        cost = trace.budget.cost(least, np.zeros(1))
        if cost is not None:
            total = float(cost[0]) * self.num_starts * self.steps_per_call
            if not trace.fits(total):
                step = f"an outer step of {self.num_starts} starts"
                raise too_small(trace.budget, total, step)

    def run(self, task, trace):
        runs = SideBySide(self.solver, self._tasks(task), self.steps_per_call)
        if trace.budget.cost(None, np.zeros(1)) is not None:
            runs.compile()  # which the budget leaves out
        before = 0.0
        while trace.fits(before):
            call = runs.advance()
            work = None if call.work is None else call.work.total()
            first = trace.spent == 0
            before = checked_cost(self.solver, trace, work, call.seconds)
            losses = np.where(np.isfinite(call.losses), call.losses, np.inf)
            best = int(np.argmin(losses))
            note_failures(trace, call.codes)
            loss = float(call.losses[best])
            if not trace.add(work, call.seconds, loss, runs.hyper(best)):
                if first:
                    step = f"an outer step of {self.num_starts} starts"
                    raise too_small(trace.budget, before, step)
                return

    def _tasks(self, task: Task) -> list[Task]:
        space = Space(self.space, task.hyper)
        random = np.random.default_rng(numpy_seed(task))
        draw = lambda: {s.name: random.uniform(size=s.shape) for s in space.drawn}
        drawn = [space.at_uniforms(draw()) for _ in range(self.num_starts - 1)]
        keys = jax.random.split(task.key, self.num_starts)
        pairs = zip([task.hyper, *drawn], keys)
        return [dataclasses.replace(task, hyper=hyper, key=key) for hyper, key in pairs]
