"""Training anew at given settings, and the metrics of what comes out."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._core._compiled import compiled
from .._core._results import RESULTS
from .._core._tree import leaf_names
from .._core._types import Batch, Hyper, Key
from .._data import AbstractData
from .._objective import Objective
from .._problem import initialise
from ..hyper import values
from ._comparison import Record
from ._method import Task
from ._trace import Point, Trace


class Metric(eqx.Module):
    """A measure of a trained model.

    A function in the place of a metric becomes one for which higher is better.

    **Arguments:**

    - `fn`: `fn(params, hyper, batch)`, a number; with model state
        `fn(params, hyper, batch, model_state)`. It may be any Python, and is called outside
        of `jax.jit`.
    - `higher_is_better`: whether it is, as of an accuracy, or not, as of an error.
    """

    fn: Callable[..., Any]
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class Measure:
    """All that training anew and measuring needs.

    **Attributes:**

    - `task`: the task, whose inner solver trains.
    - `test`: the data that is measured on.
    - `metrics`: the metrics by their names.
    - `key`: the randomness of training anew, the same for all methods.
    """

    task: Task
    test: AbstractData
    metrics: Mapping[str, Metric]
    key: Key

    def check(self) -> None:
        """Try the metrics at the initial params.

        **Raises:**

        `ValueError` where one raises, or returns no number.
        """
        task = self.task
        params, state = task.params, task.model_state
        if params is None:
            params, state = initialise(task.problem.inner, task.hyper, self.key)
        batch = self.test.full()
        for name, metric in self.metrics.items():
            _measured(name, metric, params, task.hyper, batch, state)

    def record(self, trace: Trace, error: str = "") -> Record:
        """The record of a trace, measured at each of its points.

        **Arguments:**

        - `trace`: the trace of a method.
        - `error`: the error that ended it, in words.
        """
        rows = [self._at(point) for point in trace.points]
        values = {name: [row[name] for row in rows] for name in rows[0]}
        last = trace.last
        return Record(
            costs=[point.cost for point in trace.points],
            values=values,
            gradients=last.gradients,
            products=last.products,
            seconds=last.seconds,
            found=_found(last.hyper),
            num_failed=trace.num_failed,
            failure=trace.failure,
            error=error,
        )

    def _at(self, point: Point) -> dict[str, float]:
        task, hyper = self.task, point.hyper
        data = task.train, task.valid, self.test
        start = task.params, task.model_state
        params, state, loss, good = _train(
            task.problem, task.inner, *data, *start, hyper, self.key
        )
        names = [LOSS, *self.metrics]
        if not bool(good):
            return dict.fromkeys(names, math.nan)
        batch = self.test.full()
        values = [
            _measured(name, metric, params, hyper, batch, state)
            for name, metric in self.metrics.items()
        ]
        return dict(zip(names, [float(loss), *values]))


_MAX_FOUND = 1000  # numbers


def _found(hyper: Hyper) -> dict[str, Any]:
    """The values of outer variables by their names, as lists of numbers."""
    tree = eqx.filter(values(hyper), eqx.is_inexact_array)
    leaves = jax.tree.leaves(tree)
    if sum(leaf.size for leaf in leaves) > _MAX_FOUND:
        return {}
    lists = [np.asarray(leaf, float).tolist() for leaf in leaves]
    return dict(zip(leaf_names(tree, "hyper"), lists))


LOSS = "loss"
"""The name of the outer loss among the metrics."""


@compiled
def _train(problem, inner, train, valid, test, params, model_state, hyper, key):
    objective = Objective(problem, inner, train, valid, params, model_state, key)
    _, outcome = objective.primal(hyper)
    loss, _ = problem.evaluate_outer(
        outcome.params, hyper, test.full(), key, outcome.model_state
    )
    # One that took all of its steps, and is not converged, is as good as it is.
    bad = outcome.result == RESULTS.inner_nonfinite
    return outcome.params, outcome.model_state, loss, ~bad & jax.numpy.isfinite(loss)


def _measured(
    name: str, metric: Metric, params: Any, hyper: Hyper, batch: Batch, state: Any
) -> float:
    given = (params, hyper, batch) if state is None else (params, hyper, batch, state)
    try:
        value = np.asarray(metric.fn(*given))
    except Exception as error:
        called = "fn(params, hyper, batch" + (")" if state is None else ", model_state)")
        raise ValueError(
            f"The metric {name!r}, called as `{called}`, raises {type(error).__name__}: "
            f"{error}"
        ) from error
    numeric = np.issubdtype(value.dtype, np.number) or value.dtype == bool
    if value.size != 1 or not numeric:
        raise ValueError(
            f"The metric {name!r} must return one number; got shape {value.shape} and "
            f"dtype {value.dtype}. Take `jax.numpy.mean` of an array, and one metric for "
            "each number."
        )
    return float(value.reshape(()))
