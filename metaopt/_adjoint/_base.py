"""The interface of adjoints, which differentiate an inner solve."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp

from .._data import AbstractData
from .._report import AbstractDerivativeInfo
from .._results import first_failure, RESULTS
from .._solver import (
    AbstractIterativeSolver,
    AbstractSolver,
    InnerSolve,
    Loop,
    LoopState,
    new_gauge,
    Outcome,
)
from .._tree import split_trainable, tree_norm
from .._types import (
    Aux,
    FloatScalar,
    Hyper,
    ModelState,
    Params,
    Vector,
)
from ._explosion import judge_path
from ._info import PathInfo


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


OuterLoss = Callable[[Params, Hyper, ModelState], tuple[FloatScalar, Aux]]
"""`outer(params, hyper, model_state) -> (value, aux)`: batch and key are fixed."""

Start = Callable[[Hyper], tuple[Params, ModelState]]
"""`start(hyper) -> (params, model_state)`: where the inner solve starts."""


class HypergradientOutput(eqx.Module):
    """One hypergradient and everything computed on the way.

    **Attributes:**

    - `value`, `aux`: the outer loss and its auxiliary output.
    - `direct`: the derivative of the outer loss at fixed params, times the scale that
        was asked for; a vector like the trainable part of `hyper`.
    - `through_solution`: the derivative by way of the inner solution, likewise. The
        hypergradient is the sum of the two.
    - `outcome`: the inner solution.
    - `inner_residual`: the norm of the optimality there.
    - `result`: how the derivative went; the inner solve has a result of its own.
    - `info`: the adjoint's part of the report.
    - `carry`: what the adjoint wants back at the next outer step.
    """

    value: FloatScalar
    aux: Aux
    direct: Vector
    through_solution: Vector
    outcome: Outcome
    inner_residual: FloatScalar
    result: RESULTS
    info: AbstractDerivativeInfo
    carry: Any


class AbstractAdjoint(eqx.Module):
    """A way to differentiate an inner solve.

    An adjoint receives the solve as a value, [`metaopt.InnerSolve`][], and never
    imports a function that solves.
    """

    sees_path: AbstractClassVar[bool]
    """Whether initial params and settings of the solver are within reach."""

    sees_inner_loss: AbstractClassVar[bool]
    """Whether what acts through the gradients of the inner loss is within reach."""

    heeds_tolerance: AbstractClassVar[bool]
    """Whether it does less where the inner solve says that less accuracy will do."""

    @abc.abstractmethod
    def check(self, solver: AbstractSolver, data: AbstractData) -> None:
        """Checks that this adjoint can serve the solver.

        **Arguments:**

        - `solver`, `data`: the inner solver and where its batches come from.

        **Raises:**

        `ValueError` if it cannot, with what to use instead.
        """

    @abc.abstractmethod
    def solve(
        self,
        inner: InnerSolve,
        params: Params,
        hyper: Hyper,
        model_state: ModelState,
        throw: bool,
    ) -> Outcome:
        """Solves, differentiably in everything the answer depends on.

        **Arguments:**

        - `inner`: the solve.
        - `params`, `model_state`: where it starts.
        - `hyper`: the outer variables.
        - `throw`: whether a derivative that fails its checks raises; otherwise it is NaN.

        **Returns:**

        An [`metaopt.Outcome`][].
        """

    @abc.abstractmethod
    def init(self, params: Params) -> Any:
        """The carry for the first of several hypergradients.

        **Arguments:**

        - `params`: the initial params.

        **Returns:**

        A pytree of arrays, or `None` where nothing is worth carrying over.
        """

    @abc.abstractmethod
    def hypergradient(
        self,
        inner: InnerSolve,
        outer: OuterLoss,
        start: Start,
        hyper: Hyper,
        carry: Any,
        scale: FloatScalar,
    ) -> HypergradientOutput:
        """The hypergradient of `scale * outer`, with all there is to say about it.

        **Arguments:**

        - `inner`: the inner solve.
        - `outer`: `outer(params, hyper, model_state) -> (value, aux)`.
        - `start`: `start(hyper) -> (params, model_state)`, where the solve starts.
        - `hyper`: the outer variables.
        - `carry`: what `init` or the hypergradient before returned; `None` for a cold
            start.
        - `scale`: a scalar that multiplies the outer loss. The result must be computed
            from it, which shows which leaves are out of reach.

        **Returns:**

        A [`metaopt.HypergradientOutput`][].
        """


class AbstractPathAdjoint(AbstractAdjoint):
    """An adjoint that follows the path of an iterative solver, step by step."""

    meets_cotangents: AbstractClassVar[bool]
    """Whether the cotangents of the params pass from step to step, last step first."""

    @property
    @abc.abstractmethod
    def left_out(self) -> tuple[str, ...]:
        """A description of the bias that the derivative has by construction."""

    @abc.abstractmethod
    def error_bound(
        self, hyper: Hyper, outer_slope: Callable[[], FloatScalar]
    ) -> FloatScalar | None:
        """A bound on the error that this leaves, or `None` where none is known.

        **Arguments:**

        - `hyper`: the outer variables.
        - `outer_slope`: gives the norm of the derivative of the outer loss in the params.
        """

    def init(self, params):
        return None

    def hypergradient(self, inner, outer, start, hyper, carry, scale):
        measured = None

        def differentiate(objective, hyper, scale):
            nonlocal measured
            gauge = new_gauge() if self.meets_cotangents else None
            value, pullback, arrays = jax.vjp(objective, hyper, hyper, gauge, has_aux=True)
            through_solution, direct, measured = pullback(scale.astype(value.dtype))
            return value, arrays, through_solution, direct

        output = path_hypergradient(self, differentiate, inner, outer, start, hyper, scale)
        outcome = output.outcome
        reached, rest = split_trainable(outcome.params)

        def outer_slope():
            def of_params(params):
                return outer(eqx.combine(params, rest), hyper, outcome.model_state)[0]

            return tree_norm(jax.grad(of_params)(reached))

        bound = self.error_bound(hyper, outer_slope)
        growth, result = None, output.result
        if measured is not None:

            def at_start():
                params, model_state = start(hyper)
                return outer(params, hyper, model_state)[0]

            growth, result = judge_path(measured, output.value, at_start, reached)
        info = PathInfo(
            left_out=self.left_out, error=bound, num_flat=outcome.num_flat, growth=growth
        )
        return dataclasses.replace(output, result=result, info=info)


PathObjective = Callable[..., tuple[FloatScalar, Any]]
"""`objective(of_solution, of_outer_loss, gauge=None) -> (value, arrays)`: the outer loss
with one `hyper` in the inner solve and another in the loss, and its auxiliary arrays."""

Derivatives = tuple[FloatScalar, Any, Vector, Vector]
"""The value of an objective, its auxiliary arrays, and its derivative in each `hyper`."""


def in_reverse(objective: PathObjective, hyper: Vector, scale: FloatScalar) -> Derivatives:
    """Differentiates `scale` times an objective at `hyper` in reverse mode."""
    value, pullback, arrays = jax.vjp(objective, hyper, hyper, has_aux=True)
    return value, arrays, *pullback(scale.astype(value.dtype))


def path_hypergradient(
    adjoint: AbstractAdjoint,
    differentiate: Callable[[PathObjective, Vector, FloatScalar], Derivatives],
    inner: InnerSolve,
    outer: OuterLoss,
    start: Start,
    hyper: Hyper,
    scale: FloatScalar,
) -> HypergradientOutput:
    """The hypergradient along the path that `adjoint.solve` follows."""
    trainable, static = split_trainable(hyper)
    static_outcome: Any = None

    def objective(of_solution, of_outer_loss, gauge=None):
        nonlocal static_outcome
        full = eqx.combine(of_solution, static)
        params, model_state = start(full)
        gauged = inner if gauge is None else dataclasses.replace(inner, gauge=gauge)
        outcome = adjoint.solve(gauged, params, full, model_state, False)
        full = eqx.combine(of_outer_loss, static)
        value, aux = outer(outcome.params, full, outcome.model_state)
        arrays, static_outcome = eqx.partition((outcome, aux), eqx.is_array)
        return value, arrays

    value, arrays, through, direct = differentiate(objective, trainable, scale)
    outcome, aux = eqx.combine(arrays, static_outcome)
    residual = inner.last_residual(outcome, hyper)
    info = PathInfo(num_flat=outcome.num_flat)
    return HypergradientOutput(
        value, aux, direct, through, outcome, residual, first_failure(), info, None
    )


def counted_anew(state: LoopState, loop: Loop) -> LoopState:
    """The state of a loop whose steps so far are not differentiated."""
    num_flat = None if state.num_flat is None else jnp.zeros_like(state.num_flat)
    return dataclasses.replace(state, num_flat=num_flat, gauge=loop.gauge)


def check_iterative(adjoint: AbstractAdjoint, solver: AbstractSolver) -> None:
    """Raises a `ValueError` unless the solver proceeds by steps."""
    if not isinstance(solver, AbstractIterativeSolver):
        raise ValueError(
            f"`{type(adjoint).__name__}` follows the steps of the inner solver, and "
            f"`{type(solver).__name__}` runs as a whole. Use `metaopt.ImplicitAdjoint()`"
            ", or a solver that proceeds by steps: `metaopt.Descent` or "
            "`metaopt.Picard`."
        )
