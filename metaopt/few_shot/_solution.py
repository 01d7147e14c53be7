"""Results of learning over tasks, and states to go on from."""

from typing import Any

import equinox as eqx
import numpy as np

from .._report import flat_text, is_positive, table, verdict
from .._results import RESULTS
from .._types import IntScalar, Key, ModelState


class TrainState(eqx.Module):
    """The state that one meta-step hands to the next, and that a checkpoint holds.

    **Attributes:**

    - `meta`: what is learned.
    - `model_state`: the model state, or `None`.
    - `optimizer_state`: that of the optimizer.
    - `num_steps`: how many meta-steps were taken.
    - `key`: the randomness of the run.
    """

    meta: Any
    model_state: ModelState
    optimizer_state: Any
    num_steps: IntScalar
    key: Key


class TrainHistory(eqx.Module):
    """The reports of all meta-steps, one entry for each, as NumPy arrays.

    **Attributes:**

    - `loss`: the mean query loss over the batch of tasks, as `value_and_grad` returns it.
    - `num_failed`: how many tasks failed.
    - `reason`: why the first task that failed did; successful where none did.
    - `num_flat`: the sum over tasks of that of [`metaopt.few_shot.TaskStats`][].
    """

    loss: np.ndarray
    num_failed: np.ndarray
    reason: RESULTS
    num_flat: np.ndarray | None = None


class TrainSolution(eqx.Module):
    """The result of learning over tasks.

    **Attributes:**

    - `meta`: what was learned.
    - `model_state`: the model state, or `None`.
    - `history`: the steps since the run began, or was taken up again.
    - `state`: to go on from.
    - `result`: how the run ended.
    - `seconds`: how long it took, compilation included.
    """

    meta: Any
    model_state: ModelState
    history: TrainHistory
    state: TrainState
    result: RESULTS
    seconds: float

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        losses, num_failed = self.history.loss, int(self.history.num_failed.sum())
        rows = [
            ("meta-steps", f"{int(self.state.num_steps)}, of which {len(losses)} now"),
            ("tasks that failed", f"{num_failed}"),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        tenth = max(len(losses) // 10, 1)
        if np.any(np.isfinite(losses)):
            rows.insert(1, ("query loss, first tenth", f"{_mean(losses[:tenth]):.4g}"))
            rows.insert(2, ("query loss, last tenth", f"{_mean(losses[-tenth:]):.4g}"))
        if is_positive(self.history.num_flat):
            rows.append(("left out", flat_text(self.history.num_flat)))
        text = verdict(self.result)
        if num_failed:
            text += f" Tasks that failed are left out. {verdict(self.history.reason)}"
        return table("Learning over tasks", rows, text)


def _mean(losses: np.ndarray) -> float:
    good = losses[np.isfinite(losses)]
    return float(good.mean()) if good.size else float("nan")
