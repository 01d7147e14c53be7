"""Raising a numerical failure once, at the outermost call."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.core
import numpy as np

from .._core._results import RESULTS, SolveError
from ._table import verdict


T = TypeVar("T")


def raise_on_failure(value: T, result: Any, throw: bool, show: object = None) -> T:
    """`value`, unless `throw` and `result` is a failure.

    Outside of compiled functions the failure is a [`metaopt.SolveError`][] that holds
    `value`; inside them it is raised when they run.
    """
    if not throw:
        return value
    code = result._value  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(code, jax.core.Tracer):
        return result.error_if(value, result != RESULTS.successful)
    if np.any(np.asarray(code) != np.asarray(_SUCCESS)):
        sentence = verdict(result)
        # Tables end with the same sentence.
        shown = str(value if show is None else show).removesuffix(sentence).rstrip()
        raise SolveError(f"{sentence}\n\n{shown}", value)
    return value


def attach_solution(error: Exception, solution: Callable[[], Any]) -> None:
    """Add to an error of the user's own code (a callback, a source of data) what a run had
    reached: as the attribute `solution`, which a note names."""
    try:
        reached = solution()
        error.solution = reached  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as second:  # the first error is the one to be seen
        error.add_note(f"What the run had reached could not be computed: {second!r}")
        return
    error.add_note(
        "The run ended at this error. What it had reached is the attribute `solution` of "
        "the error, and `solution.state` goes on from there."
    )


def ends_run(callback: Callable[..., Any] | None, *args: Any) -> bool:
    """Call a callback, if there is one; whether it returned `True`, or raised
    `StopIteration`. Any other return value is ignored."""
    if callback is None:
        return False
    try:
        answer = callback(*args)
    except StopIteration:
        return True
    if not isinstance(answer, bool | np.bool_ | np.ndarray | jax.Array):
        return False
    answer = np.asarray(answer)
    return answer.dtype == np.bool_ and answer.ndim == 0 and bool(answer)


_SUCCESS = RESULTS.successful._value  # pyright: ignore[reportAttributeAccessIssue]
