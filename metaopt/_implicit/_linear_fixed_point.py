"""Linear systems, solved as fixed points."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import lineax as lx

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import (
    divided,
    scale_and_norm,
    tree_add,
    tree_norm,
    tree_scale,
    tree_where,
    tree_zeros_like,
)
from .._core._validate import check_kind
from .._data import FullBatch
from .._linear import (
    AbstractToleranceSolver,
    check_square,
    check_structures,
    floored_rtol,
    how_it_ended,
    relative,
    reported,
    steps_left_out,
)
from .._problem import FixedPointProblem
from .._solver import (
    AbstractFixedPointSolver,
    AbstractSingleMapSolver,
    Anderson,
    Examples,
    InnerSolve,
)


_MARGIN = 0.8


class LinearFixedPoint(AbstractToleranceSolver):
    r"""Solves a linear system $A x = b$ as the fixed point of $x + b - A x$, by any solver
    of fixed points.

    At a fixed point $A = I - J^T$, and the map is $b + J^T x$: what an equilibrium layer
    needs for its derivative, found like the equilibrium itself. It can stop after any
    step, where [`metaopt.GMRES`][] takes whole cycles. Not for the Hessian of a loss,
    for which this map is no contraction: use [`metaopt.CG`][].

    The solve is successful once $\|b - A x\| \le rtol \|b\|$, with the `rtol` of the
    solver; its `atol` is not used.

    **Arguments:**

    - `solver`: [`metaopt.Anderson`][], [`metaopt.Broyden`][] or [`metaopt.Picard`][]. With
        `rtol=None` it takes exactly `num_steps` steps, which is no failure.

    **Raises:**

    `ValueError` for a solver of another kind.

    ??? cite "Source"

        Bai, Kolter, Koltun: *Deep equilibrium models*, 2019.
    """

    solver: AbstractFixedPointSolver = Anderson(rtol=1e-4)
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = False

    def __check_init__(self):
        check_kind(
            self.solver,
            AbstractFixedPointSolver,
            "solver",
            "metaopt.Anderson(rtol=1e-4)",
        )
        if not isinstance(self.solver, AbstractSingleMapSolver):
            raise ValueError(
                "`solver` must be `metaopt.Anderson`, `metaopt.Broyden` or "
                f"`metaopt.Picard`, with one product in each step; got `{self.solver!r}`."
            )
        if self.solver.rtol == 0:
            raise ValueError(
                "The `rtol` of the solver must be positive, or `None` for a fixed number "
                "of steps; got 0."
            )

    @property
    def relative_tolerance(self):
        return self.solver.rtol

    @property
    def left_out(self):
        most, budget = self.solver.num_steps, self.solver.budget
        if budget is not None and self.solver.rtol is None:
            return (f"what more steps than its budget, at most {most}, would add",)
        return steps_left_out(self.solver.rtol, most)

    def check(self, operator):
        check_square("LinearFixedPoint", operator)

    def with_rtol(self, rtol):
        solver = dataclasses.replace(self.solver, rtol=rtol)
        return dataclasses.replace(self, solver=solver)

    def rough(self, rtol):
        return self.with_rtol(rtol)

    def keeping_directions(self, vector):
        return self

    def solve(self, operator, vector, start=None, tolerance=None):
        self.check(operator)
        check_structures(operator, vector, start)
        operator = lx.linearise(operator)
        solver, rtol = self.solver, self.solver.rtol
        scale, size = scale_and_norm(vector)
        divisor = jnp.where(size > 0, size, 1)
        if rtol is not None:
            rtol = floored_rtol(rtol, "LinearFixedPoint", vector)
            if tolerance is not None:
                # A shorter right-hand side, for which the same number is a looser one.
                divisor *= jnp.maximum(tolerance.astype(size.dtype) / rtol, 1)
            parts = math.prod(Examples.of(vector, solver.per_example).shape)
            # The residual is computed anew in the end, with other rounding.
            within = _MARGIN * rtol / parts**0.5
            solver = dataclasses.replace(solver, rtol=0.0, atol=within)

        def shortened(x):
            return divided(divided(x, scale), divisor)

        def remaining(x):
            product = operator.mv(x)
            return jax.tree.map(lambda r, p: r - p.astype(r.dtype), b, product)

        b = shortened(vector)
        x = tree_zeros_like(b)
        if start is not None:
            start = shortened(start)
            # Comparing with NaN is false.
            useful = tree_norm(remaining(start)) <= tree_norm(b)
            x = tree_where(useful, start, x)
        problem = FixedPointProblem(lambda x, hyper, batch: tree_add(x, remaining(x)))
        key, nothing = jax.random.key(0), jnp.zeros(())
        inner = InnerSolve(problem, solver, FullBatch(None), key)
        outcome = inner.primal(x, nothing, None)
        healthy = jnp.isfinite(size)
        residual = tree_norm(remaining(outcome.params))
        # Nothing is better than what is further from the solution.
        useful = healthy & (residual <= tree_norm(b))
        x = tree_where(useful, outcome.params, tree_zeros_like(b))
        residual = jnp.where(useful, residual, tree_norm(b))
        converged = healthy & (useful | (size == 0))
        if rtol is not None:
            converged &= residual <= rtol
        diverged = healthy & (outcome.result == RESULTS.inner_diverged)
        ended = how_it_ended(
            converged,
            ~healthy | (outcome.result == RESULTS.inner_nonfinite),
            outcome.result == RESULTS.inner_stagnation,
            rtol,
        )
        result = first_failure(mask_result(diverged, RESULTS.linear_diverged), ended)
        return reported(
            tree_scale(scale, tree_scale(divisor, x)),
            result,
            relative(residual, tree_norm(b)),
            outcome.num_steps,
            outcome.num_steps + 1 + int(start is not None),
        )
