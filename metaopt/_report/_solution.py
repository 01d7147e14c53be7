"""Solutions of inner and of bilevel problems."""

from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._core._results import RESULTS
from .._core._types import Aux, FloatScalar, Hyper, ModelState, Params
from ._history import History, is_float_array
from ._report import notes, Report
from ._table import is_known, norm, number, table, verdict


class Solution(eqx.Module):
    """The solution of an inner problem.

    **Attributes:**

    - `value`: the params at the solution, with the structure of the initial ones.
    - `result`: how the solve ended; `metaopt.RESULTS[result]` is its text.
    - `aux`: the auxiliary output of the last evaluation, or `None`.
    - `model_state`: the model state at the solution, or `None`.
    - `solver_state`: the state of the solver after the last step (momenta, averages, the
        count of steps), for `solve_inner(..., solver_state=)`; `None` where the solver
        or the adjoint does not hand it on.
    - `stats`: a dictionary of `num_steps`, `losses` (the inner loss at the start of
        each step, or `None`) and `failed_step` (-1 if none).
    """

    value: Params
    result: RESULTS
    aux: Aux
    model_state: ModelState
    stats: dict[str, Any]
    solver_state: Any = None

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        losses = self.stats["losses"]
        rows = [("steps", number(self.stats["num_steps"]))]
        if losses is not None and is_known(losses):
            taken = np.asarray(losses)[..., : int(np.max(self.stats["num_steps"]))]
            if taken.ndim == 1 and taken.size:
                rows.append(("first loss", number(taken[0])))
                rows.append(("last loss", number(taken[-1])))
        return table("Inner solution", rows, verdict(self.result))


INTERRUPT = "an interrupt"
"""The end of a run that was interrupted, as `ended_by`."""


class Best(eqx.Module):
    """The outer step of the lowest outer loss, under [`metaopt.callbacks.KeepBest`][].

    **Attributes:**

    - `hyper`: the outer variables at which the outer loss was evaluated.
    - `params`: the params that it was evaluated at.
    - `outer_loss`: the outer loss.
    - `step`: the number of the step, in the whole run; the first is 0.
    """

    hyper: Hyper
    params: Params
    outer_loss: float
    step: int

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [("outer step", number(self.step)), ("outer loss", number(self.outer_loss))]
        return table("Best step", rows, "`hyper` and `params` of it are attributes.")


class BilevelSolution(eqx.Module):
    """The solution of a bilevel problem. `print` it.

    **Attributes:**

    - `hyper`: the outer variables that were found.
    - `params`: the inner solution *at* `hyper`, solved for after the last outer step
        (from a warm start where the solver uses one).
    - `model_state`: the model state there, or `None`.
    - `outer_loss`: the outer loss there.
    - `history`: one row for each outer step.
    - `result`: how the run ended; `metaopt.RESULTS[result]` is its text.
    - `report`: the report on the last hypergradient.
    - `state`: the state of the bilevel solver, from which `step` and
        `solve_bilevel(..., state=)` can go on.
    - `num_skipped`: outer steps at which `hyper` was left alone, because the
        hypergradient was not finite.
    - `warm_started`: whether the params owe something to the `hyper` of earlier outer
        steps. The value of `hyper` in a new run is then unknown: measure it with
        [`metaopt.solve_inner`][] before you report a result.
    - `best`: the best step, under [`metaopt.callbacks.KeepBest`][]; else `None`.
    - `ended_by`: the end of the run: `num_steps`, `atol`, the name of a callback, the end
        of the data, a failed step or an interrupt.
    """

    hyper: Hyper
    params: Params
    model_state: ModelState
    outer_loss: FloatScalar
    history: History
    result: RESULTS
    report: Report | None
    state: Any
    num_skipped: int
    warm_started: bool
    best: Best | None = None
    ended_by: str = eqx.field(default="", static=True)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        history = self.history
        rows = [("outer steps", str(len(history)))]
        if self.ended_by:
            rows.append(("ended by", self.ended_by))
        if len(history):
            rows += [
                ("outer loss, first", number(history.outer_loss[0])),
                ("outer loss, best", number(self._best())),
                ("outer loss, final", number(self.outer_loss)),
                ("hypergradient norm", norm(history.hypergradient_norm[-1])),
            ]
            if self._stands_still():
                rows.append(("outer variables", "not moved by any step"))
            for name, column in history.columns.items():
                if name.endswith(("_steps", "_products")) and column.any():
                    title = name.removeprefix("num_").replace("_", " ")
                    rows.append((title, number(column.sum())))
            if self.report is not None:
                accuracy = self.report.derivative.accuracy()
                rows += [(f"{name} of the last", text) for name, text in accuracy]
                rows += notes(self.report)
            if self.num_skipped:
                rows.append(("updates skipped", str(self.num_skipped)))
            rows.append(("seconds", f"{history.seconds.sum():.1f}"))
        if self.warm_started:
            rows.append(("inner solution", "from warm starts, not from `hyper` alone"))
        return table("Bilevel solution", rows, verdict(self.result))

    def _stands_still(self) -> bool:
        """Whether two or more steps left the outer variables as the first one did."""
        path = eqx.filter(self.history.hyper, is_float_array)
        same = [bool(np.all(leaf == leaf[:1])) for leaf in jax.tree.leaves(path)]
        return len(self.history) > 1 and bool(same) and all(same)

    def _best(self) -> float:
        values = np.append(self.history.outer_loss, np.asarray(self.outer_loss))
        finite = values[np.isfinite(values)]
        return float(finite.min()) if finite.size else float("nan")
