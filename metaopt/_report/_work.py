"""The work of outer steps, counted in evaluations of the inner problem."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import equinox as eqx
import numpy as np


Columns = Mapping[str, np.ndarray]
"""The columns of a history, or of a part of it, by their names."""


class Work(eqx.Module):
    """The work of outer steps, by which [`metaopt.study.compare`][] keeps a budget.

    **Attributes:**

    - `gradients`: evaluations of a gradient of the inner loss (or of the field of another
        inner problem), those made again for a reverse pass included, and of the gradient
        of the outer loss; an array of shape `(num_steps,)`. A step of an inner solver
        counts as one evaluation, with a line search as well.
    - `products`: products with second derivatives of the inner loss, with the derivative
        in `hyper` that comes along; of the same shape.
    """

    gradients: np.ndarray
    products: np.ndarray

    def __add__(self, other: "Work") -> "Work":
        """The work of both."""
        return Work(self.gradients + other.gradients, self.products + other.products)

    def total(self) -> "Work":
        """The work of all steps, as arrays of shape `()`."""
        return Work(np.sum(self.gradients), np.sum(self.products))


def inner_steps(columns: Columns) -> np.ndarray:
    """The inner steps of each outer step, as floats."""
    return np.asarray(columns["num_inner_steps"], float)


@runtime_checkable
class CountsWork(Protocol):
    """An adjoint or a bilevel solver that counts its work, for budgets."""

    def work(self, columns: Columns, num_hyper: int) -> Work | None:
        """Count the work of outer steps, from the history of a run.

        **Arguments:**

        - `columns`: columns of the history, such as `num_inner_steps`.
        - `num_hyper`: how many numbers `hyper` holds.

        **Returns:**

        A [`metaopt.extend.Work`][], or `None` where it is not known.
        """
        ...
