"""Implicit differentiation at the inner solution."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from .._dependence import depends
from .._detach import detached, forbid_derivative, stop_gradient
from .._linear import (
    AbstractLinearSolver,
    AbstractToleranceSolver,
    CG,
    coarsest_eps,
    initial_state,
    LinearSolution,
    prepare,
    transposed,
)
from .._operators import linear_solve, newton_length
from .._results import first_failure, mask_result, RESULTS, where_result
from .._solver import InnerSolve, Optimality, Outcome
from .._tree import (
    divided,
    nan_where,
    same_structs,
    scale_and_norm,
    split_trainable,
    tree_add,
    tree_cast_like,
    tree_dot,
    tree_dtype,
    tree_entangled,
    tree_norm,
    tree_scaled_norm,
    tree_structs,
    tree_sub,
    tree_where,
    tree_widened,
)
from .._types import FloatScalar, Hyper, IntScalar, Vector
from .._validate import check_count, check_tolerance
from .._warn import warn
from ._base import AbstractAdjoint, HypergradientOutput, OuterLoss, Start
from ._correction import random_signs
from ._curvature import AbstractCurvature, ExactCurvature
from ._dual_weighted import DualWeighted
from ._error import AbstractErrorEstimate, Linearisation
from ._info import ImplicitInfo


_OF_THE_WAY = 1e-3
_OF_RTOL = 0.1
_ROUGH = 0.01  # relative residuals for which a rough solver suffices
_PRECONDITIONER = 1  # folded into the key of the solve


class ImplicitAdjoint(AbstractAdjoint):
    r"""The implicit function theorem at the inner solution.

    With the optimality $g(params, hyper) = 0$ at the solution, the hypergradient is
    $\partial_h F - (\partial_h g)^T (\partial_p g)^{-T} \partial_p F$: one linear
    solve, whatever path led there. Memory does not depend on the number of inner steps.
    Use it where the inner problem is solved to convergence; the initial params and the
    solver's own settings (learning rate, momentum) are out of its reach, and asking for
    them is an error.

    A hypergradient whose inner solution or linear solve is not good enough never passes
    silently: it raises, or under `throw=False` is marked in the report, and inside a
    plain `jax.grad` is NaN.

    **Arguments:**

    - `linear_solver`: how the linear system is solved: [`metaopt.CG`][] for a loss to
        minimise, [`metaopt.GMRES`][], [`metaopt.BiCGStab`][], [`metaopt.NormalCG`][],
        [`metaopt.Neumann`][] or [`metaopt.Dense`][] for fixed points, roots and
        constrained problems too. Only [`metaopt.MINRES`][] is accepted at a saddle or a
        maximum of a loss.
    - `rtol`: the largest relative error of the hypergradient that is accepted, as estimated
        by `error`; `jax.numpy.inf` accepts any. A linear solver with a looser tolerance
        than a tenth of it is tightened to that. In a run the error is compared with the
        largest hypergradient so far, because near an outer optimum the hypergradient is
        as small as its error. A linear solver or operator that leaves something out by
        request (a fixed number of steps, damping, [`metaopt.GaussNewton`][]) is not held
        to it: the error is reported, and the inner solution is held to `rtol` instead.
    - `inner_rtol`: the largest relative error of the inner solution that is accepted,
        as estimated from one product with the Jacobian, in place of a check of the
        hypergradient; `jax.numpy.inf` accepts any.
    - `newton_steps`: how many Newton steps the inner solution is corrected by before it
        is differentiated. Each costs a linear solve, and makes the error that an inexact
        inner solution leaves quadratic in its residual instead of linear. A step that
        does not make the residual smaller is not taken.
    - `error`: how the error of the hypergradient is found: [`metaopt.DualWeighted`][]
        estimates it, [`metaopt.StrongConvexity`][] bounds it. `None` saves the products
        of the estimate, and holds the inner solution to `rtol` instead.
    - `curvature`: which operator stands for the Jacobian of the optimality in the linear
        system: that itself, [`metaopt.ExactCurvature`][], or [`metaopt.GaussNewton`][],
        which is cheaper and never indefinite, and leaves something out.

    The method goes back to Larsen et al. (1996) and Bengio (2000); with conjugate
    gradients on Hessian-vector products it is that of Pedregosa (2016). With a Newton
    step it is super-efficient in the sense of Ye, Peyré, Cremers and Ablin (2024).
    """

    linear_solver: AbstractLinearSolver = CG()
    rtol: float = eqx.field(default=1e-3, static=True)
    inner_rtol: float | None = eqx.field(default=None, static=True)
    newton_steps: int = eqx.field(default=0, static=True)
    error: AbstractErrorEstimate | None = DualWeighted()
    curvature: AbstractCurvature = ExactCurvature()
    sees_path: ClassVar[bool] = False
    sees_inner_loss: ClassVar[bool] = True
    heeds_tolerance: ClassVar[bool] = True

    def __check_init__(self):
        if not isinstance(self.linear_solver, AbstractLinearSolver):
            raise ValueError(
                "`linear_solver` must be a linear solver of metaopt, such as "
                f"`metaopt.CG(rtol=1e-4)`; got {self.linear_solver!r}."
            )
        check_tolerance(self.rtol, "rtol", infinite=True, optional=False)
        check_tolerance(self.inner_rtol, "inner_rtol", infinite=True)
        check_count(self.newton_steps, "newton_steps", minimum=0)
        if not isinstance(self.error, AbstractErrorEstimate | None):
            raise ValueError(
                "`error` must be `metaopt.DualWeighted()`, `metaopt.StrongConvexity(...)` "
                f"or `None`; got {self.error!r}."
            )
        if not isinstance(self.curvature, AbstractCurvature):
            raise ValueError(
                "`curvature` must be `metaopt.ExactCurvature()` or `metaopt.GaussNewton()`"
                f"; got {self.curvature!r}."
            )

    def check(self, solver, data):
        data.full()

    def init(self, params):
        trainable = tree_widened(split_trainable(params)[0])
        zeros = jax.tree.map(jnp.zeros_like, trainable)
        largest = jnp.zeros((), tree_dtype(trainable))
        return _Carry(zeros, initial_state(self.linear_solver, trainable), largest)

    def solve(self, inner, params, hyper, model_state, throw):
        outcome, _, _ = self._solve(inner, params, hyper, model_state, throw)
        return outcome

    def _solve(
        self, inner, params, hyper, model_state, throw
    ) -> tuple[Outcome, Optimality, Vector]:
        """The outcome with its implicit derivative, and its condition, which is traced
        once, with the point to linearise it at."""
        outcome = inner.primal(params, hyper, model_state)
        outer_variables = split_trainable(hyper)[0]
        for _ in range(self.newton_steps):
            outcome = detached(ft.partial(self._newton_step, inner), outcome, hyper)
        trainable, static = split_trainable(outcome.params)
        condition, widened = _condition(inner, outcome, hyper)
        residual, operator, jacobian = self.curvature.linearise(
            condition, widened, outer_variables
        )
        self.linear_solver.check(operator)
        point = _Point.at(params, widened, residual, jacobian)
        # What a function in it (a preconditioner) closes over must be seen by JAX.
        hoisted = jax.tree.map(
            lambda x: eqx.filter_closure_convert(x, widened) if callable(x) else x,
            self._prepared(operator, inner, outcome, None)[0],
        )
        if self.error is not None:
            # No outer loss is known here, whose constants a bound would be about.
            hoisted = dataclasses.replace(hoisted, error=DualWeighted())
        adjoint, static_adjoint = eqx.partition(hoisted, eqx.is_array)
        solution = _with_implicit_derivative(
            condition,
            trainable,
            outer_variables,
            stop_gradient((outcome.result, point, adjoint)),
            static_adjoint=static_adjoint,
            throw=throw,
        )
        params = eqx.combine(solution, static)
        outcome = eqx.tree_at(lambda o: o.params, outcome, params)
        return outcome, condition, widened

    def hypergradient(self, inner, outer, start, hyper, carry, scale):
        outer_variables, static_hyper = split_trainable(hyper)
        params, model_state = start(hyper)
        outcome, condition, widened = self._solve(inner, params, hyper, model_state, False)
        narrow, static = split_trainable(outcome.params)
        trainable = tree_cast_like(narrow, widened)

        def outer_loss(trainable, outer_variables):
            full_hyper = eqx.combine(outer_variables, static_hyper)
            full_params = eqx.combine(tree_cast_like(trainable, narrow), static)
            return outer(full_params, full_hyper, outcome.model_state)

        def at(trainable):
            return Linearisation(
                self.curvature, condition, outer_loss, trainable, outer_variables, scale
            )

        here = at(trainable)
        point = _Point.at(params, trainable, here.residual, here.jacobian)
        if carry is None:
            carry = _Carry(None, None, None)
        first_guess = carry.solution
        if first_guess is not None:
            first_guess = tree_cast_like(first_guess, trainable)
        ready, known, num_products = self._prepared(
            here.operator, inner, outcome, carry.preconditioner
        )
        exact = ready._tightened(trainable)
        if self.error is not None:
            exact = exact._keeping_directions(trainable)
        linear = exact._solve_transposed(
            here.operator, condition.tags, here.in_params, first_guess, inner.tolerance
        )
        through_solution = here.through_solution(linear.value)
        gradient = tree_add(through_solution, here.direct)
        inner_error = point.error(linear.value, here.in_params)
        estimate = None
        if self.error is not None:
            estimate = self.error(here, linear, gradient, at, ready._solve_anew, hyper)
        largest = tree_scaled_norm(gradient)
        before = largest if carry.largest is None else carry.largest.astype(largest.dtype)
        largest = jnp.maximum(largest, before)
        allowed = self._allowed_error(largest, inner.tolerance)
        decides = self._judges_error and inner.tolerance is None
        inner_rtol = jnp.inf if decides else self._own_inner_rtol
        result = first_failure(
            self._judge(inner_error, inner_rtol, inner.tolerance), linear.result
        )
        min_curvature = linear.min_curvature
        if estimate is not None:
            result = first_failure(result, estimate.judged(allowed))
            min_curvature = jnp.minimum(min_curvature, estimate.min_curvature)
        info = ImplicitInfo(
            inner_error=inner_error,
            linear_residual=linear.residual,
            num_linear_steps=linear.num_steps,
            num_products=linear.num_products + num_products,
            min_curvature=min_curvature,
            tolerance=inner.tolerance,
            error=None if estimate is None else estimate.error,
            num_error_products=None if estimate is None else estimate.num_products,
            allowed_error=allowed,
            # The slope of the outer loss is rounded to what half precision holds.
            error_is_bound=self.error is not None
            and self.error.is_bound
            and tree_structs(narrow) == tree_structs(tree_widened(narrow)),
            left_out=(
                *self.curvature.left_out,
                *self.linear_solver.left_out,
                *_unseen_model_state(inner, outer, start, hyper, outcome),
            ),
        )
        return HypergradientOutput(
            here.value,
            here.aux,
            here.direct,
            through_solution,
            outcome,
            tree_scaled_norm(here.residual),
            result,
            info,
            # What was refused is no measure of what comes next.
            _Carry(
                tree_widened(linear.value),
                known,
                jnp.where(result == RESULTS.successful, largest, before),
            ),
        )

    @property
    def _is_biased(self) -> bool:
        """Whether the linear solution was asked to leave something out."""
        return bool(self.linear_solver.left_out or self.curvature.left_out)

    def _tightened(self, vector: Vector) -> "ImplicitAdjoint":
        """The same, its linear solver at least as exact as `rtol` needs."""
        solver = self.linear_solver
        if not isinstance(solver, AbstractToleranceSolver):
            return self
        own = solver.relative_tolerance
        asked = self.rtol
        if self.inner_rtol is not None and self.inner_rtol < jnp.inf:
            # Who accepts a rough inner solution needs no exact linear one.
            asked = max(asked, self.inner_rtol)
        needed = max(_OF_RTOL * asked, 10 * coarsest_eps(vector))
        if own is None or own <= needed:
            return self
        return dataclasses.replace(self, linear_solver=solver.with_rtol(needed))

    def _keeping_directions(self, vector: Vector) -> "ImplicitAdjoint":
        solver = self.linear_solver
        if not isinstance(solver, AbstractToleranceSolver):
            return self
        return dataclasses.replace(self, linear_solver=solver.keeping_directions(vector))

    @property
    def _judges_error(self) -> bool:
        """Whether the error of the hypergradient decides."""
        judged = self.error is not None and self.inner_rtol is None
        return judged and not self._is_biased and self.rtol != jnp.inf

    def _judge_pullback(
        self,
        condition: Optimality,
        params: Vector,
        read: tuple[Any, Hyper],
        moving: tuple[Any, Hyper],
        linear: LinearSolution,
        cotangent: Vector,
    ) -> Any:
        """Whether the derivative of the cotangent times the inner solution is accurate.

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
            one = jnp.ones((), jnp.float32)
            return Linearisation(self.curvature, along, outer_loss, params, varied, one)

        here = at(params)
        assert self.error is not None
        mixed = jax.tree.map(jnp.multiply, linear.value, random_signs(linear.value))
        try:
            gradient, terms = here.through_solution_both(linear.value, mixed)
        except ValueError:
            # So does the derivative itself, if anyone takes it.
            return RESULTS.successful
        estimate = self.error(here, linear, gradient, at, self._solve_anew, read[1])
        size = jnp.maximum(tree_scaled_norm(gradient), tree_scaled_norm(terms))
        return estimate.judged(self.rtol * size)

    def _allowed_error(
        self, size: FloatScalar, tolerance: FloatScalar | None
    ) -> FloatScalar | None:
        """The largest error of a hypergradient of this size, or `None` for any."""
        if not self._judges_error:
            return None
        allowed = self.rtol * size
        if tolerance is None:
            return allowed
        # The outer loop has the residuals held to its tolerance, and not the error.
        return jnp.where(tolerance > _OF_RTOL * self.rtol, jnp.inf, allowed)

    def _prepared(
        self,
        operator: lx.AbstractLinearOperator,
        inner: InnerSolve,
        outcome: Outcome,
        state: Any,
    ) -> tuple["ImplicitAdjoint", Any, IntScalar]:
        """The same with its preconditioner ready for an operator, what that knows now,
        and the products that it took."""
        solver, state, num_products = prepare(
            self.linear_solver,
            operator,
            state,
            jax.random.fold_in(inner.key, _PRECONDITIONER),
            outcome.solver_state,
        )
        ready = dataclasses.replace(self, linear_solver=solver, error=None)
        return ready, stop_gradient(state), num_products

    def _newton_step(self, inner: InnerSolve, outcome: Outcome, hyper: Hyper) -> Outcome:
        """One Newton step towards the inner solution, unless it leads away from it."""
        trainable, static = split_trainable(outcome.params)
        outer_variables = split_trainable(hyper)[0]
        condition, widened = _condition(inner, outcome, hyper)
        residual, operator, _ = self.curvature.linearise(
            condition, widened, outer_variables
        )
        self.linear_solver.check(operator)
        ready, _, _ = self._prepared(operator, inner, outcome, None)
        step = ready._linear_solution(operator, residual)
        corrected = tree_cast_like(tree_sub(widened, step.value), trainable)
        # Comparing with NaN is false, and so is a step to where nothing is known.
        left = condition(tree_cast_like(corrected, widened), outer_variables)
        closer = tree_scaled_norm(left) < tree_scaled_norm(residual)
        params = eqx.combine(tree_where(closer, corrected, trainable), static)
        return eqx.tree_at(lambda o: o.params, outcome, params)

    def _solve_anew(
        self,
        here: Linearisation,
        vector: Vector,
        *,
        transposed: bool,
        rtol: float,
        tolerance: FloatScalar | None = None,
    ) -> LinearSolution:
        """A solve at a linearisation."""
        solver, operator = self.linear_solver, here.operator
        if transposed and lx.symmetric_tag not in here.condition.tags:
            solver, operator = self._transposed().linear_solver, operator.transpose()
        if isinstance(solver, AbstractToleranceSolver):
            solver = solver.rough(rtol) if rtol >= _ROUGH else solver.with_rtol(rtol)
        solution = solver.solve(operator, vector, None, tolerance)
        if not (self._is_biased or self.linear_solver.accepts_indefinite):
            return solution
        # Whoever asked for that, or for something to be left out, is not refused for it.
        infinite = jnp.full_like(solution.min_curvature, jnp.inf)
        return dataclasses.replace(solution, min_curvature=infinite)

    def _transposed(self) -> "ImplicitAdjoint":
        """The same, ready for the transposed operator."""
        solver = transposed(self.linear_solver)
        return dataclasses.replace(self, linear_solver=solver)

    def _judge(
        self, error: FloatScalar, rtol: float, tolerance: FloatScalar | None = None
    ) -> Any:
        """Whether the inner solution is good enough, by its own error."""
        if rtol == jnp.inf:
            return RESULTS.successful
        allowed = jnp.asarray(rtol)
        if tolerance is not None:
            allowed = jnp.maximum(allowed, tolerance)
        good = error <= allowed
        return where_result(good, RESULTS.successful, RESULTS.inner_not_converged)

    @property
    def _own_inner_rtol(self) -> float:
        return self.rtol if self.inner_rtol is None else self.inner_rtol

    def _linear_solution(
        self,
        operator: lx.AbstractLinearOperator,
        vector: Vector,
        start: Vector | None = None,
        tolerance: FloatScalar | None = None,
    ) -> LinearSolution:
        """The solution of the linear system, its curvature checked by this as well.

        Methods that do not look at curvature solve at a saddle or a maximum like
        anywhere else, and what they find is not the response of a minimum. Where that
        was asked for, negative curvature is only reported.
        """
        solver = self.linear_solver
        solution = solver.solve(operator, vector, start, tolerance)
        if not lx.is_positive_semidefinite(operator):
            return solution
        # Curvature has no scale of the right-hand side, whose square may be no number.
        # Without the barrier XLA takes a constant factor out of the vector again.
        scale, b = scale_and_norm(jax.lax.optimization_barrier(vector))
        unit = jax.lax.optimization_barrier(divided(vector, scale))
        scaled = divided(solution.value, scale)
        x = tree_norm(scaled)
        along = tree_dot(scaled, unit)  # x.A x, but for the residual
        negative = along < -solution.residual * x * b
        safe = jnp.where(x > 0, x, 1)
        smallest = jnp.minimum(
            solution.min_curvature, jnp.where(x > 0, along / safe**2, jnp.inf)
        )
        num_products = solution.num_products
        if solver.accepts_indefinite:
            negative = jnp.asarray(False)
        elif not (solver.checks_curvature or solver.left_out):
            # Conjugate gradients meet each sign of curvature that acts on the solution.
            probe = CG(rtol=self._probe_rtol).solve(operator, unit, None, tolerance)
            smallest = jnp.minimum(smallest, probe.min_curvature)
            num_products = num_products + probe.num_products
            rounding = 100 * coarsest_eps(vector) * b / safe
            negative |= probe.min_curvature < -rounding
        result = mask_result(negative, RESULTS.linear_indefinite)
        return dataclasses.replace(
            solution,
            result=first_failure(solution.result, result),
            min_curvature=smallest,
            num_products=num_products,
        )

    @property
    def _probe_rtol(self) -> float:
        solver = self.linear_solver
        own = None
        if isinstance(solver, AbstractToleranceSolver):
            own = solver.relative_tolerance
        return 1e-5 if own is None else own

    def _solve_transposed(
        self,
        operator: lx.AbstractLinearOperator,
        tags: frozenset[object],
        vector: Vector,
        start: Vector | None = None,
        tolerance: FloatScalar | None = None,
    ) -> LinearSolution:
        """Solves with the transposed operator, differentiably once more."""
        symmetric = lx.symmetric_tag in tags
        adjoint_operator = operator if symmetric else operator.transpose()
        start, tolerance = jax.lax.stop_gradient((start, tolerance))
        # A leaf that nothing moves would not be taken for linear in a second derivative.
        vector = tree_entangled(vector)

        def solve(ready, product, vector):
            made = lx.FunctionLinearOperator(product, tree_structs(vector), tags)
            solution = ready._linear_solution(made, vector, start, tolerance)
            return solution.value, eqx.tree_at(lambda s: s.value, solution, None)

        value, rest = jax.lax.custom_linear_solve(
            adjoint_operator.mv,
            vector,
            ft.partial(solve, self._transposed()),
            transpose_solve=ft.partial(solve, self),
            symmetric=symmetric,
            has_aux=True,
        )
        if self._is_biased:
            value = _without_second_derivative(self, value)
        return eqx.tree_at(lambda s: s.value, rest, value, is_leaf=lambda x: x is None)


