"""Training from scratch on a schedule of `hyper` that a run has found."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._adjoint import UnrolledAdjoint
from .._best_response import best_responses, ordinary
from .._core._types import Hyper, Key, ModelState, Params
from .._core._validate import canonical_arrays, check_kind, DESCENT_EXAMPLE
from .._data import AbstractData, AbstractWrappedData, as_data
from .._problem import (
    AbstractProblem,
    AbstractWrappedProblem,
    BilevelProblem,
    returned,
)
from .._report import History, Solution
from .._solve_inner import solve_inner
from .._solver import Descent


def retrain(
    problem: AbstractProblem | BilevelProblem,
    schedule: Hyper,
    train: Any = None,
    *,
    solver: Descent,
    params: Params | None = None,
    model_state: ModelState = None,
    key: Key | None = None,
    throw: bool = True,
) -> Solution:
    """Train anew on a schedule of `hyper`, such as a self-tuning run has found.

    Tells what a schedule is worth by itself: params that were trained while `hyper` was
    tuned owe something to the tuning. For one constant `hyper` use
    [`metaopt.solve_inner`][].

    **Arguments:**

    - `problem`: the inner problem, one that minimises a loss, or the bilevel problem.
    - `schedule`: a pytree like `hyper` whose arrays have a leading axis of stages, such
        as `solution.history.hyper`. That has `hyper` *after* each outer step, and so is one
        step ahead of the run; put the initial `hyper` in front where this matters. Each
        stage is used for an equal share of the steps.
    - `train`: arrays, or a source of batches.
    - `solver`: how to train, such as `metaopt.Descent(optax.adam(1e-3), num_steps=1000)`.
    - `params`, `model_state`, `key`, `throw`: as in [`metaopt.solve_inner`][]. The
        initial params are drawn at the first stage.

    **Returns:**

    A [`metaopt.Solution`][].

    **Raises:**

    `ValueError` for arguments that do not fit; [`metaopt.SolveError`][] for a numerical
    failure under `throw`.
    """
    inner = problem.inner if isinstance(problem, BilevelProblem) else problem
    check_kind(inner, AbstractProblem, "problem", "metaopt.InnerProblem(loss)")
    if not inner.has_loss:
        raise ValueError(
            "`problem` must minimise a loss, such as `metaopt.InnerProblem(loss)`; "
            f"`{type(inner).__name__}` has none."
        )
    check_kind(solver, Descent, "solver", DESCENT_EXAMPLE)
    if isinstance(schedule, History):
        raise ValueError(
            "`schedule` must be the path of `hyper`; got a `History`, which has it as "
            "`history.hyper`."
        )
    schedule = canonical_arrays(schedule, "schedule")
    leaves = [leaf for leaf in jax.tree.leaves(schedule) if eqx.is_inexact_array(leaf)]
    lengths = {leaf.shape[:1] for leaf in leaves}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            "The arrays of `schedule` must share a leading axis, one row for each stage, "
            "as `solution.history.hyper` does; got shapes "
            f"{[leaf.shape for leaf in leaves]}."
        )
    if not isinstance(solver.transform, optax.GradientTransformation):
        raise ValueError(
            "`solver` makes its transform from `hyper`, and there is one for each stage "
            "here. Give it a transform, whose own schedule can go by its steps, such as "
            f"`{DESCENT_EXAMPLE}`."
        )
    ((num_stages,),) = lengths
    if num_stages > solver.num_steps:
        raise ValueError(
            f"`schedule` has {num_stages} stages and `solver` takes {solver.num_steps} "
            "steps. Give it at least one for each stage."
        )
    data = as_data(canonical_arrays(train, "train"), "train")
    solution = solve_inner(
        _Staged(inner),
        schedule,
        _InStages(data, num_stages),
        params=params,
        solver=solver,
        adjoint=UnrolledAdjoint(),
        model_state=model_state,
        key=key,
        throw=throw,
    )
    if not best_responses(solution.value):
        return solution
    return dataclasses.replace(solution, value=ordinary(solution.value))


class _InStages(AbstractWrappedData):
    """Batches with the number of the stage that each is for."""

    source: AbstractData
    num_stages: int = eqx.field(static=True)

    @property
    def varies(self):
        return True

    def init(self, key):
        return self.source.init(key)

    def take(self, cursor, num_steps):
        stages = np.arange(num_steps) * self.num_stages // num_steps
        plan, cursor = self.source.take(cursor, num_steps)
        return (jnp.asarray(stages), plan), cursor

    def batch(self, draw):
        stage, inner = draw
        return stage, self.source.batch(inner)

    def full(self):
        raise ValueError(
            "`train` has no one batch for a whole schedule. Use a `solver` that takes a "
            "fixed number of steps, such as `metaopt.Descent(..., num_steps=1000)`."
        )


class _Staged(AbstractWrappedProblem):
    """An inner problem whose `hyper` has one row for each stage of the run."""

    problem: AbstractProblem

    def init(self, hyper, key):
        return self.problem.init(_row(hyper, 0), key)

    def loss(self, params, hyper, batch, *, key, state=None):
        stage, batch = batch
        out = self.problem.evaluate(params, _row(hyper, stage), batch, key, state)
        return returned(self, out)


def _row(schedule: Hyper, index: Any) -> Hyper:
    return jax.tree.map(
        lambda leaf: leaf[index] if eqx.is_inexact_array(leaf) else leaf, schedule
    )
