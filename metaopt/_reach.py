"""Leaves of `hyper` whose derivative is zero by construction."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax

from ._adjoint import AbstractAdjoint
from ._dependence import influences
from ._detach import forbid_derivative, unknown_derivative
from ._promises import no_derivative_message, trainable_names
from ._solver import Outcome
from ._tree import split_trainable
from ._types import Hyper


def zero_message(
    names: Sequence[str], adjoint: AbstractAdjoint, root: str = "hyper"
) -> str:
    """The text of the error about a derivative that is zero by construction."""
    listed = ", ".join(names)
    kind = type(adjoint).__name__
    if root != "hyper":
        return (
            f"The derivative with respect to {listed} is zero by construction under "
            f"`{kind}`: it acts on the fixed point only through operations that have no "
            "derivative (rounding, comparisons, `argmax`), or that this adjoint does not "
            "see. Use a smooth operation in their place, or hold it constant in the cell "
            "with `jax.lax.stop_gradient`."
        )
    if not adjoint.sees_inner_loss:
        return (
            f"The derivative with respect to {listed} is zero by construction under "
            f"`{kind}`: it acts through the gradients of the inner loss, which are held "
            "constant. Use `metaopt.UnrolledAdjoint()`."
        )
    if adjoint.sees_path:
        return no_derivative_message(names)
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
    root: str = "hyper",
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
    matters = influences(outputs, trainable)
    # What comes first among the outputs are the params.
    count = len(jax.tree.leaves(jax.eval_shape(outputs, trainable)[0]))
    leaves, structure = jax.tree.flatten(trainable)
    leaves = [
        forbid_derivative(leaf, zero_message([name], adjoint, root))
        if any(some[:count]) and not any(known[:count])
        else leaf
        for leaf, name, some, known in zip(
            leaves, _names(leaves, hyper, root), matters, seen, strict=True
        )
    ]
    solve, hyper = eqx.combine(jax.tree.unflatten(structure, leaves), static)
    outcome = solve(hyper)
    hidden = [
        [some and not known for some, known in zip(*rows, strict=True)]
        for rows in zip(matters, seen, strict=True)
    ]
    hides = [
        [leaf for leaf, row in zip(leaves, hidden, strict=True) if row[index]]
        for index in range(count, len(hidden[0]))
    ]
    return _with_unknown_derivatives(adjoint, outcome, hides, throw)


def _with_unknown_derivatives(
    adjoint: AbstractAdjoint, outcome: Outcome, hides: list[list[Any]], throw: bool
) -> Outcome:
    """`hides` are, for each output beside the params, the leaves that act on it unseen."""
    dynamic, static = eqx.partition(_unsolved(outcome), eqx.is_inexact_array)
    values, structure = jax.tree.flatten(dynamic)
    message = UNKNOWN_MESSAGE.format(adjoint=type(adjoint).__name__)
    values = [
        unknown_derivative(value, leaves, message=message, throw=throw)
        for value, leaves in zip(values, hides, strict=True)
    ]
    unsolved = eqx.combine(jax.tree.unflatten(structure, values), static)
    return eqx.tree_at(_unsolved, outcome, unsolved, is_leaf=lambda x: x is None)


def _unsolved(outcome: Outcome) -> tuple[Any, Any, Any, Any]:
    """The parts of an outcome that satisfy no condition."""
    return outcome.model_state, outcome.aux, outcome.losses, outcome.solver_state


def _names(leaves: Sequence[Any], hyper: Hyper, root: str) -> list[str]:
    """Names for the leaves of a function and of `hyper`, the arguments of a solve."""
    names = [f"`{name}`" for name in trainable_names(hyper, root)]
    closed_over = leaves[: len(leaves) - len(names)]
    return [f"a closed-over array of shape {a.shape}" for a in closed_over] + names


UNKNOWN_MESSAGE = (
    "The model state, auxiliary outputs, losses and solver state of an inner solution have "
    "no derivative under `{adjoint}`, which sees the solution alone. Compute what you need "
    "from `solution.value`, or use `metaopt.UnrolledAdjoint()`."
)
START_MESSAGE = (
    "The derivative with respect to the initial params is zero by construction under "
    "`{adjoint}`, which does not see where the inner solver started. Use "
    "`metaopt.UnrolledAdjoint()`, or tie the solution to the initial params by a proximal "
    "term in the inner loss and pass `jax.lax.stop_gradient(params)` as the start."
)
