"""Learning over tasks, step by step."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .._core._foreign import is_loader
from .._core._results import mask_result, RESULTS
from .._core._trace_once import tracing_once
from .._core._tree import (
    same_structs,
    split_trainable,
    tree_norm,
    tree_strong,
    tree_where_arrays,
)
from .._core._types import Key, ModelState
from .._core._validate import (
    canonical_key,
    check_count,
    check_kind,
    check_tolerance,
)
from .._data import restarted
from .._outer import AbstractBody, as_callbacks, drive, Pulled, Run, StepRecord
from .._report import raise_on_failure
from ..callbacks import AbstractCallback
from ._adaptation import chosen_leaves
from ._batches import as_tasks
from ._episodes import HostEpisodes
from ._learner import AbstractLearner, canonical_meta, check_model_state
from ._solution import TrainSolution, TrainState
from ._task import Learned, model_of


@tracing_once()
def train(
    learner: AbstractLearner,
    meta: Any,
    tasks: Callable[[Key], Any] | Iterable[Any] | HostEpisodes,
    *,
    outer: optax.GradientTransformation,
    num_steps: int,
    model_state: ModelState = None,
    key: Key | None = None,
    state: TrainState | None = None,
    atol: float | None = None,
    steps_per_call: int = 10,
    callbacks: Sequence[AbstractCallback | Callable[[Run], Any]] = (),
    throw: bool = True,
) -> TrainSolution:
    """Learn over tasks: a gradient over a batch of tasks, a step of the optimizer, again.

    A step whose tasks all failed is not taken. Ctrl-C stops the run after the call it is in
    and returns what was reached.

    **Arguments:**

    - `learner`: a [`metaopt.few_shot.MAML`][] or another.
    - `meta`: where to start: a model, or a [`metaopt.few_shot.Learned`][].
    - `tasks`: [`metaopt.few_shot.Episodes`][] or another function `tasks(key)` that draws
        a batch of tasks, called inside the compiled loop;
        [`metaopt.few_shot.HostEpisodes`][]; or an iterator or loader of batches, such as
        pairs of support and query. A loader is started anew whenever it is exhausted. A
        call ends where the shapes of batches change, and each shape is compiled once.
    - `outer`: the optax transform for what is learned.
    - `num_steps`: the number of meta-steps, those of `state` or of a checkpoint included.
    - `model_state`: the model state at the start.
    - `key`: for everything random, from `jax.random.key`; by default key 0.
    - `state`: the `state` of a solution, to go on from, in place of `key`, `model_state`
        and what is in `meta`. The history is that of the new steps.
    - `atol`: stop once the Euclidean norm of the meta-gradient is at most this.
    - `steps_per_call`: how many steps are compiled into one call; callbacks see the last of
        each call.
    - `callbacks`: called between calls, such as [`metaopt.callbacks.Checkpoint`][]; a
        function is called with the [`metaopt.extend.Run`][] after each call. One ends the
        run by returning `True` or raising `StopIteration`. Any other error that it raises
        has what was reached as its attribute `solution`.
    - `throw`: whether a failure raises.

    **Returns:**

    A [`metaopt.few_shot.TrainSolution`][].

    **Raises:**

    `ValueError` for arguments that do not fit; [`metaopt.SolveError`][] under `throw` where
    all tasks of some step failed, whose `value` is the solution before that step.

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
            maml, model, lines, outer=optax.adam(1e-2), num_steps=20
        )
        ```
    """
    check_kind(learner, AbstractLearner, "learner", "metaopt.few_shot.MAML(...)")
    check_kind(outer, optax.GradientTransformation, "outer", "optax.adam(1e-3)")
    check_count(num_steps, "num_steps")
    check_tolerance(atol, "atol")
    check_count(steps_per_call, "steps_per_call")
    watching = as_callbacks(callbacks)
    meta = tree_strong(canonical_meta(meta))
    if state is None:
        check_model_state(learner, model_state)
        state = TrainState(
            meta=meta,
            model_state=tree_strong(model_state),
            outer_state=outer.init(split_trainable(meta)[0]),
            num_steps=jnp.zeros((), int),
            key=canonical_key(key),
        )
    else:
        _check_goes_on(state, meta, key, model_state)
    draw = tasks if callable(tasks) else None
    feeds = () if callable(tasks) else (_feed(tasks),)
    run = Run(_Body(learner, outer, draw), feeds, state, num_steps)
    solution = drive(
        run,
        steps_per_call=steps_per_call,
        atol=atol,
        callbacks=watching,
        throw=throw,
        solution=lambda: _solution(run),
        evaluates=False,
    )
    return raise_on_failure(solution, solution.result, throw and not run.interrupted)


class _Body(AbstractBody):
    """A gradient over a batch of tasks, and a step of the optimizer."""

    learner: AbstractLearner
    outer: optax.GradientTransformation
    draw: Callable[[Key], Any] | None  # where the batches are not handed over

    def exact(self, info):
        return self

    def step(self, state, *data):
        # Depends on the number of the step alone, however the steps are cut into calls.
        key = jax.random.fold_in(state.key, state.num_steps)
        draw_key, task_key = jax.random.split(key)
        batch = data[0] if self.draw is None else as_tasks(self.draw(draw_key))
        loss, gradient, stats = self.learner.value_and_grad(
            state.meta, batch, key=task_key, model_state=state.model_state, throw=False
        )
        trainable, rest = split_trainable(state.meta)
        updates, outer_state = optax.with_extra_args_support(self.outer).update(
            gradient, state.outer_state, trainable, value=loss
        )
        updates = _without_frozen(updates, state.meta, self.learner.model_loss.frozen)
        lost = stats.num_failed == stats.losses.size
        new = TrainState(
            meta=eqx.combine(optax.apply_updates(trainable, updates), rest),
            model_state=stats.model_state,
            outer_state=outer_state,
            num_steps=state.num_steps,
            key=state.key,
        )
        new = tree_where_arrays(jnp.logical_not(lost), new, state)
        new = eqx.tree_at(lambda s: s.num_steps, new, state.num_steps + 1)
        first = jnp.argmax(stats.failed)
        num_flat = jnp.asarray(0 if stats.num_flat is None else stats.num_flat)
        columns = {
            "outer_loss": loss,
            "hypergradient_norm": tree_norm(gradient),
            "num_failed": stats.num_failed,
            "num_flat": jnp.sum(num_flat),
        }
        return new, StepRecord(
            columns,
            result=mask_result(lost, RESULTS.all_tasks_failed),
            reason=jax.tree.map(lambda a: a[first], stats.results),
            updated=jnp.logical_not(lost),
            is_rough=False,
            info=stats,
        )

    def hyper(self, state):
        return state.meta

    def solution(self, state):
        return None


def _feed(tasks: Any) -> Pulled:
    """The batches that an iterator or a loader yields.

    **Raises:**

    `ValueError` for anything else.
    """
    if isinstance(tasks, HostEpisodes):
        return Pulled(tasks.starting_at, as_tasks, restarts=True)
    if isinstance(tasks, Iterator):  # goes on by itself where it was
        return Pulled(lambda num_steps: tasks, as_tasks)
    if is_loader(tasks):
        start = lambda num_steps: itertools.islice(restarted(tasks), num_steps, None)
        return Pulled(start, as_tasks, restarts=True)
    raise ValueError(
        "`tasks` must be `metaopt.few_shot.Episodes` or another function of a key that "
        "draws a batch of tasks, or an iterator or loader of batches; got "
        f"{type(tasks).__name__}. One batch over and over is `lambda key: tasks`."
    )


def _check_goes_on(state: Any, meta: Any, key: Key | None, model_state: ModelState) -> None:
    """Raise a `ValueError` for a `state` of another kind, and for arguments that
    contradict it."""
    if not isinstance(state, TrainState):
        raise ValueError(
            "`state` must be the `state` of a `metaopt.few_shot.TrainSolution`, as in "
            f"`state=solution.state`; got {type(state).__name__}. Leave it out to begin at "
            "`meta`."
        )
    if key is not None or model_state is not None:
        raise ValueError(
            "`state` has the key and the model state of its run: hand over no others."
        )
    if not same_structs(*(split_trainable(x)[0] for x in (state.meta, meta))):
        raise ValueError("`state` is of another model than `meta`, with other arrays.")


def _solution(run: Run) -> TrainSolution:
    """The solution as far as it was reached."""
    state = run.state
    return TrainSolution(
        meta=state.meta,
        model_state=state.model_state,
        history=run.history,
        result=run.result,
        reason=run.reason,
        state=state,
        best=run.best,
        seconds=run.seconds,
        ended_by=run.ended_by,
    )


def _without_frozen(updates: Any, meta: Any, frozen: Callable[[Any], Any] | None) -> Any:
    """The updates, with zeros for the frozen part, which weight decay would move."""
    if frozen is None:
        return updates
    marks = chosen_leaves(split_trainable(model_of(meta))[0], frozen, "frozen")
    held = lambda update, mark: jnp.zeros_like(update) if mark else update
    model = jax.tree.map(held, model_of(updates), marks)
    return Learned(model, updates.settings) if isinstance(updates, Learned) else model
