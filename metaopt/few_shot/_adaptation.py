"""The inner problem of one task: a model that adapts, from where it was left."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._tree import split_trainable, tree_dot, tree_dtype, tree_sub
from .._core._types import (
    Aux,
    Batch,
    FloatScalar,
    IntScalar,
    Key,
    LossFn,
    ModelState,
    Params,
    PyTree,
    Vector,
)
from .._problem import (
    AbstractInnerProblem,
    AbstractStatePolicy,
    check_signature,
    declared,
    StepStates,
)
from ._task import model_of


class ModelLoss(AbstractInnerProblem):
    """The loss of a model on a batch, without outer variables.

    **Attributes:**

    - `loss_fn`: `loss_fn(model, batch)`, with `key` and `state` as it declares them.
    - `has_aux`, `has_state`: as in [`metaopt.extend.AbstractInnerProblem`][].
    - `frozen`: the part of the model that is held constant, as a function of the model;
        `None` for nothing.
    """

    loss_fn: LossFn
    has_aux: bool = eqx.field(static=True)
    has_state: bool = eqx.field(static=True)
    frozen: Callable[[Any], Any] | None = None

    def init(self, hyper, key):
        raise ValueError("A loss of a model does not say where the model starts.")

    def loss(self, params, hyper, batch, *, key=None, **state):
        optional = declared(self.loss_fn, {"key": key})
        params = freeze(params, self.frozen)
        optional |= state
        check_signature(self.loss_fn, "loss", ("model", "batch"), optional)
        return self.loss_fn(params, batch, **optional)


class Adaptation(AbstractInnerProblem):
    """The inner problem of adapting a model to a task.

    The outer variables are what is learned over tasks: the model, or a
    [`metaopt.few_shot.Learned`][]. The params are those leaves of the model that adapt,
    and the batch is a [`metaopt.few_shot.Task`][].

    **Attributes:**

    - `model_loss`: the loss on support and query examples.
    - `adapts`: the part of the model that adapts, as a function of the model; `None` for
        all of it.
    - `proximal`: what half the squared distance from the start is multiplied by, a number
        or a function of what is learned; `None` for nothing.
    - `step_weights`: what the query loss counts for after each step, of shape
        `(num_steps,)`; `None` where only the last one counts.
    - `initial_state`: the model state before adaptation.
    """

    model_loss: ModelLoss
    adapts: Callable[[Any], Any] | None
    proximal: Any
    step_weights: Any
    initial_state: ModelState

    def split(self, model: Params) -> tuple[Vector, PyTree]:
        """The arrays of a model that adapt, and all the rest of it."""
        return adapting_part(model, self.adapts, self.model_loss.frozen)

    @property
    def has_state(self):
        return self.model_loss.has_state or self.step_weights is not None

    def init(self, hyper, key):
        params = self.split(model_of(hyper))[0]
        state = self.initial_state
        if self.step_weights is not None:
            total = jnp.zeros((), tree_dtype(params))
            state = _WithTotal(state, total, jnp.zeros((), int), state)
        return (params, state) if self.has_state else params

    def loss(self, params, hyper, batch, *, key, state=None):
        start, rest = self.split(model_of(hyper))
        model = eqx.combine(params, rest)
        before = _model_state(state)
        out = self.model_loss.evaluate(model, None, batch.support, key, before)
        value, new = out.value, out.state
        if self.proximal is not None:
            strength: Any = self.proximal
            strength = strength(hyper) if callable(strength) else strength
            away = tree_sub(params, start)
            value += (0.5 * strength * tree_dot(away, away)).astype(value.dtype)
        if isinstance(state, _WithTotal):

            def counted():
                # Of the step before this one, whose answer is judged.
                after = state.after
                query = self.model_loss.evaluate(model, None, batch.query, key, after)
                weight = jnp.asarray(self.step_weights)[state.step - 1]
                return (weight * query.value).astype(state.total.dtype)

            # At the start nothing has adapted yet.
            nothing = lambda: jnp.zeros_like(state.total)
            total = state.total + jax.lax.cond(state.step > 0, counted, nothing)
            new = _WithTotal(new, total, state.step, state.after)
        return (value, new) if self.has_state else value

    def query_loss(
        self, params: Params, hyper: Any, batch: Batch, *, key: Key, state: ModelState
    ) -> tuple[FloatScalar, "Judged"]:
        """The outer loss of the adapted model, for a [`metaopt.BilevelProblem`][]."""
        model = eqx.combine(params, self.split(model_of(hyper))[1])
        judged = judge(self.model_loss, model, batch, key, _model_state(state))
        value = judged.loss
        if isinstance(state, _WithTotal):
            weight = jnp.asarray(self.step_weights)[-1]
            value = (weight * value + state.total).astype(value.dtype)
        return value, judged


class Judged(eqx.Module):
    """The results of evaluating an adapted model.

    **Attributes:**

    - `loss`: the query loss after the last step.
    - `aux`: what the loss returned beside it, or `None`.
    - `state`: the model state afterwards, or `None`.
    """

    loss: FloatScalar
    aux: Aux
    state: ModelState


def judge(
    model_loss: ModelLoss, model: Params, batch: Batch, key: Key, state: ModelState
) -> Judged:
    """Evaluate an adapted model, which has the model state of its last step."""
    out = model_loss.evaluate(model, None, batch, key, state)
    kept = isinstance(state, StepStates)
    return Judged(out.value, out.aux, state.with_last(out.state) if kept else out.state)


def chosen_leaves(tree: PyTree, where: Callable[[Any], Any] | None, name: str) -> PyTree:
    """A tree of booleans: which leaves are in the nodes that `where` returns.

    **Raises:**

    `ValueError` where it returns no leaf.
    """
    marks = jax.tree.map(lambda _: False, tree)
    if where is None:
        return marks
    if not jax.tree.leaves(where(marks)):
        raise ValueError(
            f"`{name}` chooses no floating-point array of the model. Return a part that "
            "has some, as in `lambda model: model.layers[-1]`."
        )
    marked = lambda node: jax.tree.map(lambda _: True, node)
    return eqx.tree_at(where, marks, replace_fn=marked)


def freeze(model: Params, frozen: Callable[[Any], Any] | None) -> Params:
    """A model whose frozen part is held constant for derivatives."""
    if frozen is None:
        return model
    trainable, rest = split_trainable(model)
    fixed, moving = eqx.partition(trainable, chosen_leaves(trainable, frozen, "frozen"))
    return eqx.combine(jax.lax.stop_gradient(fixed), moving, rest)


def adapting_part(
    model: Params,
    adapts: Callable[[Any], Any] | None,
    frozen: Callable[[Any], Any] | None = None,
) -> tuple[Vector, PyTree]:
    """The arrays of a model that adapt, and all the rest of it.

    **Raises:**

    `ValueError` where nothing adapts.
    """
    trainable, rest = split_trainable(model)
    if frozen is not None:
        marks = chosen_leaves(trainable, frozen, "frozen")
        fixed, trainable = eqx.partition(trainable, marks)
        rest = eqx.combine(fixed, rest)
        if not jax.tree.leaves(trainable):
            raise ValueError("`frozen` is all of the model, so nothing adapts.")
    if adapts is None:
        return trainable, rest
    marks = jax.tree.map(lambda _: False, trainable)
    marked = lambda node: jax.tree.map(lambda _: True, node)
    if jax.tree.leaves(adapts(marks)):
        marks = eqx.tree_at(adapts, marks, replace_fn=marked)
    adapting, fixed = eqx.partition(trainable, marks)
    if not jax.tree.leaves(adapting):
        raise ValueError(
            "`adapts` chooses no floating-point array of the model, so nothing adapts. "
            "Return a part that has some, as in `lambda model: model.layers[-1]`."
        )
    return adapting, eqx.combine(fixed, rest)


class _WithTotal(eqx.Module):
    """A model state, and the weighted query losses of the steps so far."""

    state: ModelState
    total: FloatScalar
    step: IntScalar
    after: ModelState  # what the answer of the steps so far is judged with


def _model_state(state: Any) -> ModelState:
    return state.state if isinstance(state, _WithTotal) else state


class WithTotalPolicy(AbstractStatePolicy):
    """A policy for a model state to which a total of query losses is added.

    **Attributes:**

    - `policy`: what becomes of the model state, or `None` if there is none.
    """

    policy: AbstractStatePolicy | None
    is_constant: ClassVar[bool] = False

    def begin(self, state, num_steps):
        inner = self.policy and self.policy.begin(state.state, num_steps)
        return _WithTotal(inner, state.total, state.step, None)

    def read(self, carried, step):
        inner = self.policy and self.policy.read(carried.state, step)
        after = self.policy and self.policy.finish(carried.state, step)
        return _WithTotal(inner, carried.total, step, after)

    def write(self, carried, new, step):
        inner = self.policy and self.policy.write(carried.state, new.state, step)
        return _WithTotal(inner, new.total, carried.step, None)

    def finish(self, carried, num_steps):
        inner = self.policy and self.policy.finish(carried.state, num_steps)
        return _WithTotal(inner, carried.total, carried.step, inner)
