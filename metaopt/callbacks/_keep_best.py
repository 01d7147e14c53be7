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
        if not run.info.updated:
            return  # the params in the state are then of another step
        loss = float(run.info.report.outer.loss)
        if run.best is None or loss < run.best.outer_loss:
            params = run.solver.solution(run.state)
            run.best = Best(run.evaluated, params, loss, run.num_steps - 1)
