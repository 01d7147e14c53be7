"""Learning over tasks, step by step."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from .._checkpoint import load, save
from .._raise import raise_on_failure
from .._results import RESULTS
from .._tree import split_trainable, tree_strong, tree_where_arrays
from .._types import FloatScalar, IntScalar, Key, ModelState
from .._validate import canonical_key, check_count, check_kind
from ._learner import AbstractLearner, as_tasks, canonical_meta
from ._task import Task


class TrainState(eqx.Module):
    """What one meta-step hands to the next, and what a checkpoint holds.

    **Attributes:**

    - `meta`: what is learned.
    - `model_state`: the model state, or `None`.
    - `optimizer_state`: that of the optimizer.
    - `num_steps`: how many meta-steps were taken.
    - `key`: the randomness of the run.
    """

    meta: Any
    model_state: ModelState
    optimizer_state: Any
    num_steps: IntScalar
    key: Key


class TrainHistory(eqx.Module):
    """What every meta-step reported, one entry for each, as NumPy arrays.

    **Attributes:**

    - `loss`: the mean query loss over the batch of tasks.
    - `num_failed`: how many tasks failed.
    """

    loss: np.ndarray
    num_failed: np.ndarray


class TrainSolution(eqx.Module):
    """What learning over tasks came to.

    **Attributes:**

    - `meta`: what was learned.
    - `model_state`: the model state, or `None`.
    - `history`: the steps since the run began, or was taken up again.
    - `state`: to go on from.
    - `result`: how the run ended.
    - `seconds`: how long it took, compilation included.
    """

    meta: Any
    model_state: ModelState
    history: TrainHistory
    state: TrainState
    result: RESULTS
    seconds: float


def train(
    learner: AbstractLearner,
    meta: Any,
    tasks: Callable[[Key], Any] | Iterator[Any],
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    key: Key | None = None,
    model_state: ModelState = None,
    steps_per_call: int = 10,
    state: TrainState | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 500,
    progress: bool = False,
    callback: Callable[[int, TrainState], None] | None = None,
    throw: bool = True,
) -> TrainSolution:
    """Learns over tasks: a gradient over a batch of tasks, a step of the optimizer, again.

    A step whose tasks all failed is not taken. Ctrl-C stops the run after the steps it is
    in and returns what was reached.

    **Arguments:**

    - `learner`: a [`metaopt.few_shot.MAML`][] or another.
    - `meta`: where to start: a model, or a [`metaopt.few_shot.Learned`][].
    - `tasks`: [`metaopt.few_shot.Episodes`][] or another function `tasks(key)` that draws
        a batch of tasks, called inside the compiled loop; or an iterator over batches.
    - `optimizer`: the optax transform for what is learned.
    - `num_steps`: the number of meta-steps, those of `state` or of a checkpoint included.
    - `key`: for everything random, from `jax.random.key`; by default key 0.
    - `model_state`: the model state at the start.
    - `steps_per_call`: how many steps are compiled into one call. The callback and the
        progress bar come between calls.
    - `state`: the `state` of a solution, to go on from.
    - `checkpoint`: a file. If it is there the run goes on from it; and it is written every
        `checkpoint_every` steps and at the end. An iterator is not part of it: hand over
        one that goes on, as `HostEpisodes.starting_at` makes it.
    - `progress`: whether to show a progress bar.
    - `callback`: called between calls as `callback(num_steps, state)`.
    - `throw`: whether a failure raises.

    **Returns:**

    A [`metaopt.few_shot.TrainSolution`][].

    **Raises:**

    `ValueError` for arguments that do not fit; [`metaopt.SolveError`][] under `throw`
    where all tasks of some step failed, whose `value` is the solution as far as it was
    reached; `metaopt.CheckpointError` for a file that is no checkpoint of this run.
    """
    check_kind(learner, AbstractLearner, "learner", "metaopt.few_shot.MAML(...)")
    check_kind(optimizer, optax.GradientTransformation, "optimizer", "optax.adam(1e-3)")
    check_count(num_steps, "num_steps")
    check_count(steps_per_call, "steps_per_call")
    check_count(checkpoint_every, "checkpoint_every")
    meta = tree_strong(canonical_meta(meta))
    if state is None:
        state = TrainState(
            meta=meta,
            model_state=tree_strong(model_state),
            optimizer_state=optimizer.init(split_trainable(meta)[0]),
            num_steps=jnp.zeros((), int),
            key=canonical_key(key),
        )
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        state = load(path, state)
    run = _Run(learner, optimizer, tasks, state, steps_per_call)
    saved = int(state.num_steps)
    begin = time.perf_counter()
    bar = tqdm(total=num_steps, initial=saved, disable=not progress, unit="step")
    result: Any = RESULTS.successful
    try:
        while (done := int(run.state.num_steps)) < num_steps:
            loss = run.go(min(steps_per_call, num_steps - done))
            now = int(run.state.num_steps)
            bar.update(now - done)
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            if path is not None and (now - saved >= checkpoint_every or now >= num_steps):
                save(path, run.state)
                saved = now
            if callback is not None:
                callback(now, run.state)
            if throw and run.failed:
                break
    except KeyboardInterrupt:
        result = RESULTS.interrupted
    except StopIteration:
        result = RESULTS.outer_data_exhausted
    finally:
        bar.close()
    if run.failed:
        result = RESULTS.all_tasks_failed
    if path is not None and int(run.state.num_steps) != saved:
        save(path, run.state)
    solution = TrainSolution(
        meta=run.state.meta,
        model_state=run.state.model_state,
        history=run.history(),
        state=run.state,
        result=result,
        seconds=time.perf_counter() - begin,
    )
    interrupted = bool(result == RESULTS.interrupted)
    return raise_on_failure(solution, result, throw and not interrupted)


class _Run:
    """The steps taken so far."""

    def __init__(
        self,
        learner: AbstractLearner,
        optimizer: optax.GradientTransformation,
        tasks: Any,
        state: TrainState,
        steps_per_call: int,
    ):
        self.learner = learner
        self.optimizer = optimizer
        self.state = state
        self.losses: list[np.ndarray] = []
        self.num_failed: list[np.ndarray] = []
        self.failed = False
        self.tasks = tasks
        if not callable(tasks) and not isinstance(tasks, Iterator):
            raise ValueError(
                "`tasks` must be `metaopt.few_shot.Episodes` or another function of a key "
                "that draws a batch of tasks, or an iterator over batches; got "
                f"{type(tasks).__name__}. One batch over and over is `lambda key: tasks`."
            )

    def go(self, count: int) -> float:
        """Takes so many steps; the loss of the last one."""
        if callable(self.tasks):
            out = _steps(self.learner, self.optimizer, self.state, self.tasks, count)
        else:
            pulled = [as_tasks(next(self.tasks)) for _ in range(count)]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pulled)
            out = _steps_on(self.learner, self.optimizer, self.state, stacked)
        state, (losses, num_failed, lost) = jax.block_until_ready(out)
        self.state = state
        self.losses.append(np.asarray(losses))
        self.num_failed.append(np.asarray(num_failed))
        self.failed |= bool(np.any(lost))
        return float(losses[-1])

    def history(self) -> TrainHistory:
        """All of them."""
        join = lambda parts: np.concatenate(parts) if parts else np.zeros(0)
        return TrainHistory(join(self.losses), join(self.num_failed))


@eqx.filter_jit
def _steps(
    learner: AbstractLearner,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tasks: Callable[[Key], Any],
    count: int,
):
    return _scan(learner, optimizer, state, None, count, tasks)


@eqx.filter_jit
def _steps_on(
    learner: AbstractLearner,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tasks: Task,
):
    count = jax.tree.leaves(tasks)[0].shape[0]
    return _scan(learner, optimizer, state, tasks, count, None)


def _scan(
    learner: AbstractLearner,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tasks: Task | None,
    count: int,
    draw: Callable[[Key], Any] | None,
) -> tuple[TrainState, tuple[FloatScalar, IntScalar, Any]]:
    arrays, static = eqx.partition(state, eqx.is_array)

    def step(arrays, batch):
        state = eqx.combine(arrays, static)
        # Depends on the number of the step alone, however the steps are cut into calls.
        key = jax.random.fold_in(state.key, state.num_steps)
        draw_key, task_key = jax.random.split(key)
        if draw is not None:
            batch = as_tasks(draw(draw_key))
        loss, gradient, stats = learner.value_and_grad(
            state.meta, batch, key=task_key, model_state=state.model_state, throw=False
        )
        trainable, rest = split_trainable(state.meta)
        updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
            gradient, state.optimizer_state, trainable, value=loss
        )
        lost = stats.num_failed == stats.losses.size
        new = TrainState(
            meta=eqx.combine(optax.apply_updates(trainable, updates), rest),
            model_state=stats.model_state,
            optimizer_state=optimizer_state,
            num_steps=state.num_steps,
            key=state.key,
        )
        new = tree_where_arrays(jnp.logical_not(lost), new, state)
        new = eqx.tree_at(lambda s: s.num_steps, new, state.num_steps + 1)
        return eqx.filter(new, eqx.is_array), (loss, stats.num_failed, lost)

    arrays, outputs = jax.lax.scan(step, arrays, tasks, count)
    return eqx.combine(arrays, static), outputs
