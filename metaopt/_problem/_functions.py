"""Inner problems made from plain functions."""

from collections.abc import Callable
from typing import Any

import equinox as eqx

from .._core._types import Batch, Hyper, Key, LossFn, ModelState, Params
from ._call import check_signature, declared, start
from ._kinds import AbstractFixedPointProblem, AbstractInnerProblem, AbstractRootProblem
from ._least_squares import AbstractLeastSquaresProblem
from ._prediction import AbstractPredictionProblem


class InnerProblem(AbstractInnerProblem):
    """An inner minimisation problem made from plain functions.

    **Arguments:**

    - `loss_fn`: `loss_fn(params, hyper, batch)`, a floating-point scalar. May declare
        arguments named `key` and (with `has_state`) `state`.
    - `init_fn`: `init_fn(hyper, key)`, the initial params. May be left out where
        initial params are handed over at each call.
    - `has_aux`, `has_state`: as in [`metaopt.extend.AbstractInnerProblem`][].

    **Example:**

    ```python
    import metaopt as mo

    problem = mo.InnerProblem(lambda params, hyper, batch: (params - hyper) ** 2)
    ```
    """

    loss_fn: LossFn
    init_fn: Callable[..., Any] | None = None
    has_aux: bool = eqx.field(default=False, static=True, kw_only=True)
    has_state: bool = eqx.field(default=False, static=True, kw_only=True)

    def init(self, hyper, key):
        return start(self.init_fn, hyper, key)

    def loss(self, params, hyper, batch, *, key=None, **state):
        return _forward(self.loss_fn, "loss_fn", params, hyper, batch, key, state)


class PredictionProblem(AbstractPredictionProblem):
    """An inner problem made from a model and a criterion, as plain functions.

    **Arguments:**

    - `predict_fn`: `predict_fn(params, hyper, batch)`, a pytree with a floating-point
        array in it. May declare arguments named `key` and (with `has_state`) `state`.
    - `criterion_fn`: `criterion_fn(predictions, params, hyper, batch)`, a floating-point
        scalar, convex in predictions and params. May declare an argument named `key`.
    - `init_fn`: `init_fn(hyper, key)`, the initial params. May be left out where
        initial params are handed over at each call.
    - `has_aux`, `has_state`: as in [`metaopt.extend.AbstractPredictionProblem`][]: the
        former is about the criterion, the latter about the model.

    **Example:**

    ```python
    import jax.numpy as jnp
    import metaopt as mo

    problem = mo.PredictionProblem(
        lambda params, hyper, batch: jnp.tanh(batch["x"] @ params),
        lambda predictions, params, hyper, batch: (
            jnp.mean((predictions - batch["y"]) ** 2) + jnp.exp(hyper) * params @ params
        ),
    )
    ```
    """

    predict_fn: LossFn
    criterion_fn: LossFn
    init_fn: Callable[..., Any] | None = None
    has_aux: bool = eqx.field(default=False, static=True, kw_only=True)
    has_state: bool = eqx.field(default=False, static=True, kw_only=True)

    def init(self, hyper, key):
        return start(self.init_fn, hyper, key)

    def predict(self, params, hyper, batch, *, key=None, **state):
        return _forward(self.predict_fn, "predict_fn", params, hyper, batch, key, state)

    def criterion(self, predictions, params, hyper, batch, *, key=None):
        optional = {} if key is None else declared(self.criterion_fn, {"key": key})
        return self.criterion_fn(predictions, params, hyper, batch, **optional)


class LeastSquaresProblem(AbstractLeastSquaresProblem):
    """A problem of nonlinear least squares made from plain functions.

    **Arguments:**

    - `residual_fn`: `residual_fn(params, hyper, batch)`, a pytree of any shapes, half of
        whose sum of squares is minimised. May declare arguments named `key` and (with
        `has_state`) `state`.
    - `init_fn`: `init_fn(hyper, key)`, the initial params. May be left out where
        initial params are handed over at each call.
    - `has_state`: as in [`metaopt.extend.AbstractLeastSquaresProblem`][].

    **Example:**

    ```python
    import metaopt as mo

    problem = mo.LeastSquaresProblem(
        lambda params, hyper, batch: batch["x"] @ params - hyper * batch["y"]
    )
    ```
    """

    residual_fn: LossFn
    init_fn: Callable[..., Any] | None = None
    has_state: bool = eqx.field(default=False, static=True, kw_only=True)

    def init(self, hyper, key):
        return start(self.init_fn, hyper, key)

    def residual(self, params, hyper, batch, *, key=None, **state):
        return _forward(self.residual_fn, "residual_fn", params, hyper, batch, key, state)


class FixedPointProblem(AbstractFixedPointProblem):
    """A fixed-point problem made from plain functions.

    **Arguments:**

    - `step_fn`: `step_fn(params, hyper, batch)`, a pytree like `params`.
    - `init_fn`: `init_fn(hyper, key)`, the initial params. May be left out where
        initial params are handed over at each call.
    - `has_aux`, `has_state`: as in [`metaopt.extend.AbstractInnerProblem`][].
    """

    step_fn: LossFn
    init_fn: Callable[..., Any] | None = None
    has_aux: bool = eqx.field(default=False, static=True, kw_only=True)
    has_state: bool = eqx.field(default=False, static=True, kw_only=True)

    def init(self, hyper, key):
        return start(self.init_fn, hyper, key)

    def step(self, params, hyper, batch, *, key=None, **state):
        return _forward(self.step_fn, "step_fn", params, hyper, batch, key, state)


class RootProblem(AbstractRootProblem):
    """A root-finding problem made from plain functions.

    **Arguments:**

    - `residual_fn`: `residual_fn(params, hyper, batch)`, a pytree like `params`.
    - `init_fn`: `init_fn(hyper, key)`, the initial params. May be left out where
        initial params are handed over at each call.
    - `has_aux`, `has_state`: as in [`metaopt.extend.AbstractInnerProblem`][].
    """

    residual_fn: LossFn
    init_fn: Callable[..., Any] | None = None
    has_aux: bool = eqx.field(default=False, static=True, kw_only=True)
    has_state: bool = eqx.field(default=False, static=True, kw_only=True)

    def init(self, hyper, key):
        return start(self.init_fn, hyper, key)

    def residual(self, params, hyper, batch, *, key=None, **state):
        return _forward(self.residual_fn, "residual_fn", params, hyper, batch, key, state)


def _forward(
    fn: LossFn,
    name: str,
    params: Params,
    hyper: Hyper,
    batch: Batch,
    key: Key | None,
    state: dict[str, ModelState],
) -> Any:
    # The methods above declare a key for every function: here it is known which want one.
    optional = {} if key is None else declared(fn, {"key": key})
    optional |= state
    check_signature(fn, name, ("params", "hyper", "batch"), optional)
    return fn(params, hyper, batch, **optional)
