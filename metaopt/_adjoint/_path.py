"""Adjoints that follow the path of an inner solver."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._results import first_failure
from .._core._tree import split_trainable, tree_norm
from .._core._types import FloatScalar, Hyper, Vector
from .._solver import (
    AbstractIterativeSolver,
    AbstractSolver,
    InnerSolve,
    Loop,
    LoopState,
    new_gauge,
)
from ._base import AbstractAdjoint, HypergradientOutput, OuterLoss, Start
from ._explosion import judge_path
from ._info import PathInfo


class AbstractPathAdjoint(AbstractAdjoint):
    """An adjoint that follows the path of an iterative solver, step by step, and passes
    cotangents back along it."""

    def hypergradient(self, inner, outer, start, hyper, carry):
        return back_along_path(self, inner, outer, start, hyper)


PathObjective = Callable[..., tuple[FloatScalar, Any]]
"""`objective(of_solution, of_outer_loss, gauge=None) -> (value, arrays)`: the outer loss
with one `hyper` in the inner solve and another in the loss, and its auxiliary arrays."""

Derivatives = tuple[FloatScalar, Any, Vector, Vector]
"""The value of an objective, its auxiliary arrays, and its derivative in each `hyper`."""


def in_reverse(objective: PathObjective, hyper: Vector) -> Derivatives:
    """Differentiate an objective at `hyper` in reverse mode."""
    value, pullback, arrays = jax.vjp(objective, hyper, hyper, has_aux=True)
    return value, arrays, *pullback(jnp.ones((), value.dtype))


def path_hypergradient(
    adjoint: AbstractAdjoint,
    differentiate: Callable[[PathObjective, Vector], Derivatives],
    inner: InnerSolve,
    outer: OuterLoss,
    start: Start,
    hyper: Hyper,
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

    value, arrays, through, direct = differentiate(objective, trainable)
    outcome, aux = eqx.combine(arrays, static_outcome)
    residual = inner.last_residual(outcome, hyper)
    info = PathInfo(num_flat=outcome.num_flat)
    return HypergradientOutput(
        value, aux, direct, through, outcome, residual, first_failure(), info, None
    )


def back_along_path(
    adjoint: AbstractAdjoint,
    inner: InnerSolve,
    outer: OuterLoss,
    start: Start,
    hyper: Hyper,
) -> HypergradientOutput:
    """The hypergradient in reverse mode along the path that `adjoint.solve` follows, and
    a report on how the derivative grew along it."""
    measured: Any = None

    def differentiate(objective, hyper):
        nonlocal measured
        value, pullback, arrays = jax.vjp(
            objective, hyper, hyper, new_gauge(), has_aux=True
        )
        through_solution, direct, measured = pullback(jnp.ones((), value.dtype))
        return value, arrays, through_solution, direct

    output = path_hypergradient(adjoint, differentiate, inner, outer, start, hyper)
    outcome = output.outcome
    reached, rest = split_trainable(outcome.params)

    def outer_slope():
        def of_params(params):
            return outer(eqx.combine(params, rest), hyper, outcome.model_state)[0]

        return tree_norm(jax.grad(of_params)(reached))

    def at_start():
        params, model_state = start(hyper)
        return outer(params, hyper, model_state)[0]

    growth, result = judge_path(measured, output.value, at_start, reached)
    bias = adjoint.bias
    info = PathInfo(
        left_out=bias.left_out,
        error=bias.error(hyper, outer_slope),
        num_flat=outcome.num_flat,
        growth=growth,
    )
    return dataclasses.replace(output, result=result, info=info)


def counted_anew(state: LoopState, loop: Loop) -> LoopState:
    """The state of a loop whose steps so far are not differentiated."""
    num_flat = None if state.num_flat is None else jnp.zeros_like(state.num_flat)
    return dataclasses.replace(state, num_flat=num_flat, gauge=loop.gauge)


def check_iterative(adjoint: AbstractAdjoint, solver: AbstractSolver) -> None:
    """Raise a `ValueError` unless the solver proceeds by steps."""
    if not isinstance(solver, AbstractIterativeSolver):
        raise ValueError(
            f"`{type(adjoint).__name__}` follows the steps of the inner solver, and "
            f"`{type(solver).__name__}` runs as a whole. Use `metaopt.ImplicitAdjoint()`"
            ", or a solver that proceeds by steps: `metaopt.Descent` or "
            "`metaopt.Picard`."
        )
