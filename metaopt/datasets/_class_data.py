"""Examples sorted by class, from which few-shot tasks are made."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import numpy as np


_FOR_ROWS = (
    "rows of one length, with examples of one shape. Where classes have different numbers "
    "of examples, `ClassData.from_labels(x, y)` takes all examples in a row with their "
    "labels; or fill the rows up, and say by `counts` how many are real"
)


class ClassData(eqx.Module):
    """Examples sorted by class, held on the host as NumPy arrays.

    [`metaopt.few_shot.Episodes`][] draws tasks from it. `data[classes]` selects some
    classes.

    **Arguments:**

    - `x`: the examples, of shape `(num_classes, most, ...)`; any dtype.
    - `counts`: how many examples each class has, of shape `(num_classes,)`; the rest of
        its row is not used. `None` where all have `most`.
    - `name`: what the data are called in tables and pictures.

    **Raises:**

    `ValueError` if the shapes or counts do not fit.
    """

    x: np.ndarray
    counts: np.ndarray
    name: str = eqx.field(static=True)

    def __init__(self, x: Any, counts: Any = None, name: str = "examples"):
        x = _as_array(x, "x", _FOR_ROWS)
        if x.ndim < 2 or x.size == 0:
            raise ValueError(
                "`x` must have an axis of classes and one of examples, and hold something; "
                f"got shape {x.shape}."
            )
        counts = np.full(len(x), x.shape[1]) if counts is None else counts
        counts = _as_array(counts, "counts", "one whole number for each class")
        if counts.shape != (len(x),) or not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(
                f"`counts` must be one whole number for each of the {len(x)} classes; got "
                f"shape {counts.shape} and dtype {counts.dtype}."
            )
        if counts.min() < 1 or counts.max() > x.shape[1]:
            raise ValueError(
                f"`counts` must lie between 1 and {x.shape[1]}, the length of a row of "
                f"`x`; got values from {counts.min()} to {counts.max()}."
            )
        if np.issubdtype(x.dtype, np.inexact) and not np.all(np.isfinite(x)):
            raise ValueError("`x` holds infinite or NaN values.")
        self.x = x
        self.counts = counts
        self.name = name

    @classmethod
    def from_labels(cls, x: Any, y: Any, name: str = "examples") -> "ClassData":
        """Sort labelled examples into classes.

        **Arguments:**

        - `x`: the examples, of shape `(n, ...)`.
        - `y`: their labels, whole numbers of shape `(n,)`, none of them negative. Numbers
            without an example are no class.
        - `name`: as above.

        **Returns:**

        A `ClassData` whose classes are in the order of their labels.
        """
        x = _as_array(x, "x", "examples of one shape: crop or resize them, or pad them")
        y = _as_array(y, "y", "one whole number for each example")
        if x.ndim == 0:
            raise ValueError(f"`x` must have an axis of examples; got {x!r}.")
        if y.ndim != 1 or len(x) != len(y) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(
                f"`y` must hold one whole number for each of the {len(x)} examples in `x`; "
                f"got shape {y.shape} and dtype {y.dtype}."
            )
        if len(y) == 0 or y.min() < 0:
            lowest = "no label at all" if len(y) == 0 else f"label {y.min()}"
            raise ValueError(f"Labels must be 0 or more, and some; got {lowest}.")
        rows = [x[y == label] for label in np.unique(y)]
        counts = np.array([len(row) for row in rows])
        out = np.zeros((len(rows), counts.max(), *x.shape[1:]), x.dtype)
        for place, row in zip(out, rows):
            place[: len(row)] = row
        return cls(out, counts, name)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.x)

    def __getitem__(self, classes: slice | Sequence[int] | np.ndarray) -> "ClassData":
        """The classes that a slice, or an array of positions or booleans, selects."""
        return ClassData(self.x[classes], self.counts[classes], self.name)

    def with_rotations(self, axes: tuple[int, int] = (-2, -1)) -> "ClassData":
        """Each class, and the same turned by 90, 180 and 270 degrees as three more classes.

        **Arguments:**

        - `axes`: the two axes of an image that are turned, counted from the end.

        **Returns:**

        A `ClassData` with four times as many classes.
        """
        if self.x.ndim < 4:
            raise ValueError(
                "Only images can be turned: `x` must have two axes beside those of classes "
                f"and examples; its shape is {self.x.shape}."
            )
        turned = [np.rot90(self.x, k, axes) for k in range(4)]
        if turned[0].shape != turned[1].shape:
            raise ValueError(
                f"Images that are turned must be square; got shape {self.x.shape[2:]}."
            )
        return ClassData(np.concatenate(turned), np.tile(self.counts, 4), self.name)


def _as_array(value: Any, name: str, remedy: str) -> np.ndarray:
    """`value` as a NumPy array.

    **Raises:**

    `ValueError` for lists of parts that do not fit together.
    """
    try:
        return np.asarray(value)
    except ValueError as error:
        if not isinstance(value, list | tuple):
            raise
        shapes = list(dict.fromkeys(_shape(part) for part in value))
        listed = ", ".join(shapes[:4] + ["..."] * (len(shapes) > 4))
        raise ValueError(
            f"`{name}` must be one array; got a {type(value).__name__} of {len(value)} "
            f"parts of shape {listed}. Hand over {remedy}."
        ) from error


def _shape(part: Any) -> str:
    try:
        return str(np.shape(part))
    except ValueError:
        return f"({len(part)}, ?)"
