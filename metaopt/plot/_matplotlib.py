"""The one place that asks for matplotlib."""

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that size in inches.

    **Raises:**

    `ImportError` that says how to install matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "`metaopt.plot` needs matplotlib: `pip install 'metaopt-jax[plot]'`."
        ) from error
    return plt.figure(figsize=(width, height), layout="constrained")


def tidy(axes: Any) -> None:
    """Take away the frame on two sides."""
    axes.spines[["top", "right"]].set_visible(False)


def legend_beside(axes: Any) -> None:
    """A legend to the right of a panel, where it hides no curve."""
    axes.legend(
        frameon=False,
        fontsize="small",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
        handlelength=1.3,
    )
