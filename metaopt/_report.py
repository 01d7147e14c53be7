"""Solutions, reports and histories, with their printed tables."""

import csv
import os
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ._results import RESULTS
from ._tree import leaf_names
from ._types import Aux, BoolScalar, FloatScalar, Hyper, IntScalar, ModelState, Params


class Solution(eqx.Module):
    """The solution of an inner problem.

    **Attributes:**

    - `value`: the params at the solution, with the structure of the initial ones.
    - `result`: how the solve ended; `metaopt.RESULTS[result]` is its text.
    - `aux`: the auxiliary output of the last evaluation, or `None`.
    - `model_state`: the model state at the solution, or `None`.
    - `solver_state`: the state of the solver after the last step (momenta, averages, the
        count of steps), for `solve_inner(..., solver_state=)`; `None` where the solver
        or the adjoint does not hand it on.
    - `stats`: a dictionary of `num_steps`, `losses` (the inner loss at the start of
        each step, or `None`) and `failed_step` (-1 if none).
    """

    value: Params
    result: RESULTS
    aux: Aux
    model_state: ModelState
    stats: dict[str, Any]
    solver_state: Any = None

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        losses = self.stats["losses"]
        rows = [("steps", _number(self.stats["num_steps"]))]
        if losses is not None and _is_known(losses):
            taken = np.asarray(losses)[..., : int(np.max(self.stats["num_steps"]))]
            if taken.ndim == 1 and taken.size:
                rows.append(("first loss", _number(taken[0])))
                rows.append(("last loss", _number(taken[-1])))
        return table("Inner solution", rows, verdict(self.result))


