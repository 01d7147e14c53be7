"""A learned best response beside the implicit one."""

from typing import Any

import numpy as np

from .._core._validate import check_kind
from ..diagnostics import ResponseCheck
from ._lines import readable
from ._matplotlib import legend_beside, new_figure, tidy


def response(check: ResponseCheck, *, figure: Any = None) -> list[Any]:
    """Draw a learned response beside the implicit one, and both hypergradients.

    **Arguments:**

    - `check`: what [`metaopt.diagnostics.check_response`][] returned.
    - `figure`: a matplotlib figure or subfigure to draw into; by default a new one.

    **Returns:**

    The list of two axes.

    **Raises:**

    `ValueError` for anything else; `ImportError` without matplotlib.
    """
    check_kind(check, ResponseCheck, "check", "metaopt.diagnostics.check_response(...)")
    count = len(check.names)
    if figure is None:
        figure = new_figure(9.0, 1.4 + 0.32 * count)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = np.arange(count)
    colors = ["C0" if c > 0 else "C3" for c in np.nan_to_num(check.cosine)]
    left.barh(rows, np.nan_to_num(check.cosine), color=colors)
    left.set(xlim=(-1, 1), xticks=(-1, 0, 1), title="cosine of the responses")
    left.axvline(0, color="black", linewidth=0.8)
    names = [readable(name).removeprefix("hyper.") for name in check.names]
    left.set_yticks(rows, names)
    left.invert_yaxis()
    right.barh(rows - 0.2, check.learned_slope, 0.4, color="C0", label="learned")
    right.barh(rows + 0.2, check.implicit_slope, 0.4, color="C1", label="implicit")
    right.set(title=f"slope of the outer loss (cosine {check.slope_cosine:.2f})")
    right.axvline(0, color="black", linewidth=0.8)
    legend_beside(right)
    for axes in (left, right):
        tidy(axes)
    return [left, right]
