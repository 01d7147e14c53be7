"""Plots of the path of each outer variable."""

import math
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._core._tree import leaf_names
from .._core._validate import check_kind
from .._report import History, is_float_array
from ..hyper import values
from ._matplotlib import new_figure, tidy


_PER_ROW = 4
_WIDE = 20.0  # a range of values that a logarithmic axis shows better
_MAX_LINES = 12


def hyper_path(history: History, *, figure: Any = None) -> list[Any]:
    """Draw the outer variables over the outer steps, one panel for each leaf of `hyper`.

    Hyperparameters of [`metaopt.hyper`][] are drawn by their values. An axis is
    logarithmic where values are positive and span a factor of more than 20.

    **Arguments:**

    - `history`: what `solution.history` is.
    - `figure`: a matplotlib figure or subfigure to draw into; by default a new one.

    **Returns:**

    The list of axes, from which `axes[0].figure.savefig(...)` writes the picture.

    **Raises:**

    `ValueError` for anything else, or a history without a path of `hyper`; `ImportError`
    without matplotlib.
    """
    check_kind(history, History, "history", "solution.history")
    if history.hyper is None:
        raise ValueError(
            "`history` holds no path of `hyper`: no step was taken, or `hyper` has more "
            "than 1000 numbers. Record what you need with `callback`."
        )
    path = values(history.hyper)
    # Leaves that are no floats are kept once, without an axis of steps.
    path = eqx.filter(path, is_float_array)
    names, leaves = leaf_names(path, ""), jax.tree.leaves(path)
    columns = min(_PER_ROW, len(leaves))
    rows = math.ceil(len(leaves) / columns)
    if figure is None:
        figure = new_figure(3.2 * columns, 2.4 * rows)
    grid = np.atleast_1d(figure.subplots(rows, columns, sharex=True, squeeze=False)).ravel()
    for axes in grid[len(leaves) :]:
        axes.set_visible(False)
    for axes, name, leaf in zip(grid, names, leaves):
        leaf = np.asarray(leaf, np.float64)
        _draw(axes, leaf.reshape(len(leaf), -1))
        axes.set_title(name.removeprefix(".") or "hyper")
        tidy(axes)
    for axes in grid[max(len(leaves) - columns, 0) : len(leaves)]:
        axes.set_xlabel("outer step")
        axes.tick_params(labelbottom=True)
    return list(grid[: len(leaves)])


def _draw(axes: Any, lines: np.ndarray) -> None:
    steps = np.arange(1, len(lines) + 1)
    many = lines.shape[1] > _MAX_LINES
    for index, line in enumerate(lines.T):
        style = {"color": "C0", "alpha": 0.3, "linewidth": 0.8} if many else {}
        label = str(index) if lines.shape[1] > 1 and not many else None
        axes.plot(steps, line, label=label, **style)
    if np.min(lines) > 0 and np.max(lines) > _WIDE * np.min(lines):
        axes.set_yscale("log")
    if lines.shape[1] > 1 and not many:
        axes.legend(frameon=False, fontsize="small")
