"""The records of a single-loop solver: its state, an update, and its part of a report."""

from typing import Any

import equinox as eqx
import jax

from .._core._types import (
    Aux,
    FloatScalar,
    Hyper,
    IntScalar,
    Key,
    ModelState,
    Params,
    PyTree,
    Vector,
)
from .._report import AbstractDerivativeInfo, number
from ._drawn import Cursors


class SingleLoopState(eqx.Module):
    """The state that one outer step of a single-loop solver hands to the next.

    **Attributes:**

    - `hyper`: the outer variables.
    - `params`, `model_state`: the inner variables, and the model state or `None`.
    - `evaluated`: the params at which the last outer step evaluated the outer loss.
    - `outer_state`: the state of the outer optimizer.
    - `extra`: the variables that the method keeps beside these: what `first` returned, and
        then each `update`.
    - `cursors`: the cursors of `train` and `valid`: the batches that come next.
    - `key`, `num_steps`: the randomness of the run, and the outer steps taken.
    - `drawn`: whether the problem's `init` drew the initial params.
    """

    hyper: Hyper
    params: Params
    evaluated: Params
    model_state: ModelState
    outer_state: PyTree
    extra: PyTree
    cursors: Cursors
    key: Key
    num_steps: IntScalar
    drawn: bool = eqx.field(static=True)


class SingleLoopUpdate(eqx.Module):
    """One step of a single-loop method, which the solver takes where it is finite.

    **Arguments:**

    - `params`, `extra`: the new inner variables and the new variables of the method, of the
        structure, shapes and dtypes of the old ones.
    - `direction`: the estimate of the hypergradient: a vector like `hyper`, with `None` in
        the place of what is no floating-point array.
    - `outer_loss`, `aux`: the outer loss at `evaluated` and its auxiliary output.
    - `evaluated`: the params at which `outer_loss` was evaluated; by default the old ones.
    - `model_state`: the new model state; by default the old one.
    - `inner_loss`, `inner_residual`: the inner loss and the norm of its gradient (of the
        field of the inner problem), for the report; by default left out of it.
    - `num_inner_steps`: the number of inner steps; by default that of the batches drawn
        for the inner loss.
    - `scalars`: more numbers for the report, by the names of their columns in the history.
    """

    params: Params
    extra: PyTree
    direction: Vector
    outer_loss: FloatScalar
    aux: Aux = None
    evaluated: Params | None = None
    model_state: ModelState = None
    inner_loss: FloatScalar | None = None
    inner_residual: FloatScalar | None = None
    num_inner_steps: IntScalar | int | None = None
    scalars: dict[str, Any] = eqx.field(default_factory=dict)


class SingleLoopInfo(AbstractDerivativeInfo):
    """The report of a single-loop method on its direction.

    **Attributes:**

    - `left_out`: what the direction leaves out by construction, in words.
    - `change`: the Euclidean norm of the change of all that moves beside `hyper`. A
        direction of zero is no convergence while this is large.
    - `own`: the scalars of the method, by name.
    """

    left_out: tuple[str, ...] = eqx.field(static=True)
    change: FloatScalar
    own: dict[str, jax.Array]

    def accuracy(self):
        return []

    def rows(self):
        rows = {"change of the params": self.change}
        rows |= {name.replace("_", " "): x for name, x in self.own.items()}
        return [(name, number(x)) for name, x in rows.items()]

    def scalars(self):
        return self.own | {"change": self.change}