def _condition(
    inner: InnerSolve, outcome: Outcome, hyper: Hyper
) -> tuple[Optimality, Vector]:
    """The optimality and the point to linearise it at: in float32 for params of half
    precision, unless the problem insists on the dtype that it is used to.

    It is traced here, once for all of its derivatives.
    """
    narrow, outer_variables = split_trainable(outcome.params)[0], split_trainable(hyper)[0]
    widened = tree_widened(narrow)
    plain = inner.optimality(outcome, hyper)
    if tree_structs(narrow) == tree_structs(widened):
        return plain.converted(narrow, outer_variables), narrow
    condition = inner.optimality(outcome, hyper, widen=True)
    try:
        found = jax.eval_shape(condition, widened, outer_variables)
    except (TypeError, ValueError):
        found = None
    if found is not None and same_structs(found, widened):
        return condition.converted(widened, outer_variables), widened
    warn(
        "The inner problem cannot be evaluated in float32 at params of half precision: "
        "something in it has a dtype of its own. The linear system is solved in half "
        "precision. Write `x.astype(params.dtype)` for arrays that the loss makes or "
        "closes over.",
    )
    return plain.converted(narrow, outer_variables), narrow


class _Carry(eqx.Module):
    """The state that one hypergradient leaves for the next."""

    solution: Vector | None
    preconditioner: Any  # what it knows; `None` where there is none
    largest: FloatScalar | None  # the largest norm of a hypergradient so far


