"""Leaves of `hyper` whose derivative is zero by construction."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ._adjoint import AbstractAdjoint
from ._dependence import influences, leaves_with_influence
from ._detach import forbid_derivative, unknown_derivative
from ._solver import Outcome
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
    zero = tuple(f"`{n}`" for n, seen, matters in rows if matters and not seen)
    idle = tuple(n for n, seen, matters in rows if not (matters or seen))
    return zero, idle


def zero_message(names: Sequence[str], adjoint: AbstractAdjoint) -> str:
    """The text of the error about a derivative that is zero by construction."""
    listed = ", ".join(names)
    kind = type(adjoint).__name__
    if adjoint.sees_path:
        return (
            f"The derivative with respect to {listed} is zero by construction: it acts on "
            "the result only through operations that have no derivative (rounding, "
            "comparisons, `argmax`, accuracies, updates by sign). Use a smooth measure "
            "in their place, or keep it out of `hyper`."
        )
    return (
        f"The derivative with respect to {listed} is zero by construction under `{kind}`: "
        "it acts on the inner solution only through what this adjoint does not see (the "
        "inner solver's settings, the initial params, an operation with no derivative). "
        "Use `metaopt.UnrolledAdjoint()` or `metaopt.ForwardAdjoint()`, let it enter the "
        "inner loss, or hold it constant there with `jax.lax.stop_gradient`."
    )


def guarded(
    adjoint: AbstractAdjoint,
    solve: Callable[[Hyper], Outcome],
    hyper: Hyper,
    throw: bool,
) -> Outcome:
    """`solve(hyper)`, with an error lying in wait wherever a derivative is zero by
    construction, for derivatives that JAX takes later on, when no report can be given.

    The derivative of the solution raises at leaves of `hyper`, and at arrays that
    `solve` closes over, that are out of reach; that of what else an outcome holds raises
    where it is asked for.
    """
    if adjoint.sees_path:
        return solve(hyper)
    solve = eqx.filter_closure_convert(solve, hyper)
    trainable, static = split_trainable((solve, hyper))

    def outputs(trainable):
        solve, hyper = eqx.combine(trainable, static)
        outcome = solve(hyper)
        return eqx.filter((outcome.params, _unsolved(outcome)), eqx.is_inexact_array)

    seen = influences(lambda t: jax.jvp(outputs, (trainable,), (t,))[1], trainable)
    seen, matters = np.asarray(seen, bool), np.asarray(influences(outputs, trainable), bool)
    hidden = matters & ~seen
    if not hidden.any():
        return solve(hyper)

    # What comes first among the outputs are the params.
    count = len(jax.tree.leaves(jax.eval_shape(outputs, trainable)[0]))
    out_of_reach = matters[:, :count].any(axis=1) & ~seen[:, :count].any(axis=1)
    leaves, structure = jax.tree.flatten(trainable)
    names = _names(leaves, hyper)
    leaves = [
        forbid_derivative(leaf, zero_message([name], adjoint)) if forbidden else leaf
        for leaf, name, forbidden in zip(leaves, names, out_of_reach, strict=True)
    ]
    solve, hyper = eqx.combine(jax.tree.unflatten(structure, leaves), static)
    outcome = solve(hyper)

    dynamic, rest = eqx.partition(_unsolved(outcome), eqx.is_inexact_array)
    values, structure = jax.tree.flatten(dynamic)
    message = UNKNOWN_MESSAGE.format(adjoint=type(adjoint).__name__)
    values = [
        unknown_derivative(
            value,
            [leaf for leaf, hides in zip(leaves, column, strict=True) if hides],
            message=message,
            throw=throw,
        )
        for value, column in zip(values, hidden[:, count:].T, strict=True)
    ]
    dynamic = jax.tree.unflatten(structure, values)
    return eqx.tree_at(
        _unsolved, outcome, eqx.combine(dynamic, rest), is_leaf=lambda x: x is None
    )


def _unsolved(outcome: Outcome) -> tuple[Any, Any, Any]:
    """What comes with a solution and does not satisfy any condition."""
    return outcome.model_state, outcome.aux, outcome.losses


def _names(leaves: Sequence[Any], hyper: Hyper) -> list[str]:
    """Names for the leaves of a function and of `hyper`, the arguments of a solve."""
    names = [f"`{name}`" for name in trainable_names(hyper)]
    closed_over = leaves[: len(leaves) - len(names)]
    return [f"a closed-over array of shape {a.shape}" for a in closed_over] + names


UNKNOWN_MESSAGE = (
    "The model state, auxiliary outputs and losses of an inner solution have no "
    "derivative under `{adjoint}`, which sees the solution alone. Compute what you need "
    "from `solution.value`, or use `metaopt.UnrolledAdjoint()`."
)
START_MESSAGE = (
    "The derivative with respect to the initial params is zero by construction under "
    "`{adjoint}`, which does not see where the inner solver started. Use "
    "`metaopt.UnrolledAdjoint()`, or tie the solution to the initial params by a proximal "
    "term in the inner loss and pass `jax.lax.stop_gradient(params)` as the start."
)
