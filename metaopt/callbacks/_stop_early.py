"""An early end of a run."""

from collections.abc import Mapping

import numpy as np

from .._core._validate import check_count, check_tolerance
from ._base import AbstractCallback


class StopEarly(AbstractCallback):
    """Ends a run that has stopped to improve, is accurate enough or has taken its time.

    Each limit that is given ends the run by itself. An end by a callback is no failure.

    **Arguments:**

    - `patience`: the number of outer steps without a lower outer loss than ever before.
    - `min_decrease`: how much lower it has to be to count, in the units of the loss.
    - `atol`: ends once the Euclidean norm of the hypergradient (under a single-loop solver
        that of its change of the params, too), at the last step of a compiled call, is at
        most this. Not for a solver with a `tolerance`.
    - `seconds`: the wall time of the run, looked at between compiled calls.

    **Raises:**

    `ValueError` for numbers out of range, and where no limit is given.
    """

    def __init__(
        self,
        patience: int | None = None,
        *,
        min_decrease: float = 0.0,
        atol: float | None = None,
        seconds: float | None = None,
    ):
        if patience is not None:
            check_count(patience, "patience")
        check_tolerance(min_decrease, "min_decrease", optional=False)
        check_tolerance(atol, "atol")
        check_tolerance(seconds, "seconds")
        if patience is atol is seconds is None:
            raise ValueError(
                "`StopEarly()` has no limit, and would never end a run. Give it "
                "`patience=`, `atol=` or `seconds=`."
            )
        self.patience = patience
        self.min_decrease = min_decrease
        self.atol = atol
        self.seconds = seconds
        self._lowest = float("inf")
        self._since = self._seen = 0

    def open(self, run):
        self._begin()
        if run.num_taken:  # a run that goes on from a checkpoint
            columns = run.history.columns
            self._look_at(columns["outer_loss"])
            return self._is_done(columns)

    def see(self, run):
        late = self.seconds is not None and run.seconds >= self.seconds
        if run.going_back is not None:
            return late  # these steps are taken again
        if self._seen == run.num_taken - len(run.last["seconds"]):
            self._look_at(run.last["outer_loss"])
        else:  # the run went back
            self._begin()
            self._look_at(run.history.columns["outer_loss"])
        return late or self._is_done(run.last)

    def _is_done(self, columns: Mapping[str, np.ndarray]) -> bool:
        if self.patience is not None and self._since >= self.patience:
            return True
        return self.atol is not None and self._is_small(columns)

    def _is_small(self, columns: Mapping[str, np.ndarray]) -> bool:
        if "tolerance" in columns:
            raise ValueError(
                "`StopEarly(atol=...)` would take a zero of a rough hypergradient for one "
                "of the hypergradient, under the `tolerance` of the solver. Write "
                "`solve_bilevel(..., atol=...)`, which takes an exact step before it ends."
            )
        # The second of a solver without inner solve.
        names = [n for n in ("hypergradient_norm", "change") if n in columns]
        return all(bool(columns[name][-1] <= self.atol) for name in names)

    def _begin(self) -> None:
        self._lowest, self._since, self._seen = float("inf"), 0, 0

    def _look_at(self, losses: np.ndarray) -> None:
        self._seen += len(losses)
        for loss in losses:
            if loss < self._lowest - self.min_decrease:
                self._lowest, self._since = float(loss), 0
            else:
                self._since += 1
