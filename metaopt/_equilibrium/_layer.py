"""A layer whose output is a fixed point."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._adjoint import AbstractAdjoint, ImplicitAdjoint
from .._core._results import RESULTS
from .._core._trace_once import tracing_once
from .._core._types import IntScalar, PyTree
from .._core._validate import (
    ADJOINT_EXAMPLE,
    canonical_arrays,
    check_count,
    check_flag,
    check_kind,
)
from .._data import FullBatch
from .._jaxpr._detach import detached, stop_gradient
from .._linear import BiCGStab
from .._solve_inner import solve_inner
from .._solver import (
    AbstractFixedPointSolver,
    AbstractIterativeSolver,
    AbstractSolver,
    Anderson,
    InnerSolve,
)
from ._cell import AbstractCell
from ._cell_problem import cell_problem, CellProblem


class EquilibriumInfo(eqx.Module):
    """The result of the solve for an equilibrium.

    Under `jax.vmap` every field has an axis of examples. A solver with `per_example=True`
    runs one loop for all of them: then `residual` alone has that axis.

    **Attributes:**

    - `num_steps`: the number of steps that the solver took.
    - `residual`: the norm of `cell(z, x) - z` at the answer, over the norm of `z`.
    - `residuals`: the norms of `cell(z, x) - z` at the start of each step, of shape
        `(num_steps,)`, padded with NaN; the largest one over the examples of a solver with
        `per_example=True`; `None` for a solver that runs as a whole.
    - `result`: how the solve ended.
    """

    num_steps: IntScalar
    residual: Float[Array, "..."]
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

    - `cell`: `cell(z, x)`, which returns a pytree like `z`; usually an Equinox module,
        or a [`metaopt.nn.AbstractCell`][]. Randomness in it must stay the same from step
        to step: draw a mask of dropout once and hand it over in `x`.
    - `initial`: `initial(x)`, where the solver starts, any pytree of arrays; by default
        what the cell says, or zeros like `x`. No derivative passes through it, but for an
        adjoint that follows the path.
    - `solver`: how the fixed point is found: [`metaopt.Anderson`][],
        [`metaopt.Broyden`][], [`metaopt.NewtonKrylov`][], [`metaopt.Picard`][], or one of
        optimistix or jaxopt.
    - `adjoint`: how the derivative passes through that: [`metaopt.ImplicitAdjoint`][] with
        any linear solver for systems that are not symmetric; by default
        [`metaopt.linear.BiCGStab`][] to a relative residual of 1e-4.
        [`metaopt.Neumann`][] with a few terms is the phantom gradient of Geng et al.
        (2021), with none the Jacobian-free one, and [`metaopt.linear.SHINE`][] shares
        Broyden's inverse. Or [`metaopt.UnrolledAdjoint`][] and its like.
    - `inference_solver`: the solver in inference mode; by default the same.
    - `inference`: whether the layer is in inference mode, which
        `equinox.nn.inference_mode` sets.
    - `throw`: whether a solve that fails raises. If not, `info.result` says so, and a
        derivative that fails its checks is NaN.

    **Raises:**

    `ValueError` for arguments that do not fit, and when called, where the cell does not
    return what it is given; [`metaopt.SolveError`][], or inside of compiled functions an
    error of JAX, where no fixed point is found.
    """

    cell: Callable[..., Any]
    initial: Callable[[Any], Any] | None
    solver: AbstractSolver
    adjoint: AbstractAdjoint
    inference_solver: AbstractSolver | None
    inference: bool
    throw: bool = eqx.field(static=True)

    def __init__(
        self,
        cell: Callable[..., Any],
        initial: Callable[[Any], Any] | None = None,
        *,
        solver: AbstractSolver = Anderson(),
        adjoint: AbstractAdjoint = ImplicitAdjoint(BiCGStab(rtol=1e-4), inner_rtol=1e-2),
        inference_solver: AbstractSolver | None = None,
        inference: bool = False,
        throw: bool = True,
    ):
        if not callable(cell):
            raise ValueError(f"`cell` must be a function `cell(z, x)`; got {cell!r}.")
        if initial is not None and not callable(initial):
            raise ValueError(
                "`initial` must be a function `initial(x)`, such as "
                f"`lambda x: jnp.zeros(16)`; got {initial!r}."
            )
        check_flag(throw, "throw")
        check_flag(inference, "inference")
        check_kind(solver, AbstractSolver, "solver", "metaopt.Anderson()")
        check_kind(adjoint, AbstractAdjoint, "adjoint", ADJOINT_EXAMPLE)
        if inference_solver is not None:
            check_kind(
                inference_solver, AbstractSolver, "inference_solver", "metaopt.Anderson()"
            )
            adjoint.check(inference_solver, FullBatch(None))
        self.cell = cell
        self.initial = initial
        self.solver = solver
        self.adjoint = adjoint
        self.inference_solver = inference_solver
        self.inference = inference
        self.throw = throw

    @tracing_once()
    def __call__(
        self, x: PyTree, z: PyTree | None = None, *, budget: IntScalar | int | None = None
    ) -> tuple[PyTree, EquilibriumInfo]:
        """The fixed point for one input.

        **Arguments:**

        - `x`: the input, any pytree of arrays.
        - `z`: where to start, in place of `initial(x)`: the fixed point of a step of
            training before this one, say. No derivative passes to it, but for an adjoint
            that follows the path.
        - `budget`: the most steps that the solver takes, at least 1 and at most its own
            `num_steps`; an integer array, which can change without compiling again.

        **Returns:**

        A pytree like `z`, and an [`metaopt.nn.EquilibriumInfo`][].

        **Raises:**

        `ValueError` where the cell does not return a state like `z`, where the state holds
        anything but floating-point arrays, and for a budget below 1 or for a solver that
        takes none; [`metaopt.SolveError`][], or inside of compiled functions an error of
        JAX, where no fixed point is found (unless `throw=False`).
        """
        solver = self._solver(budget)
        problem, moving, start = self._problem(x, z)
        solution = solve_inner(
            problem,
            moving,
            params=start,
            solver=solver,
            adjoint=self.adjoint,
            throw=self.throw,
        )
        each = isinstance(solver, AbstractFixedPointSolver) and solver.per_example
        residual = lambda z, moving: problem.relative_residual(z, moving, each)
        info = EquilibriumInfo(
            num_steps=solution.stats["num_steps"],
            residual=detached(residual, solution.value, moving),
            residuals=stop_gradient(solution.stats["losses"]),
            result=solution.result,
        )
        return solution.value, info

    def iterates(
        self, x: PyTree, steps: Sequence[int], z: PyTree | None = None
    ) -> list[PyTree]:
        """Iterates on the way to the fixed point, for losses on them (fixed-point
        corrections; Bai, Geng, Savani and Kolter, 2022).

        Each has had the cell applied to it once more, and is differentiable in the cell and
        in `x` through that alone, like a one-step estimate. Start the layer at the last of
        them and nothing is solved twice: `layer(x, iterates[-1])`.

        **Arguments:**

        - `x`: the input, any pytree of arrays.
        - `steps`: after which steps of the solver; increasing, and at most its
            `num_steps`.
        - `z`: where to start, in place of `initial(x)`.

        **Returns:**

        A list of pytrees like `z`, one for each entry of `steps`.

        **Raises:**

        `ValueError` where the steps are no sequence or do not increase, and for a solver
        that runs as a whole.
        """
        solver = self._solver(None)
        if not isinstance(solver, AbstractIterativeSolver):
            raise ValueError(
                "`iterates` needs a solver that proceeds by steps, such as "
                f"`metaopt.Anderson()`; `{type(solver).__name__}` runs as a whole."
            )
        if not isinstance(steps, Sequence | np.ndarray):
            raise ValueError(
                "`steps` must be a sequence of numbers of steps, such as (2, 4, 8); got "
                f"{steps!r}."
            )
        ends = list(steps)
        for end in ends:
            check_count(end, "steps")
        if ends != sorted(set(ends)) or (ends and ends[-1] > solver.num_steps):
            raise ValueError(
                "`steps` must increase, up to the `num_steps` of the solver at most, "
                f"{solver.num_steps}; got {ends}."
            )
        problem, moving, start = self._problem(x, z)
        data = FullBatch(None)
        solver.check(problem, data)

        def run(problem, moving, start):
            inner = InnerSolve(problem, solver, data, jax.random.key(0))
            loop = inner.loop(start)
            state, begin, reached = loop.start(start, moving, None), 0, []
            for end in ends:
                state, _ = loop.run_primal(moving, state, begin, end)
                reached.append(eqx.combine(state.params, loop.static_params))
                begin = end
            return reached

        return [
            problem.step(stop_gradient(z), moving, None)
            for z in detached(run, problem, moving, start)
        ]

    def _problem(self, x: PyTree, z: PyTree | None) -> tuple[CellProblem, PyTree, PyTree]:
        """The fixed-point problem, the variables of its derivative, and the initial
        state."""
        x = canonical_arrays(x, "x")
        start = self._start(x) if z is None else z
        as_array = lambda a: jnp.asarray(a) if isinstance(a, float) else a
        start = canonical_arrays(jax.tree.map(as_array, start), "z")
        start = self.adjoint.reach.held_start(start)
        problem, moving = cell_problem(self.cell, x, start)
        return problem, moving, start

    def _start(self, x: PyTree) -> PyTree:
        if self.initial is not None:
            return self.initial(x)
        if isinstance(self.cell, AbstractCell):
            return self.cell.initial(x)
        return jax.tree.map(jnp.zeros_like, x)

    def _solver(self, budget: IntScalar | int | None) -> AbstractSolver:
        """The solver of the mode that the layer is in, with a budget."""
        solver = self.solver
        if self.inference and self.inference_solver is not None:
            solver = self.inference_solver
        if budget is None:
            return solver
        if not isinstance(solver, AbstractFixedPointSolver):
            raise ValueError(
                f"`{type(solver).__name__}` takes no `budget`. Use `metaopt.Anderson()`, "
                "or another of metaopt's own solvers of fixed points."
            )
        return solver.with_budget(budget)
