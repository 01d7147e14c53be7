"""Training from scratch on a schedule of `hyper` that a run has found."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ._adjoint import UnrolledAdjoint
from ._data import AbstractData, as_data
from ._problem import AbstractInnerProblem, BilevelProblem
from ._report import Solution
from ._solve_inner import solve_inner
from ._solver import Descent
from ._types import Hyper, Key, ModelState, Params
from ._validate import canonical_arrays, check_kind, DESCENT_EXAMPLE


def retrain(
    problem: AbstractInnerProblem | BilevelProblem,
    schedule: Hyper,
    train: Any = None,
    *,
    solver: Descent,
    params: Params | None = None,
    model_state: ModelState = None,
    key: Key | None = None,
    throw: bool = True,
) -> Solution:
    """Trains anew on a schedule of `hyper`, such as a self-tuning run has found.

    Tells what a schedule is worth by itself: params that were trained while `hyper` was
    tuned owe something to the tuning. For one constant `hyper` use
    [`metaopt.solve_inner`][].

    **Arguments:**

    - `problem`: the inner problem, one that minimises a loss, or the bilevel problem.
    - `schedule`: a pytree like `hyper` whose arrays have a leading axis of stages, such
        as `solution.history.hyper`. Each stage is used for an equal share of the steps.
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
    check_kind(inner, AbstractInnerProblem, "problem", "metaopt.InnerProblem(loss)")
    assert isinstance(inner, AbstractInnerProblem)
    check_kind(solver, Descent, "solver", DESCENT_EXAMPLE)
    schedule = canonical_arrays(schedule, "schedule")
    leaves = [leaf for leaf in jax.tree.leaves(schedule) if eqx.is_inexact_array(leaf)]
    lengths = {leaf.shape[:1] for leaf in leaves}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            "The arrays of `schedule` must share a leading axis, one row for each stage, "
            "as `solution.history.hyper` does; got shapes "
            f"{[leaf.shape for leaf in leaves]}."
        )
    ((num_stages,),) = lengths
    staged = _Staged(inner, num_stages, solver.num_steps)
    return solve_inner(
        staged,
        schedule,
        params,
        _Numbered(as_data(canonical_arrays(train, "train"), "train")),
        solver=solver,
        adjoint=UnrolledAdjoint(),
        model_state=model_state,
        key=key,
        throw=throw,
    )


class _Numbered(AbstractData):
    """Batches with the number of the step that each is for."""

    data: AbstractData

    @property
    def varies(self):
        return True

    def check(self, num_steps):
        self.data.check(num_steps)

    def plan(self, key, num_steps):
        return jnp.arange(num_steps), self.data.plan(key, num_steps)

    def batch(self, draw):
        index, inner = draw
        return index, self.data.batch(inner)

    def full(self):
        raise ValueError("A schedule has no batch of its own.")


class _Staged(AbstractInnerProblem):
    """An inner problem whose `hyper` has one row for each stage of the run."""

    problem: AbstractInnerProblem
    num_stages: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    has_aux: bool = eqx.field(static=True)
    has_state: bool = eqx.field(static=True)

    def __init__(self, problem: AbstractInnerProblem, num_stages: int, num_steps: int):
        self.problem = problem
        self.num_stages = num_stages
        self.num_steps = num_steps
        self.has_aux = problem.has_aux
        self.has_state = problem.has_state

    def init(self, hyper, key):
        return self.problem.init(_row(hyper, 0), key)

    def loss(self, params, hyper, batch, *, key, state=None):
        step, batch = batch
        # In this order, so that no product overflows.
        stage = (step * (self.num_stages / self.num_steps)).astype(int)
        row = _row(hyper, jnp.minimum(stage, self.num_stages - 1))
        out = self.problem.evaluate(params, row, batch, key, state)
        parts = (out.value,)
        if self.has_state:
            parts += (out.state,)
        if self.has_aux:
            parts += (out.aux,)
        return parts[0] if len(parts) == 1 else parts


def _row(schedule: Hyper, index: Any) -> Hyper:
    return jax.tree.map(
        lambda leaf: leaf[index] if eqx.is_inexact_array(leaf) else leaf, schedule
    )
