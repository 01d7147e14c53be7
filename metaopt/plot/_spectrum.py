"""Plots of eigenvalues."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._lines import is_wide
from ._matplotlib import legend_beside, new_figure, tidy


def spectrum(eigenvalues: Any, *, figure: Any = None) -> Any:
    """Draw eigenvalues: real ones by their size, complex ones in the plane.

    Of the Hessian of an inner loss, say: negative ones, drawn in red, are directions in
    which the inner problem is not at a minimum; the title has the number of zeros. Of the
    Jacobian of a fixed-point map: it contracts where all of them lie within the unit
    circle, which is drawn.

    **Arguments:**

    - `eigenvalues`: an array of shape `(n,)`, real or complex, or a dictionary of several
        by names.
    - `figure`: a matplotlib figure or subfigure to draw into; by default a new one.

    **Returns:**

    The axes, from which `axes.figure.savefig(...)` writes the picture.

    **Raises:**

    `ValueError` for numbers of another shape, or that are not finite; `ImportError` without
    matplotlib.
    """
    named = eigenvalues if isinstance(eigenvalues, Mapping) else {"": eigenvalues}
    given = {str(name): np.asarray(found) for name, found in named.items()}
    for name, found in given.items():
        numeric = np.issubdtype(found.dtype, np.number)
        if found.ndim != 1 or not found.size or not numeric:
            raise ValueError(
                f"`eigenvalues` must have shape (n,); got shape {found.shape} and dtype "
                f"{found.dtype}{f' of {name!r}' if name else ''}."
            )
        if not np.all(np.isfinite(found)):
            raise ValueError("`eigenvalues` holds infinite or NaN entries.")
    if not given:
        raise ValueError("`eigenvalues` is empty.")
    is_complex = any(np.iscomplexobj(found) for found in given.values())
    if figure is None:
        figure = new_figure(5.0 if is_complex else 5.6, 4.2 if is_complex else 3.4)
    axes = figure.subplots()
    (_draw_plane if is_complex else _draw_sizes)(axes, given)
    tidy(axes)
    if len(given) > 1 or not is_complex and any(np.any(x < 0) for x in given.values()):
        legend_beside(axes)
    return axes


def _draw_plane(axes: Any, given: Mapping[str, np.ndarray]) -> None:
    angles = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(angles), np.sin(angles), color="black", lw=0.8)
    for number, (name, found) in enumerate(given.items()):
        label = name or None
        axes.scatter(
            np.real(found), np.imag(found), s=14, color=f"C{number % 10}", label=label
        )
    radius = max(float(np.max(np.abs(found))) for found in given.values())
    axes.set(
        title=f"Eigenvalues; spectral radius {radius:.3g}",
        xlabel="real part",
        ylabel="imaginary part",
        aspect="equal",
    )


def _draw_sizes(axes: Any, given: Mapping[str, np.ndarray]) -> None:
    for number, (name, found) in enumerate(given.items()):
        # The largest first, by their sizes.
        sizes = np.sort(found)[::-1]
        places = np.arange(1, len(sizes) + 1)
        color = f"C{number % 10}" if number < 3 else f"C{(number + 1) % 10}"
        good = sizes > 0
        axes.plot(places[good], sizes[good], ".", color=color, label=name or "positive")
        if np.any(sizes < 0):
            label = f"{name}, negative".removeprefix(", ")
            axes.plot(places[sizes < 0], -sizes[sizes < 0], ".", color="C3", label=label)
    sizes = np.abs(np.concatenate(list(given.values())))
    zeros = np.count_nonzero(sizes == 0)
    if is_wide(sizes[sizes > 0]):
        axes.set_yscale("log")
    title = f"Eigenvalues; {zeros} of {sizes.size} are zero" if zeros else "Eigenvalues"
    axes.set(title=title, xlabel="number, the largest first", ylabel="size")
