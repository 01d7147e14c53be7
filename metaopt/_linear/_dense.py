"""Factorising the whole matrix."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import (
    divided,
    scale_and_norm,
    tree_all_finite,
    tree_dtype,
    tree_norm,
    tree_scale,
    tree_size,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from .._core._validate import check_count
from ._base import (
    AbstractLinearSolver,
    check_square,
    check_structures,
    coarsest_eps,
    relative,
    reported,
)
from ._promotion import cast_up, in_auto_axes, promoted


class Dense(AbstractLinearSolver):
    r"""An LU factorisation of the operator's matrix, for small systems.

    Exact to rounding, whatever the conditioning, for any nonsingular operator. If the
    operator promises to be positive semidefinite its eigenvalues are computed, and a
    negative one is the result `linear_indefinite`. Use it to check other methods, and for
    up to some hundred unknowns. It makes the matrix from as many products as there are
    unknowns, all at once.

    **Arguments:**

    - `max_size`: the largest number of unknowns to make a matrix for.
    """

    max_size: int = eqx.field(default=4096, static=True)
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = True

    def __check_init__(self):
        check_count(self.max_size, "max_size")

    @property
    def left_out(self):
        return ()

    def check(self, operator):
        check_square("Dense", operator)
        structure = operator.in_structure()
        size = tree_size(structure)
        if size > self.max_size:
            num_bytes = size**2 * tree_dtype(structure).itemsize
            raise ValueError(
                f"`Dense` would make a matrix of {size} x {size} numbers, which takes "
                f"{num_bytes:,} bytes ({num_bytes / 2**30:.3g} GiB). Use "
                "`metaopt.CG()` for the Hessian of a loss and `metaopt.GMRES()` "
                "otherwise, which need products only; or allow it by name with "
                f"`metaopt.Dense(max_size={size})`."
            )

    def solve(self, operator, vector, start=None, tolerance=None):
        """As for every linear solver; `start` is of no use here, and is ignored."""
        self.check(operator)
        check_structures(operator, vector, start)
        operator = lx.linearise(operator)
        scale, size = scale_and_norm(vector)
        b = divided(vector, scale)
        method = lx.LU()
        semidefinite = lx.is_positive_semidefinite(operator)

        def run(full, b):
            state = method.init(full, {})
            x, _, _ = method.compute(state, b, {})
            # In ascending order: the smallest and the largest.
            return x, jnp.linalg.eigvalsh(full.as_matrix()) if semidefinite else None

        full = promoted(operator, vector)
        x, eigenvalues = in_auto_axes(run, full, cast_up(b))
        x = jax.tree.map(lambda a, b: a.astype(b.dtype), x, vector)
        finite = tree_all_finite(x) & jnp.isfinite(size)
        x = tree_where(finite & (size > 0), x, tree_zeros_like(x))
        residual = relative(tree_norm(tree_sub(b, operator.mv(x))), size)
        # LU is backward stable: it leaves rounding only, unless there is no solution.
        regular = finite & (residual <= coarsest_eps(vector) ** 0.5)
        smallest = jnp.full((), jnp.inf, size.dtype)
        indefinite = jnp.asarray(False)
        if eigenvalues is not None:
            smallest = eigenvalues[0].astype(size.dtype)
            rounding = 10 * coarsest_eps(vector) * jnp.abs(eigenvalues[-1])
            indefinite = smallest < -tree_size(vector) * rounding
        return reported(
            tree_scale(scale, x),
            first_failure(
                mask_result(~regular, RESULTS.linear_nonfinite),
                mask_result(indefinite, RESULTS.linear_indefinite),
            ),
            residual,
            1,
            tree_size(vector) + 1,
            smallest,
        )
