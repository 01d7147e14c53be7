"""Labelled images, and how to divide them."""

from collections.abc import Sequence

import equinox as eqx
import numpy as np
from jaxtyping import Float32, Int32


class ImageData(eqx.Module):
    """Labelled images, flattened, held on the host as NumPy arrays.

    It is a pytree with two leaves, `x` and `y`, so it can be given to a jitted function
    as it is. `len(data)` is the number of images; `data[:1000]` and `data[indices]`
    select some of them.

    **Arguments:**

    - `x`: the images, float32 of shape `(n, d)`, brightness from 0 to 1.
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
        if self.y.ndim != 1 or self.y.dtype != np.int32:
            raise ValueError(
                "`y` must be int32 of shape (n,), got "
                f"{self.y.dtype} of shape {self.y.shape}."
            )
        if len(self.x) != len(self.y):
            raise ValueError(
                f"`x` has {len(self.x)} images but `y` has {len(self.y)} labels."
            )
        # Written so that NaN fails.
        if self.x.size and not (self.x.min() >= 0 and self.x.max() <= 1):
            raise ValueError(
                "`x` must lie between 0 and 1, got values from "
                f"{self.x.min()} to {self.x.max()}."
            )
        if self.y.size and not (self.y.min() >= 0 and self.y.max() < self.num_classes):
            raise ValueError(
                f"`y` must lie between 0 and {self.num_classes - 1} "
                f"(`num_classes` is {self.num_classes}), got labels from "
                f"{self.y.min()} to {self.y.max()}."
            )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.y)

    def __getitem__(self, index: slice | np.ndarray) -> "ImageData":
        """The images that a slice, or an array of positions or booleans, selects."""
        return ImageData(self.x[index], self.y[index], self.num_classes, self.name)


def _check_count(value: object, argument: str, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{argument} must be an integer, got {value!r}.")
    if value < lowest:
        raise ValueError(f"{argument} must be at least {lowest}, got {value}.")
    return int(value)


def split(
    data: ImageData, sizes: Sequence[int], seed: int, *, stratified: bool = False
) -> tuple[ImageData, ...]:
    """Divide data at random into parts that have no image in common.

    The images are shuffled and dealt out in turn; images beyond the sum of `sizes` are
    left out. The same seed gives the same parts on every machine.

    !!! example

        ```python
        import metaopt as mo

        digits = mo.datasets.load_digits()
        train, valid, test = mo.datasets.split(digits, (800, 400, 597), seed=0)
        ```

    **Arguments:**

    - `data`: what to divide.
    - `sizes`: how many images each part gets, at least 1 each and `len(data)` in all at
        most.
    - `seed`: a non-negative integer that fixes the shuffle.
    - `stratified`: whether each part has the classes in the proportions of the whole, to
        within two images of a class, which matters for parts of few images per class.

    **Returns:**

    One `ImageData` for each entry of `sizes`, in that order.

    **Raises:**

    `ValueError` that names the argument, if a size or the seed is not such a number.
    """
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
            f"`sizes` sum to {sum(checked)}, but {data.name} has only {len(data)} images."
        )
    order = _shuffled(data, seed, stratified)
    ends = np.cumsum(checked)
    return tuple(
        data[order[end - size : end]] for end, size in zip(ends, checked, strict=True)
    )


def k_fold(
    data: ImageData, num_folds: int, seed: int, *, stratified: bool = True
) -> list[tuple[ImageData, ImageData]]:
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

    - `data`: what to divide.
    - `num_folds`: the number of folds, from 2 to `len(data)`. Their sizes differ by one
        image at most.
    - `seed`, `stratified`: as for [`metaopt.datasets.split`][].

    **Returns:**

    A pair for each fold: the images of all others, and its own.

    **Raises:**

    `ValueError` that names the argument, if the number of folds or the seed is no such
    number.
    """
    num_folds = _check_count(num_folds, "`num_folds`", lowest=2)
    if num_folds > len(data):
        raise ValueError(
            f"`num_folds` is {num_folds}, but {data.name} has only {len(data)} images."
        )
    folds = np.array_split(_shuffled(data, seed, stratified), num_folds)
    others = lambda index: np.concatenate(folds[:index] + folds[index + 1 :])
    return [(data[others(index)], data[fold]) for index, fold in enumerate(folds)]


def _shuffled(data: ImageData, seed: int, stratified: bool) -> np.ndarray:
    seed = _check_count(seed, "`seed`", lowest=0)
    random = np.random.default_rng(seed)
    order = random.permutation(len(data))
    if not stratified:
        return order
    # The images of each class are spread evenly over the order.
    places = np.empty(len(data))
    for label in np.unique(data.y):
        mine = np.flatnonzero(data.y[order] == label)
        places[mine] = (np.arange(len(mine)) + random.uniform()) / len(mine)
    return order[np.argsort(places, kind="stable")]
