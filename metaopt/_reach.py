"""Leaves of `hyper` whose derivative is zero by construction."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax

from ._adjoint import AbstractAdjoint
from ._dependence import leaves_with_derivative, leaves_with_influence
from ._detach import forbid_derivative
from ._tree import leaf_names, split_trainable
from ._types import Hyper, PyTree


def trainable_names(hyper: Hyper) -> list[str]:
    """The name of each leaf of `hyper` that can be tuned."""
    return leaf_names(split_trainable(hyper)[0], "hyper")


def split_unreached(
    reached: Sequence[bool], primal: Callable[[Hyper], PyTree], hyper: Hyper
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of leaves that are zero by construction, and of those without influence.

    **Arguments:**

    - `reached`: for each trainable leaf, whether the derivative can see it.
    - `primal`: what is differentiated; arrays out.
    - `hyper`: the outer variables.
    """
    names = trainable_names(hyper)
    if all(reached):
        return (), ()
    trainable, static = split_trainable(hyper)
    influences = leaves_with_influence(
        lambda trainable: primal(eqx.combine(trainable, static)), trainable
    )
    rows = list(zip(names, reached, influences, strict=True))
    zero = tuple(n for n, seen, matters in rows if matters and not seen)
    idle = tuple(n for n, seen, matters in rows if not (matters or seen))
    return zero, idle


def zero_message(names: Sequence[str], adjoint: AbstractAdjoint) -> str:
    """The text of the error about a derivative that is zero by construction."""
    listed = ", ".join(f"`{name}`" for name in names)
    return (
        f"The derivative with respect to {listed} is zero by construction under "
        f"`{type(adjoint).__name__}`: it acts on the result only through what this "
        "adjoint does not see (the inner solver's settings, the initial params, an "
        "operation with no derivative). Use `metaopt.UnrolledAdjoint()` or "
        "`metaopt.ForwardAdjoint()`, let it enter the inner or the outer loss, or keep "
        "it out of what is differentiated with `jax.lax.stop_gradient`."
    )


def guard_hyper(
    adjoint: AbstractAdjoint, solve: Callable[[Hyper], PyTree], hyper: Hyper
) -> Hyper:
    """`hyper`, with an error lying in wait at each leaf that is zero by construction.

    For derivatives that JAX takes later on, when no report can be given.
    """
    if adjoint.sees_path:
        return hyper
    trainable, static = split_trainable(hyper)
    full = lambda trainable: eqx.combine(trainable, static)
    reached = leaves_with_derivative(
        lambda trainable: eqx.filter(solve(full(trainable)), eqx.is_inexact_array),
        trainable,
    )
    zero, _ = split_unreached(
        reached, lambda h: eqx.filter(solve(h), eqx.is_inexact_array), hyper
    )
    leaves, structure = jax.tree.flatten(trainable)
    guarded = [
        forbid_derivative(leaf, zero_message([name], adjoint)) if name in zero else leaf
        for leaf, name in zip(leaves, trainable_names(hyper), strict=True)
    ]
    return eqx.combine(jax.tree.unflatten(structure, guarded), static)


START_MESSAGE = (
    "The derivative with respect to the initial params is zero by construction under "
    "`{adjoint}`, which does not see where the inner solver started. Use "
    "`metaopt.UnrolledAdjoint()`, or tie the solution to the initial params by a proximal "
    "term in the inner loss and pass `jax.lax.stop_gradient(params)` as the start."
)
