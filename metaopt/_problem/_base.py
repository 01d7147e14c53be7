"""The base of all kinds of inner problem."""

import abc
from typing import Any

import equinox as eqx

from .._core._types import Aux, Batch, Hyper, Key, ModelState, Params, Vector


class Evaluation(eqx.Module):
    """One evaluation of a loss, a step map or a residual.

    **Attributes:**

    - `value`: what the function returned first: a scalar for a loss, else a pytree. An
        evaluation that comes with a field has the loss here, or `None` for a kind without.
    - `state`: the updated model state, or `None` for a problem without one.
    - `aux`: the auxiliary output, or `None`.
    """

    value: Any
    state: ModelState
    aux: Aux


class AbstractProblem(eqx.Module):
    """The base of all kinds of inner problem; subclass one of the kinds instead:
    [`metaopt.extend.AbstractInnerProblem`][] (a loss to minimise; or, where it is that of a
    model's output, [`metaopt.extend.AbstractPredictionProblem`][]),
    [`metaopt.extend.AbstractFixedPointProblem`][] or
    [`metaopt.extend.AbstractRootProblem`][]. A game of several players is a
    [`metaopt.GameProblem`][].

    A kind differs from another only in its *field*, a vector that is zero at the inner
    solution, in whether that is the gradient of a loss, and in the structure which its
    Jacobian promises.
    """

    # Without annotations, and so no fields: a subclass sets them in its body in the same
    # way, or declares fields of these names for whoever makes an instance to set.
    has_aux = False
    has_state = False
    # Whether the field is the gradient of a loss: the value of `evaluate`, and that of the
    # evaluation beside the field.
    has_loss = False
    # The name of the field in errors.
    field_name = "the field of the inner problem"
    # The name of the outer variables in errors.
    outer_name = "hyper"

    @abc.abstractmethod
    def init(self, hyper: Any, key: Any) -> Any:
        """Return the initial params (a pytree), drawn with `key`.

        With `has_state = True`, a pair of initial params and initial model state.
        """

    @abc.abstractmethod
    def evaluate(
        self, params: Params, hyper: Hyper, batch: Batch, key: Key, state: ModelState
    ) -> Evaluation:
        """Call the user's function and check what it returned.

        **Arguments:**

        - `params`, `hyper`, `batch`: handed to the function.
        - `key`, `state`: handed to it if it declares them.

        **Returns:**

        A [`metaopt.extend.Evaluation`][].

        **Raises:**

        `ValueError` where the function returned something else than its kind asks for.
        """

    @abc.abstractmethod
    def field(
        self, params: Params, hyper: Hyper, batch: Batch, key: Key, state: ModelState
    ) -> tuple[Vector, Evaluation]:
        """Evaluate the vector that is zero at the inner solution.

        That is the gradient of a loss, `params - step(params)`, the residual of a root, or
        the gradients of the players of a game. The user's function is called once.

        **Arguments:**

        - `params`, `hyper`, `batch`, `key`, `state`: as for `evaluate`.

        **Returns:**

        A vector with the structure, shapes and dtypes of the trainable part of `params`;
        and the [`metaopt.extend.Evaluation`][] it came from, whose `value` is the loss, or
        `None` for a kind without one (`has_loss = False`).
        """

    def optimality(
        self, params: Params, hyper: Hyper, batch: Batch, key: Key, state: ModelState
    ) -> Vector:
        """Return the vector of the field alone.

        **Arguments:**

        - `params`, `hyper`, `batch`, `key`, `state`: as for `evaluate`.
        """
        return self.field(params, hyper, batch, key, state)[0]

    @property
    @abc.abstractmethod
    def tags(self) -> frozenset[object]:
        """The `lineax` tags promised by the Jacobian of the field in `params`."""
