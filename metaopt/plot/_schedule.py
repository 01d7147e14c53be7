"""Plots of schedules over the steps of an inner solver."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ._lines import draw_lines, entries
from ._matplotlib import new_figure, tidy


def schedule(
    schedules: Any, *, labels: Sequence[str] | None = None, figure: Any = None
) -> list[Any]:
    """Draw schedules as curves over the inner steps, one panel for each.

    The panels share one axis of values, so that a tuned schedule is seen beside the one
    that it started from.

    **Arguments:**

    - `schedules`: one schedule, or a dictionary of several by their titles. Each is
        anything with a `value`, such as a [`metaopt.hyper.WarmupCosine`][] or a
        [`metaopt.hyper.Positive`][] of one number for each step, or an array of shape
        `(num_steps,)` or `(num_steps, num_parts)`.
    - `labels`: the names of the parts, such as those of layers; by default they are counted
        from 1.
    - `figure`: a matplotlib figure or subfigure to draw into; by default a new one.

    **Returns:**

    The list of axes, from which `axes[0].figure.savefig(...)` writes the picture.

    **Raises:**

    `ValueError` for numbers of another shape, or labels that do not fit; `ImportError`
    without matplotlib.
    """
    panels = dict(schedules) if isinstance(schedules, Mapping) else {"": schedules}
    if not panels:
        raise ValueError("`schedules` is empty. Give one schedule at least.")
    tables = {title: _table(title, given) for title, given in panels.items()}
    for title, table in tables.items():
        if labels is not None and len(labels) != table.shape[1]:
            where = f" of {title!r}" if title else ""
            raise ValueError(
                f"`labels` has {len(labels)} names, and the schedule{where} has "
                f"{table.shape[1]} parts."
            )
    if figure is None:
        figure = new_figure(1.0 + 4.2 * len(panels), 3.2)
    all_axes = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for axes, (title, table) in zip(all_axes, tables.items()):
        names = entries(table.shape[1:]) if labels is None else labels
        draw_lines(axes, np.arange(len(table)), table, names)
        axes.set(title=title, xlabel="inner step")
        tidy(axes)
    for axes in all_axes[:-1]:
        if axes.get_legend() is not None and labels is not None:
            axes.get_legend().remove()  # the same as in the last panel
    if all_axes[0].get_yscale() == "linear" and all(
        np.all(t >= 0) for t in tables.values()
    ):
        all_axes[0].set_ylim(bottom=0)
    return all_axes


@runtime_checkable
class _HasValue(Protocol):
    @property
    def value(self) -> Any: ...


def _table(title: str, given: Any) -> np.ndarray:
    """The numbers of a schedule, of shape `(num_steps, num_parts)`."""
    found = given.value if isinstance(given, _HasValue) else given
    try:
        table = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        table = np.zeros(())
    if table.ndim not in (1, 2) or len(table) < 2:
        where = f"`schedules[{title!r}]`" if title else "`schedules`"
        raise ValueError(
            f"{where} must hold one number for each step, or one for each step and part; "
            f"got {type(given).__name__}"
            + (f" of shape {table.shape}." if table.ndim else ".")
        )
    return table.reshape(len(table), -1)
