"""Single-loop solvers: a few inner steps in each outer step, and no inner solve."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .._core._results import first_failure, mask_result, RESULTS, voids_hypergradient
from .._core._tree import (
    nan_where,
    same_structs,
    split_trainable,
    tree_cast_like,
    tree_scaled_norm,
    tree_strong,
    tree_sub,
)
from .._core._types import FloatScalar, Hyper, Key, Params, PyTree
from .._core._validate import check_count, check_kind, check_params
from .._data import AbstractData
from .._problem import BilevelProblem, initialise
from .._promises import (
    all_finite,
    BothLosses,
    check_direction,
    check_losses_of_hyper,
    judged,
    keep_where,
    overflowed,
)
from .._report import InnerInfo, OuterInfo, Report
from ._base import AbstractBilevelSolver, BilevelEvaluation, BilevelStep
from ._drawn import check_drawn, Cursors, draw, DrawnBatches, first_cursors
from ._optimizer_step import optimizer_step
from ._single_loop_parts import SingleLoopInfo, SingleLoopState, SingleLoopUpdate


class AbstractSingleLoopSolver(AbstractBilevelSolver):
    """A solver that moves params, `hyper` and its own variables together.

    Subclass it for methods without an inner solve: SOBA and its relatives (Dagréou et al.,
    "A framework for bilevel optimization that enables stochastic and global variance
    reduction algorithms", 2022), methods with a few inner and linear steps, penalty
    methods. A subclass writes `first` and `update`; this class draws the batches, refuses
    derivatives that are zero by construction, takes no step that is not finite, applies the
    optimizer to `hyper`, and reports. For a hypergradient at an inner solution use
    [`metaopt.NestedSolver`][].

    `hyper` follows from a direction at params that are no inner solution yet, so it is
    biased until these have caught up. Judge the result with [`metaopt.solve_inner`][].
    A report counts inner steps within the outer one, and `failed_step` is the outer step.

    **Attributes:**

    - `outer`: the optax transform that updates `hyper`.
    - `num_train_batches`, `num_valid_batches`: how many batches of the inner and of the
        outer loss each outer step draws. A subclass declares each as a field or a property.

    **Raises:**

    `ValueError` where one of these is of the wrong kind.
    """

    outer: eqx.AbstractVar[optax.GradientTransformation]
    num_train_batches: eqx.AbstractVar[int]
    num_valid_batches: eqx.AbstractVar[int]

    def __check_init__(self):
        transform = optax.GradientTransformation
        check_kind(self.outer, transform, "outer", "optax.adam(0.01)")
        check_count(self.num_train_batches, "num_train_batches")
        check_count(self.num_valid_batches, "num_valid_batches")

    @abc.abstractmethod
    def first(self, problem: BilevelProblem, hyper: Hyper, params: Params) -> PyTree:
        """Return the variables of the method before the first step.

        **Arguments:**

        - `problem`, `hyper`, `params`: the bilevel problem, and where the run starts.

        **Returns:**

        Any pytree, the `extra` of the state.
        """

    @abc.abstractmethod
    def update(
        self,
        problem: BilevelProblem,
        state: SingleLoopState,
        train: DrawnBatches,
        valid: DrawnBatches,
        key: Key,
    ) -> SingleLoopUpdate:
        """Compute one step of the method, as plain traceable code.

        **Arguments:**

        - `problem`: the bilevel problem.
        - `state`: a [`metaopt.extend.SingleLoopState`][].
        - `train`, `valid`: the batches of the inner and of the outer loss: `train[0]` is
            the first.
        - `key`: for losses that are random; another than that of the batches.

        **Returns:**

        A [`metaopt.extend.SingleLoopUpdate`][].
        """

    def init(self, problem, hyper, train, valid, *, params, model_state, key):
        self._check_data(train, valid)
        init_key, key, data_key = jax.random.split(key, 3)
        drawn = params is None
        if drawn:
            params, model_state = initialise(problem.inner, hyper, init_key, model_state)
        check_params(params)
        params, model_state = tree_strong(params), tree_strong(model_state)
        outer = optax.with_extra_args_support(self.outer)
        return SingleLoopState(
            hyper=hyper,
            params=params,
            evaluated=params,
            model_state=model_state,
            outer_state=outer.init(split_trainable(hyper)[0]),
            extra=tree_strong(self.first(problem, hyper, params)),
            cursors=first_cursors(train, valid, data_key),
            key=key,
            num_steps=jnp.zeros((), int),
            drawn=drawn,
        )

    def step(self, problem, state, train, valid):
        self._check_data(train, valid)  # of an iterator, the first alone is known to `init`
        key = jax.random.fold_in(state.key, state.num_steps)
        key = jax.random.split(key, 3)[2]
        train, train_cursor = draw(train, state.cursors.train, self.num_train_batches)
        valid, valid_cursor = draw(valid, state.cursors.valid, self.num_valid_batches)
        batches = train, valid
        idle, held, start_left_out = self._check_promises(problem, state, batches, key)
        update = self._checked(self.update(problem, state, *batches, key), state)
        trainable, static = split_trainable(state.hyper)
        tuned, outer_state = optimizer_step(
            self.outer, update.direction, state.outer_state, trainable, update.outer_loss
        )
        norm = tree_scaled_norm(update.direction)
        inner_is_finite = all_finite(
            (update.params, update.evaluated, update.model_state),
            (update.inner_loss, update.inner_residual),
        )
        outer_is_finite = all_finite(update.outer_loss)
        extra_is_finite = all_finite(update.extra)
        lost = overflowed(outer_state, state.outer_state)
        # A step that is too long can overflow `hyper` by itself.
        hyper_is_finite = all_finite(norm, tuned)
        result = judged(
            mask_result(~inner_is_finite, RESULTS.inner_nonfinite),
            outer_is_finite,
            hyper_is_finite,
            mask_result(~extra_is_finite, RESULTS.extra_nonfinite),
        )
        lost = mask_result(lost, RESULTS.outer_step_nonfinite)
        result = first_failure(result, lost)
        good = inner_is_finite & outer_is_finite & extra_is_finite & hyper_is_finite
        good &= lost == RESULTS.successful
        keep = keep_where(good)
        new = SingleLoopState(
            hyper=eqx.combine(keep(tuned, trainable), static),
            params=keep(update.params, state.params),
            evaluated=keep(update.evaluated, state.evaluated),
            model_state=keep(update.model_state, state.model_state),
            outer_state=keep(outer_state, state.outer_state),
            extra=keep(update.extra, state.extra),
            cursors=Cursors(train_cursor, valid_cursor),
            key=state.key,
            num_steps=state.num_steps + 1,
            drawn=state.drawn,
        )
        left_out = "the steps that params have yet to take", *start_left_out
        report = Report(
            result=result,
            outer=_outer_info(update, norm, result, idle, held),
            inner=InnerInfo(
                loss=update.inner_loss,
                residual=update.inner_residual,
                num_steps=jnp.asarray(update.num_inner_steps),
                failed_step=jnp.where(inner_is_finite, -1, state.num_steps),
            ),
            derivative=SingleLoopInfo(left_out, _change(update, state), update.scalars),
            adjoint=type(self).__name__,
        )
        return new, BilevelStep(report, good)

    def evaluate(self, problem, state, train, valid):
        key = jax.random.fold_in(state.key, state.num_steps)
        loss_key = jax.random.split(key)[1]
        # A batch of the next step, which a run that goes on sees again.
        drawn, _ = draw(valid, state.cursors.valid, 1)
        value, _ = problem.evaluate_outer(
            state.params, state.hyper, drawn[0], loss_key, state.model_state
        )
        return BilevelEvaluation(value, state.params, state.model_state)

    def hyper(self, state):
        return state.hyper

    def solution(self, state):
        return state.evaluated

    def _check_data(self, train: AbstractData, valid: AbstractData) -> None:
        check_drawn(train, "train", self.num_train_batches)
        check_drawn(valid, "valid", self.num_valid_batches)

    def _check_promises(
        self,
        problem: BilevelProblem,
        state: SingleLoopState,
        batches: tuple[DrawnBatches, DrawnBatches],
        key: Key,
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Leaves without influence, those held constant, and the parts of the start that
        the derivative leaves out."""
        train, valid = batches[0][0], batches[1][0]
        point = state.params, state.hyper, train, valid, key, state.model_state
        name = type(self).__name__
        idle, held, left_out = check_losses_of_hyper(
            BothLosses(problem, *point),
            drawn=state.drawn,
            solver=name,
            reason="which are drawn once, before the first step",
        )

        def direction(problem, inputs):
            state, (train, valid), key = inputs
            update = self._checked(self.update(problem, state, train, valid, key), state)
            return update.direction

        check_direction(direction, problem, (state, batches, key), (*idle, *held), name)
        return idle, held, left_out

    def _checked(self, update: Any, state: SingleLoopState) -> SingleLoopUpdate:
        """An update with its defaults filled in.

        **Raises:**

        `ValueError` where a part is of another structure than what it stands for.
        """
        name = type(self).__name__
        example = "metaopt.extend.SingleLoopUpdate(...)"
        check_kind(update, SingleLoopUpdate, f"the return value of {name}.update", example)
        trainable = split_trainable(state.hyper)[0]
        direction = split_trainable(update.direction)[0]
        evaluated, model_state = update.evaluated, update.model_state
        evaluated = state.params if evaluated is None else evaluated
        model_state = state.model_state if model_state is None else model_state
        num_steps = update.num_inner_steps
        _check_alike(update.params, state.params, "params", name)
        _check_alike(evaluated, state.params, "evaluated", name)
        _check_alike(model_state, state.model_state, "model_state", name)
        _check_alike(update.extra, state.extra, "extra", name)
        _check_alike(direction, trainable, "direction", name, any_dtype=True)
        scalars = {key: jnp.asarray(x) for key, x in update.scalars.items()}
        if wrong := [key for key, x in scalars.items() if x.ndim]:
            raise ValueError(
                f"`scalars['{wrong[0]}']` of the update of `{name}` has the shape "
                f"{scalars[wrong[0]].shape}, and a column of the history has one number "
                "for each step. Hand over a norm or a mean."
            )
        return dataclasses.replace(
            update,
            params=tree_strong(update.params),
            extra=tree_strong(update.extra),
            evaluated=tree_strong(evaluated),
            model_state=tree_strong(model_state),
            direction=tree_cast_like(direction, trainable),
            num_inner_steps=self.num_train_batches if num_steps is None else num_steps,
            scalars=scalars,
        )


def _change(update: SingleLoopUpdate, state: SingleLoopState) -> FloatScalar:
    """The length of the step of all that moves beside `hyper`."""
    new, old = ((x.params, x.extra) for x in (update, state))
    floats = (eqx.filter(x, eqx.is_inexact_array) for x in (new, old))
    return tree_scaled_norm(tree_sub(*floats))


def _outer_info(
    update: SingleLoopUpdate,
    norm: Any,
    result: Any,
    idle: tuple[str, ...],
    held: tuple[str, ...],
) -> OuterInfo:
    zeros = sum(jnp.sum(leaf == 0) for leaf in jax.tree.leaves(update.direction))
    norm = nan_where(voids_hypergradient(result), norm)
    return OuterInfo(update.outer_loss, update.aux, norm, jnp.asarray(zeros), idle, held)


def _check_alike(
    new: PyTree, old: PyTree, part: str, solver: str, any_dtype: bool = False
) -> None:
    """Raise a `ValueError` unless a part of an update has the structure, shapes and dtypes
    of the part of the state that it replaces."""
    given, expected = eqx.filter((new, old), eqx.is_array)
    if any_dtype and jax.tree.structure(given) == jax.tree.structure(expected):
        given = tree_cast_like(given, expected)
    if not same_structs(given, expected):
        of = "hyper" if part == "direction" else "params" if part == "evaluated" else part
        raise ValueError(
            f"`{part}` of the update of `{solver}` must have the structure, shapes and "
            f"dtypes of `{of}` in the state: {eqx.tree_pformat(expected)}; got "
            f"{eqx.tree_pformat(given)}."
        )
