"""The derivative of an inner solution by the implicit function theorem."""

import dataclasses
import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from .._core._results import first_failure, RESULTS
from .._core._tree import (
    tree_cast_like,
    tree_dot,
    tree_entangled,
    tree_nan_where,
    tree_scaled_norm,
    tree_structs,
)
from .._core._types import Hyper, Vector
from .._jaxpr._detach import stop_gradient
from .._jaxpr._linearise import linear_solve
from .._linear import AbstractLinearSolver, LinearSolution, transposed
from .._solver import Optimality
from ._accuracy import Accuracy
from ._checked_solve import checked_solve
from ._correction import random_signs
from ._curvature import AbstractCurvature
from ._dual_weighted import DualWeighted
from ._error import Linearisation
from ._inner_error import InnerError, judge_inner
from ._second_derivative import without_second_derivative
from ._system import ImplicitSystem


class _Rule(eqx.Module):
    """The linear solver, ready, and the accuracy that its solutions are held to."""

    linear_solver: AbstractLinearSolver
    curvature: AbstractCurvature
    accuracy: Accuracy

    @property
    def left_out(self) -> tuple[str, ...]:
        return (*self.curvature.left_out, *self.linear_solver.left_out)

    def judge_pullback(
        self,
        condition: Optimality,
        params: Vector,
        read: tuple[Any, Hyper],
        moving: tuple[Any, Hyper],
        linear: LinearSolution,
        cotangent: Vector,
    ) -> Any:
        """Judge the derivative of the cotangent times the inner solution.

        The derivative is that in the leaves of `read`, the condition's function and
        `hyper`, whose tangent in `moving` is not `None`. The curvature of an outer loss is
        not known here: it counts as linear. Its slope in `hyper` is not known either, so
        that the error is compared with the size of the terms of the derivative, which may
        cancel near an outer optimum.
        """
        outer_loss = lambda params, moving: (tree_dot(cotangent, params), None)
        moves = jax.tree.map(lambda _, tangent: tangent is not None, read, moving)
        varied, held = eqx.partition(read, moves)

        def residual(params, varied):
            fn, hyper = eqx.combine(varied, held)
            return fn(params, hyper)

        along = Optimality(residual, condition.tags)

        def at(params):
            here = Linearisation.at(self.curvature, along, outer_loss, params, varied)
            return here.solved_with(self.linear_solver)

        here = at(params)
        error = self.accuracy.error
        assert error is not None
        mixed = jax.tree.map(jnp.multiply, linear.value, random_signs(linear.value))
        try:
            gradient, terms = here.through_solution_both(linear.value, mixed)
        except ValueError:
            # The derivative itself raises as well, if anyone takes it.
            return RESULTS.successful
        estimate = error(here, linear, gradient, at, read[1])
        size = jnp.maximum(tree_scaled_norm(gradient), tree_scaled_norm(terms))
        return estimate.judged(self.accuracy.rtol * size)


def with_implicit_derivative(
    params: Vector,
    system: ImplicitSystem,
    inner_error: InnerError,
    inner_result: RESULTS,
    accuracy: Accuracy,
    *,
    throw: bool,
) -> Vector:
    """Return an inner solution with its implicit derivative in `hyper`.

    **Arguments:**

    - `params`: the inner solution, in its own dtypes.
    - `system`: the linear system there, its linear solver prepared.
    - `inner_error`: the distance to the solution.
    - `inner_result`: the result of the inner solve.
    - `accuracy`: what the derivative is held to.
    - `throw`: whether a derivative that fails raises; else it is NaN.

    **Returns:**

    `params`.
    """
    if accuracy.error is not None:
        # No outer loss is known here, whose constants a bound would be about.
        accuracy = dataclasses.replace(accuracy, error=DualWeighted())
    rule = _Rule(system.linear_solver, system.curvature, accuracy)
    # JAX must see the arrays that a function in it (a preconditioner) closes over.
    hoisted = jax.tree.map(
        lambda x: eqx.filter_closure_convert(x, system.params) if callable(x) else x, rule
    )
    dynamic, static = eqx.partition(hoisted, eqx.is_array)
    return _with_implicit_derivative(
        system.condition,
        params,
        system.hyper,
        stop_gradient((inner_result, inner_error, dynamic)),
        static_rule=static,
        throw=throw,
    )


@eqx.filter_custom_jvp
def _with_implicit_derivative(condition, params, hyper, fixed, *, static_rule, throw):
    return params


@_with_implicit_derivative.def_jvp
def _(primals, tangents, *, static_rule, throw):
    condition, params, hyper, (inner_result, inner_error, rule) = primals
    rule = eqx.combine(rule, static_rule)
    moving_condition, _, moving_hyper, _ = tangents
    # Used again below, so that second derivatives see the solution move as well.
    params = _with_implicit_derivative(*primals, static_rule=static_rule, throw=throw)
    solution = params
    condition, params, hyper = without_second_derivative(
        rule.left_out, (condition, params, hyper)
    )
    widened = tree_cast_like(params, inner_error.params)
    read, moving = (condition.fn, hyper), (moving_condition.fn, moving_hyper)
    _, pushed = eqx.filter_jvp(lambda fn, hyper: fn(widened, hyper), read, moving)
    # `None` stands for a derivative that is zero by construction.
    if not jax.tree.leaves(pushed):
        return solution, jax.tree.map(lambda _: None, params)
    right_hand_side = tree_entangled(
        jax.tree.map(lambda p, t: jnp.zeros_like(p) if t is None else -t, widened, pushed)
    )
    _, operator, _ = rule.curvature.linearise(condition, widened, hyper)
    accuracy = rule.accuracy

    def solve(solver, product, vector, *, reverse):
        structure = tree_structs(vector)
        operator = lx.FunctionLinearOperator(product, structure, condition.tags)
        linear = checked_solve(accuracy.tightened(solver, vector), operator, vector)
        error = inner_error.relative(linear.value, vector)
        judged = judge_inner(error, accuracy.own_inner_rtol)
        if reverse:
            linear = accuracy.passed(linear, vector)
        result = first_failure(inner_result, judged, linear.result)
        if reverse and accuracy.judges_error:
            seen = rule.judge_pullback(condition, widened, read, moving, linear, vector)
            result = first_failure(result, seen)
        failed = result != RESULTS.successful
        if throw:
            return result.error_if(linear.value, failed)
        return tree_nan_where(failed, linear.value)

    tangent = linear_solve(
        operator.mv,
        right_hand_side,
        ft.partial(solve, rule.linear_solver, reverse=False),
        transpose_solve=ft.partial(solve, transposed(rule.linear_solver), reverse=True),
        symmetric=lx.symmetric_tag in condition.tags,
    )
    # Its transpose entangles the cotangent, for second derivatives.
    return solution, tree_cast_like(tree_entangled(tangent), params)
