"""Plots of the columns of a history."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._core._validate import check_kind
from .._report import History
from ._lines import is_wide
from ._matplotlib import legend_beside, new_figure, tidy


Runs = History | Sequence[History] | Mapping[str, "History | Sequence[History]"]

_WIDTH = 9  # steps of a running mean
_FEW = 30  # steps, below which nothing is averaged


def history(
    runs: Runs,
    *,
    columns: Sequence[str] = ("outer_loss", "hypergradient_norm"),
    figure: Any = None,
) -> list[Any]:
    """Draw columns of a history over the outer steps, one panel for each.

    One run is drawn thin, with its running mean over 9 steps bold. Several runs, which
    differ by their seeds, are drawn as their mean and a band of one standard error.

    **Arguments:**

    - `runs`: the `history` of a solution, a list of those of several seeds, or a dictionary
        of either by names.
    - `columns`: the columns to draw.
    - `figure`: a matplotlib figure or subfigure to draw into; by default a new one.

    **Returns:**

    The list of axes, from which `axes[0].figure.savefig(...)` writes the picture.

    **Raises:**

    `ValueError` for anything else, and for a column that is not there; `ImportError`
    without matplotlib.
    """
    groups = {"": _listed(runs)} if not isinstance(runs, Mapping) else {}
    if isinstance(runs, Mapping):
        groups = {str(name): _listed(group) for name, group in runs.items()}
    if not groups or not columns:
        raise ValueError("There is nothing to draw: `runs` or `columns` is empty.")
    for name in columns:
        for one in (one for group in groups.values() for one in group):
            if name not in one.columns:
                raise ValueError(
                    f"`columns` has {name!r}, and the history has {', '.join(one.columns)}."
                )
    if figure is None:
        figure = new_figure(4.6 * len(columns), 3.2)
    all_axes = list(figure.subplots(1, len(columns), squeeze=False)[0])
    for axes, name in zip(all_axes, columns):
        drawn = []
        for number, (label, group) in enumerate(groups.items()):
            shown = [np.asarray(one.columns[name], float) for one in group]
            drawn.append(_draw(axes, shown, label, f"C{number % 10}"))
        is_averaged = any(len(g) == 1 and len(g[0]) >= _FEW for g in groups.values())
        bold = f"; bold: mean of {_WIDTH}" if is_averaged else ""
        axes.set(title=name.replace("_", " "), xlabel=f"outer step{bold}")
        if is_wide(np.concatenate(drawn)):
            axes.set_yscale("log")
        tidy(axes)
    if len(groups) > 1:
        legend_beside(all_axes[-1])
    return all_axes


def _listed(group: Any) -> list[History]:
    listed = [group] if isinstance(group, History) else group
    if not isinstance(listed, Sequence) or not listed:
        listed = [listed]  # refused next
    for one in listed:
        check_kind(one, History, "runs", "solution.history")
        if not len(one):
            raise ValueError("A history in `runs` has no steps.")
    return list(listed)


def _draw(axes: Any, shown: list[np.ndarray], label: str, color: str) -> np.ndarray:
    """Draw one group of runs; the numbers that were drawn."""
    if len(shown) == 1:
        (values,) = shown
        steps = np.arange(len(values))
        few = len(values) < _FEW
        line = {"color": color, "label": label or None}
        if few:
            axes.plot(steps, values, lw=1.8, **line)
        else:
            axes.plot(steps, values, color=color, lw=0.9, alpha=0.35)
            axes.plot(steps, running_mean(values), lw=2, **line)
        return values
    # As far as all of them go.
    count = min(map(len, shown))
    table = np.stack([values[:count] for values in shown])
    mean = np.mean(table, axis=0)
    error = np.std(table, axis=0, ddof=1) / np.sqrt(len(table))
    steps = np.arange(count)
    axes.plot(steps, mean, color=color, lw=2, label=label or None)
    axes.fill_between(steps, mean - error, mean + error, color=color, alpha=0.18, lw=0)
    return mean


def running_mean(values: np.ndarray, width: int = _WIDTH) -> np.ndarray:
    """A centred running mean, over fewer values at the ends; NaN is left out."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centres = np.arange(len(values))
    first = np.maximum(centres - width // 2, 0)
    end = np.minimum(centres + width // 2 + 1, len(values))
    number = counts[end] - counts[first]
    mean = (sums[end] - sums[first]) / np.maximum(number, 1)
    return np.where(number > 0, mean, np.nan)
