"""SHINE: reuse the quasi-Newton inverse of the forward solve."""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from .._core._results import mask_result, RESULTS
from .._core._tree import (
    divided,
    scale_and_norm,
    tree_norm,
    tree_scale,
    tree_where,
    tree_zeros_like,
)
from .._core._types import Vector
from .._core._validate import check_kind
from ._base import (
    AbstractLinearSolver,
    AbstractPreparedSolver,
    check_square,
    check_structures,
    relative,
    reported,
)
from ._inverse import AbstractInverse


class SHINE(AbstractPreparedSolver):
    r"""Reuses the inverse of the forward pass: the approximation of $(I - J)^{-1}$ that
    [`metaopt.Broyden`][] has built is applied to the right-hand side.

    Two products, whatever the system, which say how good it is: the inverse is used where
    it leaves less of the right-hand side than the one-step (Jacobian-free) estimate does,
    and that estimate otherwise. Biased, because the inverse has learned the directions
    of the forward pass and not those of the loss: use it where the derivative takes most
    of the time and [`metaopt.linear.LinearFixedPoint`][] is too slow, or as its start.

    **Arguments:**

    - `refine`: a linear solver that goes on from there, to its own tolerance or for a fixed
        number of steps; by default none.
    - `inverse`: the inverse; by default the one that the inner solver leaves.

    **Raises:**

    `ValueError` where the inner solver leaves no inverse.

    ??? cite "Source"

        Ramzi, Mannel, Bai, Starck, Ciuciu, Moreau: *SHINE: SHaring the INverse Estimate
        from the forward pass for bi-level optimization and implicit models*, 2022.
        Different here: the choice between the two estimates is by their residuals.
    """

    refine: AbstractLinearSolver | None = None
    inverse: AbstractInverse | None = None
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = False

    def __check_init__(self):
        if self.refine is not None:
            check_kind(self.refine, AbstractLinearSolver, "refine", "metaopt.GMRES()")
        if isinstance(self.refine, SHINE):
            raise ValueError(
                "`refine` must be a linear solver that improves what it is given, such as "
                "`metaopt.linear.LinearFixedPoint()`; got another `SHINE`."
            )

    @property
    def left_out(self):
        if self.refine is not None:
            return self.refine.left_out
        return ("what the inverse of the forward pass does not know of the Jacobian",)

    def check(self, operator):
        check_square("SHINE", operator)
        if self.refine is not None:
            self.refine.check(operator)

    def initial_state(self, vector):
        return None

    def prepared(self, operator, state, key, solver_state):
        """Take the inverse in the state of the inner solver, unless it was given one.

        **Arguments:** as for every linear solver that is prepared.

        **Raises:**

        `ValueError` where there is none.
        """
        none = jnp.zeros((), jnp.int32)
        if self.inverse is not None:
            return self, None, none
        is_inverse = lambda x: isinstance(x, AbstractInverse)
        found = filter(is_inverse, jax.tree.leaves(solver_state, is_leaf=is_inverse))
        inverse = next(found, None)
        if inverse is None:
            raise ValueError(_NO_INVERSE)
        return dataclasses.replace(self, inverse=inverse), None, none

    def transposed(self):
        if self.inverse is None:
            return self
        return dataclasses.replace(self, inverse=self.inverse.transposed())

    def solve(self, operator, vector, start=None, tolerance=None):
        """As for every linear solver; the inverse takes the place of a `start`."""
        self.check(operator)
        check_structures(operator, vector, start)
        if self.inverse is None:
            raise ValueError(_NO_INVERSE)
        operator = lx.linearise(operator)
        scale, size = scale_and_norm(vector)
        b = divided(vector, scale)

        def left(x: Vector) -> Vector:
            product = operator.mv(x)
            return jax.tree.map(lambda r, p: r - p.astype(r.dtype), b, product)

        shared = jax.tree.map(lambda a, r: a.astype(r.dtype), self.inverse.apply(b), b)
        by_one_step, by_inverse = left(b), left(shared)
        # Comparing with NaN is false.
        better = self.inverse.norm(by_inverse) <= self.inverse.norm(by_one_step)
        x = self.inverse.choose(better, shared, b)
        # Fixed points that one problem holds do not act on each other.
        residual = tree_norm(self.inverse.choose(better, by_inverse, by_one_step))
        if self.refine is not None:
            start = tree_scale(scale, x)
            refined = self.refine.solve(operator, vector, start, tolerance)
            return eqx.tree_at(lambda s: s.num_products, refined, refined.num_products + 2)
        healthy = jnp.isfinite(size) & jnp.isfinite(residual)
        x = tree_where(healthy & (size > 0), x, tree_zeros_like(x))
        return reported(
            tree_scale(scale, x),
            mask_result(~healthy, RESULTS.linear_nonfinite),
            relative(residual, size),
            0,
            2,
        )


_NO_INVERSE = (
    "`SHINE` uses the inverse that a quasi-Newton method leaves behind, and the inner "
    "solver leaves none. Solve with `metaopt.Broyden()`, or use "
    "`metaopt.linear.LinearFixedPoint()`."
)
