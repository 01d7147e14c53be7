"""The parts of a report: each knows its printed rows and its columns in the history."""

import abc

import equinox as eqx
import jax
import numpy as np

from .._core._types import Aux, FloatScalar, IntScalar
from ._table import is_known, is_positive, norm, number


class AbstractInfo(eqx.Module):
    """A part of a report."""

    @abc.abstractmethod
    def rows(self) -> list[tuple[str, str]]:
        """The rows of the printed table: pairs of a name and a text."""

    @abc.abstractmethod
    def scalars(self) -> dict[str, jax.Array]:
        """The scalars that the history of a run records, by the names of their columns."""


class AbstractDerivativeInfo(AbstractInfo):
    """The part of a report that an adjoint, or a bilevel solver, says of its derivative.

    **Attributes:**

    - `left_out`: what the derivative leaves out by construction, in words: it is biased
        unless this is empty.
    """

    left_out: eqx.AbstractVar[tuple[str, ...]]

    @abc.abstractmethod
    def accuracy(self) -> list[tuple[str, str]]:
        """The rows on how accurate the derivative is, which head those of `rows` and
        stand in the table of a whole run as well."""


class OuterInfo(AbstractInfo):
    """The outer loss and the size of its hypergradient.

    **Attributes:**

    - `loss`, `aux`: the outer loss and its auxiliary output.
    - `hypergradient_norm`: the Euclidean norm of the hypergradient.
    - `num_zeros`: how many entries of the hypergradient are exactly zero. The reach of an
        adjoint is known for each leaf of `hyper`, and not within one.
    - `unreached`: the names of the leaves of `hyper` that influence nothing; their
        derivative is exactly zero.
    - `held_constant`: the names of the leaves of `hyper` that have influence and no
        derivative, because the losses read them behind `jax.lax.stop_gradient` alone, as
        `equinox.nn.Dropout` does its rate.
    """

    loss: FloatScalar
    aux: Aux
    hypergradient_norm: FloatScalar
    num_zeros: IntScalar
    unreached: tuple[str, ...] = eqx.field(default=(), static=True)
    held_constant: tuple[str, ...] = eqx.field(default=(), static=True)

    def rows(self):
        rows = [
            ("outer loss", number(self.loss)),
            ("hypergradient norm", norm(self.hypergradient_norm)),
        ]
        if is_positive(self.num_zeros):
            rows.append(("entries exactly zero", number(self.num_zeros)))
        return rows

    def scalars(self):
        return {"outer_loss": self.loss, "hypergradient_norm": self.hypergradient_norm}


class InnerInfo(AbstractInfo):
    """The inner solve of one hypergradient.

    **Attributes:**

    - `loss`: the inner loss at the inner solution, on the batch of the last step; `None`
        where the inner problem has none.
    - `residual`: the norm of the optimality (of the gradient of the inner loss) at the
        inner solution; on the batch of the last step where the adjoint follows the path
        of the solver, on all of the data where it is implicit; `None` where a single-loop
        method does not compute it.
    - `num_steps`: the steps that the inner solver took.
    - `failed_step`: the first inner step at which the gradient or the params were not
        finite, or -1; `num_steps` where that is the loss at the solution alone.
    - `carried`: the values that the inner solve took over from the outer step before, and
        those that it did not, in words; empty where there is nothing to say.
    - `left_out`: the part of the path that lies in earlier outer steps and is left out of
        the derivative, in words; empty where there is none.
    """

    loss: FloatScalar | None
    residual: FloatScalar | None
    num_steps: IntScalar
    failed_step: IntScalar
    carried: str = eqx.field(default="", static=True)
    left_out: tuple[str, ...] = eqx.field(default=(), static=True)

    def rows(self):
        rows = [("inner steps", number(self.num_steps))]
        if self.loss is not None:
            rows.append(("inner loss", number(self.loss)))
        if self.residual is not None:
            rows.append(("inner residual", number(self.residual)))
        if is_known(self.failed_step) and np.any(np.asarray(self.failed_step) >= 0):
            rows.append(("failed at step", number(self.failed_step)))
        return rows

    def scalars(self):
        known = {} if self.residual is None else {"inner_residual": self.residual}
        return {**known, "num_inner_steps": self.num_steps}
