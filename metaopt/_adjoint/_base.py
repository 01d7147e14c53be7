"""The interface of adjoints, which differentiate an inner solve."""

import abc
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import equinox as eqx

from .._core._results import RESULTS
from .._core._types import (
    Aux,
    FloatScalar,
    Hyper,
    ModelState,
    Params,
    Vector,
)
from .._data import AbstractData
from .._report import AbstractDerivativeInfo
from .._solver import AbstractSolver, InnerSolve, Outcome
from ._bias import Bias
from ._reach import AbstractReach


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


OuterLoss = Callable[[Params, Hyper, ModelState], tuple[FloatScalar, Aux]]
"""`outer(params, hyper, model_state) -> (value, aux)`: batch and key are fixed."""

Start = Callable[[Hyper], tuple[Params, ModelState]]
"""`start(hyper) -> (params, model_state)`: where the inner solve starts."""


class HypergradientOutput(eqx.Module):
    """One hypergradient and all that its computation yields.

    **Attributes:**

    - `value`, `aux`: the outer loss and its auxiliary output.
    - `direct`: the derivative of the outer loss at fixed params; a vector like the
        trainable part of `hyper`.
    - `through_solution`: the derivative by way of the inner solution, likewise. The
        hypergradient is the sum of the two.
    - `outcome`: the inner solution.
    - `inner_residual`: the norm of the optimality there.
    - `result`: how the derivative went; the inner solve has a result of its own.
    - `info`: the adjoint's part of the report.
    - `carry`: what the adjoint wants back at the next outer step.
    - `chosen`: the adjoint that was chosen to run, for an adjoint that chooses; else
        `None`.
    """

    value: FloatScalar
    aux: Aux
    direct: Vector
    through_solution: Vector
    outcome: Outcome
    inner_residual: FloatScalar
    result: RESULTS
    info: AbstractDerivativeInfo
    carry: Any
    chosen: "AbstractAdjoint | None" = None


class AbstractAdjoint(eqx.Module):
    """A way to differentiate an inner solve.

    An adjoint receives the solve as a value, [`metaopt.extend.InnerSolve`][], and never
    imports a function that solves. It checks a solver, solves differentiably, computes
    hypergradients, and states two values: its reach and its bias. One with a method `work`
    counts its work as well, as a [`metaopt.extend.CountsWork`][].
    """

    reach: AbstractClassVar[AbstractReach]
    """The ways from `hyper` to the solution that it differentiates."""

    @property
    @abc.abstractmethod
    def bias(self) -> Bias:
        """The part of the derivative that it leaves out by construction."""

    @abc.abstractmethod
    def check(self, solver: AbstractSolver, data: AbstractData) -> None:
        """Check that this adjoint can serve the solver.

        **Arguments:**

        - `solver`, `data`: the inner solver and where its batches come from.

        **Raises:**

        `ValueError` if it cannot, with what to use instead.
        """

    @abc.abstractmethod
    def solve(
        self,
        inner: InnerSolve,
        params: Params,
        hyper: Hyper,
        model_state: ModelState,
        throw: bool,
    ) -> Outcome:
        """Solves, differentiably in everything the answer depends on.

        **Arguments:**

        - `inner`: the solve.
        - `params`, `model_state`: where it starts.
        - `hyper`: the outer variables.
        - `throw`: whether a derivative that fails its checks raises; otherwise it is NaN.

        **Returns:**

        An [`metaopt.extend.Outcome`][].
        """

    @abc.abstractmethod
    def hypergradient(
        self,
        inner: InnerSolve,
        outer: OuterLoss,
        start: Start,
        hyper: Hyper,
        carry: Any,
    ) -> HypergradientOutput:
        """Differentiate the outer loss at the inner solution, and report on it.

        **Arguments:**

        - `inner`: the inner solve.
        - `outer`: `outer(params, hyper, model_state) -> (value, aux)`.
        - `start`: `start(hyper) -> (params, model_state)`, where the solve starts.
        - `hyper`: the outer variables.
        - `carry`: the `carry` of the hypergradient before, or what `init` returned where
            the adjoint has one; `None` for a cold start.

        **Returns:**

        A [`metaopt.extend.HypergradientOutput`][].
        """


class AbstractSystemAdjoint(AbstractAdjoint):
    """An adjoint that solves a linear system at the inner solution.

    The outer loop may loosen its accuracy by the `tolerance` of an
    [`metaopt.extend.InnerSolve`][], and hands the solution of one system on to the next.
    """

    @abc.abstractmethod
    def init(self, params: Params) -> Any:
        """The carry for the first of several hypergradients.

        **Arguments:**

        - `params`: the initial params.

        **Returns:**

        A pytree of arrays.
        """


def first_carry(adjoint: AbstractAdjoint, params: Params) -> Any:
    """The carry for the first of several hypergradients, or `None`."""
    return adjoint.init(params) if isinstance(adjoint, AbstractSystemAdjoint) else None
