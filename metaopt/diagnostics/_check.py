"""Checking a hypergradient against finite differences."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .._adjoint import AbstractAdjoint
from .._core._results import RESULTS, SolveError
from .._core._trace_once import tracing_once
from .._core._tree import split_trainable
from .._core._types import Hyper, Key, ModelState, Params, Vector
from .._core._validate import check_count, check_tolerance
from .._hypergradient import differentiate, prepare
from .._objective import Objective
from .._problem import BilevelProblem
from .._report import Report, table
from .._solver import AbstractSolver


class HypergradientCheck(eqx.Module):
    """A hypergradient beside central differences. `print` it.

    **Attributes:**

    - `hypergradient`: the derivative along each direction, `(num_directions,)`.
    - `finite_difference`: the same by central differences, each of which solves the
        inner problem anew, `(num_directions,)`.
    - `difference_error`: an estimate of the error of the finite differences themselves,
        `(num_directions,)`.
    - `relative_error`: the largest relative disagreement along any direction.
    - `rtol`: the relative error that was accepted.
    - `passed`: whether the two agree along every direction, up to `rtol` and the error
        of the differences.
    - `decisive`: whether that is known: `False` where the differences are too noisy to
        tell a right hypergradient from a wrong one.
    - `dtype`: the precision in which the two were compared.
    - `report`: the report on the hypergradient, in that precision.
    """

    hypergradient: np.ndarray
    finite_difference: np.ndarray
    difference_error: np.ndarray
    relative_error: float
    rtol: float
    passed: bool
    decisive: bool
    dtype: str
    report: Report

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [
            f"{float(a): .8e}  {float(b): .8e}  (+- {float(e):.0e})"
            for a, b, e in zip(
                self.hypergradient, self.finite_difference, self.difference_error
            )
        ]
        rows = [("adjoint", self.report.adjoint)]
        rows += [(f"direction {i}", line) for i, line in enumerate(lines)]
        rows.append(("relative error", f"{self.relative_error:.2e}"))
        rows.append(("accepted", f"{self.rtol:.2e}"))
        rows.append(("compared in", self.dtype))
        text = "The two agree."
        if not self.decisive:
            text = (
                "Cannot tell: the error of the differences is as large as what they "
                "measure. The inner solver may stop early, the loss may have kinks, or "
                "the derivative of the path explodes (then fewer inner steps agree). Try "
                "float64, another `step`, or fewer inner steps."
            )
        elif not self.passed and self.report.result != RESULTS.successful:
            text = f"The hypergradient failed. {RESULTS[self.report.result]}"
        elif not self.passed:
            text = (
                "The two do NOT agree, by more than the differences are wrong: the "
                "derivative is biased, the problem is not the same at every call, or its "
                "losses have kinks (such as of relu) that a difference steps over. Try a "
                "smaller `step` in float64, or a smooth activation such as tanh."
            )
        return table("Hypergradient (left) against finite differences", rows, text)


@tracing_once()
def check_hypergradient(
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
    num_directions: int = 3,
    step: float | None = None,
    rtol: float | None = None,
    widen: bool = True,
    throw: bool = True,
) -> HypergradientCheck:
    """Compare a hypergradient with central differences that solve the inner problem
    anew, along random directions.

    Run it once on a small version of your problem. In float32 differences are mostly
    rounding, so both are computed in float64 where the problem allows it: random draws are
    then other ones. Otherwise the step is chosen for each direction by the noise that is
    measured, and where that hides the answer the check says that it cannot tell. It costs
    four inner solves for each direction, ten in float32. The inner solve must be
    deterministic for a given key and, under [`metaopt.ImplicitAdjoint`][], converged.
    Biased adjoints are expected to fail.

    **Arguments:**

    - `problem`, `hyper`, `train`, `valid`, `inner`, `adjoint`, `params`, `key`,
        `model_state`: as in [`metaopt.hypergradient`][].
    - `num_directions`: how many random unit directions in all of `hyper` are tried;
        where `hyper` has several leaves, one more in each of them.
    - `step`: the length of the finite difference, in the units of `hyper`; by default
        the cube root of the precision. In float32 shorter and longer ones are tried as
        well.
    - `rtol`: the relative error that is accepted; by default 1e-6 in float64 and 1e-2
        where `hyper` is in float32.
    - `widen`: whether to compare in float64 what is in float32. A problem that needs
        float32, or fails in float64, is compared in float32 all the same.
    - `throw`: whether a check that does not pass raises.

    **Returns:**

    A [`metaopt.diagnostics.HypergradientCheck`][].

    **Raises:**

    [`metaopt.SolveError`][] under `throw` where the two disagree or where the check cannot
    tell; otherwise as
    [`metaopt.hypergradient`][].
    """
    check_count(num_directions, "num_directions")
    check_tolerance(step, "step")
    check_tolerance(rtol, "rtol")
    if step == 0:
        raise ValueError("`step` must be positive, or `None` for a default; got 0.")
    arguments = prepare(problem, hyper, params, train, valid, inner, adjoint, key)
    hyper_dtype = ravel_pytree(split_trainable(arguments[1])[0])[0].dtype
    if rtol is None:
        rtol = 1e-6 if hyper_dtype == jnp.float64 else 1e-2
    everything = (*arguments, inner, adjoint, model_state)
    check = None
    if widen and hyper_dtype != jnp.float64:
        check = _widened_check(everything, num_directions, step, rtol)
    if check is None:
        check = _check(everything, num_directions, step, rtol)
    if throw and not check.passed:
        failed = bool(check.report.result != RESULTS.successful)
        cause = f"\n\n{check.report}" if failed else ""
        raise SolveError(f"{check}{cause}", check)
    return check


def _widened_check(
    everything: tuple, num_directions: int, step: float | None, rtol: float
) -> HypergradientCheck | None:
    """The check in float64, or `None` where the problem does not allow it."""
    # New config states trace and compile anew: nothing of float32 is reused.
    with jax.enable_x64(True):
        try:
            widened = jax.tree.map(_in_float64, everything)
            check = _check(widened, num_directions, step, rtol)
        except (TypeError, ValueError):
            # A program that insists on float32, or an error that comes back without this.
            return None
    failed = bool(check.report.result != RESULTS.successful)
    return None if failed else check


def _in_float64(x: Any) -> Any:
    is_real = eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float64) if is_real else x


def _check(
    everything: tuple, num_directions: int, step: float | None, rtol: float
) -> HypergradientCheck:
    problem, hyper, params, train, valid, key, inner, adjoint, model_state = everything
    trainable, static = split_trainable(hyper)
    flat, unravel = ravel_pytree(trainable)
    precision = float(jnp.finfo(flat.dtype).eps)
    is_double = precision < 1e-10
    length = precision ** (1 / 3) if step is None else step

    gradient, report = differentiate(
        problem, hyper, params, train, valid, key, inner, adjoint, model_state
    )
    gradient = ravel_pytree(gradient)[0]
    directions = _directions(trainable, num_directions)
    if not is_double and num_directions > 1 and float(jnp.linalg.norm(gradient)) > 0:
        # Nowhere do differences stand out more from their noise.
        directions[0] = np.asarray(gradient / jnp.linalg.norm(gradient))
    directions = jnp.asarray(directions, flat.dtype)
    slopes = np.asarray(directions @ gradient, np.float64)

    def value(shift):
        moved = eqx.combine(unravel(flat + shift), static)
        rest = params, train, valid, key, inner, model_state
        return float(_evaluate(problem, moved, *rest))

    noise_of_value = _noise(value, directions[0], length, precision)
    lengths = length * 2.0 ** (np.arange(2) if is_double else np.arange(-2, 3))
    differences, noise = np.transpose(
        [_difference(value, d, lengths, noise_of_value) for d in directions]
    )
    disagreement, size = np.abs(slopes - differences), np.abs(differences)
    floor = np.maximum(noise, np.finfo(np.float64).tiny)
    error = float(np.max(disagreement / np.maximum(size, floor)))
    # Differences that are nothing but noise agree with everything.
    small = disagreement <= rtol * np.max(size)
    clear = bool(np.all((noise <= 0.1 * size) | small))
    agree = bool(np.all(disagreement <= rtol * size + noise))
    # An estimate of noise can be low by chance.
    wrong = bool(np.any(disagreement > rtol * size + _SURELY * noise))
    failed = bool(report.result != RESULTS.successful)
    return HypergradientCheck(
        slopes,
        differences,
        noise,
        error,
        rtol,
        passed=clear and agree and not failed,
        decisive=wrong or failed or (clear and agree),
        dtype=str(flat.dtype),
        report=report,
    )


_SURELY = 3


def _noise(value: Callable, direction: jax.Array, length: float, precision: float) -> float:
    """The noise of the outer loss: its second differences over steps so short that a
    smooth function has none, and at least one rounding."""
    here = value(0 * direction)
    noises = [precision * abs(here)]
    for short in (length / 400, length / 512):
        around = value(short * direction) + value(-short * direction)
        noises.append(abs(around - 2 * here) / 2)
    return float(np.nan_to_num(max(noises), nan=np.inf))


def _difference(
    value: Callable, direction: jax.Array, lengths: np.ndarray, noise: float
) -> tuple[float, float]:
    """The slope along a direction by central differences of the best of several lengths,
    each with one step of Richardson extrapolation; and an estimate of its error."""

    def central(h):
        return (value(h * direction) - value(-h * direction)) / (2 * h)

    plain = np.asarray([central(float(h)) for h in lengths])
    better = (4 * plain[:-1] - plain[1:]) / 3
    # Extrapolation changes what is wrong with the difference; the rounding stays.
    errors = np.abs(better - plain[:-1]) + 2 * noise / lengths[:-1]
    if len(better) > 1:
        # Kinks: an estimate that looks right by chance has neighbours that do not.
        steps = np.abs(np.diff(better))
        errors = np.maximum(errors, np.abs(better - plain[1:]))
        errors = np.maximum(errors, np.maximum([0, *steps], [*steps, 0]))
    best = int(np.nanargmin(errors)) if np.any(np.isfinite(errors)) else 0
    return float(better[best]), float(errors[best])


def _directions(trainable: Vector, count: int) -> np.ndarray:
    """Random unit directions: in all of `hyper`, and in each leaf where there are
    several, because a long leaf would hide a short one."""
    rng = np.random.default_rng(0)
    sizes = [leaf.size for leaf in jax.tree.leaves(trainable)]
    total = sum(sizes)
    rows = list(rng.standard_normal((min(count, total), total)))
    if len(sizes) > 1:
        for start, size in zip(np.cumsum([0, *sizes]), sizes):
            row = np.zeros(total)
            row[start : start + size] = rng.standard_normal(size)
            rows.append(row)
    directions = np.stack(rows)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


@eqx.filter_jit
def _evaluate(problem, hyper, params, train, valid, key, inner, model_state):
    objective = Objective(problem, inner, train, valid, params, model_state, key)
    return objective.primal(hyper)[0]
