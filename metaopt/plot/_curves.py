"""Means of several methods over what they have spent."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._matplotlib import new_figure, tidy


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
