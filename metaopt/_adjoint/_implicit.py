"""Implicit differentiation at the inner solution."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._results import first_failure, RESULTS
from .._core._tree import (
    split_trainable,
    tree_add,
    tree_cast_like,
    tree_dtype,
    tree_scaled_norm,
    tree_structs,
    tree_sub,
    tree_where,
    tree_widened,
)
from .._core._types import FloatScalar, Hyper, Params, Vector
from .._core._validate import check_count, check_tolerance
from .._implicit import (
    AbstractCurvature,
    AbstractErrorEstimate,
    Accuracy,
    DualWeighted,
    ExactCurvature,
    ImplicitSystem,
    InnerError,
    Linearisation,
    widened_condition,
    with_implicit_derivative,
)
from .._jaxpr._dependence import depends
from .._jaxpr._detach import detached
from .._linear import (
    AbstractLinearSolver,
    AbstractToleranceSolver,
    CG,
    initial_state,
    LinearSolution,
)
from .._report import inner_steps, Work
from .._solver import InnerSolve, Optimality, Outcome
from ._base import AbstractSystemAdjoint, HypergradientOutput, OuterLoss, Start
from ._bias import Bias
from ._info import ImplicitInfo
from ._reach import AbstractReach, AtSolution


_PRECONDITIONER = 1  # folded into the key of the solve


class ImplicitAdjoint(AbstractSystemAdjoint):
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
        minimise, [`metaopt.GMRES`][], [`metaopt.linear.BiCGStab`][],
        [`metaopt.linear.NormalCG`][], [`metaopt.Neumann`][] or [`metaopt.Dense`][] for
        fixed points, roots and constrained problems too. Only [`metaopt.linear.MINRES`][]
        is accepted at a saddle or a maximum of a loss.
    - `rtol`: the largest relative error of the hypergradient that is accepted, as estimated
        by `error`; `jax.numpy.inf` accepts any. A linear solver with a looser tolerance
        than a tenth of it is tightened to that. In a run the error is compared with the
        largest hypergradient so far, because near an outer optimum the hypergradient is as
        small as its error. A linear solver or operator that leaves something out by request
        (a fixed number of steps, damping, [`metaopt.linear.GaussNewton`][]) is not held to
        it: the error is reported, and the inner solution is held to `rtol` instead.
    - `inner_rtol`: the largest relative error of the inner solution that is accepted,
        as estimated from one product with the Jacobian, in place of a check of the
        hypergradient; `jax.numpy.inf` accepts any.
    - `newton_steps`: how many Newton steps the inner solution is corrected by before it
        is differentiated. Each costs a linear solve, and makes the error that an inexact
        inner solution leaves quadratic in its residual instead of linear. A step that
        does not make the residual smaller is not taken.
    - `error`: how the error of the hypergradient is found:
        [`metaopt.accuracy.DualWeighted`][] estimates it,
        [`metaopt.accuracy.StrongConvexity`][] bounds it. `None` saves the products of the
        estimate, and holds the inner solution to `rtol` instead.
    - `curvature`: which operator stands for the Jacobian of the optimality in the linear
        system: that itself, [`metaopt.linear.ExactCurvature`][], or
        [`metaopt.linear.GaussNewton`][], which is cheaper and never indefinite, and leaves
        something out.

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
    reach: ClassVar[AbstractReach] = AtSolution()

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
                "`error` must be `metaopt.accuracy.DualWeighted()`, "
                f"`metaopt.accuracy.StrongConvexity(...)` or `None`; got {self.error!r}."
            )
        if not isinstance(self.curvature, AbstractCurvature):
            raise ValueError(
                "`curvature` must be `metaopt.linear.ExactCurvature()` or "
                f"`metaopt.linear.GaussNewton()`; got {self.curvature!r}."
            )

    @property
    def bias(self):
        return Bias((*self.curvature.left_out, *self.linear_solver.left_out))

    def check(self, solver, data):
        data.full()

    def work(self, columns, num_hyper):
        """Count the work of outer steps, as a [`metaopt.extend.CountsWork`][]."""
        steps = inner_steps(columns)
        solves = np.asarray(columns["num_products"], float)
        # A Newton step solves a system that is as hard as that of the derivative.
        products = (1 + self.newton_steps) * solves + 1
        if "num_error_products" in columns:
            products = products + columns["num_error_products"]
        # The optimality, and the slope of the outer loss, at the solution.
        return Work(gradients=steps + 2 + self.newton_steps, products=products)

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
        for _ in range(self.newton_steps):
            outcome = detached(ft.partial(self._newton_step, inner), outcome, hyper)
        trainable, static = split_trainable(outcome.params)
        system = self._system(inner, outcome, hyper)
        inner_error = InnerError.at(
            system.residual, system.distance(), system.params, params
        )
        solution = with_implicit_derivative(
            trainable, system, inner_error, outcome.result, self._accuracy, throw=throw
        )
        params = eqx.combine(solution, static)
        outcome = eqx.tree_at(lambda o: o.params, outcome, params)
        return outcome, system.condition, system.params

    def hypergradient(self, inner, outer, start, hyper, carry):
        params, model_state = start(hyper)
        outcome, condition, point = self._solve(inner, params, hyper, model_state, False)
        narrow = split_trainable(outcome.params)[0]
        at = self._linearisations(outer, outcome, condition, hyper)
        here = at(tree_cast_like(narrow, point))
        if carry is None:
            carry = _Carry(None, None, None)
        system = self._prepared(here.system, inner, outcome, carry.preconditioner)
        here = dataclasses.replace(here, system=system)
        linear = self._linear_solution(here, carry.solution, inner.tolerance)
        if inner.tolerance is None:
            linear = self._accuracy.passed(linear, here.system.params)
        through_solution = here.through_solution(linear.value)
        gradient = tree_add(through_solution, here.direct)
        estimate = None
        if self.error is not None:
            estimate = self.error(here, linear, gradient, at, hyper)
        largest = tree_scaled_norm(gradient)
        before = largest if carry.largest is None else carry.largest.astype(largest.dtype)
        largest = jnp.maximum(largest, before)
        allowed = self._accuracy.allowed_error(largest, inner.tolerance)
        result, inner_error = self._judge(here, linear, params, inner.tolerance)
        min_curvature = linear.min_curvature
        if estimate is not None:
            result = first_failure(result, estimate.judged(allowed))
            min_curvature = jnp.minimum(min_curvature, estimate.min_curvature)
        info = ImplicitInfo(
            inner_error=inner_error,
            linear_residual=linear.residual,
            num_linear_steps=linear.num_steps,
            num_products=linear.num_products + system.num_products,
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
                *self.bias.left_out,
                *_unseen_model_state(inner, outer, start, hyper, outcome),
            ),
        )
        carry = _Carry(
            tree_widened(linear.value),
            system.preconditioner_state,
            # A refused hypergradient does not measure the next ones.
            jnp.where(result == RESULTS.successful, largest, before),
        )
        return HypergradientOutput(
            here.value,
            here.aux,
            here.direct,
            through_solution,
            outcome,
            tree_scaled_norm(system.residual),
            result,
            info,
            carry,
        )

    @property
    def _accuracy(self) -> Accuracy:
        return Accuracy(self.rtol, self.inner_rtol, self.error, bool(self.bias.left_out))

    def _linearisations(
        self,
        outer: OuterLoss,
        outcome: Outcome,
        condition: Optimality,
        hyper: Hyper,
    ) -> Callable[[Vector], Linearisation]:
        """A function that linearises the two losses at params near the solution."""
        outer_variables, static_hyper = split_trainable(hyper)
        narrow, static = split_trainable(outcome.params)

        def outer_loss(trainable, outer_variables):
            full_hyper = eqx.combine(outer_variables, static_hyper)
            full_params = eqx.combine(tree_cast_like(trainable, narrow), static)
            return outer(full_params, full_hyper, outcome.model_state)

        def at(trainable):
            return Linearisation.at(
                self.curvature, condition, outer_loss, trainable, outer_variables
            )

        return at

    def _system(self, inner: InnerSolve, outcome: Outcome, hyper: Hyper) -> ImplicitSystem:
        """The linear system at an outcome, its linear solver prepared."""
        condition, point = widened_condition(
            lambda widen: inner.optimality(outcome, hyper, widen), outcome.params, hyper
        )
        outer_variables = split_trainable(hyper)[0]
        system = ImplicitSystem.linearised(
            condition, point, outer_variables, self.curvature
        )
        return self._prepared(system, inner, outcome, None)

    def _prepared(
        self, system: ImplicitSystem, inner: InnerSolve, outcome: Outcome, state: Any
    ) -> ImplicitSystem:
        return system.prepare(
            self.linear_solver,
            state,
            key=jax.random.fold_in(inner.key, _PRECONDITIONER),
            solver_state=outcome.solver_state,
        )

    def _linear_solution(
        self,
        here: Linearisation,
        first_guess: Vector | None,
        tolerance: FloatScalar | None,
    ) -> LinearSolution:
        """The solution of the transposed system, as exact as `rtol` needs, which keeps its
        search directions for the error estimate."""
        vector, params = here.in_params, here.system.params
        if first_guess is not None:
            first_guess = tree_cast_like(first_guess, params)
        solver = self._accuracy.tightened(here.system.linear_solver, params)
        if self.error is not None and isinstance(solver, AbstractToleranceSolver):
            solver = solver.keeping_directions(params)
        system = here.solved_with(solver).system
        return system.solve(vector, transposed=True, start=first_guess, tolerance=tolerance)

    def _judge(
        self,
        here: Linearisation,
        linear: LinearSolution,
        start: Params,
        tolerance: FloatScalar | None,
    ) -> tuple[RESULTS, FloatScalar]:
        """Judge the two solutions, the inner one unless the error estimate decides."""
        decides = self._accuracy.judges_error and tolerance is None
        inner_rtol = jnp.inf if decides else self._accuracy.own_inner_rtol
        return here.system.judge(
            linear,
            here.in_params,
            inner_rtol=inner_rtol,
            tolerance=tolerance,
            start=start,
        )

    def _newton_step(self, inner: InnerSolve, outcome: Outcome, hyper: Hyper) -> Outcome:
        """One Newton step towards the inner solution, unless it leads away from it."""
        trainable, static = split_trainable(outcome.params)
        system = self._system(inner, outcome, hyper)
        step = system.solve(system.residual)
        corrected = tree_cast_like(tree_sub(system.params, step.value), trainable)
        # Comparing with NaN is false, and so is a step to where nothing is known.
        left = system.condition(tree_cast_like(corrected, system.params), system.hyper)
        closer = tree_scaled_norm(left) < tree_scaled_norm(system.residual)
        params = eqx.combine(tree_where(closer, corrected, trainable), static)
        return eqx.tree_at(lambda o: o.params, outcome, params)


class _Carry(eqx.Module):
    """The state that one hypergradient leaves for the next."""

    solution: Vector | None
    preconditioner: Any  # what it knows; `None` where there is none
    largest: FloatScalar | None  # the largest norm of a hypergradient so far


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
