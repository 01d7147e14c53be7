"""Newton's method with a Krylov solver, for fixed points."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from .._core._tree import tree_axpy, tree_dtype, tree_structs, tree_sub
from .._core._types import FloatScalar, IntScalar, Vector
from .._core._validate import check_kind
from .._jaxpr._linearise import linear_solve, linearised
from .._linear import AbstractLinearSolver, GMRES
from .._problem import AbstractStatePolicy
from ._examples import Examples
from ._fixed_point import AbstractAcceleratedSolver, Applied, as_budget, Progress


_LOOSEST = 0.1  # what a linear solve may leave
_DECREASE = 1e-4  # of the residual, for each unit of length that is taken
_SHORTEST = 0.01


class NewtonKrylov(AbstractAcceleratedSolver):
    r"""Solves a fixed-point problem by Newton's method, each of whose linear systems

    $$(I - J(z))\, d = step(z) - z$$

    is solved by products with the Jacobian $J$ of the map alone (Knoll and Keyes, 2004), as
    accurately as pays off so far from the solution (Eisenstat and Walker, 1996, the second
    choice). If the residual does not fall the next step goes back by half of the last one.

    Few steps, each of which costs an application of the map and as many products as the
    linear solver takes. Use it for high accuracy, and where [`metaopt.Anderson`][]
    stalls. It sees all of the params as one system: for examples that are solved one by
    one, use `jax.vmap`.

    **Arguments:**

    - `num_steps`: the most steps that are taken.
    - `rtol`, `atol`: stop once the Euclidean norm of `step(params) - params` is at most
        `atol + rtol * norm(params)`. With `rtol=None` all the steps are taken.
    - `linear_solver`: how the systems are solved; one for operators that are not
        symmetric, whose own `rtol` is the most accurate that it is asked for.
    - `budget`: the most steps that are taken in this call, at most `num_steps`: an integer
        array, which can change without compiling again.
    - `state_policy`: what becomes of model state, if the problem has any.

    **Raises:**

    `ValueError` for arguments out of range, and where the inner problem is not a fixed
    point.
    """

    num_steps: int = eqx.field(default=50, static=True)
    rtol: float | None = eqx.field(default=1e-5, kw_only=True, static=True)
    atol: float = eqx.field(default=0.0, kw_only=True, static=True)
    linear_solver: AbstractLinearSolver = eqx.field(
        default=GMRES(rtol=1e-3, restart=10), kw_only=True
    )
    budget: IntScalar | None = eqx.field(default=None, converter=as_budget, kw_only=True)
    state_policy: AbstractStatePolicy | None = eqx.field(default=None, kw_only=True)
    per_example: bool = eqx.field(default=False, init=False, static=True)

    def __check_init__(self):
        check_kind(
            self.linear_solver, AbstractLinearSolver, "linear_solver", "metaopt.GMRES()"
        )

    def begin(self, params: Vector, examples: Examples) -> "_Memory":
        dtype = tree_dtype(params)
        return _Memory(
            direction=jax.tree.map(jnp.zeros_like, params),
            length=jnp.ones((), dtype),
            norm=jnp.full((), jnp.inf, dtype),
        )

    def advance(
        self, at: Applied, memory: "_Memory", progress: Progress
    ) -> tuple[Vector, "_Memory"]:
        enough = (1 - _DECREASE * memory.length) * memory.norm
        falls = (progress.step == 0) | (at.norm <= enough)
        back = ~falls & (memory.length > _SHORTEST)

        def backwards():
            half = memory.length / 2
            new = tree_axpy(-half, memory.direction, at.params)
            return new, _Memory(memory.direction, half, memory.norm)

        def onwards():
            direction = self._direction(at, memory)
            new = tree_axpy(jnp.ones_like(memory.length), direction, at.params)
            return new, _Memory(direction, jnp.ones_like(memory.length), at.norm)

        return jax.lax.cond(back, backwards, onwards)

    def _direction(self, at: Applied, memory: "_Memory") -> Vector:
        _, push = linearised(at.apply, at.params)
        operator = lx.FunctionLinearOperator(
            lambda x: tree_sub(x, push(x)), tree_structs(at.params)
        )
        ratio = at.norm / jnp.where(memory.norm > 0, memory.norm, 1)
        tolerance = jnp.minimum(0.9 * ratio**2, _LOOSEST)
        tolerance = jnp.where(jnp.isfinite(memory.norm), tolerance, _LOOSEST)
        tolerance = jax.lax.stop_gradient(tolerance)

        def solve(product, vector):
            made = lx.FunctionLinearOperator(product, tree_structs(vector))
            return self.linear_solver.solve(made, vector, None, tolerance).value

        # So that derivatives along the path can pass it.
        self.linear_solver.check(operator)
        return linear_solve(operator.mv, at.residual, solve, transpose_solve=solve)


class _Memory(eqx.Module):
    """The memory of one step: its direction, the part of it that was taken, and the norm
    of the residual before."""

    direction: Vector
    length: FloatScalar
    norm: FloatScalar
