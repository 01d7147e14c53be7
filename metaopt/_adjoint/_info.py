"""The adjoints' parts of a report."""

import equinox as eqx

from .._core._types import BoolScalar, FloatScalar, IntScalar
from .._report import (
    AbstractDerivativeInfo,
    error_text,
    flat_text,
    is_infinite,
    is_positive,
    number,
    yes_or_no,
)
from ._explosion import Growth


class PathInfo(AbstractDerivativeInfo):
    """The report of an adjoint that follows the path of the inner solver.

    **Attributes:**

    - `left_out`: what the derivative leaves out by construction, in words.
    - `error`: a bound on the error that this leaves, as a Euclidean norm, or `None` where
        none is known.
    - `num_flat`: the number of entries of inner gradients, summed over the steps, at which
        the derivative of the step was left out, because they are zero and the slope of
        the update there, such as the `1 / eps` of Adam, says nothing about any other
        gradient (see [`metaopt.Descent`][]). No harm where they are zero whatever
        `hyper` is. `None` where no derivative can be left out.
    - `growth`: how the derivative grew along the path, or `None` where no derivative
        passes back along it.
    """

    left_out: tuple[str, ...] = eqx.field(default=(), static=True)
    error: FloatScalar | None = None
    num_flat: IntScalar | None = None
    growth: Growth | None = None

    @property
    def error_is_bound(self) -> bool:
        """Whether the error cannot be larger, which is so of a known one."""
        return self.error is not None

    def accuracy(self):
        if self.error is None:
            return []
        return [("hypergradient error", error_text(self.error, is_bound=True))]

    def rows(self):
        rows = [] if self.growth is None else self.growth.rows()
        if is_positive(self.num_flat):
            rows.append(("left out", flat_text(self.num_flat)))
        return rows

    def scalars(self):
        known = {} if self.growth is None else self.growth.scalars()
        if self.num_flat is not None:
            known["num_flat"] = self.num_flat
        return known


class ReversibleInfo(AbstractDerivativeInfo):
    """The report of [`metaopt.ReversibleAdjoint`][].

    **Attributes:**

    - `returned_to_start`: whether steps that were undone ended where they had begun, bit
        for bit; `None` where they are undone to rounding.
    - `stored_bits`: the bits stored for each step and parameter, or `None`.
    - `drift`: how far from the start steps that were undone to rounding have led,
        relative to the norm of the start or of the end, whichever is larger; or `None`.
    - `growth`: how the derivative grew along the path, or `None` where that is not
        measured.
    """

    returned_to_start: BoolScalar | None
    stored_bits: FloatScalar | None
    drift: FloatScalar | None
    growth: Growth | None = None
    left_out: tuple[str, ...] = eqx.field(default=(), static=True)

    def accuracy(self):
        rows = []
        if self.returned_to_start is not None:
            rows.append(("returned to start", yes_or_no(self.returned_to_start)))
        if self.drift is not None:
            rows.append(("drift on the way back", number(self.drift)))
        return rows

    def rows(self):
        rows = []
        if self.stored_bits is not None:
            rows.append(("bits per step and parameter", number(self.stored_bits)))
        return rows + ([] if self.growth is None else self.growth.rows())

    def scalars(self):
        known = {} if self.growth is None else self.growth.scalars()
        own = {"stored_bits": self.stored_bits, "drift": self.drift}
        return known | {name: value for name, value in own.items() if value is not None}


class ImplicitInfo(AbstractDerivativeInfo):
    """The report of [`metaopt.ImplicitAdjoint`][].

    **Attributes:**

    - `left_out`: what the derivative leaves out by construction, in words.
    - `inner_error`: an estimate of the relative error of the inner solution. An estimate,
        not a bound.
    - `linear_residual`: the relative residual of the linear system.
    - `num_linear_steps`: the steps of the linear solver.
    - `num_products`: the products with the Hessian (or what stands for it) that solving
        the linear system took, those of checks and of a preconditioner included.
    - `min_curvature`: the smallest curvature that the linear solver met; infinite where
        it does not look.
    - `tolerance`: what the linear system was solved to at most, and the error of the inner
        solution that was accepted, because the outer loop accepts that much at this step;
        `None` without a [`metaopt.PolynomialTolerance`][] or the like. The linear solver
        may stop before it meets negative curvature or slow directions of the inner
        solution.
    - `error`: the Euclidean norm of the error of the hypergradient, or `None` where
        nobody asked for it.
    - `error_is_bound`: whether the error cannot be larger; otherwise it is an estimate.
    - `allowed_error`: the largest such error that is accepted, or `None` where it is not
        judged: where the linear solver leaves something out by request, or `inner_rtol`
        was given.
    - `num_error_products`: the products with the Hessian that the error took, beside
        `num_products`, or `None`.
    """

    inner_error: FloatScalar
    linear_residual: FloatScalar
    num_linear_steps: IntScalar
    num_products: IntScalar
    min_curvature: FloatScalar
    tolerance: FloatScalar | None
    error: FloatScalar | None
    allowed_error: FloatScalar | None
    num_error_products: IntScalar | None
    error_is_bound: bool = eqx.field(static=True)
    left_out: tuple[str, ...] = eqx.field(static=True)

    def accuracy(self):
        rows = []
        if self.error is not None:
            text = error_text(self.error, self.error_is_bound, self.allowed_error)
            rows.append(("hypergradient error", text))
        rows.append(("inner relative error", f"{number(self.inner_error)} (est.)"))
        return rows

    def rows(self):
        rows = [
            ("linear steps", number(self.num_linear_steps)),
            ("linear products", number(self.num_products)),
        ]
        if self.num_error_products is not None:
            rows.append(("products for its error", number(self.num_error_products)))
        rows.append(("linear residual", number(self.linear_residual)))
        if not is_infinite(self.min_curvature):
            rows.append(("smallest curvature", number(self.min_curvature)))
        if self.tolerance is not None:
            rows.append(("tolerance of this step", number(self.tolerance)))
        return rows

    def scalars(self):
        names = "inner_error", "linear_residual", "num_linear_steps", "num_products"
        optional = "error", "num_error_products", "tolerance"
        known = {name: getattr(self, name) for name in (*names, *optional)}
        return {name: value for name, value in known.items() if value is not None}
