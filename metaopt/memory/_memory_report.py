"""The memory that hypergradients take, before they run."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx

from .._adjoint import (
    AbstractAdjoint,
    exact_adjoints,
    format_bytes,
    temporary_bytes,
    unrolled_by_default,
)
from .._core._tree import tree_num_bytes
from .._core._types import Hyper, Key, ModelState, Params
from .._core._validate import ADJOINT_EXAMPLE, check_kind
from .._hypergradient import prepare
from .._objective import Objective
from .._problem import BilevelProblem
from .._report import table
from .._solver import AbstractSolver


class MemoryReport(eqx.Module):
    """The memory that one hypergradient takes under each of several adjoints. `print` it.

    **Attributes:**

    - `temporary_bytes`: the temporary memory by the name of the adjoint, beside that of
        the arguments and the result.
    - `params_bytes`: the size of the params, for comparison.
    - `automatic`: the adjoint that `metaopt.UnrolledAdjoint()` runs, by its name; `None` if
        none of the adjoints is an unrolled one.
    """

    temporary_bytes: dict[str, int]
    params_bytes: int
    automatic: str | None = None

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [("params", format_bytes(self.params_bytes))]
        rows += [(name, format_bytes(n)) for name, n in self.temporary_bytes.items()]
        if self.automatic is not None:
            rows.append(("taken by default", self.automatic))
        text = "Temporary memory as XLA plans it, on one device. Nothing was run."
        return table("Memory of one hypergradient", rows, text)


def memory_report(
    problem: BilevelProblem,
    hyper: Hyper,
    train: Any = None,
    valid: Any = None,
    *,
    inner: AbstractSolver,
    adjoints: Mapping[str, AbstractAdjoint] | None = None,
    params: Params | None = None,
    key: Key | None = None,
    model_state: ModelState = None,
) -> MemoryReport:
    """Report the memory that a hypergradient takes under each of several adjoints.

    Each is compiled and none is run, so it costs some seconds for each adjoint and none
    of the memory. The figures are those by which
    [`metaopt.UnrolledAdjoint(memory="2GiB")`][metaopt.UnrolledAdjoint] chooses.

    ```python
    import jax.numpy as jnp
    import metaopt as mo
    import optax

    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.mean((params * batch - hyper) ** 2),
        lambda params, hyper, batch: jnp.mean(params**2),
    )
    print(
        mo.memory.memory_report(
            problem, 3.0, jnp.ones(1000), params=jnp.ones(1000),
            inner=mo.Descent(optax.sgd(0.1), num_steps=100),
        )
    )
    ```

    **Arguments:**

    - `problem`, `hyper`, `train`, `valid`, `inner`, `params`, `key`, `model_state`: as
        in [`metaopt.hypergradient`][].
    - `adjoints`: the adjoints by the names to show; by default
        [`metaopt.UnrolledAdjoint`][] with each of its memory plans and, for
        [`metaopt.ReversibleSGD`][], [`metaopt.ReversibleAdjoint`][].

    **Returns:**

    A [`metaopt.memory.MemoryReport`][].

    **Raises:**

    As [`metaopt.hypergradient`][].
    """
    if adjoints is None:
        check_kind(inner, AbstractSolver, "inner", "metaopt.Descent(...)")
        adjoints = {repr(adjoint): adjoint for adjoint in exact_adjoints(inner)}
    for name, adjoint in adjoints.items():
        check_kind(adjoint, AbstractAdjoint, f"adjoints[{name!r}]", ADJOINT_EXAMPLE)
    if not adjoints:
        raise ValueError("`adjoints` is empty: there is nothing to report on.")
    some = next(iter(adjoints.values()))
    arguments = prepare(problem, hyper, params, train, valid, inner, some, key)

    def objective_of(problem, hyper, params, train, valid, key, model_state):
        return Objective(problem, inner, train, valid, params, model_state, key), hyper

    def start(*arguments):
        objective, hyper = objective_of(*arguments)
        return objective.start(hyper)[0]

    def program(adjoint):
        def run(*arguments):
            objective, hyper = objective_of(*arguments)
            return objective.differentiate(adjoint, hyper, None)[1:]

        return run

    sizes = {
        name: temporary_bytes(program(adjoint), *arguments, model_state)
        for name, adjoint in adjoints.items()
    }
    params_bytes = tree_num_bytes(eqx.filter_eval_shape(start, *arguments, model_state))
    automatic, unrolled = None, unrolled_by_default(adjoints.values())
    if unrolled is not None:

        def by_default(*arguments):
            objective, hyper = objective_of(*arguments)
            return objective.differentiate(unrolled, hyper, None)[2]

        automatic = eqx.filter_eval_shape(by_default, *arguments, model_state).adjoint
        if automatic == type(unrolled).__name__:
            automatic = repr(exact_adjoints(inner)[0])  # all steps are stored
    return MemoryReport(sizes, params_bytes, automatic)