class _Point(eqx.Module):
    """The point of an implicit derivative, and its distance from a solution."""

    residual: Vector
    distance: FloatScalar  # to the solution, by one product
    params: Vector
    way: Vector  # from the start, times how much of it is allowed for

    @classmethod
    def at(cls, start, params: Vector, residual: Vector, jacobian) -> "_Point":
        way = tree_sub(params, tree_cast_like(split_trainable(start)[0], params))
        way = jax.tree.map(lambda leaf: leaf * jnp.asarray(_OF_THE_WAY, leaf.dtype), way)
        return cls(residual, newton_length(residual, jacobian), params, way)

    def error(self, solution: Vector, vector: Vector) -> FloatScalar:
        """An estimate of the relative error of the params, from below.

        With $A w = b$ solved for the derivative, $w . r = b . A^{-1} r$ is the step that
        is still to come, $A^{-1} r$, projected on $b$: for a hypergradient, on the
        direction in which the outer loss changes. It sees slow directions, which the
        residual hides. It is compared with the params as $b$ weighs them, because large
        params that the outer loss does not look at excuse nothing.
        """
        size = tree_scaled_norm(vector)
        weights = divided(vector, _or_one(size))
        along = jnp.abs(tree_dot(solution, divided(self.residual, _or_one(size))))
        weighed = lambda x: tree_scaled_norm(jax.tree.map(jnp.multiply, weights, x))
        return jnp.maximum(
            self._relative(self.distance, tree_scaled_norm),
            jnp.where(size > 0, self._relative(along, weighed), 0.0),
        )

    def _relative(self, length: FloatScalar, norm: Callable) -> FloatScalar:
        # A solution near zero is good if it is near in comparison with the way to it.
        size = jnp.maximum(norm(self.params), norm(self.way))
        return jnp.where(length == 0, 0.0, length / size)


