"""An estimate of the error of an implicit hypergradient, by correcting it."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from .._core._results import mask_result, RESULTS
from .._core._tree import (
    divided,
    tree_scaled_norm,
    tree_sub,
)
from .._core._validate import check_tolerance
from ._correction import corrected_once, known_subspace, lengths_beside
from ._error import AbstractErrorEstimate, ErrorEstimate


class DualWeighted(AbstractErrorEstimate):
    r"""Estimate the error of the hypergradient by correcting it.

    A Newton step from the inner solution and one more solve for the remaining right-hand
    side of the linear system give a better hypergradient. Its difference from the one in
    question estimates the error of the latter. The two corrections are solved to a rough
    tolerance and start from what the solution of the linear system already knows of the
    inverse, so that they cost a fraction of the products of that solve. Not a bound.

    A [`metaopt.linear.GaussNewton`][] operator is used to solve for the corrections, and
    the residuals are those of the exact Jacobian. The estimate is as rough as the operator.

    **Arguments:**

    - `rtol`: the relative residual to which each of the two corrections is solved.

    ??? cite "Source"

        Becker, Rannacher: *An optimal control approach to a posteriori error estimation
        in finite element methods*, 2001, applied to both systems.
    """

    rtol: float = eqx.field(default=0.3, static=True)
    is_bound: ClassVar[bool] = False

    def __check_init__(self):
        check_tolerance(self.rtol, "rtol", optional=False)
        if not 0 < self.rtol < 1:
            raise ValueError(
                f"`rtol` must lie between 0 and 1, being relative; got {self.rtol!r}."
            )

    def __call__(self, here, linear, gradient, at, hyper):
        w = linear.value
        knows, asked = known_subspace(here, linear)
        better = corrected_once(here, here, w, knows, at, self.rtol)
        old, new = better.with_old_solution, better.gradient
        length = lengths_beside(gradient)
        # The two parts of the correction can cancel by chance, and their own errors do not.
        # The residual that the Newton step leaves tells how large these are.
        parts = length(tree_sub(old, gradient)) + length(tree_sub(new, old))
        before = jnp.where(better.residual > 0, better.residual, 1)
        after = tree_scaled_norm(divided(better.there.system.residual, before))
        error = length(tree_sub(new, gradient))
        error = error + _OF_PARTS * jnp.minimum(after, 1) * parts
        floor = jnp.finfo(error.dtype).eps * length(new)
        unsolved = linear.residual * tree_scaled_norm(here.in_params)
        share = unsolved / jnp.where(better.left > 0, better.left, 1)
        num_products = asked + better.num_products
        indefinite = mask_result(better.indefinite, RESULTS.linear_indefinite)
        return ErrorEstimate(
            error + floor, share, num_products, better.min_curvature, indefinite
        )


_OF_PARTS = 0.5  # of the two parts of the correction, taken for their own error