class Report(eqx.Module):
    """A report on how far one hypergradient can be trusted. `print` it.

    **Attributes:**

    - `result`: how it went; `metaopt.RESULTS[result]` names the cause and the remedy.
    - `outer_loss`, `aux`: the outer loss and its auxiliary output.
    - `hypergradient_norm`: the Euclidean norm of the hypergradient.
    - `num_zeros`: how many entries of the hypergradient are exactly zero. What an adjoint
        can see is known for each leaf of `hyper`, and not within one.
    - `inner_loss`: the inner loss at the inner solution, on the batch of the last step;
        `None` where the inner problem has none.
    - `inner_residual`: the norm of the optimality (of the gradient of the inner loss)
        at the inner solution; on the batch of the last step where the adjoint follows
        the path of the solver, on all of the data where it is implicit.
    - `inner_error`: an estimate of the relative error of the inner solution, or `None`
        where it does not matter. An estimate, not a bound.
    - `num_inner_steps`: the steps that the inner solver took.
    - `failed_step`: the first inner step at which the gradient or the params were not
        finite, or -1; `num_inner_steps` where that is the loss at the solution alone.
    - `linear_residual`: the relative residual of the implicit linear system, or `None`.
    - `num_linear_steps`: the steps of the linear solver, or `None`.
    - `num_products`: the products with the Hessian (or what stands for it) that solving
        the linear system took, those of checks and of a preconditioner included, or
        `None`.
    - `min_curvature`: the smallest curvature that the linear solver met, or `None`.
    - `tolerance`: what the linear system was solved to at most, and the error of the
        inner solution that was accepted, because the outer loop said that it would do;
        `None` without a [`metaopt.PolynomialTolerance`][] or the like. What the linear
        solver has not met by then (negative curvature, slow directions of the inner
        solution) is not known.
    - `returned_to_start`: whether steps that were undone ended where they had begun, bit
        for bit; `None` where none were.
    - `stored_bits`: what undoing them took, in bits for each step and parameter, or
        `None`.
    - `drift`: how far from the start steps that were undone to rounding have led,
        relative to the norm of the start or of the end, whichever is larger; or `None`.
    - `error`: the Euclidean norm of the error of the hypergradient, or `None` where the
        adjoint does not know it.
    - `allowed_error`: the largest such error that is accepted, or `None` where it is not
        judged: under an adjoint that follows the path, one whose linear solver leaves
        something out by request, or one that was given `inner_rtol`.
    - `num_error_products`: the products with the Hessian that the error took, beside
        `num_products`, or `None`.
    - `error_is_bound`: whether the error cannot be larger; otherwise it is an estimate.
    - `adjoint`: the name of the adjoint.
    - `left_out`: what the derivative leaves out by construction, in words: it is
        biased unless this is empty.
    - `unreached`: the names of the leaves of `hyper` that influence nothing; their
        derivative is exactly zero.
    - `held_constant`: the names of the leaves of `hyper` that have influence and no
        derivative, because the losses read them behind `jax.lax.stop_gradient` alone, as
        `equinox.nn.Dropout` does its rate.
    - `num_flat`: the number of entries of inner gradients, summed over the steps, at which
        the derivative of the step was left out, because they are zero and the slope of
        the update there, such as the `1 / eps` of Adam, says nothing about any other
        gradient (see [`metaopt.Descent`][]). No harm where they are zero whatever
        `hyper` is. `None` where no derivative can be left out.
    - `growth`: the largest norm of the derivative of the outer loss in the params along
        the path of the inner solver, relative to that at its end; `None` where no
        derivative passes back along the path.
    - `rounding_effect`: the change of the outer loss when the params are rounded once,
        at the step of the path where that changes it the most; or `None`.
    - `carried`: what the inner solve took over from the outer step before, and what not,
        in words; empty where there is nothing to say.
    """

    result: RESULTS
    outer_loss: FloatScalar
    aux: Aux
    hypergradient_norm: FloatScalar
    num_zeros: IntScalar
    inner_loss: FloatScalar | None
    inner_residual: FloatScalar
    inner_error: FloatScalar | None
    num_inner_steps: IntScalar
    failed_step: IntScalar
    linear_residual: FloatScalar | None
    num_linear_steps: IntScalar | None
    num_products: IntScalar | None
    min_curvature: FloatScalar | None
    tolerance: FloatScalar | None
    returned_to_start: BoolScalar | None
    stored_bits: FloatScalar | None
    drift: FloatScalar | None
    error: FloatScalar | None
    allowed_error: FloatScalar | None
    num_error_products: IntScalar | None
    error_is_bound: bool = eqx.field(static=True)
    adjoint: str = eqx.field(static=True)
    left_out: tuple[str, ...] = eqx.field(static=True)
    unreached: tuple[str, ...] = eqx.field(static=True)
    held_constant: tuple[str, ...] = eqx.field(default=(), static=True)
    num_flat: IntScalar | None = None
    growth: FloatScalar | None = None
    rounding_effect: FloatScalar | None = None
    carried: str = eqx.field(static=True, default="")

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [
            ("adjoint", self.adjoint + (" (biased)" if self.left_out else "")),
            ("outer loss", _number(self.outer_loss)),
            ("hypergradient norm", _number(self.hypergradient_norm)),
            ("inner steps", _number(self.num_inner_steps)),
        ]
        if self.inner_loss is not None:
            rows.append(("inner loss", _number(self.inner_loss)))
        rows.append(("inner residual", _number(self.inner_residual)))
        if _is_known(self.num_zeros) and np.any(np.asarray(self.num_zeros) > 0):
            rows.insert(3, ("entries exactly zero", _number(self.num_zeros)))
        if self.error is not None:
            text = _error_text(self)
            rows.insert(3, ("its error", text))
        if self.inner_error is not None:
            rows.append(("inner relative error", f"{_number(self.inner_error)} (est.)"))
        if self.linear_residual is not None:
            rows.append(("linear steps", _number(self.num_linear_steps)))
            rows.append(("linear products", _number(self.num_products)))
            if self.num_error_products is not None:
                rows.append(("products for its error", _number(self.num_error_products)))
            rows.append(("linear residual", _number(self.linear_residual)))
            # Infinite where the linear solver did not look.
            if not np.any(np.isinf(_values(self.min_curvature))):
                rows.append(("smallest curvature", _number(self.min_curvature)))
        if self.tolerance is not None:
            rows.append(("tolerance of this step", _number(self.tolerance)))
        if self.returned_to_start is not None:
            rows.append(("returned to start", _yes_or_no(self.returned_to_start)))
            rows.append(("bits per step and parameter", _number(self.stored_bits)))
        if self.growth is not None:
            rows.append(("growth along the path", _number(self.growth)))
            rows.append(("effect of one rounding", _number(self.rounding_effect)))
        if self.drift is not None:
            rows.append(("drift on the way back", _number(self.drift)))
        if _is_known(self.failed_step) and np.any(np.asarray(self.failed_step) >= 0):
            rows.append(("failed at step", _number(self.failed_step)))
        if self.left_out:
            rows.append(("left out", "; ".join(self.left_out)))
        if is_positive(self.num_flat):
            rows.append(("left out", flat_text(self.num_flat)))
        if self.unreached:
            rows.append(("without influence", ", ".join(self.unreached)))
        if self.held_constant:
            rows.append(("without derivative", held_text(self.held_constant)))
        if self.carried:
            rows.append(("carried over", self.carried))
        return table("Hypergradient", rows, verdict(self.result))


