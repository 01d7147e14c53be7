"""The bias of a derivative, in words and in numbers."""

from collections.abc import Callable

import equinox as eqx

from .._core._types import FloatScalar, Hyper


Bound = Callable[[Hyper, FloatScalar], FloatScalar]
"""`bound(hyper, outer_slope)`: a bound on the error of a hypergradient, from the norm of
the derivative of the outer loss in the params."""


class Bias(eqx.Module):
    """The part of a hypergradient that an adjoint leaves out by construction.

    `Bias()` is that of an exact adjoint.

    **Arguments:**

    - `left_out`: the parts that are left out, in words, as the report prints them. Empty
        for an exact derivative.
    - `bound`: `bound(hyper, outer_slope)` bounds the Euclidean norm of the error that this
        leaves, given the norm of the derivative of the outer loss in the params; `None`
        where no bound is known.
    """

    left_out: tuple[str, ...] = eqx.field(default=(), static=True)
    bound: Bound | None = None

    def error(
        self, hyper: Hyper, outer_slope: Callable[[], FloatScalar]
    ) -> FloatScalar | None:
        """The bound at `hyper`, or `None`.

        **Arguments:**

        - `hyper`: the outer variables.
        - `outer_slope`: returns the norm of the derivative of the outer loss in the params.
            It is called where there is a bound to compute.
        """
        return None if self.bound is None else self.bound(hyper, outer_slope())
