"""The kind of inner problem whose loss is a criterion of a model's output."""

import abc
from typing import Any

import jax

from .._core._tree import split_trainable
from .._core._types import Aux, Batch, FloatScalar, Hyper, Key, ModelState, Params, PyTree
from ._base import Evaluation
from ._call import check_scalar, declared, describe, returned, unpack
from ._kinds import AbstractInnerProblem


class AbstractPredictionProblem(AbstractInnerProblem):
    r"""An inner problem whose loss is a criterion of a model's predictions,
    $loss = criterion(predict(params), params)$.

    It is an [`metaopt.extend.AbstractInnerProblem`][] and can stand wherever one can. Write
    the loss in its two parts where the curvature is to be that of Gauss and Newton
    ([`metaopt.linear.GaussNewton`][]); nothing else needs them.

    ```python
    import jax.numpy as jnp
    import metaopt as mo


    class Fit(mo.extend.AbstractPredictionProblem):
        def init(self, hyper, key):
            return jnp.zeros((4, 8)), jnp.zeros(8)

        def predict(self, params, hyper, batch):
            weights, readout = params
            return jnp.tanh(batch["x"] @ weights) @ readout

        def criterion(self, predictions, params, hyper, batch):
            penalty = sum(jnp.sum(leaf**2) for leaf in params)
            return jnp.mean((predictions - batch["y"]) ** 2) + jnp.exp(hyper) * penalty
    ```

    - `init(hyper, key)` returns the initial params.
    - `predict(params, hyper, batch)` returns any pytree with a floating-point array in
        it, such as the logits of a classifier.
    - `criterion(predictions, params, hyper, batch)` returns a floating-point scalar. It
        should be convex in predictions and params together, and may be anything in
        `hyper`. Penalties on the params belong here.

    Each may declare an argument named `key`, for a fresh random key at each step. With
    `has_aux = True` it is the criterion that returns `(value, aux)`. With
    `has_state = True` it is `predict` that takes the model `state` as a keyword and
    returns `(predictions, state)`.
    """

    @abc.abstractmethod
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The predictions of the model, `predict(params, hyper, batch)`: a pytree."""

    @abc.abstractmethod
    def criterion(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, `criterion(predictions, params, hyper, batch)`: a scalar."""

    def loss(
        self,
        params: Params,
        hyper: Hyper,
        batch: Batch,
        *,
        key: Key | None = None,
        state: ModelState = None,
    ) -> Any:
        """The inner loss: the criterion of the predictions.

        **Arguments:**

        - `params`, `hyper`, `batch`: handed to both functions.
        - `key`, `state`: handed on to whoever declares them.

        **Returns:**

        The value, and what `has_state` and `has_aux` add to it.
        """
        predictions, state = self.evaluate_predictions(params, hyper, batch, key, state)
        value, aux = self.evaluate_criterion(predictions, params, hyper, batch, key)
        return returned(self, Evaluation(value, state, aux))

    def evaluate_predictions(
        self,
        params: Params,
        hyper: Hyper,
        batch: Batch,
        key: Key | None,
        state: ModelState,
    ) -> tuple[PyTree, ModelState]:
        """Call `predict` and check what it returned.

        **Arguments:**

        - `params`, `hyper`, `batch`: handed to it.
        - `key`, `state`: handed to it if it declares them.

        **Returns:**

        A pair of the predictions and the updated model state, or `None` for a problem
        without one.
        """
        optional = _keys(self.predict, key, 0)
        if self.has_state:
            # A copy: `equinox.nn.State` refuses to be read again once it was updated.
            optional["state"] = jax.tree.map(lambda leaf: leaf, state)
        out, state = self.predict(params, hyper, batch, **optional), None
        if self.has_state:
            out, state = unpack(out, "`predict`", ("predictions", "state"))
        if not jax.tree.leaves(split_trainable(out)[0]):
            raise ValueError(
                f"`predict` returned {describe(out)}. It must return a pytree with a "
                "floating-point array in it, from which the criterion is computed."
            )
        return out, state

    def evaluate_criterion(
        self,
        predictions: PyTree,
        params: Params,
        hyper: Hyper,
        batch: Batch,
        key: Key | None,
    ) -> tuple[FloatScalar, Aux]:
        """Call `criterion` and check what it returned.

        **Arguments:**

        - `predictions`: what `predict` returned.
        - `params`, `hyper`, `batch`: handed to it.
        - `key`: handed to it if it declares one.

        **Returns:**

        A pair of the value and the auxiliary output (`None` without `has_aux`).
        """
        optional = _keys(self.criterion, key, 1)
        value, aux = self.criterion(predictions, params, hyper, batch, **optional), None
        if self.has_aux:
            value, aux = unpack(value, "`criterion`", ("value", "aux"))
        check_scalar(value, "`criterion`")
        return value, aux


def _keys(fn: Any, key: Key | None, index: int) -> dict[str, Any]:
    """The key of one of the two functions, if it is to have one."""
    if key is None:
        return {}
    return declared(fn, {"key": jax.random.split(key)[index]})
