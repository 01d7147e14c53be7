"""The form that all labelled data sets share."""

from typing import Any, Protocol, runtime_checkable, Self

import numpy as np


@runtime_checkable
class Labelled(Protocol):
    """Examples with a label each, some of which can be selected."""

    @property
    def y(self) -> np.ndarray:
        """The labels, int32 of shape `(n,)`."""
        ...

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        ...

    @property
    def name(self) -> str:
        """The name of the data in tables and pictures."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Self: ...


def check_labels(y: np.ndarray, num_classes: int) -> None:
    """Raise a `ValueError` unless `y` holds labels from 0 to `num_classes - 1`."""
    if y.ndim != 1 or y.dtype != np.int32:
        raise ValueError(
            f"`y` must be int32 of shape (n,), got {y.dtype} of shape {y.shape}."
        )
    if y.size and not (y.min() >= 0 and y.max() < num_classes):
        raise ValueError(
            f"`y` must lie between 0 and {num_classes - 1} (`num_classes` is "
            f"{num_classes}), got labels from {y.min()} to {y.max()}."
        )
