"""The interface of linear solvers, their results, and the checks that they share."""

import abc
import dataclasses
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import same_structs, tree_axpy, tree_dot, tree_structs, tree_zeros_like
from .._core._types import BoolScalar, FloatScalar, IntScalar, Key, Vector
from .._core._validate import check_tolerance
from .._core._warn import warn


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


class Subspace(eqx.Module):
    r"""Directions whose products with an operator are known.

    A system with another right-hand side is solved approximately in their span, without
    any product. The directions of conjugate gradients are conjugate but for rounding, so
    that one pass of line searches along them is a Galerkin solve.

    **Attributes:**

    - `directions`, `products`: $p_i$ and $A p_i$, stacked on a leading axis.
    - `curvatures`: $p_i^T A p_i$; 0 for a slot that is not in use.
    - `holds_solution`: whether the solution that they led to lies in their span. Not
        where the solve began at a guess.
    """

    directions: Vector
    products: Vector
    curvatures: Array
    holds_solution: bool = eqx.field(default=True, static=True)

    def solve(self, vector: Vector) -> tuple[Vector, Vector]:
        """Solve in the span of the directions.

        **Returns:**

        The solution, and what it leaves of the right-hand side.
        """

        def search(carry, known):
            x, left = carry
            p, product, curvature = known
            used = curvature > 0
            length = tree_dot(p, left) / jnp.where(used, curvature, 1)
            length = jnp.where(used, length, 0)
            return (tree_axpy(length, p, x), tree_axpy(-length, product, left)), None

        known = self.directions, self.products, self.curvatures
        return jax.lax.scan(search, (tree_zeros_like(vector), vector), known)[0]

    @property
    def max_curvature(self) -> FloatScalar:
        r"""The largest $p_i^T A p_i / p_i^T p_i$."""
        squares = jax.vmap(lambda p: tree_dot(p, p))(self.directions)
        return jnp.max(self.curvatures / jnp.where(squares > 0, squares, 1))


class LinearSolution(eqx.Module):
    r"""The result of a linear solve $A x = b$.

    **Attributes:**

    - `value`: the solution $x$, a vector like $b$; the best one met if the solve
        failed, and finite in any case.
    - `result`: how the solve ended.
    - `residual`: $\|b - A x\| / \|b\|$, computed anew from `value` and without damping;
        0 where $b = 0$.
    - `num_steps`: the steps of the method.
    - `num_products`: the products with $A$, those of the checks included.
    - `min_curvature`: the smallest $p^T A p / p^T p$ met, without damping; infinite
        where the method does not look.
    - `subspace`: the search directions, where they were asked for; else `None`.
    """

    value: Vector
    result: RESULTS
    residual: FloatScalar
    num_steps: IntScalar
    num_products: IntScalar
    min_curvature: FloatScalar
    subspace: Subspace | None = None


class AbstractLinearSolver(eqx.Module):
    """A matrix-free method for linear systems.

    Its settings are plain Python numbers.
    """

    accepts_indefinite: AbstractClassVar[bool]
    """Whether it is meant to solve at a saddle: whoever chooses it asks for the
    derivative of a stationary point, be it a minimum or not."""

    checks_curvature: AbstractClassVar[bool]
    """Whether it refuses a positive semidefinite operator that turns out to have negative
    curvature."""

    @property
    @abc.abstractmethod
    def left_out(self) -> tuple[str, ...]:
        """A description of the bias that a solve was asked for."""

    @abc.abstractmethod
    def check(self, operator: lx.AbstractLinearOperator) -> None:
        """Raise a `ValueError` unless the operator has the tags that the solver needs.

        **Arguments:**

        - `operator`: a square operator; what it promises are its `lineax` tags.
        """

    @abc.abstractmethod
    def solve(
        self,
        operator: lx.AbstractLinearOperator,
        vector: Vector,
        start: Vector | None = None,
        tolerance: FloatScalar | None = None,
    ) -> LinearSolution:
        """Solve `operator @ x = vector`.

        It never raises because of the numbers: `result` says how it went.

        **Arguments:**

        - `operator`: a square operator.
        - `vector`: the right-hand side: a vector with the structure of the operator.
        - `start`: a first guess of the solution, with the same structure; zeros by
            default.
        - `tolerance`: a relative tolerance that will do where it is more than the
            solver's own, as an array. A solver without one takes no notice.

        **Returns:**

        A [`metaopt.linear.LinearSolution`][].

        **Raises:**

        `ValueError` if `check` does, or if the structures do not match.
        """


class AbstractToleranceSolver(AbstractLinearSolver):
    """A linear solver that iterates until a relative residual is met."""

    @property
    @abc.abstractmethod
    def relative_tolerance(self) -> float | None:
        """The relative residual it solves to; `None` for a fixed number of steps."""

    @abc.abstractmethod
    def with_rtol(self, rtol: float) -> "AbstractToleranceSolver":
        """The same method, solving to another relative tolerance and without damping.

        **Arguments:**

        - `rtol`: the relative residual to solve to.
        """

    @abc.abstractmethod
    def rough(self, rtol: float) -> AbstractLinearSolver:
        """A solver for corrections of which a digit suffices.

        **Arguments:**

        - `rtol`: the relative residual to solve to.
        """

    @abc.abstractmethod
    def keeping_directions(self, vector: Vector) -> "AbstractToleranceSolver":
        """The same method, whose solutions have a `subspace` if it has search directions
        and they fit into a few megabytes.

        **Arguments:**

        - `vector`: a vector like the right-hand side.
        """


