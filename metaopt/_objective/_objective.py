"""The outer loss as a function of `hyper`, and its derivative with a report."""

import dataclasses
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._adjoint import AbstractAdjoint, HypergradientOutput
from .._core._results import voids_hypergradient
from .._core._tree import (
    nan_where,
    split_trainable,
    tree_add,
    tree_nan_where,
    tree_scaled_norm,
    tree_where_arrays,
)
from .._core._types import (
    Aux,
    BoolScalar,
    FloatScalar,
    Hyper,
    Key,
    ModelState,
    Params,
    Vector,
)
from .._core._validate import check_params
from .._data import AbstractData, unwrapped
from .._jaxpr._dependence import evaluate_tracing_scale, leaves_with_influence
from .._problem import BilevelProblem, initialise
from .._promises import (
    check_inner_loss,
    check_outer_loss,
    check_seen,
    check_tunable,
    judged,
    split_unreached,
    trainable_names,
)
from .._report import InnerInfo, OuterInfo, Report
from .._solver import AbstractSolver, Earlier, InnerSolve, Outcome
from ._loop_error import loops_explained


def check_sources(
    problem: BilevelProblem,
    inner: AbstractSolver,
    train: AbstractData,
    valid: AbstractData,
) -> None:
    """Raise a `ValueError` if the sources cannot serve one inner solve and the outer loss
    at its solution."""
    inner.check(problem.inner, train)
    valid.check(1)
    if valid.num_batches is not None:
        raise ValueError(
            f"`valid` is a `{type(unwrapped(valid)).__name__}`, which has a batch for each "
            "inner step; the outer loss is evaluated once. Use plain arrays or "
            "`metaopt.Minibatches`, or give `metaopt.solve_bilevel` an iterator."
        )


class Continued(eqx.Module):
    """The run that an inner solve goes on with.

    **Attributes:**

    - `params`, `model_state`, `solver_state`: what it has reached; the last is `None`
        for a solver that remembers nothing.
    - `goes_on`: whether to go on with it, or to start anew.
    """

    params: Params
    model_state: ModelState
    solver_state: Any
    goes_on: BoolScalar


