"""Plots of whole methods over what they have spent."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ._curves import curves_figure, Line


_NUM_POINTS = 41


class _Mean(Protocol):
    @property
    def mean(self) -> float: ...

    @property
    def standard_error(self) -> float: ...


@runtime_checkable
class Comparable(Protocol):
    """A comparison of methods, such as a [`metaopt.study.Comparison`][]."""

    records: dict[str, Any]
    metrics: dict[str, bool]
    budget: float
    unit: str
    data: str

    def mean(self, method: str, metric: str, cost: float | None = None) -> _Mean:
        """The mean of a metric over seeds, at a part of the budget."""
        ...


def comparison(
    table: Comparable,
    *,
    metrics: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
) -> Any:
    """Draw each metric of a comparison over the part of the budget that is spent.

    **Arguments:**

    - `table`: the [`metaopt.study.Comparison`][] that `compare` returns.
    - `metrics`: the names of those to draw; by default all.
    - `methods`: the names of those to draw, by default all. Leave out one that is far from
        the rest, to see how they differ.

    **Returns:**

    A figure of matplotlib, with one panel for each metric: means over seeds, and bands of
    one standard error.

    **Raises:**

    `ValueError` for anything else, and for a metric or a method that is not there;
    `ImportError` without matplotlib.
    """
    if not isinstance(table, Comparable):
        raise ValueError(
            "`table` must be something like `metaopt.study.compare(...)`; got "
            f"{type(table).__name__}."
        )
    shown = _checked("metrics", metrics, table.metrics)
    drawn = _checked("methods", methods, table.records)
    panels: Mapping[str, Mapping[str, Line]] = {
        name: {method: _line(table, method, name) for method in drawn} for name in shown
    }
    return curves_figure(panels, table.unit, f"{{}} ({table.data})")


def _line(table: Comparable, method: str, metric: str) -> Line:
    spent = np.linspace(0, 1, _NUM_POINTS) * table.budget
    means = [table.mean(method, metric, cost) for cost in spent.tolist()]
    centre = np.array([m.mean for m in means])
    return spent, centre, np.nan_to_num([m.standard_error for m in means])


def _checked(
    argument: str, names: Sequence[str] | None, known: Mapping[str, Any]
) -> list[str]:
    """The names that were asked for, which are all there; by default all."""
    if names is None:
        return list(known)
    for name in names:
        if name not in known:
            raise ValueError(
                f"`{argument}` has {name!r}, and the comparison has {', '.join(known)}."
            )
    return list(names)
