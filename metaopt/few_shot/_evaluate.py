"""Evaluation of a learner on new tasks."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._compiled import compiled
from .._core._results import RESULTS
from .._core._trace_once import tracing_once
from .._core._tree import with_auto_axes
from .._core._types import Key, ModelState
from .._core._validate import canonical_key, check_count
from .._problem import declared, StepStates
from ._episodes import Episodes, HostEpisodes
from ._learner import (
    AbstractLearner,
    adapt,
    as_tasks,
    canonical_meta,
    check_model_state,
    count_tasks,
)
from ._task import Task


class Scores(eqx.Module):
    """The scores of adapted models on tasks. Printing gives the mean and its interval.

    **Attributes:**

    - `values`: the score on each task, of shape `(num_tasks,)`; NaN where it failed.
    - `num_failed`: how many tasks failed; they are left out of the mean.
    - `mean`: the mean over the other tasks.
    - `interval`: half the width of its 95 % confidence interval, 1.96 standard errors.
    """

    values: np.ndarray
    num_failed: int
    mean: float
    interval: float

    def __init__(self, values: np.ndarray):
        good = values[np.isfinite(values)]
        self.values = values
        self.num_failed = len(values) - len(good)
        self.mean = float(good.mean()) if len(good) else float("nan")
        error = good.std(ddof=1) / len(good) ** 0.5 if len(good) > 1 else float("nan")
        self.interval = float(1.96 * error)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        text = f"{self.mean:.4g} +- {self.interval:.2g} on {len(self.values)} tasks"
        if self.num_failed:
            text += f", of which {self.num_failed} failed and are left out"
        return text


@tracing_once()
def evaluate(
    learner: AbstractLearner,
    meta: Any,
    tasks: Any,
    metric: Callable[..., Any],
    *,
    num_tasks: int | None = None,
    num_steps: int | None = None,
    key: Key | None = None,
    model_state: ModelState = None,
    chunk_size: int = 16,
) -> Scores:
    """Adapt to each task and measure the adapted model on the query examples.

    With [`metaopt.few_shot.Episodes`][] the same key always draws the same tasks, so that
    learners can be compared on them.

    **Arguments:**

    - `learner`, `meta`: how to adapt, and what was learned.
    - `tasks`: a batch of tasks, as for `learner.value_and_grad`; or
        [`metaopt.few_shot.Episodes`][], or another function of a key that draws a batch,
        to draw `num_tasks` tasks from.
    - `metric`: `metric(model, batch)`, a scalar such as an accuracy or a loss. May declare
        arguments named `key` and `state`, the model state after adaptation.
    - `num_tasks`: the number of tasks, where they are drawn.
    - `num_steps`: the number of inner steps; by default as in training, and 0 for the
        model as it is.
    - `key`: for everything random, from `jax.random.key`; by default key 0.
    - `model_state`: the model state before adaptation.
    - `chunk_size`: how many tasks are taken at a time.

    **Returns:**

    A [`metaopt.few_shot.Scores`][].

    **Raises:**

    `ValueError` for arguments that do not fit.
    """
    meta, key = canonical_meta(meta), canonical_key(key)
    check_count(chunk_size, "chunk_size")
    check_model_state(learner, model_state)
    if num_steps is not None:
        check_count(num_steps, "num_steps", 0)
    if isinstance(tasks, HostEpisodes):
        raise ValueError(
            "Hand over a batch that these episodes drew: `episodes.batch(0)`, which has "
            "`num_tasks` tasks."
        )
    if callable(tasks):
        if num_tasks is None:
            raise ValueError("Tasks are drawn here: say how many, by `num_tasks=...`.")
        check_count(num_tasks, "num_tasks")
        if not isinstance(tasks, Episodes):
            tasks = _drawn(tasks, num_tasks, key)
    elif num_tasks is not None:
        raise ValueError(
            "`num_tasks` is for tasks that are drawn; these are a batch, which has a "
            "number already."
        )
    else:
        tasks = as_tasks(tasks)
        num_tasks = count_tasks(tasks)
    values = _scores(
        learner, meta, tasks, metric, num_tasks, num_steps, key, model_state, chunk_size
    )
    return Scores(np.asarray(values))


@compiled
def _drawn(draw: Callable[[Key], Any], num_tasks: int, key: Key) -> Task:
    """As many batches as it takes, and of them so many tasks."""

    def batch(key):
        tasks = as_tasks(draw(key))
        count_tasks(tasks)
        return tasks

    per_batch = jax.tree.leaves(jax.eval_shape(batch, key))[0].shape[0]
    keys = jax.random.split(key, -(-num_tasks // per_batch))
    batches = jax.lax.map(batch, keys)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_tasks], batches)


@compiled
def _scores(
    learner: AbstractLearner,
    meta: Any,
    tasks: Any,
    metric: Callable[..., Any],
    num_tasks: int,
    num_steps: int | None,
    key: Key,
    model_state: ModelState,
    chunk_size: int,
) -> jax.Array:
    arguments = learner, meta, tasks, metric, num_tasks, num_steps, key, model_state
    return with_auto_axes(_score_each, *arguments, chunk_size)


def _score_each(
    learner: AbstractLearner,
    meta: Any,
    tasks: Any,
    metric: Callable[..., Any],
    num_tasks: int,
    num_steps: int | None,
    key: Key,
    model_state: ModelState,
    chunk_size: int,
) -> jax.Array:
    draws = jax.random.split(key, num_tasks) if isinstance(tasks, Episodes) else tasks

    def one(inputs):
        draw, key = inputs
        task: Task = tasks.draw(draw) if isinstance(tasks, Episodes) else draw
        adapt_key, metric_key = jax.random.split(key)
        found = adapt(learner, meta, task, adapt_key, model_state, num_steps)
        state = found.model_state
        state = state.last if isinstance(state, StepStates) else state
        optional = declared(metric, {"key": metric_key, "state": state})
        score = jnp.asarray(metric(found.model, task.query, **optional))
        if score.shape != ():
            raise ValueError(
                f"`metric` must return a scalar; it returned shape {score.shape}. Take "
                "`jnp.mean` of it."
            )
        good = found.result == RESULTS.successful
        return jnp.where(good, score.astype(jnp.result_type(float)), jnp.nan)

    keys = jax.random.split(jax.random.fold_in(key, 1), num_tasks)
    size = min(chunk_size, num_tasks)
    return jax.lax.map(one, (draws, keys), batch_size=size)
