"""Learning over tasks, step by step."""

import os
import tempfile
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

from .._checkpoint import CheckpointError, load, save
from .._raise import attach_solution, ends_run, raise_on_failure
from .._results import RESULTS
from .._tree import same_structs, split_trainable, tree_strong, tree_where_arrays
from .._types import BoolScalar, FloatScalar, IntScalar, Key, ModelState
from .._validate import canonical_key, check_count, check_kind
from ._adaptation import chosen_leaves
from ._episodes import HostEpisodes
from ._learner import AbstractLearner, as_tasks, canonical_meta, check_model_state
from ._solution import TrainHistory, TrainSolution, TrainState
from ._task import Learned, model_of, Task


def train(
    learner: AbstractLearner,
    meta: Any,
    tasks: Callable[[Key], Any] | Iterator[Any] | HostEpisodes,
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
    callback: Callable[[int, TrainState], Any] | None = None,
    throw: bool = True,
) -> TrainSolution:
    """Learns over tasks: a gradient over a batch of tasks, a step of the optimizer, again.

    A step whose tasks all failed is not taken. Ctrl-C stops the run after the steps it is
    in and returns what was reached.

    **Arguments:**

    - `learner`: a [`metaopt.few_shot.MAML`][] or another.
    - `meta`: where to start: a model, or a [`metaopt.few_shot.Learned`][].
    - `tasks`: [`metaopt.few_shot.Episodes`][] or another function `tasks(key)` that draws
        a batch of tasks, called inside the compiled loop;
        [`metaopt.few_shot.HostEpisodes`][]; or an iterator over batches. Steps on batches
        of different shapes are different calls, compiled once for each shape.
    - `optimizer`: the optax transform for what is learned.
    - `num_steps`: the number of meta-steps, those of `state` or of a checkpoint included.
    - `key`: for everything random, from `jax.random.key`; by default key 0.
    - `model_state`: the model state at the start.
    - `steps_per_call`: how many steps are compiled into one call. The callback and the
        progress bar come between calls.
    - `state`: the `state` of a solution, to go on from, in place of `key`, `model_state`
        and what is in `meta`.
    - `checkpoint`: a file. If it is there the run goes on from it; and it is written every
        `checkpoint_every` steps and at the end, in a folder that is made if need be. It
        holds what was reached, the state of the optimizer and the key. Learner, optimizer
        and tasks are not in it: hand over the same, and of an iterator one that goes on
        where it was.
    - `progress`: whether to show a progress bar.
    - `callback`: called between calls as `callback(num_steps, state)`. It ends the run by
        returning `True` or raising `StopIteration`. Any other error that it raises has what
        was reached as its attribute `solution`.
    - `throw`: whether a failure raises.

    **Returns:**

    A [`metaopt.few_shot.TrainSolution`][].

    **Raises:**

    `ValueError` for arguments that do not fit, and before the first step for a `checkpoint`
    that cannot be written; [`metaopt.SolveError`][] under `throw` where all tasks of some
    step failed, whose `value` is the solution as far as it was
    reached (the file is as it was before that step); `metaopt.CheckpointError` for a file
    of another model, another kind of optimizer, another key or more steps.

    !!! example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import metaopt as mo
        import optax

        def lines(key):  # eight lines through the origin, five points of each
            slope = jax.random.normal(key, (8, 1))
            x = jnp.linspace(-1.0, 1.0, 5)
            points = jnp.broadcast_to(x, (8, 5)), slope * x
            return mo.few_shot.Task(support=points, query=points)

        def loss(model, batch):
            return jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)

        model = eqx.nn.MLP("scalar", "scalar", 8, 1, key=jax.random.key(0))
        maml = mo.few_shot.MAML(loss, mo.Descent(optax.sgd(0.1), num_steps=1))
        solution = mo.few_shot.train(
            maml, model, lines, optimizer=optax.adam(1e-2), num_steps=20
        )
        ```
    """
    check_kind(learner, AbstractLearner, "learner", "metaopt.few_shot.MAML(...)")
    check_kind(optimizer, optax.GradientTransformation, "optimizer", "optax.adam(1e-3)")
    check_count(num_steps, "num_steps")
    check_count(steps_per_call, "steps_per_call")
    check_count(checkpoint_every, "checkpoint_every")
    if callback is not None and not callable(callback):
        raise ValueError(
            f"`callback` must be a function `callback(num_steps, state)`; got {callback!r}."
        )
    path = None if checkpoint is None else Path(checkpoint)
    meta = tree_strong(canonical_meta(meta))
    if state is None:
        check_model_state(learner, model_state)
        state = _started(optimizer, meta, model_state, key)
        # `path.exists()` raises where it may not look, of which `_File` has more to say.
        if path is not None and os.path.exists(path):
            state = _taken_up(path, state, num_steps)
    else:
        _check_goes_on(state, meta, path, key, model_state)
    run = _Run(learner, optimizer, tasks, state)
    file = _File(path, checkpoint_every, run.num_steps)
    if run.num_steps < num_steps:
        file.check()
    begin = time.perf_counter()
    reached = lambda: run.solution(time.perf_counter() - begin)
    try:
        run.go(num_steps, steps_per_call, file, progress, callback, throw)
    except Exception as error:
        if run.losses:
            attach_solution(error, reached)
            file.write(run.state)
        raise
    solution = reached()
    interrupted = bool(solution.result == RESULTS.interrupted)
    return raise_on_failure(solution, solution.result, throw and not interrupted)


