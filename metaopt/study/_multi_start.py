"""Tuning from several starts at once, in one compiled program."""

import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._bilevel import AbstractBilevelSolver
from .._core._compiled import compiled
from .._core._results import RESULTS
from .._core._types import PyTree
from .._core._validate import check_count, check_kind
from ._method import AbstractMethod, least_work, Task, unknown_work, work_of
from ._search import numpy_seed
from ._space import Space
from ._trace import endless, too_small, Trace
from ._trials import stack


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
        states = self._start(task)
        call = lambda states: _advance(
            task.problem, self.solver, task.train, task.valid, states, self.steps_per_call
        )
        if trace.budget.cost(None, np.zeros(1)) is not None:
            jax.block_until_ready(call(states)[1])  # compiles
        before = 0.0
        while trace.fits(before):
            begin = time.perf_counter()
            states, columns, results = call(states)
            columns = {name: np.asarray(x) for name, x in columns.items()}
            seconds = time.perf_counter() - begin
            work = work_of(self.solver, columns, task.hyper)
            total = None if work is None else work.total()
            cost = trace.budget.cost(total, np.asarray(seconds))
            if cost is None:
                raise ValueError(unknown_work(self.solver, trace))
            if not cost:
                raise endless(type(self.solver).__name__, trace.budget)
            losses = np.asarray(columns["outer_loss"][-1], float)
            best = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
            hyper = _entry(self.solver.hyper(states), best)
            _note_failures(trace, np.asarray(results))
            first, before = trace.spent == 0, float(cost)
            if not trace.add(total, seconds, float(losses[best]), hyper):
                if first:
                    step = f"an outer step of {self.num_starts} starts"
                    raise too_small(trace.budget, before, step)
                return

    def _start(self, task: Task) -> Any:
        space = Space(self.space, task.hyper)
        random = np.random.default_rng(numpy_seed(task))
        draw = lambda: {s.name: random.uniform(size=s.shape) for s in space.drawn}
        drawn = [space.at_uniforms(draw()) for _ in range(self.num_starts - 1)]
        hypers = stack([task.hyper, *drawn])
        keys = jax.random.split(task.key, self.num_starts)
        data = task.train, task.valid, task.params, task.model_state
        return _init(task.problem, self.solver, *data, hypers, keys)


def _note_failures(trace: Trace, codes: np.ndarray) -> None:
    success: Any = RESULTS.successful
    failed = codes[codes != np.asarray(success._value)]
    if failed.size:
        code = jnp.asarray(failed[0], jnp.int32)
        result = eqx.tree_at(lambda item: item._value, success, code)
        trace.fail(RESULTS[result], failed.size)


def _entry(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf, tree)


@compiled
def _init(problem, solver, train, valid, params, model_state, hypers, keys):
    def one(hyper, key):
        return solver.init(
            problem, hyper, train, valid, params=params, model_state=model_state, key=key
        )

    return eqx.filter_vmap(one)(hypers, keys)


@compiled
def _advance(problem, solver, train, valid, states, num_steps):
    arrays, static = eqx.partition(states, eqx.is_array)

    def step(arrays):
        state, info = solver.step(problem, eqx.combine(arrays, static), train, valid)
        report = info.report
        result: Any = report.result
        return eqx.filter(state, eqx.is_array), (report.scalars(), result._value)

    arrays, (columns, results) = jax.lax.scan(
        lambda arrays, _: jax.vmap(step)(arrays), arrays, length=num_steps
    )
    return eqx.combine(arrays, static), columns, results
