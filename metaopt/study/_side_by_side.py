"""Runs of one bilevel solver side by side, as one compiled program."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._bilevel import AbstractBilevelSolver
from .._core._compiled import compiled
from .._core._results import RESULTS
from .._core._tree import same_structs
from .._core._types import Hyper, PyTree
from .._report import Work
from ._method import Task, work_of
from ._trace import Trace


class Call(NamedTuple):
    """The steps of one compiled call.

    **Attributes:**

    - `work`: that of each run, arrays of shape `(num_runs,)`; `None` if not counted.
    - `seconds`: the wall time.
    - `losses`: the outer losses of the last step, `(num_runs,)`.
    - `codes`: the result of each step, `(num_steps, num_runs)`.
    """

    work: Work | None
    seconds: float
    losses: np.ndarray
    codes: np.ndarray


class SideBySide:
    """Runs of one bilevel solver, each on a task of its own, vectorised over them.

    An array that all tasks share is kept once; the others are stacked.

    **Arguments:**

    - `solver`: the bilevel solver.
    - `tasks`: tasks of one problem, with arrays of the same shapes.
    - `steps_per_call`: the outer steps of one call.
    """

    def __init__(
        self, solver: AbstractBilevelSolver, tasks: Sequence[Task], steps_per_call: int
    ):
        self.solver = solver
        self.tasks = tasks
        self.steps_per_call = steps_per_call
        self._data = _stacked([(task.train, task.valid) for task in tasks])
        starts = [(task.hyper, task.params, task.model_state) for task in tasks]
        keys = jnp.stack([task.key for task in tasks])
        problem = tasks[0].problem
        self._states = _init(problem, solver, *self._data, *_stacked(starts), keys)

    def compile(self) -> None:
        """Compile the call, without taking its steps."""
        jax.block_until_ready(self._called()[1])

    def advance(self) -> Call:
        """Take the steps of one call."""
        begin = time.perf_counter()
        self._states, columns, codes = self._called()
        columns = {name: np.asarray(column) for name, column in columns.items()}
        seconds = time.perf_counter() - begin
        work = work_of(self.solver, columns, self.tasks[0].hyper)
        if work is not None:
            work = Work(np.sum(work.gradients, axis=0), np.sum(work.products, axis=0))
        losses = np.asarray(columns["outer_loss"][-1], float)
        return Call(work, seconds, losses, np.asarray(codes))

    def hyper(self, index: int) -> Hyper:
        """The outer variables of one run."""
        pick = lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf
        return jax.tree.map(pick, self.solver.hyper(self._states))

    def _called(self) -> Any:
        problem, num_steps = self.tasks[0].problem, self.steps_per_call
        return _advance(problem, self.solver, *self._data, self._states, num_steps)


def can_stack(tasks: Sequence[Task]) -> bool:
    """Whether tasks differ in the values of arrays alone."""
    parts = [eqx.partition((task.train, task.valid), eqx.is_array) for task in tasks]
    (arrays, rest), *others = parts
    same = lambda pair: same_structs(pair[0], arrays) and eqx.tree_equal(pair[1], rest)
    return all(map(same, others))


def note_failures(trace: Trace, codes: np.ndarray) -> None:
    """Note the steps that failed, by their results, in a trace."""
    success: Any = RESULTS.successful
    failed = codes[codes != np.asarray(success._value)]
    if failed.size:
        code = jnp.asarray(failed[0], jnp.int32)
        result = eqx.tree_at(lambda item: item._value, success, code)
        trace.fail(RESULTS[result], failed.size)


def _stacked(trees: Sequence[PyTree]) -> tuple[PyTree, PyTree]:
    """Arrays that differ between pytrees, with a leading axis of them, and all the rest."""
    arrays, rest = zip(*(eqx.partition(tree, eqx.is_array) for tree in trees))
    leaves, structure = zip(*(jax.tree.flatten(tree) for tree in arrays))
    columns = list(zip(*leaves))
    same = [all(leaf is column[0] for leaf in column) for column in columns]
    pairs = list(zip(columns, same))
    differ = [None if is_same else jnp.stack(column) for column, is_same in pairs]
    shared = [column[0] if is_same else None for column, is_same in pairs]
    unflatten = lambda found: jax.tree.unflatten(structure[0], found)
    return unflatten(differ), eqx.combine(unflatten(shared), rest[0])


@compiled
def _init(problem, solver, data, shared_data, starts, shared_starts, keys):
    def one(data, start, key):
        train, valid = eqx.combine(data, shared_data)
        hyper, params, model_state = eqx.combine(start, shared_starts)
        return solver.init(
            problem, hyper, train, valid, params=params, model_state=model_state, key=key
        )

    return eqx.filter_vmap(one)(data, starts, keys)


@compiled
def _advance(problem, solver, data, shared_data, states, num_steps):
    arrays, static = eqx.partition(states, eqx.is_array)

    def step(arrays, data):
        train, valid = eqx.combine(data, shared_data)
        state, info = solver.step(problem, eqx.combine(arrays, static), train, valid)
        report = info.report
        result: Any = report.result
        return eqx.filter(state, eqx.is_array), (report.scalars(), result._value)

    arrays, (columns, results) = jax.lax.scan(
        lambda arrays, _: jax.vmap(step)(arrays, data), arrays, length=num_steps
    )
    return eqx.combine(arrays, static), columns, results