def _started(
    optimizer: optax.GradientTransformation,
    meta: Any,
    model_state: ModelState,
    key: Key | None,
) -> TrainState:
    return TrainState(
        meta=meta,
        model_state=tree_strong(model_state),
        optimizer_state=optimizer.init(split_trainable(meta)[0]),
        num_steps=jnp.zeros((), int),
        key=canonical_key(key),
    )


def _taken_up(path: Path, begun: TrainState, num_steps: int) -> TrainState:
    """Load a checkpoint of this run.

    **Raises:**

    `CheckpointError` where it is of another one.
    """
    state = load(path, begun)
    if int(state.num_steps) > num_steps:
        raise CheckpointError(
            f"{path} has {int(state.num_steps)} steps, and `num_steps` is {num_steps}. Ask "
            "for as many or more, or name another file."
        )
    there, given = (np.asarray(jax.random.key_data(s.key)) for s in (state, begun))
    if not np.array_equal(there, given):
        raise CheckpointError(
            f"{path} is of a run with another `key`. Hand over the same, or name another "
            "file."
        )
    return state


def _check_goes_on(
    state: Any, meta: Any, path: Path | None, key: Key | None, model_state: ModelState
) -> None:
    """Raises where a `state` to go on from is none, or is beside something that contradicts
    it."""
    if not isinstance(state, TrainState):
        raise ValueError(
            "`state` must be the `state` of a `metaopt.few_shot.TrainSolution`, as in "
            f"`state=solution.state`; got {type(state).__name__}. Leave it out to begin at "
            "`meta`."
        )
    if path is not None and os.path.exists(path):
        raise ValueError(
            f"Both `state` and the checkpoint {path} say where to go on from. Hand over "
            "one of them, or name a file that is not there yet."
        )
    if key is not None or model_state is not None:
        raise ValueError(
            "`state` has the key and the model state of its run: hand over no others."
        )
    if not same_structs(*(split_trainable(x)[0] for x in (state.meta, meta))):
        raise ValueError("`state` is of another model than `meta`, with other arrays.")


class _File:
    """The checkpoint of a run, if it is to have one."""

    def __init__(self, path: Path | None, every: int, num_steps: int):
        self.path = path
        self.every = every
        self.num_steps = num_steps  # of the state that need not be written any more

    def check(self) -> None:
        """Raises where it cannot be written, which would be seen after hours otherwise."""
        if self.path is None:
            return
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Permission bits say little of what the superuser and network disks may do.
            with tempfile.NamedTemporaryFile(prefix=f".{self.path.name}.", dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"`checkpoint` is {self.path}, which cannot be written: {error}. Name a "
                "file in a folder that you may write to."
            ) from error

    def is_due(self, num_steps: int) -> bool:
        """Whether the last one was so many steps ago."""
        return num_steps - self.num_steps >= self.every

    def write(self, state: TrainState) -> None:
        """Writes that state, unless it is the one that is there."""
        if self.path is not None and int(state.num_steps) != self.num_steps:
            save(self.path, state)
            self.num_steps = int(state.num_steps)


class _Exhausted(Exception):
    """An iterator over batches has ended."""


