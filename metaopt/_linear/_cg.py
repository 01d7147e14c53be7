"""Conjugate gradients."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from .._core._tree import (
    tree_axpy,
    tree_dtype,
    tree_num_bytes,
    tree_scale,
)
from .._core._types import Vector
from .._core._validate import check_count, check_tolerance
from ._base import (
    AbstractToleranceSolver,
    check_square,
    check_structures,
    check_tolerances,
    relative,
    reported,
    steps_left_out,
)
from ._cg_method import Method
from ._preconditioned import AbstractPreconditionedSolver
from ._preconditioner import AbstractPreconditioner
from ._prepare import prepare
from ._rough_cg import RoughCG
from ._system import System


_MAX_KEPT = 100  # directions
_MIN_KEPT = 10
_MAX_KEPT_BYTES = 4 * 2**20


class CG(AbstractPreconditionedSolver, AbstractToleranceSolver):
    r"""Conjugate gradients, for the Hessian of an inner loss at its minimum.

    Needs about $\sqrt{\kappa}$ steps, $\kappa$ being the condition number, and one
    product in each. Use it wherever the operator is symmetric and positive definite,
    unless it is small enough for [`metaopt.Dense`][]. Do not use it for fixed points or
    roots, whose operator is not symmetric ([`metaopt.GMRES`][]).

    The curvature $p^T A p$ is looked at in every step. If it is not positive the solve
    stops with the result `linear_indefinite`: a solution found on the other side of
    negative curvature would not be the response of a minimum. Whoever wants that of another
    stationary point asks for it with [`metaopt.linear.MINRES`][]. A solve is successful
    once the *true* residual $b - A x$ meets $\|b - A x\| \le rtol \|b\| + atol$, the norms
    being Euclidean; it is looked at every 50 steps and before it is believed.

    **Arguments:**

    - `rtol`: relative tolerance, or `None` for exactly `max_steps` steps: a number of steps
        asked for by name is no failure. A tolerance below the precision of the vector is
        raised to 10 units of rounding, with a warning.
    - `atol`: absolute tolerance.
    - `max_steps`: the most steps to take.
    - `damping`: solves with $A + damping \cdot I$ instead. It makes the operator more
        definite and the answer wrong: damping of the size of the smallest eigenvalue
        can cost half of the hypergradient. The residual reported is that without it.
    - `preconditioner`: an approximation of the inverse of $A$, itself symmetric and
        positive definite: one that is made from products with $A$ or from what the inner
        solver knows ([`metaopt.linear.DiagonalEstimate`][], [`metaopt.linear.LowRank`][],
        [`metaopt.linear.SecondMoment`][]), a function from vectors to vectors, or a
        `lineax` operator.

    ??? cite "Source"

        Hestenes, Stiefel: *Methods of conjugate gradients for solving linear systems*,
        1952. Replacing the residual: van der Vorst, Ye: *Residual replacement
        strategies for Krylov subspace iterative methods*, 2000.
    """

    rtol: float | None = eqx.field(default=1e-5, static=True)
    atol: float = eqx.field(default=0.0, static=True)
    max_steps: int = eqx.field(default=1000, static=True)
    damping: float = eqx.field(default=0.0, static=True)
    preconditioner: (
        AbstractPreconditioner
        | Callable[[Vector], Vector]
        | lx.AbstractLinearOperator
        | None
    ) = None
    num_kept: int = eqx.field(default=0, static=True, repr=False)
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = True

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_count(self.max_steps, "max_steps")
        check_tolerance(self.damping, "damping", optional=False)
        made = (AbstractPreconditioner, lx.AbstractLinearOperator)
        if self.preconditioner is None or isinstance(self.preconditioner, made):
            return
        if not callable(self.preconditioner) or isinstance(self.preconditioner, type):
            raise ValueError(
                "`preconditioner` must be one of metaopt, such as "
                "`metaopt.linear.DiagonalEstimate()`, a function from vectors to vectors "
                f"or a `lineax` operator; got {self.preconditioner!r}."
            )

    @property
    def left_out(self):
        damping = (f"the damping of {self.damping:g}",) if self.damping else ()
        return damping + steps_left_out(self.rtol, self.max_steps)

    def check(self, operator):
        check_square("CG", operator)
        if not lx.is_positive_semidefinite(operator):
            promise = "symmetry only" if lx.is_symmetric(operator) else "nothing"
            raise ValueError(
                "`CG` needs a symmetric positive (semi)definite operator, and this one "
                f"promises {promise}. For saddles use `metaopt.linear.MINRES()`, which "
                "needs symmetry only; for fixed points and roots `metaopt.GMRES()`, "
                "`metaopt.linear.BiCGStab()`, `metaopt.linear.NormalCG()`, "
                "`metaopt.Neumann(20)` or "
                "`metaopt.Dense()`; if you know that it is definite, give it the tag "
                "`lineax.positive_semidefinite_tag`."
            )

    @property
    def relative_tolerance(self):
        return self.rtol

    def with_rtol(self, rtol):
        return dataclasses.replace(self, rtol=rtol, damping=0.0)

    def rough(self, rtol):
        if self.preconditioner is not None:
            return self.with_rtol(rtol)
        return RoughCG(rtol, self.max_steps)

    def keeping_directions(self, vector):
        # A direction and its product are kept.
        room = _MAX_KEPT_BYTES // max(2 * tree_num_bytes(vector), 1)
        num_kept = min(room, _MAX_KEPT, self.max_steps)
        # A few of many directions know little.
        useful = num_kept >= min(_MIN_KEPT, self.max_steps) and not self.damping
        return dataclasses.replace(self, num_kept=num_kept if useful else 0)

    def damped(self, operator):
        if not self.damping:
            return operator
        damping = jnp.asarray(self.damping, tree_dtype(operator.in_structure()))
        return lx.FunctionLinearOperator(
            lambda x: tree_axpy(damping, x, operator.mv(x)),
            operator.in_structure(),
        )

    def solve(self, operator, vector, start=None, tolerance=None):
        self.check(operator)
        check_structures(operator, vector, start)
        system = System("CG", operator, vector, start, self.rtol, self.atol, tolerance)
        # Ready already, unless it is used without an adjoint.
        ready, _, num_products = prepare(self, system.operator)
        assert isinstance(ready, CG)
        method = Method(ready, system)
        state = method.run()
        series = state.series
        solution = reported(
            tree_scale(system.scale, series.x),
            method.result(state),
            relative(state.residual, system.size),
            series.num_steps,
            state.num_products + num_products,
            series.min_curvature,
        )
        return dataclasses.replace(solution, subspace=series.kept)
