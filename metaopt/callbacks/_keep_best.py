"""The best step of a run."""

from .._report import Best
from ._base import AbstractCallback


class KeepBest(AbstractCallback):
    """Keeps the outer variables and params of the lowest outer loss, as `solution.best`.

    It sees the last step of each compiled call, with the `hyper` at which that step
    evaluated its outer loss, before the update.

    The lowest of many losses is lower than what its `hyper` is worth. Report the loss on
    data that chose nothing.
    """

    def see(self, run):
        if not run.updated:
            return  # the params in the state are then of another step
        loss = float(run.last["outer_loss"][-1])
        if run.best is None or loss < run.best.outer_loss:
            run.best = Best(run.evaluated, run.params, loss, run.num_steps - 1)
