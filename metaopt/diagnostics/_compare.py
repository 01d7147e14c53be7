"""Several adjoints on one problem, beside each other."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree

from .._adjoint import (
    AbstractAdjoint,
    Blocks,
    format_bytes,
    ImplicitAdjoint,
    temporary_bytes,
    UnrolledAdjoint,
)
from .._core._results import RESULTS
from .._core._trace_once import tracing_once
from .._core._types import Hyper, Key, ModelState, Params
from .._core._validate import ADJOINT_EXAMPLE, check_count, check_kind
from .._hypergradient import differentiate, prepare
from .._linear import GMRES
from .._objective import Objective
from .._problem import BilevelProblem
from .._report import Report, verdict
from .._solver import AbstractIterativeSolver, AbstractSolver


class ComparedAdjoint(eqx.Module):
    """One adjoint of a comparison.

    **Attributes:**

    - `cosine`, `relative_error`: of its hypergradient and that of the reference; NaN
        where there is none.
    - `is_number`: whether the hypergradient is one number, whose cosine says nothing.
    - `num_inner_steps`: the steps of the inner solver.
    - `num_products`: the products with the Hessian that an implicit one took.
    - `seconds`: the median time of one hypergradient, without compilation.
    - `temporary_bytes`: the memory that XLA plans for beside arguments and results.
    - `report`: the report on its hypergradient, or `None` where there is none.
    - `failure`: what it says where it cannot serve the problem, or `None`.
    """

    cosine: float
    relative_error: float
    is_number: bool
    num_inner_steps: int
    num_products: int
    seconds: float
    temporary_bytes: int
    report: Report | None
    failure: str | None


class Comparison(eqx.Module):
    """Hypergradients of several adjoints beside a reference. `print` it.

    **Attributes:**

    - `rows`: a [`metaopt.diagnostics.ComparedAdjoint`][] for each adjoint, by its name.
    - `reference`: the adjoint that they are compared with.
    """

    rows: dict[str, ComparedAdjoint]
    reference: AbstractAdjoint

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        width = max(len(name) for name in self.rows) + 2
        head = ("cosine", "rel. error", "steps", "products", "seconds", "memory")
        lines = [
            "Hypergradients beside each other",
            " " * (width + 2) + "".join(f"{title:>12}" for title in head),
        ]
        notes = []
        for name, row in self.rows.items():
            if row.report is None:
                cells = ["-"] * len(head)
                notes.append(f"{name}: {row.failure}")
            else:
                cells = [
                    "-" if row.is_number else f"{row.cosine:.6f}",
                    f"{row.relative_error:.2e}",
                    f"{row.num_inner_steps:,}",
                    f"{row.num_products:,}",
                    f"{row.seconds:.2g}",
                    format_bytes(row.temporary_bytes),
                ]
                if row.report.left_out:
                    notes.append(f"{name}: leaves out {'; '.join(row.report.left_out)}")
                if row.report.result != RESULTS.successful:
                    notes.append(f"{name}: {verdict(row.report.result)}")
            lines.append(f"  {name:{width}}" + "".join(f"{cell:>12}" for cell in cells))
        lines.append(f"  reference: {self.reference!r}")
        return "\n".join(lines + [f"  {note}" for note in notes])


@tracing_once()
def compare_hypergradients(
    problem: BilevelProblem,
    hyper: Hyper,
    train: Any = None,
    valid: Any = None,
    *,
    inner: AbstractSolver,
    adjoints: Mapping[str, AbstractAdjoint],
    reference: AbstractAdjoint | None = None,
    params: Params | None = None,
    key: Key | None = None,
    model_state: ModelState = None,
    repeats: int = 3,
) -> Comparison:
    """Run several adjoints on one problem and compare their hypergradients, their work,
    their time and their memory.

    ```python
    import jax.numpy as jnp
    import metaopt as mo
    import optax

    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch: jnp.sum(params**2),
    )
    print(
        mo.compare_hypergradients(
            problem, 3.0, params=jnp.zeros(10),
            inner=mo.Descent(optax.sgd(0.1), num_steps=100),
            adjoints={
                "implicit": mo.ImplicitAdjoint(),
                "last 5 steps": mo.TruncatedAdjoint(5),
                "last step": mo.OneStepAdjoint(),
            },
        )
    )
    ```

    **Arguments:**

    - `problem`, `hyper`, `train`, `valid`, `inner`, `params`, `key`, `model_state`: as
        in [`metaopt.hypergradient`][].
    - `adjoints`: the adjoints by the names to show.
    - `reference`: what they are compared with. By default the exact derivative of what the
        inner solver did, [`metaopt.UnrolledAdjoint`][] in blocks; for a solver that runs as
        a whole [`metaopt.ImplicitAdjoint`][] with a Newton step. If the inner solver has
        not converged the two differ, and neither is wrong. The derivative of a long path
        can explode; where [`metaopt.check_hypergradient`][] does not accept it, it is no
        reference.
    - `repeats`: how often each is timed.

    **Returns:**

    A [`metaopt.diagnostics.Comparison`][]. An adjoint that cannot serve the problem, or
    that fails, has a row that says so.

    **Raises:**

    `ValueError` and `TypeError` for arguments that do not fit, and where the reference
    cannot serve the problem.
    """
    check_count(repeats, "repeats")
    if not isinstance(adjoints, Mapping):
        raise ValueError(
            "`adjoints` must be a dictionary of adjoints by the names to show, such as "
            "`{'implicit': metaopt.ImplicitAdjoint()}`; got "
            f"{type(adjoints).__name__}."
        )
    if not adjoints:
        raise ValueError("`adjoints` is empty: there is nothing to compare.")
    if reference is None:
        reference = _reference(problem, inner)
    for name, adjoint in {"reference": reference, **adjoints}.items():
        check_kind(adjoint, AbstractAdjoint, name, ADJOINT_EXAMPLE)
    arguments = prepare(problem, hyper, params, train, valid, inner, reference, key)
    gradient, report = differentiate(*arguments, inner, reference, model_state)
    if report.result != RESULTS.successful:
        raise ValueError(
            f"The reference `{reference!r}` failed: {verdict(report.result)} Solve the "
            "inner problem further, or hand over another `reference`."
        )
    exact = np.asarray(ravel_pytree(gradient)[0], np.float64)
    rows = {
        name: _row(arguments, inner, adjoint, model_state, exact, repeats)
        for name, adjoint in adjoints.items()
    }
    return Comparison(rows, reference)


def _reference(problem: BilevelProblem, inner: AbstractSolver) -> AbstractAdjoint:
    if isinstance(inner, AbstractIterativeSolver):
        return UnrolledAdjoint(Blocks())
    if lx.positive_semidefinite_tag in problem.inner.tags:
        return ImplicitAdjoint(newton_steps=1)
    return ImplicitAdjoint(GMRES(), newton_steps=1)


def _row(
    arguments: tuple[Any, ...],
    inner: AbstractSolver,
    adjoint: AbstractAdjoint,
    model_state: ModelState,
    exact: np.ndarray,
    repeats: int,
) -> ComparedAdjoint:
    def run() -> Any:
        call: Any = differentiate
        return jax.block_until_ready(call(*arguments, inner, adjoint, model_state))

    def program(problem, hyper, params, train, valid, key, model_state):
        objective = Objective(problem, inner, train, valid, params, model_state, key)
        return objective.differentiate(adjoint, hyper, None)[1:]

    nan = float("nan")
    try:
        gradient, report = run()
        memory = temporary_bytes(program, *arguments, model_state)
    except ValueError as error:
        return ComparedAdjoint(nan, nan, False, 0, 0, nan, 0, None, _first_line(error))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    ours = np.asarray(ravel_pytree(gradient)[0], np.float64)
    size, own = np.linalg.norm(exact), np.linalg.norm(ours)
    num_products = int(report.scalars().get("num_products", 0))
    return ComparedAdjoint(
        cosine=float(ours @ exact / (size * own)) if size * own > 0 else nan,
        relative_error=float(np.linalg.norm(ours - exact) / size) if size > 0 else nan,
        is_number=ours.size == 1,
        num_inner_steps=int(jnp.max(report.inner.num_steps)),
        num_products=num_products,
        seconds=statistics.median(times),
        temporary_bytes=memory,
        report=report,
        failure=None,
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
