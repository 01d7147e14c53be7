"""The interface of whole methods, and the work of bilevel solvers."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import equinox as eqx
import numpy as np

from .._bilevel import AbstractBilevelSolver, NestedSolver
from .._core._tree import split_trainable, tree_size
from .._core._types import Hyper, Key, ModelState, Params
from .._data import AbstractData
from .._problem import BilevelProblem
from .._report import Columns, CountsWork, Work
from .._solver import AbstractIterativeSolver, AbstractSolver
from ._trace import endless, Trace


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


@runtime_checkable
class RunsSeeds(Protocol):
    """A method that can run on several seeds at once."""

    def run_seeds(self, tasks: Sequence[Task], traces: Sequence[Trace]) -> Iterator[int]:
        """Run on several seeds at once, each until its budget is spent.

        **Arguments:**

        - `tasks`, `traces`: as for `run`, one for each seed.

        **Returns:**

        The places of the seeds, each as soon as its budget is spent. Seeds that are not
        returned are run one by one.
        """
        ...


def checked_cost(
    solver: AbstractBilevelSolver, trace: Trace, work: Work | None, seconds: float
) -> float:
    """The cost of some outer steps in the unit of the budget.

    **Raises:**

    `ValueError` where it is not known, or is nothing.
    """
    cost = trace.budget.cost(work, np.asarray(seconds))
    if cost is None:
        raise ValueError(
            f"`{type(solver).__name__}` does not say how many {trace.budget.unit} its "
            "steps take. Define its method `work` (under `metaopt.NestedSolver`, that of "
            "its adjoint), or give `budget=metaopt.study.TimeBudget(seconds)`."
        )
    if not cost:
        raise endless(type(solver).__name__, trace.budget)
    return float(cost)


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
