"""The interface of a bilevel solver, which drives the outer problem."""

import abc
from typing import Any

import equinox as eqx

from .._data import AbstractData
from .._problem import BilevelProblem
from .._report import Report
from .._solver import Outcome
from .._types import BoolScalar, FloatScalar, Hyper, Key, ModelState, Params


class BilevelStep(eqx.Module):
    """The report of one outer step.

    **Attributes:**

    - `report`: the report on the hypergradient.
    - `updated`: whether `hyper` was updated; it is left alone where the hypergradient
        is not finite, and while a solver warms up.
    """

    report: Report
    updated: BoolScalar


class AbstractBilevelSolver(eqx.Module):
    """A driver of the outer problem: a state, and a step that is compiled once.

    [`metaopt.solve_bilevel`][] repeats the step; you can do so by hand.
    """

    @property
    @abc.abstractmethod
    def warm_starts(self) -> bool:
        """Whether the inner solution owes something to earlier outer steps."""

    @property
    @abc.abstractmethod
    def exact(self) -> "AbstractBilevelSolver":
        """The same, or one with the same state whose steps leave no accuracy out."""

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

        The new state and a [`metaopt.BilevelStep`][].
        """

    @abc.abstractmethod
    def evaluate(
        self,
        problem: BilevelProblem,
        state: Any,
        train: AbstractData,
        valid: AbstractData,
    ) -> tuple[FloatScalar, Outcome]:
        """Solves the inner problem at the `hyper` of the state.

        **Arguments:**

        - `problem`, `state`, `train`, `valid`: as for `step`.

        **Returns:**

        The outer loss there, and the [`metaopt.Outcome`][] of the inner solve.
        """

    @abc.abstractmethod
    def hyper(self, state: Any) -> Hyper:
        """The outer variables in the state."""

    @abc.abstractmethod
    def solution(self, state: Any) -> Params:
        """The inner solution in the state: the params of the last outer step."""
