"""Unrolled differentiation: reverse mode through every step."""

import dataclasses
import functools as ft
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import equinox as eqx
import jax

from .._core._tree import split_trainable, tree_num_bytes
from .._core._types import Hyper, ModelState, Params
from .._report import inner_steps, Work
from .._solver import (
    AbstractExactMomentum,
    AbstractIterativeSolver,
    AbstractSolver,
    InnerSolve,
)
from ._base import AbstractAdjoint
from ._bias import Bias
from ._memory import (
    AbstractMemoryPlan,
    AutomaticPlan,
    Blocks,
    Candidate,
    MemoryBudget,
    OnlineCheckpoints,
    RecomputeSteps,
    step_bytes,
    StoreAll,
    StoreUpdates,
)
from ._path import back_along_path, check_iterative
from ._reach import AbstractReach, AlongPath
from ._reversible import ReversibleAdjoint


class UnrolledAdjoint(AbstractAdjoint):
    """Reverse mode through every step of the inner solver.

    Exact for the params that were reached, converged or not, and the only exact choice for
    hyperparameters of the path itself: learning rates, momenta, schedules, initial params.
    By default it keeps all steps if they are small, and makes some of them again if not.
    If the inner problem is solved to convergence, [`metaopt.ImplicitAdjoint`][] needs less.

    **Arguments:**

    - `memory`: what is kept for the reverse pass.
        - `"auto"` chooses from shapes and compiles nothing for it: it takes
            [`metaopt.memory.StoreAll`][] where all steps keep at most 384 MiB or are at
            most 16. Else it takes `metaopt.memory.Blocks(n, metaopt.memory.StoreAll())`
            with the least `n` up to 3 that keeps 16 MiB, or as much as 16 steps, or as
            64 steps where that is at most 256 MiB. Each level computes the steps once
            more. Sizes are estimates, for one of the elements under `jax.vmap`.
        - A plan: [`metaopt.memory.StoreAll`][], [`metaopt.memory.StoreUpdates`][],
            [`metaopt.memory.RecomputeSteps`][], [`metaopt.memory.Blocks`][] or
            [`metaopt.memory.OnlineCheckpoints`][].
        - A budget, as a number of bytes or a text such as `"2GiB"`: the plan of the fewest
            operations is taken that seems to fit by its shapes, and whose hypergradient XLA
            plans to run within this much temporary memory, which takes a compilation
            for each plan that is looked at: mostly one. It is for one device, and
            under `jax.vmap` for one of the elements.

        Reports name a plan that was chosen, unless `"auto"` stores all steps.
        [`metaopt.memory.memory_report`][] shows what each plan takes.

    **Raises:**

    `ValueError` if `memory` is none of these and, where the hypergradient is asked for,
    if no plan keeps to the budget.

    The method is that of Maclaurin, Duvenaud and Adams (2015), and Franceschi, Donini,
    Frasconi and Pontil (2017).
    """

    memory: AbstractMemoryPlan | AutomaticPlan | MemoryBudget
    reach: ClassVar[AbstractReach] = AlongPath()

    def __init__(self, memory: AbstractMemoryPlan | int | str = "auto"):
        if isinstance(memory, str) and memory == "auto":
            self.memory = AutomaticPlan()
        elif isinstance(memory, (int, str)):
            self.memory = MemoryBudget.of(memory)
        else:
            self.memory = memory

    def __check_init__(self):
        if not isinstance(self.memory, (AbstractMemoryPlan, AutomaticPlan, MemoryBudget)):
            raise ValueError(
                "`memory` must be a memory plan such as `metaopt.memory.Blocks()`, or a "
                f'budget such as `"2GiB"`, or `"auto"`; got {self.memory!r}.'
            )

    @property
    def bias(self):
        return Bias()

    def check(self, solver, data):
        check_iterative(self, solver)

    def work(self, columns, num_hyper):
        """Count the work of outer steps, as a [`metaopt.extend.CountsWork`][]."""
        steps, memory = inner_steps(columns), self.memory
        # A plan that is chosen, by a budget or from shapes, is known to the compiled
        # program alone.
        again = memory.num_repeats if isinstance(memory, AbstractMemoryPlan) else 0
        return Work(gradients=(1 + again) * steps + 1, products=steps)

    def solve(self, inner, params, hyper, model_state, throw):
        if isinstance(self.memory, AbstractMemoryPlan):
            loop = self.memory.prepare(inner.loop(params))
            return loop.run(params, hyper, model_state, self.memory.scan)
        if isinstance(self.memory, AutomaticPlan):
            adjoint = _chosen_from_shapes(self.memory, inner, params, hyper, model_state)
            return adjoint.solve(inner, params, hyper, model_state, throw)

        def program(adjoint):
            return _pulled_back(adjoint, inner, throw)

        arguments = params, hyper, model_state
        candidates = _candidates(inner, *arguments)
        adjoint = self.memory.choose(candidates, program, *arguments)
        return adjoint.solve(inner, params, hyper, model_state, throw)

    def hypergradient(self, inner, outer, start, hyper, carry):
        if isinstance(self.memory, AbstractMemoryPlan):
            return back_along_path(self, inner, outer, start, hyper)

        def program(adjoint):
            def gradient(hyper):
                output = adjoint.hypergradient(inner, outer, start, hyper, carry)
                return eqx.filter(output, eqx.is_array)

            return gradient

        params, model_state = start(hyper)
        if isinstance(self.memory, AutomaticPlan):
            adjoint = _chosen_from_shapes(self.memory, inner, params, hyper, model_state)
            output = back_along_path(adjoint, inner, outer, start, hyper)
            stores_all = isinstance(adjoint.memory, StoreAll)
            return dataclasses.replace(output, chosen=None if stores_all else adjoint)
        candidates = _candidates(inner, params, hyper, model_state)
        adjoint = self.memory.choose(candidates, program, hyper)
        output = adjoint.hypergradient(inner, outer, start, hyper, carry)
        return dataclasses.replace(output, chosen=adjoint)