class Objective(eqx.Module):
    """The outer loss as a function of `hyper`: every choice made but the adjoint.

    The one place where the data flows: `hyper` to the start, to the inner solution, to
    the outer loss.
    """

    problem: BilevelProblem
    solve: InnerSolve
    valid: AbstractData
    params: Params | None
    model_state: ModelState
    init_key: Key
    outer_key: Key
    continued: Continued | None

    def __init__(
        self,
        problem: BilevelProblem,
        inner: AbstractSolver,
        train: AbstractData,
        valid: AbstractData,
        params: Params | None,
        model_state: ModelState,
        key: Key,
        tolerance: FloatScalar | None = None,
        continued: Continued | None = None,
    ):
        init_key, inner_key, outer_key = jax.random.split(key, 3)
        check_sources(problem, inner, train, valid)
        self.problem = problem
        earlier = None
        if continued is not None and continued.solver_state is not None:
            earlier = Earlier(continued.solver_state, continued.goes_on)
        self.solve = InnerSolve(
            problem.inner, inner, train, inner_key, tolerance, earlier=earlier
        )
        self.valid = valid
        self.params = params
        self.model_state = model_state
        self.init_key = init_key
        self.outer_key = outer_key
        self.continued = continued

    def start(self, hyper: Hyper) -> tuple[Params, ModelState]:
        """The start of the inner solve: that of the run, the given one, or the problem's
        own `init`."""
        anew = self._anew(hyper)
        run = self.continued
        if run is None:
            return anew
        reached = run.params, run.model_state
        return tree_where_arrays(run.goes_on, reached, anew)

    def _anew(self, hyper: Hyper) -> tuple[Params, ModelState]:
        if self.params is not None:
            return self.params, self.model_state
        params, model_state = initialise(
            self.problem.inner, hyper, self.init_key, self.model_state
        )
        check_params(params)
        return params, model_state

    def outer(
        self, params: Params, hyper: Hyper, model_state: ModelState
    ) -> tuple[FloatScalar, Aux]:
        """The outer loss at given params, and its auxiliary output."""
        plan_key, loss_key = jax.random.split(self.outer_key)
        draw = jax.tree.map(lambda leaf: leaf[0], self.valid.plan(plan_key, 1))
        batch = self.valid.batch(draw)
        return self.problem.evaluate_outer(params, hyper, batch, loss_key, model_state)

    def primal(self, hyper: Hyper) -> tuple[FloatScalar, Any]:
        """The outer loss at the inner solution and the outcome, without derivative."""
        params, model_state = self.start(hyper)
        outcome = self.solve.primal(params, hyper, model_state)
        value, _ = self.outer(outcome.params, hyper, outcome.model_state)
        return value, outcome

    def differentiate(
        self, adjoint: AbstractAdjoint, hyper: Hyper, carry: Any, *, guard: bool = True
    ) -> tuple[HypergradientOutput, Vector, Report]:
        """Everything the adjoint returned, the hypergradient, and the report on it.

        **Arguments:**

        - `adjoint`, `hyper`, `carry`: as for `AbstractAdjoint.hypergradient`.
        - `guard`: whether a hypergradient that the checks void is NaN.

        **Raises:**

        `ValueError` where a derivative is zero by construction.
        """
        name, output, parts, idle, held = self.trace(adjoint, hyper, carry)
        gradient = tree_add(*parts)
        norm = tree_scaled_norm(gradient)
        outcome = self.solve.checked(output.outcome, hyper)
        output = dataclasses.replace(output, outcome=outcome)
        is_finite = jnp.isfinite(output.value), jnp.isfinite(norm)
        result = judged(outcome.result, *is_finite, output.result)
        # Without a solution there is no hypergradient: a linear solver that stops at once
        # leaves a zero that looks like one.
        if guard:
            gradient = tree_nan_where(voids_hypergradient(result), gradient)
        report = _report(name, output, gradient, norm, result, idle, held)
        return output, gradient, report

    def trace(
        self, adjoint: AbstractAdjoint, hyper: Hyper, carry: Any
    ) -> tuple[
        str, HypergradientOutput, tuple[Vector, Vector], tuple[str, ...], tuple[str, ...]
    ]:
        """Trace the adjoint, and report all that is known before any number is.

        **Returns:**

        The name of the adjoint, its output, the two parts of the hypergradient (by way of
        the solution, and at fixed params), the leaves that influence nothing, and those
        whose only influence is held constant by a `stop_gradient` of the user.

        **Raises:**

        `ValueError` where a derivative is zero by construction.
        """
        adjoint.check(self.solve.solver, self.solve.data)
        self._check_inner_loss(hyper)
        static_output: Any = None

        def scaled(scale):
            nonlocal static_output

            def outer(params, hyper, model_state):
                value, aux = self.outer(params, hyper, model_state)
                return value * scale.astype(value.dtype), aux

            with self._loops_explained(adjoint, hyper):
                output = adjoint.hypergradient(self.solve, outer, self.start, hyper, carry)
            parts = (output.through_solution, output.direct)
            arrays, static_output = eqx.partition(output, eqx.is_array)
            return parts, arrays

        # A part of the hypergradient that does not depend on a factor of the outer loss
        # is zero by construction.
        parts, arrays, reached = evaluate_tracing_scale(scaled, jnp.float32)
        output = eqx.combine(arrays, static_output)
        self._check_outer_loss(output.outcome, hyper)
        idle, held = self._check_reached(adjoint, hyper, *reached)
        chosen = output.chosen
        name = type(adjoint).__name__ if chosen is None else repr(chosen)
        return name, output, parts, idle, held

    def _loops_explained(self, adjoint: AbstractAdjoint, hyper: Hyper):
        outer = lambda *args: self.outer(*args)[0]
        return loops_explained(self.solve, adjoint, self.start, hyper, outer)

    def _check_inner_loss(self, hyper: Hyper) -> None:
        problem, data = self.problem.inner, self.solve.data
        if not problem.has_loss:
            return
        params, model_state = self.start(hyper)
        trainable, static = split_trainable(params)
        draw = jax.tree.map(lambda leaf: leaf[0], data.plan(self.init_key, 1))

        def loss(trainable):
            full = eqx.combine(trainable, static)
            batch = data.batch(draw)
            return problem.evaluate(full, hyper, batch, self.init_key, model_state).value

        check_inner_loss(loss, trainable)

    def _check_outer_loss(self, outcome: Outcome, hyper: Hyper) -> None:
        trainable, static = split_trainable(outcome.params)

        def loss(trainable):
            full = eqx.combine(trainable, static)
            return self.outer(full, hyper, outcome.model_state)[0]

        check_outer_loss(loss, trainable)

    def _check_reached(
        self, adjoint: AbstractAdjoint, hyper: Hyper, solution: Vector, direct: Vector
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Each way in which a leaf acts must be seen: a leaf that the outer loss reads
        as well would hide that its way through the inner solution is not."""
        name, reached = type(adjoint).__name__, jax.tree.leaves(solution)
        adjoint.reach.check_solution(lambda: self._unreached(reached, hyper), name)
        reached = [a or b for a, b in zip(reached, jax.tree.leaves(direct), strict=True)]
        message = lambda names: adjoint.reach.zero_message(names, name)
        idle, held = check_seen(reached, lambda h: self.primal(h)[0], hyper, message)
        also = ", and nor does the inner solver"
        check_tunable(trainable_names(hyper), idle, held, also=also)
        return idle, held

    def _unreached(self, reached: list[bool], hyper: Hyper) -> tuple[str, ...]:
        """Names of the leaves that act on the outer loss through the inner solution, and
        whose derivative through it is zero by construction."""
        if all(reached):
            return ()
        # The outer loss may not read some of a solution, or hold it constant.
        read = self._read_by_outer(hyper)

        def acts(hyper):
            solution = jax.tree.leaves(_solution_of(self.primal(hyper)[1]))
            return list(itertools.compress(solution, read))

        return split_unreached(reached, acts, hyper)[0]

    def _read_by_outer(self, hyper: Hyper) -> list[bool]:
        """For each floating-point array of a solution, whether the outer loss reads it."""

        def solution(hyper):
            outcome = self.primal(hyper)[1]
            return outcome.params, outcome.model_state

        solved = eqx.filter_eval_shape(solution, hyper)
        is_struct = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
        structs, static = eqx.partition(solved, is_struct)

        def value(structs):
            params, model_state = eqx.combine(structs, static)
            return self.outer(params, hyper, model_state)[0]

        read = leaves_with_influence(value, structs)
        inexact = [
            jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(structs)
        ]
        return list(itertools.compress(read, inexact))


def _solution_of(outcome: Outcome) -> Any:
    """The part of an inner solve that the outer loss sees."""
    return eqx.filter((outcome.params, outcome.model_state), eqx.is_inexact_array)


def _report(
    adjoint: str,
    output: HypergradientOutput,
    gradient: Vector,
    norm: FloatScalar,
    result: Any,
    idle: tuple[str, ...],
    held: tuple[str, ...],
) -> Report:
    outcome = output.outcome
    return Report(
        result=result,
        outer=OuterInfo(
            loss=output.value,
            aux=output.aux,
            hypergradient_norm=nan_where(voids_hypergradient(result), norm),
            num_zeros=jnp.sum(
                jnp.stack([jnp.sum(leaf == 0) for leaf in jax.tree.leaves(gradient)])
            ),
            unreached=idle,
            held_constant=held,
        ),
        inner=InnerInfo(
            loss=outcome.loss,
            residual=output.inner_residual,
            num_steps=outcome.num_steps,
            failed_step=outcome.failed_step,
        ),
        derivative=output.info,
        adjoint=adjoint,
    )
