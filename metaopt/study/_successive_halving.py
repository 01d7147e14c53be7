"""Successive halving: many settings trained a little, the best of them to the end."""

import time
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._types import Hyper, PyTree
from .._core._validate import check_count
from .._report import Work
from ._method import AbstractMethod, least_steps, Task
from ._pieces import check_pieces, train_on
from ._search import numpy_seed
from ._space import Space
from ._trace import endless, too_small


class SuccessiveHalving(AbstractMethod):
    r"""Successive halving: train many settings for a few steps, keep the best of them, and
    train these further, until one is left that is trained to the end.

    With $n = \eta^k$ settings, each of the $k + 1$ rungs takes as many inner steps as the
    others, $T$ in all; brackets follow until the budget is spent. The settings of the
    method are those of the lowest outer loss among all that were trained to the end. For
    settings whose order shows early; a learning rate that decays over the steps is judged
    before it has.

    **Arguments:**

    - `space`: the ranges, as for [`metaopt.study.RandomSearch`][].
    - `num_settings`: the settings of a bracket, a power of `factor`.
    - `factor`: $\eta$, the share of the settings that goes on is one in so many.

    **Raises:**

    `ValueError` for numbers that do not fit, for inner solvers that cannot go on from their
    own state or may stop early, and for a [`metaopt.BatchSequence`][] as `train`.

    ??? cite "Source"

        Jamieson, Talwalkar: *Non-stochastic best arm identification and hyperparameter
        optimization*, 2016.
    """

    space: PyTree = None
    num_settings: int = eqx.field(default=9, static=True)
    factor: int = eqx.field(default=3, static=True)

    def __check_init__(self):
        check_count(self.factor, "factor", minimum=2)
        check_count(self.num_settings, "num_settings", minimum=2)
        if self.factor**self._num_halvings != self.num_settings:
            raise ValueError(
                f"`num_settings` must be a power of `factor`, {self.factor}; got "
                f"{self.num_settings}."
            )

    @property
    def _num_halvings(self) -> int:
        return round(np.log(self.num_settings) / np.log(self.factor))

    def check(self, task, trace):
        """Check the space and the inner solver, and that the budget pays for a bracket."""
        Space(self.space, task.hyper)
        check_pieces(task, "`SuccessiveHalving`", "`metaopt.study.RandomSearch`")
        if min(self._steps(task)) < 1:
            raise ValueError(
                f"`num_settings` is {self.num_settings}, and the inner solver takes only "
                f"{least_steps(task.inner)} steps: the first rung would have none."
            )
        cost = trace.budget.cost(self._work(task), np.zeros(()))
        if cost is not None and not trace.fits(float(cost)):
            raise too_small(trace.budget, float(cost), "one bracket")
        if trace.budget.cost(self._work(task), np.ones(())) == 0:
            raise endless(type(self).__name__, trace.budget)

    def run(self, task, trace):
        if trace.budget.cost(None, np.zeros(())) is not None:
            self._bracket(task, Space(self.space, task.hyper), 0)  # compiles
        space, best_loss, best_hyper = Space(self.space, task.hyper), np.inf, task.hyper
        work, number = self._work(task), 0
        while True:
            begin = time.perf_counter()
            loss, hyper = self._bracket(task, space, number)
            seconds = time.perf_counter() - begin
            if loss < best_loss:
                best_loss, best_hyper = loss, hyper
            if not np.isfinite(loss):
                trace.fail("The outer loss of the last setting of a bracket is not finite.")
            if not trace.add(work, seconds, best_loss, best_hyper):
                return
            number += 1
            if not trace.fits(trace.spent / number):
                return

    def _steps(self, task: Task) -> list[int]:
        """The inner steps that each rung adds."""
        num_steps, rungs = least_steps(task.inner), range(self._num_halvings, -1, -1)
        ends = [num_steps // self.factor**rung for rung in rungs]
        return np.diff([0, *ends]).tolist()

    def _counts(self) -> list[int]:
        """The settings of each rung."""
        halvings = self._num_halvings
        return [self.num_settings // self.factor**rung for rung in range(halvings + 1)]

    def _work(self, task: Task) -> Work:
        pairs = zip(self._counts(), self._steps(task))
        total = sum(count * steps for count, steps in pairs)
        return Work(gradients=np.asarray(float(total)), products=np.zeros(()))

    def _bracket(self, task: Task, space: Space, number: int) -> tuple[float, Hyper]:
        random = np.random.default_rng([*numpy_seed(task), number])
        draw = lambda: {s.name: random.uniform(size=s.shape) for s in space.drawn}
        # The first of all settings is the one that was given.
        hypers = [task.hyper] if number == 0 else []
        hypers += [
            space.at_uniforms(draw()) for _ in range(self.num_settings - len(hypers))
        ]
        key = jax.random.fold_in(task.key, number)
        states, losses = None, np.zeros(len(hypers))
        steps = self._steps(task)
        for rung, (count, more) in enumerate(zip(self._counts(), steps)):
            kept = np.argsort(losses, kind="stable")[:count]
            hypers = [hypers[i] for i in kept]
            if states is not None:
                states = _chosen(states, kept)
            rung_key = jax.random.fold_in(key, rung)
            losses, states = train_on(task, more, hypers, states, key, rung_key)
        return float(losses[0]), hypers[0]


def _chosen(states: PyTree, kept: Sequence[int] | np.ndarray) -> PyTree:
    pick = lambda leaf: leaf[jnp.asarray(kept)] if eqx.is_array(leaf) else leaf
    return jax.tree.map(pick, states)
