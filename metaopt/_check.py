"""Checking a hypergradient against finite differences."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ._adjoint import AbstractAdjoint
from ._hypergradient import differentiate, prepare
from ._objective import Objective
from ._problem import BilevelProblem
from ._report import Report, table
from ._results import RESULTS, SolveError
from ._solver import AbstractSolver
from ._tree import split_trainable
from ._types import Hyper, Key, ModelState, Params, Vector
from ._validate import check_count, check_tolerance


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
    - `report`: the report on the hypergradient.
    """

    hypergradient: np.ndarray
    finite_difference: np.ndarray
    difference_error: np.ndarray
    relative_error: float
    rtol: float
    passed: bool
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
        text = "The two agree."
        if not self.passed:
            text = (
                "The two do NOT agree. If the differences are at fault (float32, kinks, "
                "an inner solver that stops early), try float64 or another `step`. If "
                "fewer inner steps agree, the derivative of the path explodes: shorten "
                "or truncate it, or lower the inner rate."
            )
        return table("Hypergradient (left) against finite differences", rows, text)


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
    throw: bool = True,
) -> HypergradientCheck:
    """Compares a hypergradient with central differences that solve the inner problem
    anew, along random directions.

    Run it once on a small version of your problem, in float64. It costs four inner
    solves for each direction. The inner solve must be deterministic for a given key and,
    under [`metaopt.ImplicitAdjoint`][], converged. Biased adjoints are expected to fail.

    **Arguments:**

    - `problem`, `hyper`, `train`, `valid`, `inner`, `adjoint`, `params`, `key`,
        `model_state`: as in [`metaopt.hypergradient`][].
    - `num_directions`: how many random unit directions in all of `hyper` are tried;
        where `hyper` has several leaves, one more in each of them.
    - `step`: the length of the finite difference, in the units of `hyper`; by default
        the cube root of the precision.
    - `rtol`: the relative error that is accepted; by default 1e-6 in float64 and 1e-2
        in float32.
    - `throw`: whether a disagreement raises.

    **Returns:**

    A [`metaopt.HypergradientCheck`][].

    **Raises:**

    [`metaopt.SolveError`][] under `throw` where the two disagree; otherwise as
    [`metaopt.hypergradient`][].
    """
    check_count(num_directions, "num_directions")
    check_tolerance(step, "step")
    check_tolerance(rtol, "rtol")
    if step == 0:
        raise ValueError("`step` must be positive, or `None` for a default; got 0.")
    arguments = prepare(problem, hyper, params, train, valid, inner, adjoint, key)
    trainable, static = split_trainable(arguments[1])
    flat, unravel = ravel_pytree(trainable)
    precision = float(jnp.finfo(flat.dtype).eps)
    length = precision ** (1 / 3) if step is None else step
    if rtol is None:
        rtol = 1e-6 if precision < 1e-10 else 1e-2
    directions = jnp.asarray(_directions(trainable, num_directions), flat.dtype)

    gradient, report = differentiate(*arguments, inner, adjoint, model_state)
    slopes = np.asarray(directions @ ravel_pytree(gradient)[0], np.float64)

    def value(shift):
        moved = eqx.combine(unravel(flat + shift), static)
        moved = (arguments[0], moved, *arguments[2:])
        return float(_evaluate(*moved, inner, model_state))

    def central(direction, h):
        return (value(h * direction) - value(-h * direction)) / (2 * h)

    near = np.asarray([central(d, length) for d in directions])
    far = np.asarray([central(d, 2 * length) for d in directions])
    # One step of Richardson extrapolation; what it changes estimates what is left, and
    # the rounding of the values is there in any case.
    differences = (4 * near - far) / 3
    rounding = 2 * precision * abs(float(report.outer_loss)) / length
    noise = np.abs(differences - near) + rounding
    disagreement, size = np.abs(slopes - differences), np.abs(differences)
    floor = np.maximum(noise, np.finfo(np.float64).tiny)
    error = float(np.max(disagreement / np.maximum(size, floor)))
    # Differences that are nothing but noise agree with everything.
    small = disagreement <= rtol * np.max(size)
    decisive = bool(np.all((noise <= 0.1 * size) | small))
    agree = bool(np.all(disagreement <= rtol * size + noise))
    failed = bool(report.result != RESULTS.successful)
    passed = not failed and decisive and agree
    check = HypergradientCheck(slopes, differences, noise, error, rtol, passed, report)
    if throw and not passed:
        cause = f"\n\n{report}" if failed else ""
        raise SolveError(f"{check}{cause}", check)
    return check


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