def _or_one(size: FloatScalar) -> FloatScalar:
    return jnp.where(size > 0, size, 1)


@eqx.filter_custom_jvp
def _with_implicit_derivative(condition, params, hyper, fixed, *, static_adjoint, throw):
    return params


@_with_implicit_derivative.def_jvp
def _(primals, tangents, *, static_adjoint, throw):
    condition, params, hyper, (inner_result, point, adjoint) = primals
    adjoint = eqx.combine(adjoint, static_adjoint)
    moving_condition, _, moving_hyper, _ = tangents
    # Used again below, so that second derivatives see the solution move as well.
    params = _with_implicit_derivative(*primals, static_adjoint=static_adjoint, throw=throw)
    solution = params
    if adjoint._is_biased:
        condition, params, hyper = _without_second_derivative(
            adjoint, (condition, params, hyper)
        )
    widened = tree_cast_like(params, point.params)
    read, moving = (condition.fn, hyper), (moving_condition.fn, moving_hyper)
    _, pushed = eqx.filter_jvp(lambda fn, hyper: fn(widened, hyper), read, moving)
    # `None` stands for a derivative that is zero by construction.
    if not jax.tree.leaves(pushed):
        return solution, jax.tree.map(lambda _: None, params)
    right_hand_side = tree_entangled(
        jax.tree.map(lambda p, t: jnp.zeros_like(p) if t is None else -t, widened, pushed)
    )
    _, operator, _ = adjoint.curvature.linearise(condition, widened, hyper)

    def solve(ready, product, vector, *, reverse):
        structure = tree_structs(vector)
        operator = lx.FunctionLinearOperator(product, structure, condition.tags)
        linear = ready._tightened(vector)._linear_solution(operator, vector)
        error = point.error(linear.value, vector)
        judged = ready._judge(error, adjoint._own_inner_rtol)
        result = first_failure(inner_result, judged, linear.result)
        if reverse and adjoint._judges_error:
            seen = ready._judge_pullback(condition, widened, read, moving, linear, vector)
            result = first_failure(result, seen)
        failed = result != RESULTS.successful
        if throw:
            return result.error_if(linear.value, failed)
        return jax.tree.map(lambda leaf: nan_where(failed, leaf), linear.value)

    tangent = linear_solve(
        operator.mv,
        right_hand_side,
        ft.partial(solve, adjoint, reverse=False),
        transpose_solve=ft.partial(solve, adjoint._transposed(), reverse=True),
        symmetric=lx.symmetric_tag in condition.tags,
    )
    # Its transpose entangles the cotangent, for second derivatives.
    return solution, tree_cast_like(tree_entangled(tangent), params)


