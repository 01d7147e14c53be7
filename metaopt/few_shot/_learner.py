"""The base of few-shot learners: batches of tasks, and adapting to one."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._compiled import compiled
from .._core._results import mask_result, RESULTS
from .._core._trace_once import tracing_once
from .._core._tree import (
    split_trainable,
    tree_add,
    tree_cast_like,
    tree_sharded_like,
    tree_structs,
    tree_where,
    tree_widened,
    tree_zeros_like,
    with_auto_axes,
)
from .._core._types import (
    Batch,
    FloatScalar,
    Key,
    ModelState,
    Params,
    Vector,
)
from .._core._validate import (
    canonical_arrays,
    canonical_hyper,
    canonical_key,
    canonical_params,
    check_count,
    check_flag,
)
from .._data import FullBatch
from .._problem import initialise, StepStates
from .._report import raise_on_failure
from .._solver import AbstractIterativeSolver, AbstractSolver, InnerSolve
from ._adaptation import Adaptation, ModelLoss
from ._batches import as_tasks, check_lengths, count_tasks
from ._stats import TaskGradient, TaskStats
from ._task import Learned, model_of, Task


class AbstractLearner(eqx.Module):
    """A method that learns over tasks and adapts to each.

    [`metaopt.few_shot.MAML`][] and its family, or [`metaopt.few_shot.Reptile`][].
    """

    model_loss: eqx.AbstractVar[ModelLoss]
    inner: eqx.AbstractVar[AbstractSolver]
    chunk_size: eqx.AbstractVar[int | None]

    @abc.abstractmethod
    def adaptation(self, model_state: ModelState) -> Adaptation:
        """The inner problem of a task, which starts from a model state."""

    @abc.abstractmethod
    def task_gradient(
        self, meta: Any, task: Task, key: Key, model_state: ModelState
    ) -> TaskGradient:
        """The contribution of one task; a batch of tasks is mapped over.

        **Arguments:**

        - `meta`: the model, or a [`metaopt.few_shot.Learned`][].
        - `task`: one task.
        - `key`: for everything random in it.
        - `model_state`: the model state before it, or `None`.

        **Returns:**

        A `TaskGradient`.
        """

    @tracing_once()
    def value_and_grad(
        self,
        meta: Any,
        tasks: Task,
        *,
        key: Key | None = None,
        model_state: ModelState = None,
        throw: bool = True,
        guard: bool = True,
    ) -> tuple[FloatScalar, Vector, TaskStats]:
        """The mean query loss over a batch of tasks, and its gradient.

        A task that diverges, or whose loss or gradient is not finite, is left out of
        both, and counted. With `chunk_size` the tasks are taken so many at a time, which
        takes the memory of one chunk; a sharded axis of tasks stays sharded.

        **Arguments:**

        - `meta`: what is learned: the model, or a [`metaopt.few_shot.Learned`][].
        - `tasks`: a [`metaopt.few_shot.Task`][], or a pair of support and query
            examples; each array has a leading axis of tasks and a second one of examples.
            A list of single tasks of equal shapes is stacked.
        - `key`: for everything random, from `jax.random.key`; by default key 0.
        - `model_state`: the model state before each task.
        - `throw`: whether it raises if no task was left.
        - `guard`: whether tasks that fail are left out. With `False` they are part of
            loss and gradient as computed, and in a function that is compiled checks whose
            outcome is not read cost nothing.

        **Returns:**

        A floating-point scalar, a pytree like `meta` with `None` for what is not
        trained, and a [`metaopt.few_shot.TaskStats`][].

        **Raises:**

        `ValueError` for arguments that do not fit, and for a derivative that is zero by
        construction; [`metaopt.SolveError`][] under `throw` where all tasks failed.
        """
        meta = canonical_meta(meta)
        tasks = as_tasks(tasks)
        num_tasks = count_tasks(tasks)
        check_model_state(self, model_state)
        check_flag(guard, "guard")
        size = self.chunk_size
        if size is not None and num_tasks % size:
            raise ValueError(
                f"`chunk_size`, {size}, does not divide the number of tasks, {num_tasks}."
            )
        key = canonical_key(key)
        out = _value_and_grad(self, meta, tasks, key, model_state, guard)
        return raise_on_failure(out, out[-1].result, throw, show=out[-1])

    def adapt(
        self,
        meta: Any,
        support: Batch,
        *,
        num_steps: int | None = None,
        key: Key | None = None,
        model_state: ModelState = None,
        throw: bool = True,
    ) -> Any:
        """The model, adapted to one task. No derivative passes through it.

        **Arguments:**

        - `meta`: what was learned.
        - `support`: the examples to adapt to.
        - `num_steps`: the number of steps; by default as in training.
        - `key`: for everything random, from `jax.random.key`; by default key 0.
        - `model_state`: the model state at the start.
        - `throw`: whether a failure raises.

        **Returns:**

        A model like the one in `meta`; with `has_state` a pair of it and its state.

        **Raises:**

        `ValueError` for arguments that do not fit; [`metaopt.SolveError`][] under `throw`
        where it diverged, or did not meet the tolerance of the inner solver.
        """
        meta = canonical_meta(meta)
        check_model_state(self, model_state)
        task = Task(canonical_arrays(support, "support"), None)
        check_lengths(task.support, "support", 0, "examples")
        found = adapt(self, meta, task, canonical_key(key), model_state, num_steps)
        out = found.model
        if self.model_loss.has_state:
            state = found.model_state
            out = out, state.last if isinstance(state, StepStates) else state
        return raise_on_failure(out, found.result, throw)


class Adapted(eqx.Module):
    """A model that has adapted to a task.

    **Attributes:**

    - `model`: the whole model.
    - `model_state`: its state, or `None`.
    - `result`: how adapting went.
    """

    model: Params
    model_state: ModelState
    result: RESULTS


@compiled
def adapt(
    learner: AbstractLearner,
    meta: Any,
    task: Task,
    key: Key,
    model_state: ModelState,
    num_steps: int | None,
) -> Adapted:
    """Adapt to the support examples of one task."""
    problem, solver = learner.adaptation(model_state), learner.inner
    if num_steps is not None:
        check_count(num_steps, "num_steps", 0)
    if num_steps:
        solver = with_num_steps(solver, num_steps)
    init_key, solve_key = jax.random.split(key)
    params, state = initialise(problem, meta, init_key)
    result: Any = RESULTS.successful
    if num_steps != 0:
        data = FullBatch(task)
        solver.check(problem, data)
        solve = InnerSolve(problem, solver, data, solve_key)
        outcome = solve.primal(params, meta, state)
        params, state, result = outcome.params, outcome.model_state, outcome.result
    rest = problem.split(model_of(meta))[1]
    return Adapted(eqx.combine(params, rest), state, result)


def with_num_steps(solver: AbstractSolver, num_steps: int) -> AbstractSolver:
    """The same solver, taking another number of steps."""
    if not isinstance(solver, AbstractIterativeSolver):
        raise ValueError(
            f"`{type(solver).__name__}` runs as a whole: its number of steps is its own."
        )
    return dataclasses.replace(solver, num_steps=num_steps)


def canonical_meta(meta: Any) -> Any:
    """The learned variables, moved to JAX and checked for something to train."""
    if isinstance(meta, Learned):
        settings = canonical_hyper(meta.settings, "settings")
        return Learned(canonical_params(meta.model, "meta.model"), settings)
    return canonical_params(meta, "meta")


def check_model_state(learner: AbstractLearner, model_state: ModelState) -> None:
    """Raise a `ValueError` unless the loss declares model state exactly where it is
    given."""
    has_state = learner.model_loss.has_state
    if has_state and model_state is None:
        raise ValueError(
            "The loss has model state (`has_state=True`): hand over where it begins, as "
            "`model_state=...`."
        )
    if not has_state and model_state is not None:
        raise ValueError(
            "`model_state` was handed over, and the loss has none. Write "
            f"`{type(learner).__name__}(..., has_state=True)` for a loss that takes and "
            "returns it."
        )


@compiled
def _value_and_grad(
    learner: AbstractLearner, meta: Any, *rest: Any
) -> tuple[FloatScalar, Vector, TaskStats]:
    loss, gradient, stats = with_auto_axes(_over_tasks, learner, meta, *rest)
    structs = tree_structs(split_trainable(meta)[0])
    return loss, tree_sharded_like(gradient, structs), stats


def _over_tasks(
    learner: AbstractLearner,
    meta: Any,
    tasks: Task,
    key: Key,
    model_state: ModelState,
    guard: bool,
) -> tuple[FloatScalar, Vector, TaskStats]:
    num_tasks = count_tasks(tasks)
    per_chunk = learner.chunk_size or num_tasks
    keys = jax.random.split(key, num_tasks)
    floats = lambda tree: eqx.filter(tree, eqx.is_inexact_array)

    def one(task, key):
        out = learner.task_gradient(meta, task, key, model_state)
        # Sums over many tasks need more digits than half precision has.
        summed = tree_widened((out.gradient, out.loss, floats(out.state)))
        if guard:
            good = out.result == RESULTS.successful
            summed = tree_where(good, summed, tree_zeros_like(summed))
        return (
            summed,
            eqx.filter(dataclasses.replace(out, gradient=None), eqx.is_array),
        )

    def chunk(tasks, keys):
        summed, each = jax.vmap(one)(tasks, keys)
        each, state = dataclasses.replace(each, state=None), each.state
        first = jax.tree.map(lambda leaf: leaf[0], state)
        return jax.tree.map(lambda leaf: jnp.sum(leaf, 0), summed), each, first

    if per_chunk == num_tasks:
        sums, each, state = chunk(tasks, keys)
    else:
        # Every chunk has some of the tasks of every device, so that nothing is moved.
        def cut(leaf):
            return jnp.swapaxes(leaf.reshape(per_chunk, -1, *leaf.shape[1:]), 0, 1)

        def add(total, chunk_of_tasks):
            sums, each, state = chunk(*chunk_of_tasks)
            return tree_add(total, sums), (each, state)

        chunks = jax.tree.map(cut, (tasks, keys))
        first = jax.tree.map(lambda leaf: leaf[0], chunks)
        zeros = tree_zeros_like(jax.eval_shape(chunk, *first)[0])
        sums, (each, state) = jax.lax.scan(add, zeros, chunks)
        joined = lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(num_tasks, *leaf.shape[2:])
        each = jax.tree.map(joined, each)
        state = jax.tree.map(lambda leaf: leaf[0], state)

    failed = each.result != RESULTS.successful
    num_good = jnp.sum(jnp.logical_not(failed))
    # Without any task left the mean is NaN.
    count = num_good if guard else jnp.asarray(num_tasks)
    mean = lambda total: total / count.astype(total.dtype)
    gradient, loss, mean_state = jax.tree.map(mean, sums)
    gradient = tree_cast_like(gradient, split_trainable(meta)[0])
    mean_state = tree_cast_like(mean_state, floats(state))
    counted = eqx.filter(state, eqx.is_inexact_array, inverse=True)
    stats = TaskStats(
        losses=each.loss,
        failed=failed,
        num_failed=num_tasks - num_good,
        aux=each.aux,
        model_state=eqx.combine(mean_state, counted),
        results=each.result,
        result=mask_result(num_good == 0, RESULTS.all_tasks_failed),
        left_out=each.left_out,
        num_flat=each.num_flat,
    )
    return loss, gradient, stats
