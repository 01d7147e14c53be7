"""The interface of a bilevel solver, which drives the outer problem."""

import abc
from typing import Any

import equinox as eqx

from .._core._results import RESULTS
from .._core._types import BoolScalar, FloatScalar, Hyper, Key, ModelState, Params
from .._data import AbstractData
from .._problem import BilevelProblem
from .._report import Report


class BilevelStep(eqx.Module):
    """The report of one outer step.

    **Attributes:**

    - `report`: the report on the hypergradient.
    - `updated`: whether `hyper` was updated; it is left alone where the hypergradient
        is not finite, and while a solver warms up.
    - `exact`: a bilevel solver for the same state whose steps are as exact as they get,
        where this step was less exact on request; else `None`. A small hypergradient ends
        a run only after a step of that solver.
    """

    report: Report
    updated: BoolScalar
    exact: Any = None


class BilevelEvaluation(eqx.Module):
    """The outer loss at the `hyper` of a state, and the params that it is evaluated at.

    **Attributes:**

    - `outer_loss`: the outer loss.
    - `params`, `model_state`: the inner solution there.
    - `result`: how the inner solve went, for a solver that solves once more.
    - `warm_started`: whether the params owe something to the `hyper` of earlier outer
        steps.
    """

    outer_loss: FloatScalar
    params: Params
    model_state: ModelState = None
    result: Any = eqx.field(default_factory=lambda: RESULTS.successful)
    warm_started: bool = eqx.field(default=True, static=True)


class AbstractBilevelSolver(eqx.Module):
    """A solver of the outer problem: a state, and a step that is compiled once.

    [`metaopt.solve_bilevel`][] repeats the step; you can do so by hand. For a method that
    takes a few inner steps for each outer one subclass
    [`metaopt.extend.AbstractSingleLoopSolver`][] instead, which keeps what metaopt promises
    of derivatives and numbers.

    A state is a pytree with the attributes `key` and `num_steps`: the randomness of the
    run, and the outer steps taken. It keeps the cursors of both sources of batches, too, so
    that each step goes on where the last one stopped.

    A solver with a method `work` counts its work, as a [`metaopt.extend.CountsWork`][].
    """

    @abc.abstractmethod
    def init(
        self,
        problem: BilevelProblem,
        hyper: Hyper,
        train: AbstractData,
        valid: AbstractData,
        *,
        params: Params | None,
        model_state: ModelState,
        key: Key,
    ) -> Any:
        """The state before the first outer step.

        **Arguments:**

        - `problem`, `hyper`: the bilevel problem, and where the outer variables start.
        - `train`, `valid`: what the inner and the outer loss are evaluated on.
        - `params`, `model_state`: where the inner solve starts, or `None`.
        - `key`: the randomness of the run.

        **Returns:**

        A pytree of arrays, which the step hands on.
        """

    @abc.abstractmethod
    def step(
        self,
        problem: BilevelProblem,
        state: Any,
        train: AbstractData,
        valid: AbstractData,
    ) -> tuple[Any, BilevelStep]:
        """One outer step, as plain traceable code.

        **Arguments:**

        - `problem`, `train`, `valid`: as for `init`.
        - `state`: what `init` or the step before returned.

        **Returns:**

        The new state and a [`metaopt.extend.BilevelStep`][].
        """

    @abc.abstractmethod
    def evaluate(
        self,
        problem: BilevelProblem,
        state: Any,
        train: AbstractData,
        valid: AbstractData,
    ) -> BilevelEvaluation:
        """Evaluate the outer loss at the `hyper` of the state, at the end of a run.

        **Arguments:**

        - `problem`, `state`, `train`, `valid`: as for `step`.

        **Returns:**

        A [`metaopt.extend.BilevelEvaluation`][].
        """

    @abc.abstractmethod
    def hyper(self, state: Any) -> Hyper:
        """The outer variables in the state."""

    @abc.abstractmethod
    def solution(self, state: Any) -> Params:
        """The inner solution in the state: the params of the last outer step."""
