"""The interface of sources of batches."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from .._core._types import Batch, Key


class AbstractData(eqx.Module):
    """A source of batches, read inside the compiled loop.

    A source has a cursor, a pytree of arrays that says which batch comes next. `take` plans
    the draws of several steps and moves the cursor past them, before the loop starts;
    `batch` gathers one batch for each step inside the loop, so the data itself is never
    copied. [`metaopt.solve_bilevel`][] keeps the cursors of both losses in the state of the
    run: epochs continue from one outer step to the next, and a run that is resumed sees the
    batches that it would have seen.
    """

    @property
    @abc.abstractmethod
    def varies(self) -> bool:
        """Whether two steps can see different batches."""

    @property
    @abc.abstractmethod
    def num_batches(self) -> int | None:
        """The number of batches, where there is one for each step; else `None`."""

    @abc.abstractmethod
    def check(self, num_steps: int) -> None:
        """Raise a `ValueError` if the source cannot serve `num_steps` steps."""

    @abc.abstractmethod
    def init(self, key: Key) -> PyTree[Any]:
        """The cursor before the first draw.

        **Arguments:**

        - `key`: the randomness of all draws.

        **Returns:**

        A pytree of arrays, or `None` where every draw is the same.
        """

    @abc.abstractmethod
    def take(self, cursor: PyTree[Any], num_steps: int) -> tuple[PyTree[Any], PyTree[Any]]:
        """Plan the next draws, as plain traceable code.

        **Arguments:**

        - `cursor`: what `init` or the last `take` returned.
        - `num_steps`: the number of draws, a Python int.

        **Returns:**

        The draws for `batch`, stacked on a leading axis of length `num_steps`, and the
        cursor past them, of the structure, shapes and dtypes of the old one.
        """

    @abc.abstractmethod
    def batch(self, draw: PyTree[Any]) -> Batch:
        """The batch for one step; `draw` is one row of the plan."""

    @abc.abstractmethod
    def full(self) -> Batch:
        """All of the data as one batch."""

    def plan(self, key: Key, num_steps: int) -> PyTree[Any]:
        """The first `num_steps` draws of a new cursor, for a solve by itself."""
        return self.take(self.init(key), num_steps)[0]


class AbstractWrappedData(AbstractData):
    """A source that draws from another one.

    **Attributes:**

    - `source`: the other source.
    """

    source: eqx.AbstractVar[AbstractData]

    @property
    def num_batches(self):
        return self.source.num_batches

    def check(self, num_steps):
        self.source.check(num_steps)


def unwrapped(data: AbstractData) -> AbstractData:
    """The source that the user handed over."""
    while isinstance(data, AbstractWrappedData):
        data = data.source
    return data


class AbstractFoldedData(AbstractData):
    """Sources of equal shapes, one for each fold of a cross-validation.

    **Attributes:**

    - `stacked`: a source whose arrays have a leading axis of folds.
    - `num_folds`: the number of folds.
    """

    stacked: eqx.AbstractVar[AbstractData]
    num_folds: eqx.AbstractVar[int]
