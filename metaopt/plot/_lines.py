"""Curves of several numbers in one panel, and the names that a reader sees."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._matplotlib import legend_beside


MAX_LINES = 12  # of one panel; more numbers are drawn as bands
_WIDE = 20.0  # a range of values that a logarithmic axis shows better


def readable(name: str) -> str:
    """The path of a leaf without brackets: `layers.0.weight` for
    `['layers'][0].weight`."""
    name = re.sub(r"\['([^']*)'\]", r".\1", name)
    name = re.sub(r"\[([^\]]*)\]", r".\1", name)
    return name.strip(".").replace(", ", ".")


def entries(shape: Sequence[int]) -> list[str]:
    """The names of the entries of an array: their indices, counted from one."""
    return [" ".join(str(i + 1) for i in index) for index in np.ndindex(*shape)]


def draw_lines(axes: Any, x: np.ndarray, lines: np.ndarray, labels: Sequence[str]) -> None:
    """Draw numbers that change together; many of them as their median and two bands.

    **Arguments:**

    - `axes`: where to draw.
    - `x`: shape `(num_points,)`.
    - `lines`: shape `(num_points, num_lines)`.
    - `labels`: the name of each line.
    """
    count = lines.shape[1]
    if count > MAX_LINES:
        _draw_bands(axes, x, lines)
    else:
        # Neighbours have neighbouring colours, from first to last.
        colors = shades(count)
        for line, label, color in zip(lines.T, labels, colors):
            axes.plot(x, line, label=label if count > 1 else None, color=color, lw=1.8)
    if is_wide(lines):
        axes.set_yscale("log")
    if count > 1:
        legend_beside(axes)


def is_wide(values: np.ndarray) -> bool:
    """Whether all are positive, and some much larger than others."""
    values = values[np.isfinite(values)]
    return bool(values.size) and 0 < values.min() and values.max() > _WIDE * values.min()


def shades(count: int) -> list[Any]:
    """Colours for so many lines: the usual ones of a few, and else a scale."""
    if count <= 4:
        return [f"C{i}" for i in range(count)]
    import_map = np.linspace(0.05, 0.9, count)
    return [_scale(place) for place in import_map]


def _scale(place: float) -> tuple[float, float, float]:
    """A colour between dark blue and orange."""
    knots = np.array([[0.10, 0.16, 0.45], [0.20, 0.50, 0.60], [0.93, 0.55, 0.20]])
    return tuple(
        float(np.interp(place, np.linspace(0, 1, len(knots)), channel))
        for channel in knots.T
    )  # pyright: ignore[reportReturnType]


def _draw_bands(axes: Any, x: np.ndarray, lines: np.ndarray) -> None:
    levels = np.nanquantile(lines, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
    count = lines.shape[1]
    band = {"color": "C0", "linewidth": 0}
    axes.fill_between(x, levels[0], levels[4], alpha=0.15, label="90 %", **band)
    axes.fill_between(x, levels[1], levels[3], alpha=0.3, label="half", **band)
    axes.plot(x, levels[2], color="C0", lw=1.8, label=f"median of {count:,}")
