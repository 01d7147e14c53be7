"""Folds of data, over which outer steps are averaged."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._tree import same_structs
from .._core._types import PyTree
from .._core._validate import canonical_arrays
from ._base import AbstractData, AbstractFoldedData
from ._sources import as_data


_REFUSED = (
    "`metaopt.Folds` is a source for `metaopt.NestedSolver`, which solves the inner "
    "problem on each fold and averages their hypergradients. Hand over the data of one "
    "fold here."
)


class Folds(AbstractFoldedData):
    """The training or the validation data of each fold of a cross-validation.

    [`metaopt.NestedSolver`][] solves the inner problem on each fold, vectorised over them,
    and takes the mean of the outer losses: `train` and `valid` are both folds then.

    !!! example

        ```python
        import metaopt as mo

        digits = mo.datasets.load_digits()[:1500]
        pairs = mo.datasets.k_fold(digits, 5, seed=0)
        train = mo.Folds([(part.x, part.y) for part, _ in pairs])
        valid = mo.Folds([(part.x, part.y) for _, part in pairs])
        ```

    **Arguments:**

    - `folds`: the data of each fold: arrays, or sources such as
        [`metaopt.Minibatches`][]; of the same shapes.

    **Raises:**

    `ValueError` for a single fold, and for folds of different shapes.
    """

    stacked: AbstractData
    num_folds: int = eqx.field(static=True)

    def __init__(self, folds: Sequence[Any]):
        if not isinstance(folds, list | tuple) or len(folds) < 2:
            raise ValueError("`folds` must be a list of the data of two folds or more.")
        names = [f"folds[{index}]" for index in range(len(folds))]
        sources = [
            as_data(canonical_arrays(fold, name), name) for fold, name in zip(folds, names)
        ]
        parts = [eqx.partition(source, eqx.is_array) for source in sources]
        for name, part in zip(names, parts):
            if not same_structs(part[0], parts[0][0]):
                raise ValueError(
                    f"`{name}` has other shapes than `folds[0]`: "
                    f"{eqx.tree_pformat(part[0])} and {eqx.tree_pformat(parts[0][0])}. "
                    "Leave rows out until their number is a multiple of that of the folds."
                )
        arrays = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p[0] for p in parts))
        self.stacked = eqx.combine(arrays, parts[0][1])
        self.num_folds = len(folds)

    @property
    def varies(self):
        return self.stacked.varies

    @property
    def num_batches(self):
        return self.stacked.num_batches

    def check(self, num_steps):
        raise ValueError(_REFUSED)

    def init(self, key):
        raise ValueError(_REFUSED)

    def take(self, cursor, num_steps):
        raise ValueError(_REFUSED)

    def batch(self, draw):
        raise ValueError(_REFUSED)

    def full(self) -> PyTree:
        """There is no batch of all folds, which share rows."""
        raise ValueError(_REFUSED)
