"""The Neumann series."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import (
    divided,
    scale_and_norm,
    tree_all_finite,
    tree_axpy,
    tree_dtype,
    tree_norm,
    tree_scale,
    tree_sharded_like,
    tree_structs,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from .._core._types import FloatScalar, Vector
from .._core._validate import check_count, check_tolerance
from ._base import (
    AbstractLinearSolver,
    check_square,
    check_structures,
    coarsest_eps,
    relative,
    reported,
)


_NUM_POWER_STEPS = 10
_POWER_SAFETY = 1.2


class Neumann(AbstractLinearSolver):
    r"""The Neumann series $x = s \sum_{j=0}^K (I - s A)^j b$, cut after $K$ products.

    At a fixed point, where $A = I - J$ and $s = 1$, it is what unrolling the last
    $K + 1$ steps gives, and for $K = 0$ the Jacobian-free estimate. At the minimum of a
    loss the same holds for gradient descent with the learning rate $s$. Use it where
    $J$ contracts well, or to reproduce published results; it needs about $\kappa$
    products, $\kappa$ being the condition number, where [`metaopt.CG`][] needs
    $\sqrt{\kappa}$, so do not use it for the Hessian of a loss otherwise.

    A number of terms is asked for by name, so a series that is cut early is successful,
    and `residual` says how good it is. One whose terms grow has the result
    `linear_diverged`.

    **Arguments:**

    - `num_terms`: the number of terms after the first, each of which is one product.
    - `scale`: the step $s$. The series converges if the eigenvalues of $s A$ are within
        1 of 1; for a definite $A$, if $s < 2 / L$ with $L$ the largest eigenvalue. By
        default 1 for operators that are not symmetric, and otherwise $1 / (1.2 L)$ with
        $L$ from 10 steps of power iteration, which are 10 products more.

    ??? cite "Source"

        Lorraine, Vicol, Duvenaud: *Optimizing millions of hyperparameters by implicit
        differentiation*, AISTATS 2020. For `num_terms=0`: Fung et al., *JFB:
        Jacobian-free backpropagation for implicit networks*, AAAI 2022.
    """

    num_terms: int = eqx.field(static=True)
    scale: float | None = eqx.field(default=None, static=True)
    accepts_indefinite: ClassVar[bool] = False
    checks_curvature: ClassVar[bool] = False

    def __check_init__(self):
        check_count(self.num_terms, "num_terms", 0)
        if self.scale is not None:
            check_tolerance(self.scale, "scale")
            if self.scale == 0:
                raise ValueError(
                    "`scale` must be positive, or `None` for an estimate; got 0."
                )

    @property
    def left_out(self):
        return (f"what more than {self.num_terms} terms of the Neumann series would add",)

    def check(self, operator):
        check_square("Neumann", operator)

    def solve(self, operator, vector, start=None, tolerance=None):
        r"""As for every linear solver. A `start` $x_0$ is the first guess of the
        iteration $x \leftarrow x + s (b - A x)$, which makes the series from $x_0 = 0$;
        any other start costs one product more."""
        self.check(operator)
        check_structures(operator, vector, start)
        operator = lx.linearise(operator)
        step_size, num_products = self._step_size(operator, vector)
        scale, size = scale_and_norm(vector)
        b = divided(vector, scale)

        def remaining(x):
            return tree_sub(b, operator.mv(x))

        if start is None:
            # The first guess of zero leaves the vector itself, without a product.
            x, first = tree_scale(step_size, b), size
        else:
            start = divided(start, scale)
            left = remaining(start)
            x, first = tree_axpy(step_size, left, start), tree_norm(left)
            num_products += 1

        last = first
        if self.num_terms > 0:
            add_term = lambda _, x: tree_axpy(step_size, remaining(x), x)
            x = lax.fori_loop(0, self.num_terms - 1, add_term, x)
            left = remaining(x)
            x, last = tree_axpy(step_size, left, x), tree_norm(left)
        end = tree_norm(remaining(x))
        num_products += self.num_terms + 1

        # The logarithm of the size of a symmetric residual is a convex function of the
        # step: one that grows goes on growing. Others may grow at first, and must have
        # shrunk by the end. Rounding may grow as well, and says nothing.
        rounding = 100 * coarsest_eps(vector)
        before = last if lx.is_symmetric(operator) else first
        grown = (end > (1 + rounding) * before) & (end > rounding * size)
        diverged = (self.num_terms > 0) & (size > 0) & (grown | ~jnp.isfinite(end))
        finite = jnp.isfinite(end)
        # Asked of the solution itself, which has to wait for no product more.
        x = tree_where(tree_all_finite(x), x, tree_zeros_like(x))
        healthy = jnp.isfinite(size) & jnp.isfinite(step_size) & (finite | diverged)
        result = first_failure(
            mask_result(~healthy, RESULTS.linear_nonfinite),
            mask_result(diverged, RESULTS.linear_diverged),
        )
        return reported(
            tree_scale(scale, x),
            result,
            relative(end, size),
            self.num_terms,
            num_products,
        )

    def _step_size(self, operator, vector: Vector) -> tuple[FloatScalar, int]:
        dtype = tree_dtype(vector)
        if self.scale is not None:
            return jnp.asarray(self.scale, dtype), 0
        if not lx.is_symmetric(operator):
            return jnp.ones((), dtype), 0
        largest = largest_eigenvalue(operator, vector)
        step_size = 1 / (_POWER_SAFETY * jnp.where(largest > 0, largest, 1))
        return jnp.where(jnp.isfinite(largest), step_size, jnp.nan), _NUM_POWER_STEPS


def largest_eigenvalue(operator: lx.AbstractLinearOperator, vector: Vector) -> FloatScalar:
    """An estimate from below of the largest size of an eigenvalue of a symmetric
    operator: power iteration, always from the same random vector."""
    leaves, structure = jax.tree.flatten(vector)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves)]
    start = jax.tree.unflatten(structure, leaves)
    start = tree_sharded_like(start, tree_structs(vector))

    def step(_, carry):
        x, length = carry
        x = tree_scale(1 / jnp.where(length > 0, length, 1), x)
        product = operator.mv(x)
        return product, tree_norm(product)

    _, length = lax.fori_loop(0, _NUM_POWER_STEPS, step, (start, tree_norm(start)))
    return length