def _without_second_derivative(adjoint: ImplicitAdjoint, tree: Any) -> Any:
    """The derivative of a rough linear solution is not that of the exact one."""
    left_out = "; ".join((*adjoint.curvature.left_out, *adjoint.linear_solver.left_out))
    arrays, static = eqx.partition(tree, eqx.is_array)
    message = _NO_SECOND_DERIVATIVE.format(left_out=left_out)
    return eqx.combine(forbid_derivative(arrays, message), static)


_NO_SECOND_DERIVATIVE = (
    "The hypergradient leaves something out by request ({left_out}), and its own "
    "derivative is not known: that of the exact linear solution would belong to another "
    "number. For second derivatives use a linear solver with a tolerance and without "
    "damping, such as `metaopt.CG(rtol=1e-10)`, with `metaopt.ExactCurvature()`, or "
    "`metaopt.UnrolledAdjoint()`."
)


def _unseen_model_state(
    inner: InnerSolve, outer: OuterLoss, start: Start, hyper: Hyper, outcome: Outcome
) -> tuple[str, ...]:
    """Model state at the solution has no optimality, hence no implicit derivative."""
    trainable, static = split_trainable(hyper)
    floats, rest = split_trainable(outcome.model_state)

    def model_state(trainable):
        full = eqx.combine(trainable, static)
        params, model_state = start(full)
        return split_trainable(inner.primal(params, full, model_state).model_state)[0]

    def outer_loss(floats):
        return outer(outcome.params, hyper, eqx.combine(floats, rest))[0]

    def condition(floats):
        state = eqx.combine(floats, rest)
        return inner.solver.optimality(
            inner.problem, outcome.params, hyper, inner.data.full(), inner.key, state
        )(split_trainable(outcome.params)[0], trainable)

    if not jax.tree.leaves(floats):
        return ()
    if not (depends(outer_loss, floats) or depends(condition, floats)):
        return ()
    if not depends(model_state, trainable):
        return ()
    return ("what `hyper` does through the model state",)
