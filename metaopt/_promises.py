"""Promises that every bilevel solver keeps: derivatives that are zero by construction,
losses that depend on nothing, and numbers that are not finite.

The first two are properties of the traced program and are checked while it is traced. The
third is a property of the numbers and travels as a result code.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ._dependence import dependence, depends, leaves_with_influence
from ._problem import BilevelProblem, initialise
from ._results import first_failure, mask_result, RESULTS
from ._tree import leaf_names, split_trainable, tree_all_finite, tree_where_arrays
from ._types import (
    Batch,
    BoolScalar,
    FloatScalar,
    Hyper,
    Key,
    ModelState,
    Params,
    PyTree,
    Vector,
)


class BothLosses(eqx.Module):
    """The two losses at one point: params, outer variables, one batch for each loss.

    **Attributes:**

    - `problem`, `params`, `hyper`, `model_state`: the problem and the point.
    - `train`, `valid`: a batch for the inner and one for the outer loss.
    - `key`: one draw of the randomness of both.
    """

    problem: BilevelProblem
    params: Params
    hyper: Hyper
    train: Batch
    valid: Batch
    key: Key
    model_state: ModelState

    @property
    def names(self) -> list[str]:
        """The name of each leaf of `hyper` that can be tuned."""
        return trainable_names(self.hyper)

    @property
    def trainable(self) -> Vector:
        """The part of `hyper` that can be tuned."""
        return split_trainable(self.hyper)[0]

    def field(self, trainable: Vector) -> Vector:
        """The field of the inner problem as a function of the outer variables."""
        inner, at = self.problem.inner, self._hyper_at(trainable)
        state = self.model_state
        return inner.field(self.params, at, self.train, self.key, state)[0]

    def outer(self, trainable: Vector) -> FloatScalar:
        """The outer loss as a function of the outer variables."""
        return self._outer(self.params, self._hyper_at(trainable))

    def start(self, trainable: Vector) -> Vector:
        """The initial params that the problem draws, as a function of the outer
        variables."""
        at = self._hyper_at(trainable)
        start = initialise(self.problem.inner, at, self.key)
        return eqx.filter(start, eqx.is_inexact_array)

    def check_losses(self) -> None:
        """Raises a `ValueError` where a loss does not depend on the params."""
        moving, fixed = split_trainable(self.params)
        inner = self.problem.inner

        def inner_loss(moving):
            params = eqx.combine(moving, fixed)
            args = params, self.hyper, self.train, self.key, self.model_state
            return inner.evaluate(*args).value

        if inner.has_loss:
            check_inner_loss(inner_loss, moving)
        outer_loss = lambda moving: self._outer(eqx.combine(moving, fixed), self.hyper)
        check_outer_loss(outer_loss, moving)

    def _outer(self, params: Params, hyper: Hyper) -> FloatScalar:
        args = params, hyper, self.valid, self.key, self.model_state
        return self.problem.evaluate_outer(*args)[0]

    def _hyper_at(self, trainable: Vector) -> Hyper:
        return eqx.combine(trainable, split_trainable(self.hyper)[1])


def trainable_names(hyper: Hyper, root: str = "hyper") -> list[str]:
    """The name of each leaf of `hyper` that can be tuned."""
    return leaf_names(split_trainable(hyper)[0], root)


# Losses that depend on nothing


def check_inner_loss(loss: Callable[[PyTree], PyTree], params: PyTree) -> None:
    """Raises a `ValueError` unless the inner loss depends on the params."""
    if not depends(loss, params):
        raise ValueError(
            "The inner loss does not depend on `params`, so there is nothing to "
            "solve. Compute it from its first argument."
        )


def check_outer_loss(loss: Callable[[PyTree], PyTree], params: PyTree) -> None:
    """Raises a `ValueError` unless the outer loss depends on the params."""
    if not depends(loss, params):
        raise ValueError(
            "The outer loss does not depend on `params`, so the inner problem has no "
            "effect on it. Compute it from its first argument."
        )


def check_tunable(
    names: Sequence[str],
    idle: Sequence[str],
    held: Sequence[str] = (),
    *,
    also: str = "",
    remark: str = "",
) -> None:
    """Raises a `ValueError` where no leaf of `hyper` has a derivative.

    **Arguments:**

    - `names`: all leaves of `hyper`.
    - `idle`: those without influence.
    - `held`: those that are held constant by a `stop_gradient` of the user.
    - `also`, `remark`: more about the solver, within the sentence and after it.
    """
    if len(idle) + len(held) < len(names):
        return
    if held:
        raise ValueError(
            f"`{'`, `'.join(held)}` acts on the losses only behind "
            "`jax.lax.stop_gradient`, as the rate of `equinox.nn.Dropout` does: it has "
            "influence and no derivative, so there is nothing that a hypergradient could "
            "tune. Use `metaopt.SelfTuningSolver`, which tunes such leaves from samples, "
            "or take the `stop_gradient` away."
        )
    raise ValueError(
        f"Neither loss depends on `hyper`{also}: there is nothing to tune. Compute the "
        f"inner or the outer loss from `hyper`.{remark}"
    )


# Derivatives that are zero by construction


def split_unreached(
    reached: Sequence[bool], primal: Callable[[Hyper], PyTree], hyper: Hyper
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of leaves that are zero by construction, of those without influence, and of
    those whose only influence is held constant by a `stop_gradient` of the user.

    **Arguments:**

    - `reached`: for each trainable leaf, whether the derivative can see it.
    - `primal`: what is differentiated; arrays out.
    - `hyper`: the outer variables.
    """
    names = trainable_names(hyper)
    if all(reached):
        return (), (), ()
    trainable, static = split_trainable(hyper)
    of_trainable = lambda trainable: primal(eqx.combine(trainable, static))
    matters = leaves_with_influence(of_trainable, trainable)
    acts = leaves_with_influence(of_trainable, trainable, despite_stop_gradient=True)
    rows = list(zip(names, reached, matters, acts, strict=True))
    zero = tuple(f"`{n}`" for n, seen, matters, _ in rows if matters and not seen)
    idle = tuple(n for n, seen, matters, acts in rows if not (acts or matters or seen))
    held = tuple(n for n, seen, matters, acts in rows if acts and not (matters or seen))
    return zero, idle, held


