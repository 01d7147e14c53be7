"""Plots of the path of each outer variable."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._core._tree import leaf_names
from .._core._validate import check_kind
from .._report import History, is_float_array
from ..hyper import values
from ._lines import draw_lines, entries, MAX_LINES, readable
from ._matplotlib import new_figure, tidy


_PER_ROW = 3


def hyper_path(
    history: History,
    *,
    labels: Mapping[str, Sequence[str]] | None = None,
    figure: Any = None,
) -> list[Any]:
    """Draw the outer variables over the outer steps, one panel for each leaf of `hyper`.

    Hyperparameters of [`metaopt.hyper`][] are drawn by their values. A leaf of more than
    12 numbers is drawn as their median, the middle half and the middle 90 %. An axis is
    logarithmic where values are positive and span a factor of more than 20.

    **Arguments:**

    - `history`: the `history` of a solution.
    - `labels`: names for the entries of a leaf, by the title of its panel, such as
        `{"rate": ["first layer", "second layer"]}`; by default they are counted from 1.
    - `figure`: a matplotlib figure or subfigure to draw into; by default a new one.

    **Returns:**

    The list of axes, from which `axes[0].figure.savefig(...)` writes the picture.

    **Raises:**

    `ValueError` for anything else, for a history without a path of `hyper`, and for labels
    that do not fit; `ImportError` without matplotlib.
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
    titles = [readable(name) or "hyper" for name in leaf_names(path, "")]
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(path)]
    named = _checked_labels(labels, titles, leaves)
    columns = min(_PER_ROW, len(leaves))
    rows = math.ceil(len(leaves) / columns)
    if figure is None:
        figure = new_figure(4.2 * columns, 2.6 * rows)
    grid = np.atleast_1d(figure.subplots(rows, columns, sharex=True, squeeze=False)).ravel()
    for axes in grid[len(leaves) :]:
        axes.set_visible(False)
    for axes, title, leaf, of_leaf in zip(grid, titles, leaves, named):
        steps = np.arange(1, len(leaf) + 1)
        draw_lines(axes, steps, leaf.reshape(len(leaf), -1), of_leaf)
        axes.set_title(title)
        tidy(axes)
    for axes in grid[max(len(leaves) - columns, 0) : len(leaves)]:
        axes.set_xlabel("outer step")
        axes.tick_params(labelbottom=True)
    return list(grid[: len(leaves)])


def _checked_labels(
    labels: Mapping[str, Sequence[str]] | None, titles: list[str], leaves: list[np.ndarray]
) -> list[list[str]]:
    """The names of the entries of each leaf."""
    given = {} if labels is None else dict(labels)
    if unknown := [title for title in given if title not in titles]:
        raise ValueError(
            f"`labels` names {unknown[0]!r}, and the panels are {', '.join(titles)}."
        )
    named = []
    for title, leaf in zip(titles, leaves):
        count = math.prod(leaf.shape[1:])
        of_leaf = list(given.get(title, [])) or entries(leaf.shape[1:])
        if len(of_leaf) != count and count <= MAX_LINES:
            raise ValueError(
                f"`labels[{title!r}]` has {len(of_leaf)} names, and the leaf has {count} "
                "numbers."
            )
        named.append(of_leaf)
    return named
