"""The batches that one outer step draws from a source."""

import equinox as eqx
import jax

from .._core._types import Batch, IntScalar, Key, PyTree
from .._data import AbstractData


class DrawnBatches(eqx.Module):
    """The batches of one loss in one outer step.

    `batches[index]` gathers one of them; `index` may be traced, so that a loop gathers
    each batch in its step. `len(batches)` is their number.

    **Attributes:**

    - `data`: the source.
    - `plan`: the draws, stacked on a leading axis.
    - `num_batches`: the number of batches.
    """

    data: AbstractData
    plan: PyTree
    num_batches: int = eqx.field(static=True)

    def __getitem__(self, index: int | IntScalar) -> Batch:
        return self.data.batch(jax.tree.map(lambda leaf: leaf[index], self.plan))

    def __len__(self) -> int:
        return self.num_batches


def draw(data: AbstractData, key: Key, num_batches: int) -> DrawnBatches:
    """The one place where bilevel solvers draw batches by themselves."""
    return DrawnBatches(data, data.plan(key, num_batches), num_batches)


def draw_one(data: AbstractData, key: Key) -> Batch:
    """One batch of a source."""
    return draw(data, key, 1)[0]


def check_drawn(data: AbstractData, name: str, num_batches: int) -> None:
    """Raises a `ValueError` where a source does not have as many batches as each outer
    step draws, or has more."""
    data.check(num_batches)
    if data.num_batches is not None and data.num_batches > num_batches:
        raise ValueError(
            f"`{name}` is a `BatchSequence` of {data.num_batches} batches, and "
            f"each outer step would use the same first {num_batches} of them. Use "
            "`Minibatches`, or give `solve_bilevel` an iterator that yields a "
            f"`BatchSequence` of {num_batches} for each outer step."
        )
