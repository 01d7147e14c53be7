"""All scalars of a step as one row of ints.

Each array that a compiled program returns costs as much time as a hundred small operations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._core._static import Static


class Cell(NamedTuple):
    """The place of a scalar in a row, its dtype, and whether that is one of floats."""

    place: int
    dtype: Any
    is_float: bool

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The scalar in each of several rows: floats or ints."""
        bits = np.ascontiguousarray(rows[:, self.place])
        return bits.view(_FLOATS[bits.dtype.itemsize]) if self.is_float else bits


_FLOATS = {4: np.float32, 8: np.float64}  # by their bytes


class Row:
    """A row that is being filled, inside a compiled function."""

    def __init__(self):
        self._numbers: list[Any] = []

    def put(self, x: Any) -> Cell:
        """Put a scalar into the row, once if it is the same object."""
        found = [index for index, y in enumerate(self._numbers) if y is x]
        if not found:
            self._numbers.append(x)
        place = found[0] if found else len(self._numbers) - 1
        dtype = jnp.result_type(x)
        return Cell(place, dtype, bool(jnp.issubdtype(dtype, jnp.inexact)))

    def bits(self) -> jax.Array:
        """The row: floats as the ints of the same bits."""
        places = jnp.arange(len(self._numbers))
        out = jnp.zeros(places.shape, int)
        # One operation when compiled, where `stack` is one for each number.
        for index, x in enumerate(self._numbers):
            out = jnp.where(places == index, _bits(x), out)
        return out


class Shown(NamedTuple):
    """A pytree whose scalars are in a row, and whose other arrays are not."""

    rest: Static
    cells: tuple[Cell | None, ...]

    @classmethod
    def split(cls, tree: Any, row: Row) -> tuple[list[Any], "Shown"]:
        """Put the scalars of a pytree into a row. Returns its other arrays, and the
        inverse."""
        leaves, rest = Static.split(tree)
        cells = tuple(row.put(leaf) if _is_number(leaf) else None for leaf in leaves)
        others = [leaf for leaf, cell in zip(leaves, cells) if cell is None]
        return others, cls(rest, cells)

    def joined(self, others: list[Any], row: np.ndarray) -> Any:
        """The pytree that was split."""
        arrays = iter(others)
        scalar = lambda cell: jnp.asarray(cell.read(row[None])[0], cell.dtype)
        leaves = [next(arrays) if cell is None else scalar(cell) for cell in self.cells]
        return self.rest.joined(leaves)


def _bits(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jax.lax.bitcast_convert_type(x.astype(float), jnp.result_type(int))
    return x.astype(int)


def _is_number(leaf: Any) -> bool:
    kinds = jnp.floating, jnp.integer, jnp.bool_
    return leaf.ndim == 0 and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)
