"""The contribution of one task, and the results of a batch of them."""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._core._results import RESULTS
from .._core._types import Aux, FloatScalar, IntScalar, ModelState, Vector
from .._report import flat_text, is_positive, table, verdict


class TaskGradient(eqx.Module):
    """The contribution of one task.

    **Attributes:**

    - `loss`: the query loss of the adapted model.
    - `gradient`: the direction for what is learned, a vector like its trainable part.
    - `aux`: what the loss returned beside its value, or `None`.
    - `state`: the model state after the task, or `None`.
    - `result`: how adapting and differentiating went.
    - `left_out`: what the gradient leaves out by construction, in words.
    - `num_flat`: as in [`metaopt.Report`][].
    """

    loss: FloatScalar
    gradient: Vector
    aux: Aux
    state: ModelState
    result: RESULTS
    left_out: tuple[str, ...] = eqx.field(static=True)
    num_flat: IntScalar | None = None


class TaskStats(eqx.Module):
    """The results of a batch of tasks, task by task.

    **Attributes:**

    - `losses`: the query loss of each task, of shape `(num_tasks,)`; NaN or infinite
        where it diverged. With `step_weights`, the weighted sum of those of all steps.
    - `failed`: which tasks failed, of shape `(num_tasks,)`. They are left out of loss and
        gradients.
    - `num_failed`: how many did.
    - `aux`: what the loss returned beside its value, stacked by task, or `None`.
    - `model_state`: the mean over tasks of the model state after the query examples, or
        `None`. Leaves that are no floating-point arrays are those of the first task.
    - `results`: how each task went, of shape `(num_tasks,)`.
    - `result`: whether any task was left.
    - `left_out`: what the gradients leave out by construction, in words.
    - `num_flat`: for each task, the number of entries of inner gradients that are zero and
        at which the derivative of the step was left out, as in [`metaopt.Report`][]; of
        shape `(num_tasks,)`, or `None`.
    """

    losses: Float[Array, " num_tasks"]
    failed: Bool[Array, " num_tasks"]
    num_failed: IntScalar
    aux: Aux
    model_state: ModelState
    results: RESULTS
    result: RESULTS
    left_out: tuple[str, ...] = eqx.field(static=True)
    num_flat: Int[Array, " num_tasks"] | None = None

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        failed = np.asarray(self.failed)
        rows = [("tasks", f"{failed.size}"), ("failed", f"{failed.sum()}")]
        if not failed.all():
            mean = np.asarray(self.losses, float)[~failed].mean()
            rows.append(("mean query loss", f"{mean:.4g}"))
        if is_positive(self.num_flat):
            rows.append(("left out", flat_text(self.num_flat)))
        return table("Tasks", rows, verdict(self.results))
