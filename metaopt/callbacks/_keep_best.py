"""The best step of a run."""

from .._core._warn import warn
from ._base import AbstractCallback


class KeepBest(AbstractCallback):
    """Keeps the outer variables and params of the lowest outer loss, as `solution.best`.

    Every step counts, with the `hyper` at which it evaluated its outer loss, before the
    update; and so does the evaluation at the end of [`metaopt.solve_bilevel`][], whose
    `step` is the number of all steps.

    The lowest of many losses is lower than what its `hyper` is worth. Report the loss on
    data that chose nothing.
    """

    def open(self, run):
        run.keeps_best = True
        if run.num_taken and run.best is None:
            warn(
                "The checkpoint was written without `metaopt.callbacks.KeepBest`: "
                "`solution.best` is the best of the steps from now on."
            )
