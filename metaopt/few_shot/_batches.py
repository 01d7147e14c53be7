"""Batches of tasks that users hand over, checked."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._tree import (
    leaf_names,
    same_structs,
)
from .._core._types import (
    Batch,
)
from .._core._validate import (
    canonical_arrays,
)
from .._data import AbstractData
from ._task import Task


def as_tasks(tasks: Any) -> Task:
    """A batch of tasks, from itself, from a pair, or from a list of single tasks."""
    if isinstance(tasks, list) and tasks and all(map(_is_single, tasks)):
        tasks = _stacked(tasks)
    if not isinstance(tasks, Task):
        if not isinstance(tasks, tuple | list) or len(tasks) != 2:
            raise ValueError(
                "`tasks` must be a `metaopt.few_shot.Task`, a pair of support and query "
                "examples, or a list of tasks of equal shapes; got "
                f"{type(tasks).__name__}."
            )
        tasks = Task(*tasks)
    for name, examples in (("support", tasks.support), ("query", tasks.query)):
        if isinstance(examples, AbstractData):
            raise ValueError(
                f"The `{name}` of a task is a `{type(examples).__name__}`. It must be "
                "arrays: every step of the inner solver sees all examples of its task. "
                "Hand over the arrays themselves."
            )
    out = Task(
        canonical_arrays(tasks.support, "support"), canonical_arrays(tasks.query, "query")
    )
    _check_examples(out.support, "support")
    _check_examples(out.query, "query")
    return out


def _is_single(task: Any) -> bool:
    """Whether an element of a list is a task: a pair of arrays is support or query."""
    if isinstance(task, Task):
        return True
    nested = isinstance(task, tuple | list) and len(task) == 2
    return nested and all(isinstance(part, tuple | list | dict) for part in task)


def _stacked(tasks: list[Any]) -> Task:
    tasks = [task if isinstance(task, Task) else Task(*task) for task in tasks]
    tasks = [canonical_arrays(task, "tasks") for task in tasks]
    if not all(same_structs(tasks[0], task) for task in tasks[1:]):
        raise ValueError(
            "`tasks` is a list of tasks whose arrays differ in shape or dtype, so that "
            "they are no batch. Give all tasks as many support and query examples, or hand "
            "them over one by one."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)


def _check_examples(examples: Batch, name: str) -> None:
    """Every array needs an axis of tasks and one of examples, or a single task would pass
    for as many tasks as it has examples."""
    for where, leaf in zip(leaf_names(examples, name), jax.tree.leaves(examples)):
        if not eqx.is_array(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        if leaf.ndim < 2:
            raise ValueError(
                f"`{where}` in `tasks` has shape {leaf.shape}. Each array needs a leading "
                "axis of tasks and a second one of examples. A single task gets the first "
                "by `jax.tree.map(lambda array: array[None], task)`."
            )
    check_lengths(examples, name, 1, "examples")


def count_tasks(tasks: Task) -> int:
    """The length of the leading axis, which all arrays must share."""
    names, leaves = leaf_names(tasks, "tasks"), jax.tree.leaves(tasks)
    for name, leaf in zip(names, leaves):
        if not eqx.is_array(leaf) or leaf.ndim == 0:
            raise ValueError(
                f"`{name}` must be an array with a leading axis of tasks; got {leaf!r}."
            )
    check_lengths(tasks, "tasks", 0, "tasks")
    if not leaves:
        raise ValueError("`tasks` hold no arrays.")
    return leaves[0].shape[0]


def check_lengths(tree: Any, name: str, axis: int, what: str) -> None:
    """Those arrays that have this axis must share its length."""
    counts = {
        where: leaf.shape[axis]
        for where, leaf in zip(leaf_names(tree, name), jax.tree.leaves(tree))
        if eqx.is_array(leaf) and leaf.ndim > axis
    }
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} in `{where}`" for where, count in counts.items())
        raise ValueError(
            f"The arrays of `{name}` must share the length of axis {axis}, the number of "
            f"{what}; got {listed}. In a batch of tasks axis 0 counts tasks, and axis 1 "
            "examples."
        )