def _chosen_from_shapes(
    automatic: AutomaticPlan,
    inner: InnerSolve,
    params: Params,
    hyper: Hyper,
    model_state: ModelState,
) -> UnrolledAdjoint:
    plan = automatic.choose(inner.loop(params), params, hyper, model_state)
    return UnrolledAdjoint(plan)


_PLANS = (
    Blocks(1),
    Blocks(1, RecomputeSteps()),
    Blocks(2),
    Blocks(2, RecomputeSteps()),
    Blocks(3),
    Blocks(3, RecomputeSteps()),
    Blocks(5, RecomputeSteps()),
)


def exact_adjoints(solver: AbstractSolver) -> list[AbstractAdjoint]:
    """The adjoints that give the same hypergradient in reverse mode and differ in what
    they keep, from the fewest operations to the least memory."""
    return [adjoint for adjoint, _ in _with_num_stored(solver)]


def unrolled_by_default(adjoints: Iterable[AbstractAdjoint]) -> UnrolledAdjoint | None:
    """`UnrolledAdjoint()` if one of the adjoints is unrolled, else `None`."""
    unrolled = any(isinstance(adjoint, UnrolledAdjoint) for adjoint in adjoints)
    return UnrolledAdjoint() if unrolled else None


def _with_num_stored(
    solver: AbstractSolver,
) -> list[tuple[AbstractAdjoint, Callable[[int], int]]]:
    """The exact adjoints, each with the number of states that it stores at least."""
    adjoints: list[tuple[AbstractAdjoint, Callable[[int], int]]] = []
    unrolled = lambda plan: (UnrolledAdjoint(plan), plan.num_stored)
    adjoints += [unrolled(plan) for plan in (StoreAll(), StoreUpdates(), RecomputeSteps())]
    if isinstance(solver, AbstractExactMomentum) and solver.keeps_model_state:
        adjoints.append((ReversibleAdjoint(), lambda length: 0))
    if isinstance(solver, AbstractIterativeSolver) and solver.stops_early:
        adjoints.append(unrolled(OnlineCheckpoints()))
    return adjoints + [unrolled(plan) for plan in _PLANS]


def _candidates(
    inner: InnerSolve, params: Params, hyper: Hyper, model_state: ModelState
) -> list[Candidate[AbstractAdjoint]]:
    """The exact adjoints, each with the least memory that it takes for one solve, and an
    estimate of what it takes."""
    loop = inner.loop(params)
    begin = lambda: loop.start(params, hyper, model_state)
    size = tree_num_bytes(jax.eval_shape(begin).params)
    of_step = ft.cache(
        lambda plan: step_bytes(plan.prepare(loop), params, hyper, model_state)
    )

    def candidate(
        adjoint: AbstractAdjoint, num_stored: Callable[[int], int]
    ) -> Candidate[AbstractAdjoint]:
        least = num_stored(loop.num_steps) * size
        estimate = least
        if isinstance(adjoint, UnrolledAdjoint):
            estimate = max(least, _estimated(adjoint.memory, of_step, loop.num_steps))
        return Candidate(adjoint, least, estimate)

    return [candidate(*each) for each in _with_num_stored(inner.solver)]


def _estimated(plan: Any, of_step: Callable[..., tuple[int, int]], length: int) -> int:
    """The bytes that a plan keeps, as shapes tell; none where they do not."""
    num_states = 0
    if isinstance(plan, Blocks):
        inside = plan.block_length(length)
        num_states = plan.num_stored(length) - inside
        plan, length = plan.steps, inside
    if isinstance(plan, RecomputeSteps):
        num_states, length = num_states + length, 1
    elif not isinstance(plan, StoreAll | StoreUpdates):
        return 0
    tape, state = of_step(plan)
    return num_states * state + length * tape


def _pulled_back(
    adjoint: AbstractAdjoint, inner: InnerSolve, throw: bool
) -> Callable[..., Any]:
    """A function that solves, and pulls the solution back to `hyper`."""

    def gradient(params, hyper, model_state):
        trainable, static = split_trainable(hyper)

        def solution(trainable):
            full = eqx.combine(trainable, static)
            outcome = adjoint.solve(inner, params, full, model_state, throw)
            return split_trainable(outcome.params)[0]

        value, pullback = jax.vjp(solution, trainable)
        return value, pullback(value)

    return gradient
