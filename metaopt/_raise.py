"""Raising a numerical failure once, at the outermost call."""

from typing import Any, TypeVar

import jax
import jax.core
import numpy as np

from ._report import verdict
from ._results import RESULTS, SolveError


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


_SUCCESS = RESULTS.successful._value  # pyright: ignore[reportAttributeAccessIssue]
