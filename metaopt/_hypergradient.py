"""One hypergradient, with its report."""

from typing import Any

from ._adjoint import AbstractAdjoint
from ._core._compiled import compiled
from ._core._trace_once import tracing_once
from ._core._types import (
    Hyper,
    Key,
    ModelState,
    Params,
)
from ._core._validate import (
    ADJOINT_EXAMPLE,
    canonical_arrays,
    canonical_hyper,
    canonical_key,
    canonical_params,
    check_kind,
    DESCENT_EXAMPLE,
)
from ._data import AbstractData, as_data
from ._objective import Objective
from ._problem import BilevelProblem
from ._report import raise_on_failure, Report
from ._solver import AbstractSolver


@tracing_once()
def hypergradient(
    problem: BilevelProblem,
    hyper: Hyper,
    train: Any = None,
    valid: Any = None,
    *,
    inner: AbstractSolver,
    adjoint: AbstractAdjoint,
    params: Params | None = None,
    key: Key | None = None,
    model_state: ModelState = None,
    throw: bool = True,
    guard: bool = True,
) -> tuple[Hyper, Report]:
    """One hypergradient, and a report of how far it can be trusted.

    ```python
    import jax.numpy as jnp
    import metaopt as mo
    import optax

    problem = mo.BilevelProblem(
        lambda params, hyper, batch: (params - hyper) ** 2,
        lambda params, hyper, batch: params**2,
    )
    gradient, report = mo.hypergradient(
        problem, 3.0, params=jnp.array(0.0),
        inner=mo.Descent(optax.sgd(0.1), num_steps=100),
        adjoint=mo.ImplicitAdjoint(),
    )
    print(gradient.round(3))  # 6.0
    print(report)
    ```

    **Arguments:**

    - `problem`: the bilevel problem.
    - `hyper`: the outer variables, any pytree with a floating-point array in it.
    - `train`, `valid`: the data of the inner and of the outer loss: arrays, or a source of
        batches such as [`metaopt.Minibatches`][].
    - `inner`: how the inner problem is solved.
    - `adjoint`: how the derivative passes through the inner solve.
    - `params`: where the inner solve starts; by default the inner problem's `init`,
        whose dependence on `hyper` is differentiated.
    - `key`: for everything random, from `jax.random.key`; by default key 0.
    - `model_state`: where the model state starts; with `params` only.
    - `throw`: whether a failure raises. If not, it is marked in the report.
    - `guard`: whether a hypergradient that the report voids is NaN. With `False` it is
        what was computed, whatever the report says. Inside your own `jax.jit` every check
        whose outcome you do not read then costs nothing: read `report.result`, and you pay
        for the verdict alone.

    **Returns:**

    A pair. First the hypergradient: a pytree like `hyper`, with `None` for leaves that
    are not floating-point arrays. Then a [`metaopt.Report`][].

    **Raises:**

    `ValueError` and `TypeError` for arguments that do not fit and for a derivative that
    is zero by construction; [`metaopt.SolveError`][] for a numerical failure under
    `throw`, whose `value` is what would have been returned.
    """
    arguments = prepare(problem, hyper, params, train, valid, inner, adjoint, key)
    gradient, report = differentiate(*arguments, inner, adjoint, model_state, guard)
    code = report.result
    return raise_on_failure((gradient, report), code, throw, show=report)


def prepare(
    problem: BilevelProblem,
    hyper: Hyper,
    params: Params | None,
    train: Any,
    valid: Any,
    inner: AbstractSolver,
    adjoint: AbstractAdjoint,
    key: Key | None,
) -> tuple[BilevelProblem, Hyper, Params | None, AbstractData, AbstractData, Key]:
    """Check the arguments and bring them into canonical form."""
    check_kind(problem, BilevelProblem, "problem", "metaopt.BilevelProblem(...)")
    check_kind(inner, AbstractSolver, "inner", DESCENT_EXAMPLE)
    check_kind(adjoint, AbstractAdjoint, "adjoint", ADJOINT_EXAMPLE)
    hyper = canonical_hyper(hyper)
    if isinstance(params, AbstractData):
        raise ValueError(
            f"`params` is {params!r}, a source of data. Write `hypergradient(problem, "
            "hyper, train, valid, params=...)`; without `params` for the problem's init."
        )
    if params is not None:
        params = canonical_params(params)
    train = as_data(canonical_arrays(train, "train"), "train")
    valid = as_data(canonical_arrays(valid, "valid"), "valid")
    return problem, hyper, params, train, valid, canonical_key(key)


@compiled
def differentiate(
    problem: BilevelProblem,
    hyper: Hyper,
    params: Params | None,
    train: AbstractData,
    valid: AbstractData,
    key: Key,
    inner: AbstractSolver,
    adjoint: AbstractAdjoint,
    model_state: ModelState,
    guard: bool = True,
) -> tuple[Hyper, Report]:
    """The compiled part of [`metaopt.hypergradient`][]."""
    objective = Objective(problem, inner, train, valid, params, model_state, key)
    _, gradient, report = objective.differentiate(adjoint, hyper, None, guard=guard)
    return gradient, report
