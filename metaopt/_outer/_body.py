"""The step that a driver of the outer loop repeats."""

import abc
from typing import Any

import equinox as eqx

from .._core._results import RESULTS
from .._core._types import BoolScalar, Hyper


class StepRecord(eqx.Module):
    """The record of one outer step.

    **Attributes:**

    - `columns`: the scalars that the history keeps, by their names; `outer_loss` and
        `hypergradient_norm` at least.
    - `result`: how the step went. One that fails ends a run under `throw`, which then
        stays where it was before that step.
    - `reason`: the first failure within the step, even if the step itself succeeded.
    - `updated`: whether the outer variables were updated.
    - `is_rough`: whether the step saved accuracy, so that a hypergradient of zero may be
        none.
    - `info`: the report on the step, for callbacks.
    """

    columns: dict[str, Any]
    result: RESULTS
    reason: RESULTS
    updated: BoolScalar
    is_rough: bool = eqx.field(static=True)
    info: Any


class AbstractBody(eqx.Module):
    """The body of the outer loop. Its states have `num_steps` and `key`."""

    @abc.abstractmethod
    def exact(self, info: Any) -> "AbstractBody":
        """One with the same states whose steps are not rough; `info` is that of a step that
        was."""

    @abc.abstractmethod
    def step(self, state: Any, *data: Any) -> tuple[Any, StepRecord]:
        """One outer step, as plain traceable code.

        **Arguments:**

        - `state`: a pytree of arrays.
        - `data`: that of this step, one for each [`metaopt._outer.Feed`].

        **Returns:**

        The new state, and the record of the step.
        """

    @abc.abstractmethod
    def hyper(self, state: Any) -> Hyper:
        """The outer variables in the state."""

    @abc.abstractmethod
    def solution(self, state: Any) -> Any:
        """The inner solution in the state, or `None`."""
