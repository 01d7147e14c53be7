"""An outer loss at the solution of an inner problem."""

import equinox as eqx

from .._core._types import Aux, Batch, FloatScalar, Hyper, Key, LossFn, ModelState, Params
from ._base import AbstractProblem
from ._call import call_with_note, check_scalar, declared, describe, unpack
from ._functions import InnerProblem


class BilevelProblem(eqx.Module):
    r"""An outer loss evaluated at the solution of an inner problem,

    $$\min_{hyper} \; outer\_loss(params^*(hyper), hyper) \quad \text{where }
    params^*(hyper) \text{ solves the inner problem.}$$

    **Arguments:**

    - `inner`: the inner problem, or a plain function `loss(params, hyper, batch)`.
    - `outer_loss`: `outer_loss(params, hyper, batch)`, a floating-point scalar. May
        declare arguments named `key` (a fresh random key for each outer step) and
        `state` (the model state at the inner solution).
    - `has_aux`: whether `outer_loss` returns `(value, aux)`.

    **Raises:**

    `ValueError` if `inner` is neither a problem nor a function, or `outer_loss` is not
    a function.
    """

    inner: AbstractProblem
    outer_loss: LossFn
    has_aux: bool = eqx.field(static=True)

    def __init__(
        self,
        inner: AbstractProblem | LossFn,
        outer_loss: LossFn,
        *,
        has_aux: bool = False,
    ):
        if not isinstance(inner, AbstractProblem):
            if not callable(inner) or isinstance(inner, type):
                raise ValueError(
                    "`inner` must be an inner problem such as an instance of a "
                    "subclass of `metaopt.extend.AbstractInnerProblem`, or a function "
                    f"`loss(params, hyper, batch)`; got {describe(inner)}."
                )
            inner = InnerProblem(inner)
        if not callable(outer_loss):
            raise ValueError(
                "`outer_loss` must be a function `outer_loss(params, hyper, batch)`; "
                f"got {describe(outer_loss)}."
            )
        self.inner = inner
        self.outer_loss = outer_loss
        self.has_aux = has_aux

    def evaluate_outer(
        self, params: Params, hyper: Hyper, batch: Batch, key: Key, state: ModelState
    ) -> tuple[FloatScalar, Aux]:
        """The outer loss and its auxiliary output (`None` without `has_aux`).

        **Arguments:**

        - `params`, `hyper`: the inner and the outer variables.
        - `batch`: what `outer_loss` is evaluated on.
        - `key`, `state`: passed on if `outer_loss` declares them.

        **Returns:**

        A pair of a floating-point scalar and the auxiliary output.
        """
        optional = declared(self.outer_loss, {"key": key, "state": state})
        out = call_with_note(
            self.outer_loss, "outer_loss", params, hyper, batch, **optional
        )
        if self.has_aux:
            out = unpack(out, "the outer loss", ("value", "aux"))
            value, aux = out
        else:
            value, aux = out, None
        check_scalar(value, "the outer loss")
        return value, aux
