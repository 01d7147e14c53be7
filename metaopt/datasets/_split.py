"""Data divided at random."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ._labelled import Labelled


Data = TypeVar("Data", bound=Labelled)


def _check_count(value: object, argument: str, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{argument} must be an integer, got {value!r}.")
    if value < lowest:
        raise ValueError(f"{argument} must be at least {lowest}, got {value}.")
    return int(value)


def _check_labelled(data: object) -> None:
    if not isinstance(data, Labelled):
        raise ValueError(
            "`data` must be a data set such as `metaopt.datasets.ImageData` or "
            f"`metaopt.datasets.TableData(x, y, num_classes)`; got {type(data).__name__}."
        )


def split(
    data: Data, sizes: Sequence[int], seed: int, *, stratified: bool = False
) -> tuple[Data, ...]:
    """Divide data at random into parts that have no example in common.

    The examples are shuffled and dealt out in turn; examples beyond the sum of `sizes` are
    left out. The same seed gives the same parts on every machine.

    !!! example

        ```python
        import metaopt as mo

        digits = mo.datasets.load_digits()
        train, valid, test = mo.datasets.split(digits, (800, 400, 597), seed=0)
        ```

    **Arguments:**

    - `data`: what to divide: [`metaopt.datasets.ImageData`][],
        [`metaopt.datasets.TableData`][] or [`metaopt.datasets.SparseData`][].
    - `sizes`: how many examples each part gets, at least 1 each and `len(data)` in all at
        most.
    - `seed`: a non-negative integer that fixes the shuffle.
    - `stratified`: whether each part has the classes in the proportions of the whole, to
        within two examples of a class, which matters for parts of few examples per class.

    **Returns:**

    One part for each entry of `sizes`, in that order, of the class of `data`.

    **Raises:**

    `ValueError` that names the argument, if a size or the seed is not such a number.
    """
    _check_labelled(data)
    if not isinstance(sizes, Sequence | np.ndarray) or len(sizes) == 0:
        raise ValueError(
            "`sizes` must be a sequence with one size for each part, for example "
            f"(800, 400), got {sizes!r}."
        )
    checked = [
        _check_count(size, f"`sizes[{i}]`", lowest=1) for i, size in enumerate(sizes)
    ]
    if sum(checked) > len(data):
        raise ValueError(
            f"`sizes` sum to {sum(checked)}, but {data.name} has only {len(data)} examples."
        )
    order = _shuffled(data, seed, stratified)
    ends = np.cumsum(checked)
    return tuple(
        data[order[end - size : end]] for end, size in zip(ends, checked, strict=True)
    )


def k_fold(
    data: Data, num_folds: int, seed: int, *, stratified: bool = True
) -> list[tuple[Data, Data]]:
    """Divide data at random into folds, each of which validates what is trained on the
    others.

    !!! example

        ```python
        import metaopt as mo

        digits = mo.datasets.load_digits()
        for train, valid in mo.datasets.k_fold(digits, 5, seed=0):
            print(len(train), len(valid))
        ```

    **Arguments:**

    - `data`: what to divide, as for [`metaopt.datasets.split`][].
    - `num_folds`: the number of folds, from 2 to `len(data)`. Their sizes differ by one
        example at most.
    - `seed`, `stratified`: as for [`metaopt.datasets.split`][].

    **Returns:**

    A pair for each fold: the examples of all others, and its own.

    **Raises:**

    `ValueError` that names the argument, if the number of folds or the seed is no such
    number.
    """
    _check_labelled(data)
    num_folds = _check_count(num_folds, "`num_folds`", lowest=2)
    if num_folds > len(data):
        raise ValueError(
            f"`num_folds` is {num_folds}, but {data.name} has only {len(data)} examples."
        )
    folds = np.array_split(_shuffled(data, seed, stratified), num_folds)
    others = lambda index: np.concatenate(folds[:index] + folds[index + 1 :])
    return [(data[others(index)], data[fold]) for index, fold in enumerate(folds)]


def _shuffled(data: Labelled, seed: int, stratified: bool) -> np.ndarray:
    seed = _check_count(seed, "`seed`", lowest=0)
    random = np.random.default_rng(seed)
    order = random.permutation(len(data))
    if not stratified:
        return order
    # The examples of each class are spread evenly over the order.
    places = np.empty(len(data))
    for label in np.unique(data.y):
        mine = np.flatnonzero(data.y[order] == label)
        places[mine] = (np.arange(len(mine)) + random.uniform()) / len(mine)
    return order[np.argsort(places, kind="stable")]