def check_seen(
    reached: Sequence[bool],
    primal: Callable[[Hyper], PyTree],
    hyper: Hyper,
    message: Callable[[Sequence[str]], str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of leaves without influence, and of those that the user holds constant.

    **Arguments:**

    - `reached`, `primal`, `hyper`: as for `split_unreached`.
    - `message`: the text of the error about some leaves.

    **Raises:**

    `ValueError` for leaves that act on the result of `primal` and are not seen.
    """
    zero, idle, held = split_unreached(reached, primal, hyper)
    if zero:
        raise ValueError(message(zero))
    return idle, held


def check_start_seen(
    names: Sequence[str],
    in_start: Sequence[bool],
    in_inner: Sequence[bool],
    solver: str,
    reason: str,
) -> tuple[str, ...]:
    """A description of what is left out of the derivative of the initial params.

    **Arguments:**

    - `names`: the leaves of `hyper`.
    - `in_start`, `in_inner`: whether each acts on the initial params and on the field of
        the inner problem.
    - `solver`: the name of the solver, whose derivative does not see the start.
    - `reason`: the reason, a clause.

    **Raises:**

    `ValueError` for leaves whose only way to the inner solution is by its start.
    """
    rows = zip(names, in_start, in_inner, strict=True)
    zero = [f"`{name}`" for name, start, inner in rows if start and not inner]
    if zero:
        raise ValueError(
            f"The derivative with respect to {', '.join(zero)} is zero by construction "
            f"under `{solver}` where it acts on the initial params, {reason}. Use "
            "`metaopt.NestedSolver` with `metaopt.UnrolledAdjoint()`."
        )
    return ("the initial params",) if any(in_start) else ()


def no_derivative_message(names: Sequence[str]) -> str:
    """The text of the error about leaves that act without a derivative."""
    return (
        f"The derivative with respect to {', '.join(names)} is zero by construction: it "
        "acts on the result only through operations that have no derivative (rounding, "
        "comparisons, `argmax`, accuracies, updates by sign, random draws such as "
        "those of dropout). Use a smooth measure in their place, tune it from samples "
        "with `metaopt.SelfTuningSolver`, or keep it out of `hyper`."
    )


def leaves_with_slope(fn: Callable[[Vector], PyTree], x: Vector) -> list[bool]:
    """For each leaf of `x`, whether a cotangent of `fn(x)` can come back to it."""
    value, pullback = jax.vjp(fn, x)
    flags = jax.make_jaxpr(lambda cotangent: pullback(cotangent)[0])(value)
    return dependence(flags.jaxpr, [True] * len(flags.jaxpr.invars))


def check_losses_of_hyper(
    at: BothLosses, *, drawn: bool, solver: str, reason: str
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The promises of a solver that differentiates the losses at the params at hand.

    Each way in which a leaf acts must be seen: a leaf that the outer loss reads as well
    would hide that its way through the inner problem is not.

    **Arguments:**

    - `at`: the two losses.
    - `drawn`: whether the problem's `init` drew the initial params.
    - `solver`, `reason`: as for `check_start_seen`.

    **Returns:**

    The names of leaves without influence, those of leaves that the user holds constant,
    and a description of what is left out of the derivative of the initial params.

    **Raises:**

    `ValueError` for a loss that depends on nothing, and for leaves whose derivative is
    zero by construction.
    """
    at.check_losses()
    of_trainable = lambda fn: lambda hyper: fn(split_trainable(hyper)[0])
    in_inner = leaves_with_slope(at.field, at.trainable)
    in_outer = leaves_with_slope(at.outer, at.trainable)
    check_seen(in_inner, of_trainable(at.field), at.hyper, no_derivative_message)
    left_out = ()
    in_start = [False] * len(in_inner)
    if drawn:
        in_start = leaves_with_influence(at.start, at.trainable)
        left_out = check_start_seen(at.names, in_start, in_inner, solver, reason)
    both = of_trainable(lambda trainable: (at.field(trainable), at.outer(trainable)))
    reached = list(itertools.starmap(bool.__or__, zip(in_inner, in_outer, strict=True)))
    idle, held = check_seen(reached, both, at.hyper, no_derivative_message)
    check_tunable(at.names, idle, held)
    return idle, held, left_out


# Numbers that are not finite


def judged(
    inner: Any,
    outer_is_finite: BoolScalar,
    gradient_is_finite: BoolScalar,
    linear: Any = RESULTS.successful,
) -> Any:
    """The first failure on the way of the data.

    **Arguments:**

    - `inner`, `linear`: the results of the inner solve and of the linear system.
    - `outer_is_finite`: whether the outer loss is finite.
    - `gradient_is_finite`: whether the hypergradient is.
    """
    return first_failure(
        inner,
        mask_result(jnp.logical_not(outer_is_finite), RESULTS.outer_nonfinite),
        linear,
        mask_result(jnp.logical_not(gradient_is_finite), RESULTS.hypergradient_nonfinite),
    )


def all_finite(*trees: PyTree) -> BoolScalar:
    """Whether no floating-point number in these is infinite or NaN."""
    return tree_all_finite(trees)


def keep_where(good: BoolScalar) -> Callable[[PyTree, PyTree], PyTree]:
    """A function of a new and an old pytree, which returns the new one where `good` holds.

    A number that is not finite must reach neither `hyper`, nor the moments of its
    optimizer, nor the start of the next step.
    """
    return lambda new, old: tree_where_arrays(good, new, old)
