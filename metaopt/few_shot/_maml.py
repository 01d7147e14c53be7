"""Model-agnostic meta-learning."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._adjoint import AbstractAdjoint, StoreAll, UnrolledAdjoint
from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import tree_add, tree_all_finite
from .._core._types import LossFn
from .._core._validate import (
    ADJOINT_EXAMPLE,
    check_count,
    check_kind,
    check_tolerance,
    DESCENT_EXAMPLE,
)
from .._data import FullBatch
from .._objective import Objective
from .._problem import BilevelProblem
from .._solver import AbstractIterativeSolver, AbstractSolver, check_state_policy
from ._adaptation import Adaptation, ModelLoss, WithTotalPolicy
from ._learner import AbstractLearner
from ._stats import TaskGradient
from ._task import Learned


class MAML(AbstractLearner):
    r"""Model-agnostic meta-learning: learns where to start adapting from (Finn, Abbeel
    and Levine, 2017).

    $$\min_{model} \; \sum_{tasks} loss(adapted(model, support), query)$$

    where the model adapts by a few steps of the inner solver on the support examples.
    The gradient is a hypergradient, with the model for outer variables, and so the family
    is a matter of arguments:

    | method | how |
    |---|---|
    | MAML | as it is |
    | first-order MAML | `adjoint=metaopt.FirstOrderAdjoint()` |
    | ANIL (Raghu et al., 2020) | `adapts=lambda model: model.layers[-1]` |
    | Meta-SGD (Li et al., 2017) | [`metaopt.few_shot.learned_rates`][] |
    | Meta-Curvature (Park and Oliva, 2019) | [`metaopt.few_shot.learned_curvature`][] |
    | MAML++ (Antoniou et al., 2019) | `step_weights`, learned rates for each step |
    | implicit MAML (Rajeswaran et al., 2019) | `proximal=2.0`, an implicit adjoint |
    | Reptile (Nichol et al., 2018) | [`metaopt.few_shot.Reptile`][] |

    ```python
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import metaopt as mo
    import optax

    def loss(model, batch):
        x, y = batch
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    maml = mo.few_shot.MAML(loss, inner=mo.Descent(optax.sgd(0.01), num_steps=1))
    model = eqx.nn.MLP("scalar", "scalar", 40, 2, key=jax.random.key(0))
    x = jnp.linspace(-1.0, 1.0, 20).reshape(2, 10)  # two tasks of ten examples
    tasks = mo.few_shot.Task(support=(x, x**2), query=(x, x**2))
    value, gradient, stats = maml.value_and_grad(model, tasks)
    ```

    **Arguments:**

    - `loss`: `loss(model, batch)`, a floating-point scalar. May declare arguments named
        `key` and (with `has_state`) `state`.
    - `inner`: how a model adapts, such as [`metaopt.Descent`][] by any optax transform.
    - `adjoint`: how the derivative passes through that. One that does not see where the
        solver started is refused unless `proximal` ties the solution to it.
    - `adapts`: the part of the model that adapts, as a function of the model that returns
        a node of it or a tuple of nodes; `None` for all of it.
    - `proximal`: adds `proximal / 2` times the squared distance from the start to the
        loss on the support examples: a number, or a function of what is learned.
    - `step_weights`: what the query loss after each step counts for, of shape
        `(num_steps,)`, in place of 1 for the last alone. An array can change from one
        meta-step to the next without compiling anew.
    - `chunk_size`: how many tasks are taken at a time; `None` for all of them. Memory is
        that of one chunk. Must divide the number of tasks.
    - `frozen`: the part of the model that stays as it is, in adaptation and over tasks, as
        a function of the model that returns a node of it or a tuple of nodes; `None` for
        nothing. `jax.lax.stop_gradient` in the loss does so too, unless the optimizer
        moves what has no gradient, as one with weight decay does.
    - `has_aux`, `has_state`: whether the loss returns `(value, aux)`, `(value, state)` or
        `(value, state, aux)`. The `state_policy` of the solver decides about model state in
        the inner loop.

    **Raises:**

    `ValueError` where one of these does not fit.
    """

    model_loss: ModelLoss
    inner: AbstractSolver
    adjoint: AbstractAdjoint
    adapts: Callable[[Any], Any] | None
    proximal: Any
    step_weights: Any
    chunk_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        loss: LossFn,
        inner: AbstractSolver,
        adjoint: AbstractAdjoint = UnrolledAdjoint(StoreAll(unroll=5)),
        *,
        adapts: Callable[[Any], Any] | None = None,
        proximal: Any = None,
        step_weights: Any = None,
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
        check_kind(adjoint, AbstractAdjoint, "adjoint", ADJOINT_EXAMPLE)
        if chunk_size is not None:
            check_count(chunk_size, "chunk_size")
        if step_weights is not None:
            step_weights = _checked_weights(step_weights, inner, adjoint)
        if isinstance(proximal, int | float):
            check_tolerance(proximal, "proximal")
            proximal = proximal or None  # zero is none
        if proximal is None:
            adjoint.reach.check_path(
                f"`{type(adjoint).__name__}` does not see where the inner solver starts, "
                "so that the gradient would be zero by construction. Tie the solution to "
                "its start by `proximal=2.0`, as implicit MAML does, or use "
                "`metaopt.UnrolledAdjoint()` or `metaopt.FirstOrderAdjoint()`."
            )
        self.model_loss = ModelLoss(loss, has_aux, has_state, frozen)
        if isinstance(inner, AbstractIterativeSolver):
            check_state_policy(inner, self.model_loss)
        self.inner = inner
        self.adjoint = adjoint
        self.adapts = adapts
        self.proximal = proximal
        self.step_weights = step_weights
        self.chunk_size = chunk_size

    def adaptation(self, model_state):
        return Adaptation(self.model_loss, self.adapts, self.proximal, None, model_state)

    def task_gradient(self, meta, task, key, model_state):
        adaptation, inner = self.adaptation(model_state), self.inner
        if self.step_weights is not None:
            assert isinstance(inner, AbstractIterativeSolver)  # as `__init__` has seen
            adaptation = eqx.tree_at(
                lambda a: a.step_weights,
                adaptation,
                self.step_weights,
                is_leaf=lambda x: x is None,
            )
            inner = eqx.tree_at(
                lambda s: s.state_policy,
                inner,
                WithTotalPolicy(inner.state_policy),
                is_leaf=lambda x: x is None,
            )
        problem = BilevelProblem(adaptation, adaptation.query_loss, has_aux=True)
        objective = Objective(
            problem, inner, FullBatch(task), FullBatch(task.query), None, None, key
        )
        output, parts, idle, _ = objective.trace(self.adjoint, meta, None)[1:]
        if isinstance(meta, Learned):
            _check_used(idle, inner)
        gradient = tree_add(*parts)
        result = first_failure(
            output.outcome.result,
            output.result,
            mask_result(~jnp.isfinite(output.value), RESULTS.outer_nonfinite),
            mask_result(~tree_all_finite(gradient), RESULTS.hypergradient_nonfinite),
        )
        return TaskGradient(
            loss=output.value,
            gradient=gradient,
            aux=output.aux.aux,
            state=output.aux.state,
            result=result,
            left_out=output.info.left_out,
            num_flat=output.info.scalars().get("num_flat"),
        )


def _check_used(idle: tuple[str, ...], inner: AbstractSolver) -> None:
    """Settings that nothing depends on would never be learned."""
    unused = [name.removeprefix("hyper.") for name in idle if "hyper.settings" in name]
    if unused:
        raise ValueError(
            f"Nothing depends on `{'`, `'.join(unused)}`, so it cannot be learned: the "
            "inner solver was not built from it. Hand a function of what is learned to "
            f"`{type(inner).__name__}`, such as `metaopt.few_shot.learned_rates` or "
            "`lambda learned: optax.sgd(learned.settings)`."
        )


def _checked_weights(
    step_weights: Any, inner: AbstractSolver, adjoint: AbstractAdjoint
) -> jax.Array:
    if not isinstance(inner, AbstractIterativeSolver):
        raise ValueError(
            f"`step_weights` are for a solver that proceeds by steps; "
            f"`{type(inner).__name__}` runs as a whole."
        )
    if inner.stops_early:
        raise ValueError(
            "`step_weights` need a fixed number of steps, and `inner` may stop before. "
            "Drop its tolerance."
        )
    adjoint.reach.check_path(
        f"`{type(adjoint).__name__}` does not see what the query loss was after each "
        "step, so that `step_weights` would have next to no gradient. Use "
        "`metaopt.UnrolledAdjoint()`."
    )
    shape = np.shape(step_weights)
    if shape != (inner.num_steps,):
        raise ValueError(
            f"`step_weights` must have one entry for each of the {inner.num_steps} inner "
            f"steps; got shape {shape}."
        )
    return jnp.asarray(step_weights, float)
