"""Results of learning over tasks, and states to go on from."""

from typing import Any

import equinox as eqx
import numpy as np

from .._core._results import RESULTS
from .._core._types import IntScalar, Key, ModelState
from .._report import Best, flat_text, History, is_positive, table, verdict


class TrainState(eqx.Module):
    """The state that one meta-step hands to the next, and that a checkpoint holds.

    **Attributes:**

    - `meta`: what is learned.
    - `model_state`: the model state, or `None`.
    - `outer_state`: the state of the optimizer.
    - `num_steps`: how many meta-steps were taken.
    - `key`: the randomness of the run.
    """

    meta: Any
    model_state: ModelState
    outer_state: Any
    num_steps: IntScalar
    key: Key


class TrainSolution(eqx.Module):
    """The result of learning over tasks.

    **Attributes:**

    - `meta`: what was learned.
    - `model_state`: the model state, or `None`.
    - `history`: a [`metaopt.History`][] with a row for each meta-step: `outer_loss`, the
        mean query loss over the batch of tasks; `hypergradient_norm`, the norm of the
        meta-gradient; `num_failed`, the tasks that failed; `num_flat`, the sum over tasks
        of that of [`metaopt.few_shot.TaskStats`][]; and `seconds`.
    - `result`: how the run ended.
    - `reason`: why the first task that failed did; successful where none did.
    - `state`: to go on from.
    - `best`: the [`metaopt.extend.Best`][] that [`metaopt.callbacks.KeepBest`][] kept, or
        `None`.
    - `seconds`: how long it took, compilation included.
    - `ended_by`: the end of the run: `num_steps`, `atol`, the name of a callback, the end
        of the data, a failed step or an interrupt.
    """

    meta: Any
    model_state: ModelState
    history: History
    result: RESULTS
    reason: RESULTS
    state: TrainState
    best: Best | None
    seconds: float
    ended_by: str

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        history = self.history
        losses, num_failed = history.outer_loss, 0
        num_flat = None
        if len(history):
            num_failed, num_flat = int(history.num_failed.sum()), history.num_flat
        rows = [
            ("meta-steps", _count(int(self.state.num_steps), len(losses))),
            ("ended by", self.ended_by),
            ("tasks that failed", f"{num_failed}"),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        tenth = max(len(losses) // 10, 1)
        if np.any(np.isfinite(losses)):
            rows.insert(2, ("query loss, first tenth", f"{_mean(losses[:tenth]):.4g}"))
            rows.insert(3, ("query loss, last tenth", f"{_mean(losses[-tenth:]):.4g}"))
        if is_positive(num_flat):
            rows.append(("left out", flat_text(num_flat)))
        text = verdict(self.result)
        if num_failed:
            text += f" Tasks that failed are left out. {verdict(self.reason)}"
        return table("Learning over tasks", rows, text)


def _count(num_steps: int, num_rows: int) -> str:
    return f"{num_steps}" + ("" if num_rows == num_steps else f", {num_rows} of them now")


def _mean(losses: np.ndarray) -> float:
    good = losses[np.isfinite(losses)]
    return float(good.mean()) if good.size else float("nan")
