"""The data of the outer loop: fixed, or pulled for every outer step."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._data import AbstractData, as_data, restarted
from .._tree import same_structs
from .._validate import canonical_arrays, is_loader


class Feed:
    """The data of one of the two losses: fixed, or pulled for every outer step.

    **Attributes:**

    - `now`: the data of the last outer step, or of the first one before that.
    - `is_pulled`: whether each outer step has data of its own.
    """

    def __init__(self, data: Any, name: str):
        self.name = name
        self.source = restarted(data) if _is_pulled(data) else None
        self.is_pulled = self.source is not None
        self.now: AbstractData
        if self.source is None:
            self.now = self._check(data)
        else:
            try:
                self.now = self._check(next(self.source))
            except StopIteration:
                raise ValueError(
                    f"`{name}` is an iterator or loader that yields nothing."
                ) from None
        self.waiting = [self.now]  # pulled, and not used yet

    def pull(self, count: int) -> int:
        """Pulls data for as many outer steps as there is, up to `count`."""
        if self.source is None:
            return count
        while len(self.waiting) < count:
            try:
                self.waiting.append(self._check(next(self.source)))
            except StopIteration:
                break
        return min(len(self.waiting), count)

    def take(self, count: int, size: int) -> AbstractData:
        """The data of the next `count` outer steps, which stays until it is used.

        **Returns:**

        What is fixed as it is; what is pulled stacked along a new first axis of length
        `size`, whose entries past `count` are never read.

        **Raises:**

        `ValueError` where the shapes of two steps differ.
        """
        if self.source is None:
            return self.now
        parts = [eqx.partition(data, eqx.is_array) for data in self.waiting[:count]]
        arrays = [part[0] for part in parts]
        if not all(same_structs(arrays[0], other) for other in arrays[1:]):
            raise ValueError(
                f"`{self.name}` yields batches of different shapes or dtypes, and steps "
                "taken in one call need the same. Write `steps_per_call=1`, or make the "
                "batches alike."
            )
        arrays += [arrays[-1]] * (size - count)
        return eqx.combine(jax.tree.map(_stacked, *arrays), parts[0][1])

    def use(self, count: int) -> None:
        """Goes on to the data after that of `count` outer steps."""
        if self.source is not None and count:
            self.now = self.waiting[count - 1]
            self.waiting = self.waiting[count:]

    def _check(self, data: Any) -> AbstractData:
        return as_data(canonical_arrays(data, self.name), self.name)


def _stacked(*leaves: Any) -> Any:
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)


def _is_pulled(data: Any) -> bool:
    return isinstance(data, Iterator) or is_loader(data)
