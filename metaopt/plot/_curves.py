"""Curves with names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._lines import is_wide
from ._matplotlib import legend_beside, new_figure, tidy


_MARKED = 20  # points of a curve, up to which each has a marker
_SAME = 0.01  # of the height of a panel, within which two curves are one to the eye

Line = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The amounts spent, the mean at each, and the half width of the band around it."""


def curves_figure(
    panels: Mapping[str, Mapping[str, Line]], unit: str, title: str = "{}"
) -> Any:
    """Draw one panel for each metric, with one line for each method.

    **Arguments:**

    - `panels`: by the name of the metric and of the method, the amounts spent, the means
        and the half widths of the bands, each of shape `(num_points,)`.
    - `unit`: what is spent.
    - `title`: the title of a panel, with braces for the name of the metric.

    **Returns:**

    A figure of matplotlib.
    """
    figure = new_figure(1.2 + 4.4 * len(panels), 3.9)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, (metric, lines) in zip(all_axes, panels.items()):
        for number, (method, (spent, mean, width)) in enumerate(lines.items()):
            color, style = f"C{number % 10}", "-" if number < 10 else "--"
            (line,) = axes.step(spent, mean, style, where="post", color=color, lw=1.8)
            band = {"step": "post", "color": color, "alpha": 0.12, "linewidth": 0}
            axes.fill_between(spent, mean - width, mean + width, **band)
            handles[method] = line
        axes.set(title=title.format(metric), xlabel=unit, ylabel=metric)
        tidy(axes)
    # Beside the panels, where it hides no curve.
    figure.legend(
        list(handles.values()), list(handles), loc="outside right center", frameon=False
    )
    return figure


def curves(
    lines: Mapping[str, Any],
    *,
    levels: Mapping[str, float] | None = None,
    title: str = "",
    xlabel: str = "",
    legend: bool = True,
    axes: Any = None,
) -> Any:
    """Draw curves with names, which stand beside the panel.

    Curves of up to 20 points have a marker at each. A curve that lies on one before it is
    dashed, so that both are seen. The vertical axis is logarithmic where all values are
    positive and span a factor of more than 20; the horizontal one where the points also are
    at equal factors rather than at equal distances.

    **Arguments:**

    - `lines`: by name, the values of shape `(num_points,)`, drawn over 0, 1, 2, ..., or a
        pair of such arrays: where, and the values.
    - `levels`: by name, numbers that are drawn as dotted horizontal lines.
    - `title`: the title of the panel.
    - `xlabel`: what the horizontal axis shows.
    - `legend`: whether to write the names; not, say, where the next panel has the same.
    - `axes`: matplotlib axes to draw into; by default those of a new figure.

    **Returns:**

    The axes, from which `axes.figure.savefig(...)` writes the picture.

    **Raises:**

    `ValueError` for nothing to draw, and for a curve of another shape; `ImportError`
    without matplotlib.
    """
    pairs = {str(name): _points(str(name), given) for name, given in lines.items()}
    if not pairs:
        raise ValueError("There is nothing to draw: `lines` is empty.")
    if axes is None:
        axes = new_figure(6.2, 3.4).subplots()
    dotted = {} if levels is None else dict(levels)
    all_x = np.concatenate([x for x, _ in pairs.values()])
    all_y = np.concatenate([*(y for _, y in pairs.values()), list(dotted.values())])
    is_log_x = is_wide(all_x) and all(_by_factors(x) for x, _ in pairs.values())
    scales = [np.log if is_log else np.asarray for is_log in (is_log_x, is_wide(all_y))]
    known = all_y[np.isfinite(all_y)]
    height = np.ptp(scales[1](known)) if known.size else 0.0
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    for number, (name, (x, y)) in enumerate(pairs.items()):
        seen = any(_coincide(x, y, *other, scales[1], height) for other in drawn)
        marker = "o" if len(x) <= _MARKED else None
        line = {"color": f"C{number % 10}", "lw": 1.8, "marker": marker, "markersize": 4}
        axes.plot(x, y, "--" if seen else "-", label=name, **line)
        drawn.append((x, y))
    for number, (name, value) in enumerate(dotted.items()):
        color = f"{0.2 + 0.5 * number / max(len(dotted) - 1, 1):.2f}"
        axes.axhline(value, color=color, linestyle=":", lw=1.5, label=name)
    axes.set(title=title, xlabel=xlabel)
    for scale, set_scale in zip(scales, (axes.set_xscale, axes.set_yscale)):
        if scale is np.log:
            set_scale("log")
    tidy(axes)
    if legend and len(pairs) + len(dotted) > 1:
        legend_beside(axes)
    return axes


def _points(name: str, given: Any) -> tuple[np.ndarray, np.ndarray]:
    """The points of a curve: their places, and the values."""
    if isinstance(given, tuple) and len(given) == 2:
        x, y = (np.asarray(part, float) for part in given)
    else:
        y = np.asarray(given, float)
        x = np.arange(len(y), dtype=float) if y.ndim else y
    if y.ndim != 1 or x.shape != y.shape or not y.size:
        raise ValueError(
            f"`lines[{name!r}]` must be values of shape (num_points,), or a pair of such "
            f"arrays; got shapes {x.shape} and {y.shape}."
        )
    return x, y


def _by_factors(x: np.ndarray) -> bool:
    """Whether positive places are at equal factors rather than at equal distances."""
    if len(x) < 3:
        return False
    by_factors, by_distances = (np.diff(places) for places in (np.log(x), x))
    spread = lambda gaps: np.ptp(gaps) / np.max(np.abs(gaps))
    return bool(spread(by_factors) < spread(by_distances))


def _coincide(x, y, other_x, other_y, scale, height: float) -> bool:
    """Whether two curves are one to the eye."""
    if x.shape != other_x.shape or not np.array_equal(x, other_x):
        return False
    known = np.isfinite(y) & np.isfinite(other_y)
    apart = np.abs(scale(y[known]) - scale(other_y[known]))
    return bool(apart.size and np.median(apart) <= _SAME * height)
