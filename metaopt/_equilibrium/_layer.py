"""A layer whose output is a fixed point."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._adjoint import AbstractAdjoint, ImplicitAdjoint
from ._detach import detached, stop_gradient
from ._linear import GMRES
from ._problem import AbstractFixedPointProblem
from ._results import RESULTS
from ._solve_inner import solve_inner
from ._solver import AbstractSolver, Anderson
from ._tree import split_trainable, tree_scaled_norm, tree_sub
from ._types import FloatScalar, IntScalar, PyTree
from ._validate import ADJOINT_EXAMPLE, canonical_arrays, check_kind


class EquilibriumInfo(eqx.Module):
    """How an equilibrium was found.

    Under `jax.vmap` every field has an axis of examples.

    **Attributes:**

    - `num_steps`: the number of steps that the solver took.
    - `residual`: the norm of `cell(z, x) - z` at the answer, over the norm of `z`.
    - `residuals`: the norms of `cell(z, x) - z` at the start of each step, of shape
        `(num_steps,)`, padded with NaN; `None` for a solver that runs as a whole.
    - `result`: how the solve ended.
    """

    num_steps: IntScalar
    residual: FloatScalar
    residuals: Float[Array, " num_steps"] | None
    result: RESULTS


class Equilibrium(eqx.Module):
    r"""A layer whose output is a fixed point of a cell, $z = cell(z, x)$: a deep
    equilibrium model (Bai, Kolter and Koltun, 2019).

    It is as deep as it takes to converge and has the memory of one application of the
    cell. Differentiable in `x` and in every array of the cell, in the way that the
    `adjoint` says.

    ```python
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import metaopt as mo

    class Cell(eqx.Module):
        hidden: eqx.nn.Linear
        input: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.hidden = eqx.nn.Linear(16, 16, key=keys[0])
            self.input = eqx.nn.Linear(4, 16, key=keys[1])

        def __call__(self, z, x):
            # Small weights make a contraction, which has one fixed point.
            return jnp.tanh(self.hidden(z) / 2 + self.input(x))

    layer = mo.nn.Equilibrium(Cell(jax.random.key(0)), lambda x: jnp.zeros(16))
    x = jax.random.normal(jax.random.key(1), (8, 4))
    z, info = jax.vmap(layer)(x)
    ```

    **Arguments:**

    - `cell`: `cell(z, x)`, which returns a pytree like `z`; usually an Equinox module.
    - `initial`: `initial(x)`, where the solver starts, any pytree of arrays; by default
        zeros like `x`. No derivative passes through it, but for an adjoint that follows
        the path.
    - `solver`: how the fixed point is found: [`metaopt.Anderson`][], [`metaopt.Picard`][].
    - `adjoint`: how the derivative passes through that: [`metaopt.ImplicitAdjoint`][] with
        any linear solver for systems that are not symmetric ([`metaopt.Neumann`][] with a
        few terms is the phantom gradient of Geng et al., 2021),
        [`metaopt.OneStepAdjoint`][], [`metaopt.UnrolledAdjoint`][].
    - `throw`: whether a solve that fails raises. If not, `info.result` says so, and a
        derivative that fails its checks is NaN.

    **Raises:**

    `ValueError` for arguments that do not fit, and when called, where the cell does not
    return what it is given; [`metaopt.SolveError`][], or inside of compiled functions an
    error of JAX, where no fixed point is found.
    """

    cell: Callable[..., Any]
    initial: Callable[[Any], Any]
    solver: AbstractSolver
    adjoint: AbstractAdjoint
    throw: bool = eqx.field(static=True)

    def __init__(
        self,
        cell: Callable[..., Any],
        initial: Callable[[Any], Any] | None = None,
        *,
        solver: AbstractSolver = Anderson(),
        adjoint: AbstractAdjoint = ImplicitAdjoint(GMRES(rtol=1e-4)),
        throw: bool = True,
    ):
        if not callable(cell):
            raise ValueError(f"`cell` must be a function `cell(z, x)`; got {cell!r}.")
        check_kind(solver, AbstractSolver, "solver", "metaopt.Anderson()")
        check_kind(adjoint, AbstractAdjoint, "adjoint", ADJOINT_EXAMPLE)
        self.cell = cell
        self.initial = _zeros_like if initial is None else initial
        self.solver = solver
        self.adjoint = adjoint
        self.throw = throw

    def __call__(
        self, x: PyTree, z: PyTree | None = None
    ) -> tuple[PyTree, EquilibriumInfo]:
        """The fixed point for one input.

        **Arguments:**

        - `x`: the input, any pytree of arrays.
        - `z`: where to start, in place of `initial(x)`: the fixed point of a step of
            training before this one, say.

        **Returns:**

        A pytree like `z`, and an [`metaopt.nn.EquilibriumInfo`][].
        """
        x = canonical_arrays(x, "x")
        start = canonical_arrays(self.initial(x) if z is None else z, "z")
        if not self.adjoint.sees_path:
            start = stop_gradient(start)
        moving, fixed = split_trainable((self.cell, x))
        problem = _CellProblem(fixed)
        solution = solve_inner(
            problem,
            moving,
            start,
            solver=self.solver,
            adjoint=self.adjoint,
            throw=self.throw,
        )
        info = EquilibriumInfo(
            num_steps=solution.stats["num_steps"],
            residual=detached(_relative_residual, problem, solution.value, moving),
            residuals=stop_gradient(solution.stats["losses"]),
            result=solution.result,
        )
        return solution.value, info


class _CellProblem(AbstractFixedPointProblem):
    """The fixed point of a cell, whose arrays and input are the outer variables."""

    fixed: Any

    def init(self, hyper, key):
        raise ValueError("A cell does not say where the solver starts.")

    def step(self, params, hyper, batch):
        cell, x = eqx.combine(hyper, self.fixed)
        return cell(params, x)


def _relative_residual(problem: _CellProblem, z: PyTree, hyper: PyTree) -> FloatScalar:
    before, after = (split_trainable(a)[0] for a in (z, problem.step(z, hyper, None)))
    size = tree_scaled_norm(before)
    difference = tree_scaled_norm(tree_sub(after, before))
    return jnp.where(difference == 0, 0.0, difference / size)


def _zeros_like(x: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, x)
