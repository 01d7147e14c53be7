"""Labels that are made wrong on purpose."""

import math
from typing import Any, overload, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from .._core._types import Key
from .._core._validate import check_count, check_flag, check_key
from ._labelled import Labelled


Data = TypeVar("Data", bound=Labelled)


@overload
def corrupt_labels(
    data: Data,
    fraction: float,
    key: Key,
    *,
    num_classes: int | None = None,
    other: bool = False,
) -> tuple[Data, np.ndarray]: ...


@overload
def corrupt_labels(
    data: ArrayLike,
    fraction: float,
    key: Key,
    *,
    num_classes: int | None = None,
    other: bool = False,
) -> tuple[np.ndarray, np.ndarray]: ...


def corrupt_labels(
    data: Any,
    fraction: float,
    key: Key,
    *,
    num_classes: int | None = None,
    other: bool = False,
) -> tuple[Any, np.ndarray]:
    """Draw a share of the labels anew, as in data hyper-cleaning.

    The rows are chosen at random, and their new labels uniformly among all classes: one in
    `num_classes` of them is the old one again. Under `other=True` every new label differs
    from the old one.

    The same key gives the same labels on every machine, and the rows that are chosen for a
    smaller `fraction` are among those for a larger one.

    !!! example

        ```python
        import jax
        import metaopt as mo

        digits = mo.datasets.load_digits()
        noisy, redrawn = mo.datasets.corrupt_labels(digits, 0.5, jax.random.key(0))
        print(redrawn.mean(), (noisy.y != digits.y).mean())
        ```

    **Arguments:**

    - `data`: [`metaopt.datasets.ImageData`][], [`metaopt.datasets.TableData`][],
        [`metaopt.datasets.SparseData`][], or the labels alone: whole numbers of shape
        `(n,)` from 0.
    - `fraction`: the share of the labels that is drawn anew, from 0 to 1.
    - `key`: from `jax.random.key`.
    - `num_classes`: how many classes there are, for labels alone.
    - `other`: whether new labels always differ from the old ones.

    **Returns:**

    The data with the new labels, and a boolean array of shape `(n,)`: which of them were
    drawn anew. Under `other=False` some of those agree with the old ones.

    **Raises:**

    `ValueError` that names the argument.
    """
    check_key(key)
    check_flag(other, "other")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float | np.number):
        raise ValueError(f"`fraction` must be a number from 0 to 1; got {fraction!r}.")
    if not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must lie between 0 and 1; got {fraction}.")
    if isinstance(data, eqx.Module):
        if not isinstance(data, Labelled):
            raise ValueError(
                "`data` must have one label for each row, such as "
                f"`metaopt.datasets.TableData`; got {type(data).__name__}."
            )
        if num_classes is not None:
            raise ValueError("`num_classes` is part of `data`: leave it out.")
        y, redrawn = _redrawn(data.y, data.num_classes, fraction, key, other)
        return eqx.tree_at(lambda data: data.y, data, y), redrawn
    y = np.asarray(data)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            "`data` must be labelled data or whole numbers of shape (n,); got "
            f"{y.dtype} of shape {y.shape}."
        )
    if num_classes is None:
        raise ValueError(
            "`num_classes` is missing, the number of classes of these labels: write "
            "`corrupt_labels(y, fraction, key, num_classes=10)`."
        )
    check_count(num_classes, "num_classes")
    if y.size and not (y.min() >= 0 and y.max() < num_classes):
        raise ValueError(
            f"Labels must lie between 0 and {num_classes - 1} (`num_classes` is "
            f"{num_classes}); got {y.min()} to {y.max()}."
        )
    return _redrawn(y, num_classes, fraction, key, other)


def _redrawn(
    y: np.ndarray, num_classes: int, fraction: float, key: Key, other: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The labels, with a share of them drawn anew, and which ones."""
    if other and num_classes < 2:
        raise ValueError(
            f"`other=True` needs two classes at least; `num_classes` is {num_classes}."
        )
    row_key, label_key = jax.random.split(key)
    # Dtypes are given, so that 64-bit mode draws the same.
    scores = np.asarray(jax.random.bits(row_key, y.shape, jnp.uint32))
    redrawn = np.zeros(y.shape, bool)
    count = math.floor(fraction * len(y) + 0.5)
    redrawn[np.argsort(scores, kind="stable")[:count]] = True
    draw = lambda least: np.asarray(
        jax.random.randint(label_key, y.shape, least, num_classes, jnp.int32)
    )
    new = (y.astype(np.int64) + draw(1)) % num_classes if other else draw(0)
    return np.where(redrawn, new, y).astype(y.dtype), redrawn
