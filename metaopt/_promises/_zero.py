"""Derivatives that are zero by construction, a property of the traced program."""

import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax

from .._core._tree import split_trainable
from .._core._types import Hyper, PyTree, Vector
from .._jaxpr._dependence import dependence, leaves_with_influence
from ._both_losses import BothLosses, check_tunable, trainable_names


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
    """A description of the part of the initial params that the derivative leaves out.

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
