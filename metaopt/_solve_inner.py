"""Solving one inner problem, differentiably."""

import dataclasses
from typing import Any

import jax

from ._adjoint import AbstractAdjoint
from ._core._compiled import compiled
from ._core._trace_once import tracing_once
from ._core._types import Hyper, Key, ModelState, Params
from ._core._validate import (
    ADJOINT_EXAMPLE,
    canonical_arrays,
    canonical_hyper,
    canonical_key,
    canonical_params,
    check_kind,
    check_params,
    DESCENT_EXAMPLE,
)
from ._data import AbstractData, as_data
from ._objective import loops_explained
from ._problem import AbstractProblem, initialise
from ._report import raise_on_failure, Solution
from ._solver import AbstractSolver, can_go_on, Earlier, InnerSolve


@tracing_once()
def solve_inner(
    problem: AbstractProblem,
    hyper: Hyper,
    train: Any = None,
    *,
    solver: AbstractSolver,
    adjoint: AbstractAdjoint,
    params: Params | None = None,
    key: Key | None = None,
    model_state: ModelState = None,
    solver_state: Any = None,
    throw: bool = True,
) -> Solution:
    """Solve an inner problem: the differentiable building block under everything else.

    Use it inside your own `jax.grad`, `jax.vmap` and `jax.jit`. For one hypergradient
    with a report of how far it can be trusted, use [`metaopt.hypergradient`][].

    ```python
    import jax
    import jax.numpy as jnp
    import metaopt as mo
    import optax

    problem = mo.InnerProblem(lambda params, hyper, data: (params - hyper) ** 2)

    def outer(hyper):
        solution = mo.solve_inner(
            problem, hyper, params=jnp.array(0.0),
            solver=mo.Descent(optax.sgd(0.1), num_steps=100),
            adjoint=mo.ImplicitAdjoint(),
        )
        return solution.value**2

    jax.grad(outer)(jnp.array(3.0))  # 6.0
    ```

    **Arguments:**

    - `problem`: the inner problem.
    - `hyper`: the outer variables, any pytree with a floating-point array in it.
    - `train`: the data of the problem: arrays, or a source of batches such as
        [`metaopt.Minibatches`][].
    - `solver`: how the problem is solved.
    - `adjoint`: how the derivative passes through the solve.
    - `params`: where to start, any pytree with a floating-point array in it; by default
        the problem's own `init`. A Python float inside of a model is a setting, and is
        not trained.
    - `key`: for everything random, from `jax.random.key`; by default key 0.
    - `model_state`: where the model state starts; with `params` only.
    - `solver_state`: the `solver_state` of an earlier [`metaopt.Solution`][], to go on
        from its momenta, averages and count of steps; with the `params` and the
        `model_state` of that solution. Give another `key` for other draws. By default
        the solver begins anew.
    - `throw`: whether a failure raises. If not, it is marked in the result, and a
        derivative that fails its checks is NaN.

    **Returns:**

    A [`metaopt.Solution`][]. Its `value` is differentiable in `hyper`, `params`, `train`
    and every array that the problem closes over. The rest of it (model state, auxiliary
    output, losses) is differentiable too under an adjoint that follows the path.

    **Raises:**

    `ValueError` and `TypeError` for arguments that do not fit; `ValueError` where a
    derivative is asked for that is zero by construction under the adjoint;
    [`metaopt.SolveError`][] for a numerical failure under `throw`. Inside compiled
    functions a failure is raised when they run, as an error of JAX, which is readable
    under `equinox.filter_jit`.
    """
    check_kind(problem, AbstractProblem, "problem", "metaopt.InnerProblem(loss)")
    check_kind(solver, AbstractSolver, "solver", DESCENT_EXAMPLE)
    check_kind(adjoint, AbstractAdjoint, "adjoint", ADJOINT_EXAMPLE)
    hyper = canonical_hyper(hyper)
    train = canonical_arrays(train, "train")
    if params is not None:
        params = canonical_params(params)
    key = canonical_key(key)
    _check_solver_state(solver_state, solver, params)
    solution = _solve(
        problem,
        hyper,
        params,
        as_data(train, "train"),
        solver,
        adjoint,
        key,
        model_state,
        solver_state,
        throw,
    )
    return raise_on_failure(solution, solution.result, throw)


def _check_solver_state(
    solver_state: Any, solver: AbstractSolver, params: Params | None
) -> None:
    if solver_state is None:
        return
    if not can_go_on(solver):
        raise ValueError(
            f"`solver_state`: `{type(solver).__name__}` remembers nothing that the next "
            "solve could go on from. Leave it out and pass `params=solution.value`."
        )
    if params is None:
        raise ValueError(
            "`solver_state` goes with the params that were reached: pass "
            "`params=solution.value` as well."
        )


@compiled
def _solve(
    problem: AbstractProblem,
    hyper: Hyper,
    params: Params | None,
    data: AbstractData,
    solver: AbstractSolver,
    adjoint: AbstractAdjoint,
    key: Key,
    model_state: ModelState,
    solver_state: Any,
    throw: bool,
) -> Solution:
    solver.check(problem, data)
    adjoint.check(solver, data)
    init_key, solve_key = jax.random.split(key)
    name = type(adjoint).__name__
    params, solver_state = adjoint.reach.guarded_start((params, solver_state), name)
    earlier = None if solver_state is None else Earlier(solver_state)
    inner = InnerSolve(problem, solver, data, solve_key, earlier=earlier)

    def start(hyper):
        if params is not None:
            return params, model_state
        initial, state = initialise(problem, hyper, init_key, model_state)
        check_params(initial)
        return initial, state

    def run(hyper):
        initial, state = start(hyper)
        outcome = adjoint.solve(inner, initial, hyper, state, throw)
        # Nobody can go on from what solvers of fixed points remember.
        kept = outcome.solver_state if can_go_on(solver) else None
        return dataclasses.replace(outcome, solver_state=kept)

    with loops_explained(inner, adjoint, start, hyper):
        outcome = inner.checked(
            adjoint.reach.guarded(
                run, hyper, adjoint=name, root=problem.outer_name, throw=throw
            ),
            hyper,
        )
    return Solution(
        value=outcome.params,
        result=outcome.result,
        aux=outcome.aux,
        model_state=outcome.model_state,
        solver_state=outcome.solver_state,
        stats={
            "num_steps": outcome.num_steps,
            "losses": outcome.losses,
            "failed_step": outcome.failed_step,
        },
    )
