"""Labelled rows of numbers."""

import equinox as eqx
import numpy as np
from jaxtyping import Float32, Int32

from ._labelled import check_labels


class TableData(eqx.Module):
    """Labelled rows of numbers of any size, held on the host as NumPy arrays.

    It is a pytree with two leaves, `x` and `y`, so it can be given to a jitted function
    as it is. `len(data)` is the number of rows; `data[:1000]` and `data[indices]` select
    some of them. [`metaopt.datasets.split`][] and [`metaopt.datasets.k_fold`][] divide it.

    !!! example

        ```python
        import metaopt as mo
        import numpy as np

        random = np.random.default_rng(0)
        x = random.normal(3.0, 10.0, (100, 5)).astype(np.float32)
        y = (x[:, 0] > 3.0).astype(np.int32)
        data = mo.datasets.TableData(x, y, num_classes=2, name="a table")
        train, valid = mo.datasets.split(data, (70, 30), seed=0, stratified=True)
        valid = valid.standardized(train)
        train = train.standardized(train)
        ```

    **Arguments:**

    - `x`: the rows, float32 of shape `(n, d)`, finite.
    - `y`: their labels, int32 of shape `(n,)`, from 0 to `num_classes - 1`.
    - `num_classes`: how many classes there are.
    - `name`: what the data are called in tables and pictures.

    **Raises:**

    `ValueError` if the shapes, dtypes or ranges are not those.
    """

    x: Float32[np.ndarray, "n d"]
    y: Int32[np.ndarray, " n"]
    num_classes: int = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __check_init__(self):
        if self.x.ndim != 2 or self.x.dtype != np.float32:
            raise ValueError(
                "`x` must be float32 of shape (n, d), got "
                f"{self.x.dtype} of shape {self.x.shape}."
            )
        check_labels(self.y, self.num_classes)
        if len(self.x) != len(self.y):
            raise ValueError(
                f"`x` has {len(self.x)} rows but `y` has {len(self.y)} labels."
            )
        if not np.all(np.isfinite(self.x)):
            raise ValueError("`x` holds infinite or NaN values.")

    def standardized(self, reference: "TableData") -> "TableData":
        """Shift and scale each column so that it has mean 0 and deviation 1 in `reference`.

        **Arguments:**

        - `reference`: the rows that mean and deviation are taken of, the training part in
            general. Columns that are constant there are shifted and not scaled.

        **Returns:**

        A `TableData` with the rows of this one.

        **Raises:**

        `ValueError` where `reference` has other columns or no row.
        """
        if len(reference) == 0 or reference.x.shape[1] != self.x.shape[1]:
            raise ValueError(
                f"`reference` must have rows of {self.x.shape[1]} columns; its `x` has the "
                f"shape {reference.x.shape}."
            )
        mean = reference.x.mean(axis=0, dtype=np.float64)
        deviation = reference.x.std(axis=0, dtype=np.float64)
        constant = np.ptp(reference.x, axis=0) == 0
        x = (self.x - mean) / np.where(constant, 1, deviation)
        return TableData(x.astype(np.float32), self.y, self.num_classes, self.name)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.y)

    def __getitem__(self, index: slice | np.ndarray) -> "TableData":
        """The rows that a slice, or an array of positions or booleans, selects."""
        return TableData(self.x[index], self.y[index], self.num_classes, self.name)