class _Run:
    """One run, and what it has come to so far."""

    def __init__(
        self,
        learner: AbstractLearner,
        optimizer: optax.GradientTransformation,
        tasks: Any,
        state: TrainState,
    ):
        self.learner = learner
        self.optimizer = optimizer
        self.state = state
        self.state_before = state  # before the last call
        self.losses: list[jax.Array] = []
        self.num_failed: list[jax.Array] = []
        self.num_flat: list[jax.Array] = []
        self.reason: Any = RESULTS.successful
        self.failed = False
        self.result: Any = RESULTS.successful
        if isinstance(tasks, HostEpisodes):
            tasks = tasks.starting_at(self.num_steps)
        self.tasks = tasks
        if not callable(tasks) and not isinstance(tasks, Iterator):
            raise ValueError(
                "`tasks` must be `metaopt.few_shot.Episodes` or another function of a key "
                "that draws a batch of tasks, or an iterator over batches; got "
                f"{type(tasks).__name__}. One batch over and over is `lambda key: tasks`."
            )

    @property
    def num_steps(self) -> int:
        """The number of steps taken, those before this run included."""
        return int(self.state.num_steps)

    def go(
        self,
        num_steps: int,
        steps_per_call: int,
        file: _File,
        progress: bool,
        callback: Callable[[int, TrainState], Any] | None,
        throw: bool,
    ) -> None:
        """Takes steps until done, interrupted, failed (under `throw`) or out of tasks."""
        bar = tqdm(
            total=num_steps, initial=self.num_steps, disable=not progress, unit="step"
        )
        try:
            while (done := self.num_steps) < num_steps:
                loss = self._call(min(steps_per_call, num_steps - done))
                now = self.num_steps
                bar.update(now - done)
                bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
                if throw and self.failed:
                    break
                if file.is_due(now) or now >= num_steps:
                    file.write(self.state)
                if ends_run(callback, now, self.state):
                    break
        except KeyboardInterrupt:
            self.result = RESULTS.interrupted
        except _Exhausted:
            self.result = RESULTS.outer_data_exhausted
        finally:
            bar.close()
        # Where a step failed and that is to be seen, a run that is taken up sees it again.
        file.write(self.state_before if throw and self.failed else self.state)
        if self.failed:
            self.result = RESULTS.all_tasks_failed

    def solution(self, seconds: float) -> TrainSolution:
        """The result of the run after so many seconds."""
        return TrainSolution(
            meta=self.state.meta,
            model_state=self.state.model_state,
            history=self._history(),
            state=self.state,
            result=self.result,
            seconds=seconds,
        )

    def _call(self, count: int) -> float:
        """Takes so many steps in one call; the loss of the last one."""
        if callable(self.tasks):
            out = _steps(self.learner, self.optimizer, self.state, self.tasks, count)
            return self._take(out)
        pulled, ended = [], None
        try:
            for _ in range(count):
                pulled.append(as_tasks(next(self.tasks)))
        except (StopIteration, KeyboardInterrupt) as error:
            # The steps on what has been pulled are taken first.
            ended = _Exhausted() if isinstance(error, StopIteration) else error
        loss, before = float("nan"), self.state
        # Batches of one shape are taken in one call; another shape is another program.
        for group in _runs_of_one_shape(pulled):
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *group)
            out = _steps_on(self.learner, self.optimizer, self.state, stacked)
            loss = self._take(out)
            self.state_before = before
        if ended is not None:
            raise ended
        return loss

    def _take(self, out: Any) -> float:
        # Before they are waited for: Ctrl-C loses none of them.
        state, (losses, num_failed, lost, reasons, num_flat) = out
        self.state_before, self.state = self.state, state
        self.losses.append(losses)
        self.num_failed.append(num_failed)
        self.num_flat.append(num_flat)
        self.failed |= bool(np.any(lost))
        if bool(self.reason == RESULTS.successful) and np.any(num_failed):
            first = int(np.argmax(np.asarray(num_failed) > 0))
            self.reason = jax.tree.map(lambda a: a[first], reasons)
        return float(losses[-1])

    def _history(self) -> TrainHistory:
        arrays = lambda parts: [np.asarray(part) for part in parts]
        join = lambda parts: np.concatenate(arrays(parts)) if parts else np.zeros(0)
        return TrainHistory(
            join(self.losses), join(self.num_failed), self.reason, join(self.num_flat)
        )


def _without_frozen(updates: Any, meta: Any, frozen: Callable[[Any], Any] | None) -> Any:
    """The updates, zero for the frozen part: weight decay moves what has no gradient."""
    if frozen is None:
        return updates
    marks = chosen_leaves(split_trainable(model_of(meta))[0], frozen, "frozen")
    held = lambda update, mark: jnp.zeros_like(update) if mark else update
    model = jax.tree.map(held, model_of(updates), marks)
    return Learned(model, updates.settings) if isinstance(updates, Learned) else model


def _runs_of_one_shape(batches: list[Task]) -> list[list[Task]]:
    """The batches in their order, cut where their shapes change."""
    runs: list[list[Task]] = []
    for batch in batches:
        if runs and same_structs(runs[-1][0], batch):
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return runs


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
) -> tuple[TrainState, tuple[FloatScalar, IntScalar, BoolScalar, RESULTS, IntScalar]]:
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
        updates = _without_frozen(updates, state.meta, learner.model_loss.frozen)
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
        first = jnp.argmax(stats.failed)
        reason = jax.tree.map(lambda a: a[first], stats.results)
        num_flat = jnp.sum(jnp.asarray(0 if stats.num_flat is None else stats.num_flat))
        outputs = loss, stats.num_failed, lost, reason, num_flat
        return eqx.filter(new, eqx.is_array), outputs

    arrays, outputs = jax.lax.scan(step, arrays, tasks, count)
    return eqx.combine(arrays, static), outputs
