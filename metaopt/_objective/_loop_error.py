"""Errors about loops of unknown length, which reverse mode cannot pass."""

import contextlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .._adjoint import AbstractAdjoint, ForwardAdjoint, ImplicitAdjoint
from .._core._tree import split_trainable
from .._core._types import FloatScalar, Hyper, ModelState, Params
from .._jaxpr._dependence import passes_loop
from .._solver import AbstractIterativeSolver, InnerSolve


Outer = Callable[[Params, Hyper, ModelState], FloatScalar]
"""`outer(params, hyper, model_state)`: the outer loss."""


@contextlib.contextmanager
def loops_explained(
    inner: InnerSolve,
    adjoint: AbstractAdjoint,
    start: Callable[[Hyper], tuple[Params, ModelState]],
    hyper: Hyper,
    outer: Outer | None = None,
):
    """Names the function that holds a loop where reverse mode fails at one.

    **Arguments:**

    - `inner`, `adjoint`: the inner solve, and how it is differentiated.
    - `start`: `start(hyper)`, the initial params and model state.
    - `hyper`: the outer variables.
    - `outer`: the outer loss, or `None` where the user differentiates.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        if not _is_about_loops(error):
            raise
        message = _message(inner, adjoint, *start(hyper), hyper, outer)
        raise ValueError(message) from error


def _is_about_loops(error: Exception) -> bool:
    if isinstance(error, TypeError):
        # JAX 0.10 forgets the names of the arguments of a loop that it linearised, and
        # fails at them before it can say that reverse mode is impossible.
        return str(error) == "unsupported operand type(s) for +: 'NoneType' and 'tuple'"
    return str(error).startswith("Reverse-mode differentiation does not work for lax.wh")


def _message(
    inner: InnerSolve,
    adjoint: AbstractAdjoint,
    params: Params,
    model_state: ModelState,
    hyper: Hyper,
    outer: Outer | None,
) -> str:
    problem, kind = inner.problem, type(adjoint).__name__
    moving, static = split_trainable((params, hyper))

    def held(fn: Callable[[Params, Hyper], Any]) -> bool:
        def of_arrays(moving):
            return eqx.filter(fn(*eqx.combine(moving, static)), eqx.is_inexact_array)

        try:
            return passes_loop(of_arrays, moving)
        except (TypeError, ValueError):  # some functions allow reverse mode only
            return False

    def of_problem(fn):
        data, key = inner.data, inner.key
        batch = data.batch(jax.tree.map(lambda leaf: leaf[0], data.plan(key, 1)))
        return lambda params, hyper: fn(params, hyper, batch, key, model_state)

    evaluate = of_problem(problem.evaluate)
    in_reverse = f"`{kind}` differentiates it in reverse mode. "
    forward = "Use `metaopt.ForwardAdjoint()`. Or bound the loop. "
    if isinstance(adjoint, ForwardAdjoint):
        forward = ""
    elif not isinstance(inner.solver, AbstractIterativeSolver):
        forward = (
            "Differentiate `metaopt.solve_inner` in forward mode, with `jax.jacfwd`. Or "
            "bound the loop. "
        )
    if problem.has_loss and held(lambda params, hyper: evaluate(params, hyper).value):
        needed = "Every solver and adjoint needs its gradient. "
        return _LOOP.format("The inner loss") + needed + _BOUND
    if held(of_problem(problem.optimality)):
        name = problem.field_name.capitalize()
        return _LOOP.format(name) + in_reverse + forward + _BOUND
    if outer is not None and held(lambda p, h: outer(p, h, model_state)):
        return _LOOP.format("The outer loss") + in_reverse + forward + _BOUND
    others = [
        f"`metaopt.{other.__name__}()`"
        for other in (ImplicitAdjoint, ForwardAdjoint)
        if not isinstance(adjoint, other)
    ]
    return _LOOP.format("A step of the inner solver") + (
        f"A line search is one. {in_reverse}Use {' or '.join(others)}, or a solver without "
        "such a loop."
    )


_LOOP = (
    "{} holds a loop of unknown length (`jax.lax.while_loop`, or `jax.lax.fori_loop` with "
    "traced bounds), which reverse mode cannot pass. "
)
_BOUND = (
    "Write it with `jax.lax.scan`, or with `jax.lax.fori_loop` and Python ints as bounds, "
    "or with `equinox.internal.while_loop(..., kind='bounded')`."
)
