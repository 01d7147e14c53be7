"""Labelled rows that are mostly zeros."""

import equinox as eqx
import numpy as np
from jaxtyping import Float32, Int32

from .._core._validate import check_count, check_flag
from ._labelled import check_labels
from ._table_data import TableData


_MAX_BYTES = 2**30


class SparseData(eqx.Module):
    """Labelled rows that are mostly zeros, such as counts of words, held on the host as
    NumPy arrays.

    Only what is not zero is stored, row after row (the CSR format). JAX has no use for
    that format: `dense(columns)` makes a table of some columns, and `padded_rows(width)`
    makes rows of one length from which a loss gathers. `len(data)` is the number of rows;
    `data[:1000]` and `data[indices]` select some of them.
    [`metaopt.datasets.split`][] and [`metaopt.datasets.k_fold`][] divide it.

    !!! example

        ```python
        import jax.numpy as jnp
        import metaopt as mo
        import numpy as np

        data = mo.datasets.SparseData(
            values=np.array([2, 1, 1, 3], np.float32),
            columns=np.array([0, 4, 1, 4], np.int32),
            starts=np.array([0, 2, 3, 4], np.int32),  # of each row, and the end
            y=np.array([0, 1, 1], np.int32),
            num_columns=5,
            num_classes=2,
            name="three texts",
        )
        table = data.tf_idf(data).dense(data.most_frequent(3))

        indices, values = data.padded_rows()
        weights = jnp.ones((5, 2))
        scores = jnp.sum(weights[indices] * values[..., None], axis=-2)  # (3, 2)
        ```

    **Arguments:**

    - `values`: the numbers that are stored, float32 of shape `(k,)`, finite.
    - `columns`: the column of each, int32 of shape `(k,)`, increasing within each row.
    - `starts`: where each row starts in `values`, and where the last one ends: int32 of
        shape `(n + 1,)`.
    - `y`: the labels of the rows, int32 of shape `(n,)`, from 0 to `num_classes - 1`.
    - `num_columns`: how many columns there are.
    - `num_classes`: how many classes there are.
    - `name`: what the data are called in tables and pictures.

    **Raises:**

    `ValueError` if the shapes, dtypes or ranges are not those.
    """

    values: Float32[np.ndarray, " k"]
    columns: Int32[np.ndarray, " k"]
    starts: Int32[np.ndarray, " n_and_1"]
    y: Int32[np.ndarray, " n"]
    num_columns: int = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __check_init__(self):
        for name, array, dtype in (
            ("values", self.values, np.float32),
            ("columns", self.columns, np.int32),
            ("starts", self.starts, np.int32),
        ):
            if array.ndim != 1 or array.dtype != dtype:
                raise ValueError(
                    f"`{name}` must be {np.dtype(dtype)} with one axis, got {array.dtype} "
                    f"of shape {array.shape}."
                )
        check_labels(self.y, self.num_classes)
        if len(self.starts) != len(self.y) + 1:
            raise ValueError(
                f"`starts` must have {len(self.y) + 1} entries, one more than `y`; got "
                f"{len(self.starts)}."
            )
        sound = self.starts[0] == 0 and self.starts[-1] == len(self.values)
        if not sound or np.any(np.diff(self.starts) < 0):
            raise ValueError(
                f"`starts` must rise from 0 to {len(self.values)}, the length of `values`."
            )
        if len(self.columns) != len(self.values):
            raise ValueError(
                f"`columns` has {len(self.columns)} entries but `values` has "
                f"{len(self.values)}."
            )
        if self.columns.size and not (
            self.columns.min() >= 0 and self.columns.max() < self.num_columns
        ):
            raise ValueError(
                f"`columns` must lie between 0 and {self.num_columns - 1} (`num_columns` "
                f"is {self.num_columns}), got numbers from {self.columns.min()} to "
                f"{self.columns.max()}."
            )
        rows = self._rows()
        if np.any((np.diff(self.columns) <= 0) & (np.diff(rows) == 0)):
            raise ValueError(
                "`columns` must increase within each row: sort the entries of each row, "
                "and add up those of the same column."
            )
        if not np.all(np.isfinite(self.values)):
            raise ValueError("`values` holds infinite or NaN values.")

    def _rows(self) -> np.ndarray:
        """The row of each number that is stored."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.starts))

    def _with(self, values: np.ndarray) -> "SparseData":
        values = values.astype(np.float32)
        sizes = self.num_columns, self.num_classes
        return SparseData(values, self.columns, self.starts, self.y, *sizes, self.name)

    def most_frequent(self, count: int) -> Int32[np.ndarray, " count"]:
        """The numbers of the columns that are stored in most rows.

        **Arguments:**

        - `count`: how many of them; fewer only if there are fewer columns.

        **Returns:**

        Column numbers in increasing order. Of columns stored in equally many rows the
        first ones are taken.
        """
        check_count(count, "count")
        frequency = np.bincount(self.columns, minlength=self.num_columns)
        chosen = np.argsort(-frequency, kind="stable")[:count]
        return np.sort(chosen).astype(np.int32)

    def dense(
        self, columns: np.ndarray | None = None, *, max_bytes: int = _MAX_BYTES
    ) -> TableData:
        """Make a table of some columns, zeros included.

        **Arguments:**

        - `columns`: the numbers of the columns, in the order that the table will have;
            `None` for all. `most_frequent` gives some.
        - `max_bytes`: the largest size that the table may have.

        **Returns:**

        A [`metaopt.datasets.TableData`][].

        **Raises:**

        `ValueError` for columns that there are not or that are named twice, and for a
        table that would be too large.
        """
        count = self.num_columns if columns is None else self._check_columns(columns)
        _check_size(
            4 * len(self) * count,
            max_bytes,
            f"A table of {len(self):,} rows and {count:,} columns",
            "Take fewer columns, such as `data.dense(data.most_frequent(1000))`",
        )
        chosen = np.arange(count) if columns is None else np.asarray(columns)
        place = np.full(self.num_columns, -1)
        place[chosen] = np.arange(count)
        x = np.zeros((len(self), count), np.float32)
        at = place[self.columns]
        x[self._rows()[at >= 0], at[at >= 0]] = self.values[at >= 0]
        return TableData(x, self.y, self.num_classes, self.name)

    def _check_columns(self, columns: np.ndarray) -> int:
        """Count the columns that are named.

        **Raises:**

        `ValueError` for columns that there are not or that are named twice.
        """
        columns = np.asarray(columns)
        if columns.ndim != 1 or not np.issubdtype(columns.dtype, np.integer):
            raise ValueError(
                "`columns` must be the numbers of columns, such as "
                f"`data.most_frequent(1000)`; got {columns.dtype} of shape {columns.shape}."
            )
        if columns.size and not (columns.min() >= 0 and columns.max() < self.num_columns):
            raise ValueError(
                f"`columns` must lie between 0 and {self.num_columns - 1}, got numbers "
                f"from {columns.min()} to {columns.max()}."
            )
        if len(np.unique(columns)) != len(columns):
            raise ValueError("`columns` must name each column once.")
        return len(columns)

    def padded_rows(
        self, width: int | None = None, *, max_bytes: int = _MAX_BYTES
    ) -> tuple[Int32[np.ndarray, "n width"], Float32[np.ndarray, "n width"]]:
        """Bring all rows to one length, for losses that gather from their params.

        `jnp.sum(weights[indices] * values[..., None], axis=-2)` is the product of the rows
        with a matrix `weights` of `num_columns` rows.

        **Arguments:**

        - `width`: the length; by default that of the longest row. Of a row that is longer
            the values of the largest magnitude are kept.
        - `max_bytes`: the largest size that both arrays together may have.

        **Returns:**

        The column numbers, int32 of shape `(n, width)`, and the values, float32 of the
        same shape. A row that is shorter ends with zeros in both.

        **Raises:**

        `ValueError` for a `width` that is no positive int, and for arrays that would be
        too large.
        """
        lengths = np.diff(self.starts)
        if width is None:
            width = max(1, int(lengths.max(initial=0)))
        check_count(width, "width")
        _check_size(
            8 * len(self) * width,
            max_bytes,
            f"{len(self):,} rows of length {width:,}",
            "Give a smaller `width`",
        )
        rows = self._rows()
        by_size = np.lexsort((self.columns, -np.abs(self.values), rows))
        kept = np.empty(len(rows), bool)
        kept[by_size] = np.arange(len(rows)) - self.starts[rows] < width
        rows = rows[kept]
        ends = np.cumsum(np.minimum(lengths, width))
        place = np.arange(len(rows)) - (ends - np.minimum(lengths, width))[rows]
        indices = np.zeros((len(self), width), np.int32)
        values = np.zeros((len(self), width), np.float32)
        indices[rows, place] = self.columns[kept]
        values[rows, place] = self.values[kept]
        return indices, values

    def tf_idf(self, reference: "SparseData", *, sublinear: bool = False) -> "SparseData":
        """Weight counts by how rare their columns are, and scale the rows to length 1.

        A count is multiplied by $1 + \\log\\frac{1 + n}{1 + n_j}$, where $n_j$ of the $n$
        rows of `reference` have column $j$; then each row is divided by its Euclidean norm.
        Rows without any count stay empty.

        **Arguments:**

        - `reference`: the rows whose columns are counted, the training part in general.
        - `sublinear`: whether a count $c$ is first replaced by $1 + \\log c$, which tames
            large ones.

        **Returns:**

        A `SparseData` with the rows of this one.

        **Raises:**

        `ValueError` for values that are no counts, and where `reference` has other columns.
        """
        if reference.num_columns != self.num_columns:
            raise ValueError(
                f"`reference` must have {self.num_columns} columns; got "
                f"{reference.num_columns}."
            )
        check_flag(sublinear, "sublinear")
        least = 1 if sublinear else 0
        if self.values.size and self.values.min() < least:
            raise ValueError(
                f"`values` must be counts, {least} or more under `sublinear={sublinear}`; "
                f"got {self.values.min()}."
            )
        counts = self.values.astype(np.float64)
        counts = 1 + np.log(counts) if sublinear else counts
        found = np.bincount(reference.columns, minlength=self.num_columns)
        rarity = 1 + np.log((1 + len(reference)) / (1 + found))
        weighted = counts * rarity[self.columns]
        rows = self._rows()
        norms = np.sqrt(np.bincount(rows, weighted**2, minlength=len(self)))
        return self._with(weighted / np.where(norms > 0, norms, 1)[rows])

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.y)

    def __getitem__(self, index: slice | np.ndarray) -> "SparseData":
        """The rows that a slice, or an array of positions or booleans, selects."""
        rows = np.arange(len(self))[index]
        lengths = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        source = np.repeat(self.starts[rows] - starts[:-1], lengths)
        source += np.arange(starts[-1])
        return SparseData(
            self.values[source],
            self.columns[source],
            starts.astype(np.int32),
            self.y[rows],
            self.num_columns,
            self.num_classes,
            self.name,
        )


def _check_size(size: int, max_bytes: int, what: str, remedy: str) -> None:
    if size > max_bytes:
        raise ValueError(
            f"{what} would take {size:,} bytes, more than `max_bytes`, {max_bytes:,}. "
            f"{remedy}, or allow more."
        )
