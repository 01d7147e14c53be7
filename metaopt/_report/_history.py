"""The history of a run: one row for each outer step."""

import csv
import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._tree import leaf_names
from .._core._types import Hyper
from ._table import number


class History(eqx.Module):
    """One row for each outer step, as NumPy arrays of shape `(num_steps,)`. `print` it.

    A column is an attribute: `history.outer_loss`. Which ones there are depends on the
    bilevel solver and its adjoint, each of which records its own; `history.columns` is a
    dictionary of all. There are always `outer_loss`, `hypergradient_norm` and `seconds`.

    **Attributes:**

    - `columns`: the columns by their names: floats (NaN at steps where a quantity is not
        known) and ints. `seconds` is the wall time; steps that were taken in one call share
        it evenly, and the first call holds the compilation.
    - `hyper`: the outer variables after each outer step: a pytree like `hyper` whose
        arrays have a leading axis of steps; `None` where `hyper` holds more than 1000
        numbers (a callback sees every `hyper`) or no step was taken.
    """

    columns: dict[str, np.ndarray]
    hyper: Hyper | None = None

    def __getattr__(self, name: str) -> np.ndarray:
        # Python asks for `columns` itself while it makes copies.
        columns = {} if name == "columns" else self.columns
        try:
            return columns[name]
        except KeyError:
            raise AttributeError(
                f"The history has no column `{name}`; it has {', '.join(columns)}."
            ) from None

    def __len__(self) -> int:
        return len(self.columns["outer_loss"])

    def to_dict(self) -> dict[str, list[float]]:
        """The columns as lists of Python numbers.

        **Returns:**

        A dictionary from the name of each column to a list of numbers; each number in
        `hyper` is a column of its own, such as `hyper.log_decay[2]`.
        """
        columns = dict(self.columns)
        floats = eqx.filter(self.hyper, is_float_array)
        for name, leaf in zip(leaf_names(floats, "hyper"), jax.tree.leaves(floats)):
            for index in np.ndindex(leaf.shape[1:]):
                column = f"{name}{list(index)}" if index else name
                columns[column] = leaf[(slice(None), *index)]
        return {name: column.tolist() for name, column in columns.items()}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row for each outer step, with a header.

        **Arguments:**

        - `path`: the file to write.
        """
        columns = self.to_dict()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *columns])
            rows = zip(*columns.values(), strict=True)
            writer.writerows([step, *row] for step, row in enumerate(rows))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        count = len(self)
        shown = list(range(count))
        if count > _MAX_ROWS:
            shown = np.linspace(0, count - 1, _MAX_ROWS).round().astype(int).tolist()
        names = ["step", *self.columns]
        lines = [names]
        for step in shown:
            cells = (number(column[step]) for column in self.columns.values())
            lines.append([str(step), *cells])
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        text = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in lines]
        title = f"History of {count} outer steps"
        if len(shown) < count:
            title += f", {len(shown)} of them"
        return "\n".join([title, *text])


_MAX_ROWS = 12  # of a printed history


def is_float_array(x: Any) -> bool:
    """Whether `x` is a floating-point array of JAX or NumPy."""
    # `equinox.is_inexact_array_like` does not know bfloat16 in NumPy.
    return isinstance(x, np.ndarray | jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