class AbstractResidualSolver(AbstractToleranceSolver):
    """A solver with these two fields, whose search directions are of no use to others."""

    rtol: eqx.AbstractVar[float | None]
    max_steps: eqx.AbstractVar[int]

    @property
    def left_out(self):
        return steps_left_out(self.rtol, self.max_steps)

    @property
    def relative_tolerance(self):
        return self.rtol

    def with_rtol(self, rtol):
        return dataclasses.replace(self, rtol=rtol)

    def rough(self, rtol):
        return self.with_rtol(rtol)

    def keeping_directions(self, vector):
        return self


class AbstractPreparedSolver(AbstractLinearSolver):
    """A linear solver that learns of an operator before it solves with it."""

    @abc.abstractmethod
    def initial_state(self, vector: Vector) -> Any:
        """The state before the first operator.

        **Arguments:**

        - `vector`: arrays with the structure that the operators apply to.

        **Returns:**

        A pytree of arrays, or `None` for a solver that carries nothing from one operator
        to the next.
        """

    @abc.abstractmethod
    def prepared(
        self,
        operator: lx.AbstractLinearOperator,
        state: Any,
        key: Key,
        solver_state: Any,
    ) -> tuple[AbstractLinearSolver, Any, IntScalar]:
        """The solver, ready for an operator.

        **Arguments:**

        - `operator`: the operator that it will solve with.
        - `state`: that of the operator before; `None` for the first.
        - `key`: for everything random.
        - `solver_state`: the state of the inner solver at the solution, or `None`.

        **Returns:**

        A linear solver, the new state, and the number of products that it took.
        """

    @abc.abstractmethod
    def transposed(self) -> AbstractLinearSolver:
        """The solver, once prepared for an operator, for its transpose."""


def check_tolerances(rtol: float | None, atol: float) -> None:
    """Raise a `ValueError` unless these can be met: `rtol` positive or `None`."""
    check_tolerance(rtol, "rtol")
    if rtol == 0:
        raise ValueError(
            "`rtol` must be positive, or `None` for a fixed number of steps; got 0."
        )
    check_tolerance(atol, "atol", optional=False)


def steps_left_out(rtol: float | None, max_steps: int) -> tuple[str, ...]:
    """A description of the bias of a fixed number of steps."""
    if rtol is not None:
        return ()
    return (f"what more than {max_steps} steps of the linear solver would add",)


def check_square(solver: str, operator: lx.AbstractLinearOperator) -> None:
    """Raise a `ValueError` unless the operator is square, as a map of pytrees."""
    given, returned = operator.in_structure(), operator.out_structure()
    if not same_structs(given, returned):
        raise ValueError(
            f"`{solver}` needs an operator that maps vectors to vectors of the same "
            f"structure; this one maps {given} to {returned}."
        )


def check_structures(
    operator: lx.AbstractLinearOperator, vector: Vector, start: Vector | None
) -> None:
    """Raise a `ValueError` unless the operator applies to `vector` and `start`."""
    expected = operator.in_structure()
    for name, given in (("vector", vector), ("start", start)):
        if given is not None and not same_structs(given, expected):
            raise ValueError(
                f"`{name}` must have the structure of the operator, {expected}; got "
                f"{tree_structs(given)}."
            )


def coarsest_eps(vector: Vector) -> float:
    """The unit of rounding of the leaf with the lowest precision."""
    leaves = jax.tree.leaves(vector)
    return max((float(jnp.finfo(a.dtype).eps) for a in leaves), default=0.0)


def floored_rtol(rtol: float, solver: str, vector: Vector) -> float:
    """`rtol`, raised to the precision of the vector.

    A residual is computed to about the unit of rounding, so that a tolerance of less
    than a few of them would be met by luck or never. Warns once for each compilation.
    """
    floor = 10 * coarsest_eps(vector)
    if rtol >= floor:
        return rtol
    dtypes = {np.dtype(a.dtype).name for a in jax.tree.leaves(vector)}
    coarsest = max(dtypes, key=lambda name: float(jnp.finfo(name).eps))
    warn(
        f"`{solver}(rtol={rtol:g})` asks for more than {coarsest} can reach; using "
        f"rtol={floor:.1e}. Loosen `rtol`, or use params of higher precision.",
    )
    return floor


def out_of_steps(rtol: float | None) -> RESULTS:
    """The result of a solve that has taken all its steps."""
    fixed = jnp.asarray(rtol is None)
    return mask_result(~fixed, RESULTS.linear_max_steps)


def how_it_ended(
    converged: BoolScalar,
    nonfinite: BoolScalar,
    stagnated: BoolScalar,
    rtol: float | None,
) -> RESULTS:
    """The result of a solve: success where it converged, else the first of these that kept
    it from that, and where none did, a lack of steps."""
    failure = first_failure(
        mask_result(nonfinite, RESULTS.linear_nonfinite),
        mask_result(stagnated, RESULTS.linear_stagnation),
        out_of_steps(rtol),
    )
    return mask_result(~converged, failure)


def relative(residual: FloatScalar, size: FloatScalar) -> FloatScalar:
    """`residual / size`: 0 where `size` is, and infinite where it is not a number."""
    ratio = residual / jnp.where(size == 0, 1, size)
    ratio = jnp.where(jnp.isfinite(ratio), ratio, jnp.inf)
    return jnp.where(size == 0, 0, ratio)


def reported(
    value: Vector,
    result: RESULTS,
    residual: FloatScalar,
    num_steps: IntScalar | int,
    num_products: IntScalar | int,
    min_curvature: FloatScalar | float = jnp.inf,
) -> LinearSolution:
    """A [`metaopt.linear.LinearSolution`][] of arrays."""
    return LinearSolution(
        value=value,
        result=result,
        residual=residual,
        num_steps=jnp.asarray(num_steps, jnp.int32),
        num_products=jnp.asarray(num_products, jnp.int32),
        min_curvature=jnp.asarray(min_curvature, residual.dtype),
    )
