"""Searches: settings are drawn, tried and compared."""

import abc
import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from .._core._types import Hyper, PyTree
from .._core._validate import check_count
from .._report import Work
from ._method import AbstractMethod, least_steps, Task
from ._space import Shares, Space
from ._trace import endless, too_small, Trace
from ._trials import trial_losses


class Trial(NamedTuple):
    """A trial of a search.

    **Attributes:**

    - `hyper`: the outer variables that the loss is of.
    - `loss`: the outer loss; infinite where it is not finite, and NaN of a trial that the
        search stopped before its end.
    - `work`: the work that it took.
    - `seconds`: the wall time.
    - `failure`: how it failed, in words; empty if it did not.
    """

    hyper: Hyper
    loss: float
    work: Work | None
    seconds: float
    failure: str = ""


class AbstractSession(abc.ABC):
    """A search that is going on: it proposes settings, and is told their losses."""

    @abc.abstractmethod
    def ask(self, count: int) -> list[tuple[Any, Hyper]]:
        """Propose settings.

        **Arguments:**

        - `count`: how many at most.

        **Returns:**

        Pairs of a token and the outer variables; none at the end of the search.
        """

    def news(self) -> list[Trial]:
        """The trials of other processes, and of those before, since it was asked last."""
        return []

    def solve(
        self,
        task: Task,
        tokens: Sequence[Any],
        hypers: Sequence[Hyper],
        numbers: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Solve the inner problem at each of some settings.

        **Arguments:**

        - `task`: the task.
        - `tokens`: the tokens of the settings, `None` for those that nobody asked for.
        - `hypers`: the settings.
        - `numbers`: the numbers of the trials, by which their randomness differs.

        **Returns:**

        The outer loss of each at its inner solution, infinite where it is not finite, and
        NaN where the search stopped the trial before its end; and the number of inner
        steps; arrays of shape `(num_trials,)`.
        """
        return trial_losses(task, hypers, numbers)

    @abc.abstractmethod
    def tell(self, token: Any, trial: Trial) -> None:
        """Tell the search how settings that it proposed have done.

        **Arguments:**

        - `token`: the token of the proposal.
        - `trial`: the trial, whose `hyper` may have been tuned further.
        """


class AbstractSearch(AbstractMethod):
    """A search by trials, each of which solves the inner problem once.

    The first trial is `hyper` as it is given. The settings of a search are those of the
    lowest outer loss so far. Trials that are tried together are vectorised.

    **Attributes:**

    - `batch_size`: how many trials are tried together.
    """

    batch_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def session(self, task: Task, trial: Any = None) -> AbstractSession:
        """Begin the search.

        **Arguments:**

        - `task`: the task.
        - `trial`: the settings of a trial that is more than an inner solve. A search that
            keeps its trials in a file keeps those of other settings apart.
        """

    def check(self, task, trace):
        """Check the space, and that the budget pays for a trial."""
        self.session(task)
        least = _work(least_steps(task.inner))
        cost = trace.budget.cost(least, np.zeros(()))
        if cost is not None and not trace.fits(float(cost)):
            raise too_small(trace.budget, float(cost), "one trial")
        if trace.budget.cost(_work(1.0), np.ones(())) == 0:
            raise endless(type(self).__name__, trace.budget)

    def run(self, task, trace):
        session = self.session(task)
        if trace.budget.cost(None, np.zeros(())) is not None:
            # Compiles, which the budget leaves out.
            count = self.batch_size
            session.solve(task, [None] * count, [task.hyper] * count, range(count))
        best, number = Best(task.hyper), 0

        def add(trial: Trial) -> bool:
            nonlocal number
            number += 1
            return best.add(trial, trace)

        while all(map(add, session.news())):
            each = trace.spent / number if number else 0.0
            if not trace.fits(each):
                return
            # No more than are paid for.
            left = (trace.budget.amount - trace.spent) / each if each else np.inf
            asked = session.ask(int(min(self.batch_size, max(1.0, left))))
            if not asked:
                return
            # One shape is compiled once.
            hypers = [hyper for _, hyper in asked]
            hypers += [hypers[-1]] * (self.batch_size - len(hypers))
            begin = time.perf_counter()
            numbers = range(number, number + self.batch_size)
            tokens = [token for token, _ in asked]
            tokens += [None] * (self.batch_size - len(tokens))
            losses, steps = session.solve(task, tokens, hypers, numbers)
            seconds = (time.perf_counter() - begin) / len(asked)
            fits = True
            for (token, hyper), loss, taken in zip(asked, losses, steps):
                failure = _NOT_FINITE if np.isinf(loss) else ""
                trial = Trial(hyper, float(loss), _work(taken), seconds, failure)
                session.tell(token, trial)
                fits = fits and add(trial)
            if not fits:
                return


_NOT_FINITE = "The outer loss at the inner solution is not finite."


class Best:
    """The settings of the lowest loss among trials.

    **Arguments:**

    - `hyper`: the settings before the first trial.
    """

    def __init__(self, hyper: Hyper):
        self.loss = float("inf")
        self.hyper = hyper

    def add(self, trial: Trial, trace: Trace) -> bool:
        """Add a trial to a trace, and say whether the budget paid for it."""
        if trial.loss < self.loss:
            self.loss, self.hyper = trial.loss, trial.hyper
        added = trace.add(trial.work, trial.seconds, self.loss, self.hyper)
        if added and trial.failure:
            trace.fail(trial.failure)
        return added


def _work(steps: float) -> Work:
    return Work(gradients=np.asarray(steps, float), products=np.zeros(()))


class RandomSearch(AbstractSearch):
    """Random search: each trial draws all values anew.

    **Arguments:**

    - `space`: the ranges, a pytree like `hyper` or like the top of it, with `None` for what
        stays as it is. By default those of [`metaopt.hyper.Interval`][],
        [`metaopt.hyper.Integer`][] and [`metaopt.hyper.Simplex`][].
    - `batch_size`: how many trials are tried together.
    """

    space: PyTree
    batch_size: int = eqx.field(static=True)

    def __init__(self, space: PyTree = None, *, batch_size: int = 8):
        check_count(batch_size, "batch_size")
        self.space = space
        self.batch_size = batch_size

    def session(self, task, trial=None):
        return _RandomSession(Space(self.space, task.hyper), task)


class _RandomSession(AbstractSession):
    def __init__(self, space: Space, task: Task):
        self.space = space
        self.random = np.random.default_rng(numpy_seed(task))
        self.given = [task.hyper]

    def ask(self, count):
        given, self.given = self.given, []
        drawn = [self.space.at_uniforms(self._draw()) for _ in range(count - len(given))]
        return [("", hyper) for hyper in given + drawn]

    def tell(self, token, trial):
        pass

    def _draw(self) -> dict[str, np.ndarray]:
        return {s.name: self.random.uniform(size=s.shape) for s in self.space.drawn}


class GridSearch(AbstractSearch):
    """Grid search: all combinations of evenly spaced values, in random order.

    All entries of an array have one value in common.

    **Arguments:**

    - `space`: the ranges, as for [`metaopt.study.RandomSearch`][].
    - `num_values`: how many values each leaf has.
    - `batch_size`: how many trials are tried together.
    """

    space: PyTree
    num_values: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)

    def __init__(self, space: PyTree = None, *, num_values: int = 5, batch_size: int = 8):
        check_count(num_values, "num_values", minimum=2)
        check_count(batch_size, "batch_size")
        self.space = space
        self.num_values = num_values
        self.batch_size = batch_size

    def session(self, task, trial=None):
        return _GridSession(Space(self.space, task.hyper), self.num_values, task)


_LARGEST_GRID = 1_000_000


class _GridSession(AbstractSession):
    def __init__(self, space: Space, num_values: int, task: Task):
        size = num_values ** len(space.drawn)
        if size > _LARGEST_GRID:
            raise ValueError(
                f"The grid has {size:,} points: {num_values} values of each of "
                f"{len(space.drawn)} leaves. Give fewer `num_values`, or use "
                "`metaopt.study.RandomSearch`."
            )
        for slot in space.drawn:
            if isinstance(slot.range, Shares):
                raise ValueError(
                    f"`{slot.name}` is a simplex, which a grid has no points on. Use "
                    "`metaopt.study.RandomSearch`."
                )
        values = np.linspace(0, 1, num_values)
        points = list(itertools.product(values, repeat=len(space.drawn)))
        np.random.default_rng(numpy_seed(task)).shuffle(points)
        self.space = space
        self.left = [task.hyper, *map(self._at, points)]

    def ask(self, count):
        taken, self.left = self.left[:count], self.left[count:]
        return [("", hyper) for hyper in taken]

    def tell(self, token, trial):
        pass

    def _at(self, point: tuple[float, ...]) -> Hyper:
        slots = self.space.drawn
        return self.space.at_uniforms(
            {slot.name: np.full(slot.shape, u) for slot, u in zip(slots, point)}
        )


def numpy_seed(task: Task) -> list[int]:
    """The randomness of a task, for NumPy."""
    data = jax.random.key_data(task.key) if is_typed(task.key) else task.key
    return np.asarray(data).ravel().tolist()


def is_typed(key: Any) -> bool:
    """Whether a key is one of `jax.random.key`."""
    return jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
