"""Learning where to start by going where adaptation led."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import tree_all_finite, tree_sub
from .._core._types import LossFn
from .._core._validate import check_count, check_kind, DESCENT_EXAMPLE
from .._solver import AbstractIterativeSolver, AbstractSolver, check_state_policy
from ._adaptation import Adaptation, adapting_part, judge, ModelLoss
from ._learner import AbstractLearner, adapt
from ._stats import TaskGradient
from ._task import Learned


class Reptile(AbstractLearner):
    """Moves the model towards where it adapted to (Nichol, Achiam and Schulman, 2018).

    Its `value_and_grad` returns the model minus the adapted model in place of a gradient;
    `optax.sgd(step_size)` makes the steps of the paper. Needs no second derivatives and
    no query examples: those that there are only serve to report a loss. It learns from
    several inner steps; with one it is training on all tasks together.

    **Arguments:**

    - `loss`, `inner`, `chunk_size`, `frozen`, `has_aux`, `has_state`: as in
        [`metaopt.few_shot.MAML`][]. Settings of the inner solver cannot be learned.

    **Raises:**

    `ValueError` where one of these does not fit.
    """

    model_loss: ModelLoss
    inner: AbstractSolver
    chunk_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        loss: LossFn,
        inner: AbstractSolver,
        *,
        chunk_size: int | None = None,
        frozen: Callable[[Any], Any] | None = None,
        has_aux: bool = False,
        has_state: bool = False,
    ):
        if not callable(loss):
            raise ValueError(
                f"`loss` must be a function `loss(model, batch)`; got {loss!r}."
            )
        check_kind(inner, AbstractSolver, "inner", DESCENT_EXAMPLE)
        if chunk_size is not None:
            check_count(chunk_size, "chunk_size")
        self.model_loss = ModelLoss(loss, has_aux, has_state, frozen)
        if isinstance(inner, AbstractIterativeSolver):
            check_state_policy(inner, self.model_loss)
        self.inner = inner
        self.chunk_size = chunk_size

    def adaptation(self, model_state):
        return Adaptation(self.model_loss, None, None, None, model_state)

    def task_gradient(self, meta, task, key, model_state):
        if isinstance(meta, Learned):
            raise ValueError(
                "`Reptile` has no derivative in settings of the inner solver. Hand over "
                "the model alone, or use `metaopt.few_shot.MAML`."
            )
        found = adapt(self, meta, task, key, model_state, None)
        start = adapting_part(meta, None)[0]
        gradient = tree_sub(start, adapting_part(found.model, None)[0])
        query = judge(self.model_loss, found.model, task.query, key, found.model_state)
        lost = jnp.logical_not(tree_all_finite((gradient, query.loss)))
        result = first_failure(found.result, mask_result(lost, RESULTS.outer_nonfinite))
        return TaskGradient(
            loss=query.loss,
            gradient=gradient,
            aux=query.aux,
            state=query.state,
            result=result,
            left_out=("the query loss: this is no gradient of it",),
        )