class History(eqx.Module):
    """One row for each outer step, as NumPy arrays of shape `(num_steps,)`.

    **Attributes:**

    - `outer_loss`, `hypergradient_norm`, `inner_residual`, `inner_error`,
        `linear_residual`: floats; NaN where a quantity does not apply.
    - `num_inner_steps`, `num_linear_steps`, `num_products`: ints; 0 where they do not
        apply.
    - `seconds`: the wall time of each outer step. The first holds the compilation.
    - `hyper`: the outer variables after each outer step: a pytree like `hyper` whose
        arrays have a leading axis of steps; `None` where `hyper` holds more than 1000
        numbers (a `callback` sees every `hyper`) or no step was taken.
    """

    outer_loss: np.ndarray
    hypergradient_norm: np.ndarray
    inner_residual: np.ndarray
    inner_error: np.ndarray
    linear_residual: np.ndarray
    num_inner_steps: np.ndarray
    num_linear_steps: np.ndarray
    num_products: np.ndarray
    seconds: np.ndarray
    hyper: Hyper | None = None

    def __len__(self) -> int:
        return len(self.outer_loss)

    def to_dict(self) -> dict[str, list[float]]:
        """The columns as lists of Python numbers.

        **Returns:**

        A dictionary from the name of each attribute to a list of numbers; each number in
        `hyper` is a column of its own, such as `hyper.log_decay[2]`.
        """
        columns = {name: column for name, column in vars(self).items() if name != "hyper"}
        floats = eqx.filter(self.hyper, is_float_array)
        for name, leaf in zip(leaf_names(floats, "hyper"), jax.tree.leaves(floats)):
            for index in np.ndindex(leaf.shape[1:]):
                column = f"{name}{list(index)}" if index else name
                columns[column] = leaf[(slice(None), *index)]
        return {name: column.tolist() for name, column in columns.items()}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one row for each outer step, with a header.

        **Arguments:**

        - `path`: the file to write.
        """
        columns = self.to_dict()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *columns])
            rows = zip(*columns.values(), strict=True)
            writer.writerows([step, *row] for step, row in enumerate(rows))


class BilevelSolution(eqx.Module):
    """The solution of a bilevel problem. `print` it.

    **Attributes:**

    - `hyper`: the outer variables that were found.
    - `params`: the inner solution *at* `hyper`, solved for after the last outer step
        (from a warm start where the solver uses one).
    - `model_state`: the model state there, or `None`.
    - `outer_loss`: the outer loss there.
    - `history`: one row for each outer step.
    - `result`: how the run ended; `metaopt.RESULTS[result]` is its text.
    - `report`: the report on the last hypergradient.
    - `state`: the state of the bilevel solver, from which `step` and
        `solve_bilevel(..., state=)` can go on.
    - `num_skipped`: outer steps at which `hyper` was left alone, because the
        hypergradient was not finite.
    - `warm_started`: whether the params owe something to the `hyper` of earlier outer
        steps. What `hyper` is worth in a new run is then another question: answer it
        with [`metaopt.solve_inner`][] before you report a result.
    """

    hyper: Hyper
    params: Params
    model_state: ModelState
    outer_loss: FloatScalar
    history: History
    result: RESULTS
    report: Report | None
    state: Any
    num_skipped: int
    warm_started: bool

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        history = self.history
        rows = [("outer steps", str(len(history)))]
        if len(history):
            rows += [
                ("outer loss, first", _number(history.outer_loss[0])),
                ("outer loss, best", _number(self._best())),
                ("outer loss, final", _number(self.outer_loss)),
                ("hypergradient norm", _number(history.hypergradient_norm[-1])),
                ("inner steps", _number(history.num_inner_steps.sum())),
            ]
            if history.num_linear_steps.any():
                rows.append(("linear steps", _number(history.num_linear_steps.sum())))
            if self.report is not None and self.report.error is not None:
                rows.append(("error of the last", _error_text(self.report)))
            if self.report is not None and self.report.inner_error is not None:
                text = f"{_number(self.report.inner_error)} (est.)"
                rows.append(("inner relative error of the last", text))
            if self.report is not None and self.report.left_out:
                rows.append(("left out", "; ".join(self.report.left_out)))
            if self.report is not None and self.report.unreached:
                rows.append(("without influence", ", ".join(self.report.unreached)))
            if self.report is not None and self.report.held_constant:
                text = held_text(self.report.held_constant)
                rows.append(("without derivative", text))
            if self.num_skipped:
                rows.append(("updates skipped", str(self.num_skipped)))
            rows.append(("seconds", f"{history.seconds.sum():.1f}"))
        if self.warm_started:
            rows.append(("inner solution", "from warm starts, not from `hyper` alone"))
            if self.report is not None and self.report.carried:
                rows.append(("carried over", self.report.carried))
        return table("Bilevel solution", rows, verdict(self.result))

    def _best(self) -> float:
        values = np.append(self.history.outer_loss, np.asarray(self.outer_loss))
        finite = values[np.isfinite(values)]
        return float(finite.min()) if finite.size else float("nan")


def _error_text(report: Report) -> str:
    """The error of a hypergradient, and how large it may be."""
    if np.any(np.isinf(_values(report.error))):
        return "not known: its linear system was not solved"
    text = f"{'at most' if report.error_is_bound else 'about'} {_number(report.error)}"
    if report.allowed_error is not None:
        text += f" (allowed: {_number(report.allowed_error)})"
    return text


def is_float_array(x: Any) -> bool:
    """Whether `x` is a floating-point array of JAX or NumPy."""
    # `equinox.is_inexact_array_like` does not know bfloat16 in NumPy.
    return isinstance(x, np.ndarray | jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)


def _values(x: Any) -> np.ndarray:
    return np.asarray(x) if _is_known(x) else np.zeros(())


def _is_known(x: Any) -> bool:
    # Not a tracer, and not the shape or the name that stands for an array elsewhere.
    return eqx.is_array_like(x) and not isinstance(x, jax.core.Tracer)


def _number(x: Any) -> str:
    if x is None:
        return "-"
    if not _is_known(x):
        return "(traced)"
    x = np.asarray(x)
    if x.ndim:
        return f"{x.size} values, {_number(x.min())} to {_number(x.max())}"
    if np.issubdtype(x.dtype, np.integer):
        return f"{int(x):,}"
    return f"{float(x):.4g}"


def is_positive(x: Any) -> bool:
    """Whether a count is known, and positive anywhere."""
    return x is not None and _is_known(x) and bool(np.any(np.asarray(x) > 0))


def flat_text(num_flat: Any) -> str:
    """The meaning of a number of gradient entries whose slope was left out."""
    return (
        f"the slope of the update at {_number(np.sum(num_flat))} entries of inner "
        "gradients that are zero, about `1 / eps` (to have it, give the optimizer an `eps` "
        "of a hundredth of the largest entry, as in `optax.adam(rate, eps=1e-2)`, or start "
        "away from zero)"
    )


def held_text(names: tuple[str, ...]) -> str:
    """The meaning of leaves that have influence and no derivative."""
    return (
        f"{', '.join(names)} (read behind `stop_gradient` alone, and never changed; "
        "`metaopt.SelfTuningSolver` tunes such leaves)"
    )


def _yes_or_no(x: Any) -> str:
    if not _is_known(x):
        return "(traced)"
    x = np.asarray(x)
    if x.ndim:
        return f"{int(x.sum())} of {x.size}"
    return "yes, bit for bit" if x else "NO"


def verdict(result: Any) -> str:
    """A sentence on how a solve ended."""
    values = result._value  # pyright: ignore[reportAttributeAccessIssue]
    if not _is_known(values):
        return "The result is known only when the compiled function runs."
    values = np.atleast_1d(np.asarray(values))
    texts = [RESULTS[_item(value)] for value in np.unique(values)]
    failures = [text for text in texts if text]
    if not failures:
        return "Successful."
    if values.size > 1:
        bad = sum(bool(RESULTS[_item(value)]) for value in values)
        return f"{bad} of {values.size} did not succeed. {failures[0]}"
    return failures[0]


def _item(value: Any) -> Any:
    template = RESULTS.successful
    return eqx.tree_at(lambda item: item._value, template, np.asarray(value, np.int32))


def table(title: str, rows: list[tuple[str, str]], text: str) -> str:
    """A readable table: a title, rows of name and value, and a sentence."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return "\n".join([*lines, "  " + text])
