"""The leaves of `hyper` that a self-tuning run can see."""

import equinox as eqx
import jax

from .._best_response import conversion
from .._dependence import check_inner_loss, check_outer_loss, leaves_with_influence
from .._problem import BilevelProblem, initialise
from .._tree import leaf_names, split_trainable
from .._types import Batch, Hyper, Key, ModelState, Params


def unreached_leaves(
    problem: BilevelProblem,
    params: Params,
    hyper: Hyper,
    train: Batch,
    valid: Batch,
    key: Key,
    state: ModelState,
    drawn: bool,
) -> tuple[tuple[str, ...], tuple[str, ...], list[bool]]:
    """The leaves of `hyper` that influence nothing; what a learned response leaves out,
    in words; and for each leaf whether the inner solution depends on it. `drawn` says
    whether the problem's `init` drew the initial params.

    **Raises:**

    `ValueError` for a leaf whose derivative is zero by construction.
    """
    names = leaf_names(split_trainable(hyper)[0], "hyper")
    trainable, rest = split_trainable(hyper)
    moving, fixed = split_trainable(params)

    def loss_of(moving, at):
        full = eqx.combine(moving, fixed)
        return problem.inner.evaluate(full, at, train, key, state).value

    def gradient(trainable):
        at = eqx.combine(trainable, rest)
        return jax.grad(loss_of)(moving, at)

    def outer(trainable):
        at = eqx.combine(trainable, rest)
        return problem.evaluate_outer(params, at, valid, key, state)[0]

    def start(trainable):
        at = eqx.combine(trainable, rest)
        return eqx.filter(initialise(problem.inner, at, key), eqx.is_inexact_array)

    of_inner = lambda moving: loss_of(moving, hyper)
    of_outer = lambda moving: problem.evaluate_outer(
        eqx.combine(moving, fixed), hyper, valid, key, state
    )[0]
    check_inner_loss(of_inner, moving)
    check_outer_loss(of_outer, moving)
    # The response learns from samples: what has no derivative acts as well. (The rate of
    # `equinox.nn.Dropout` is behind a `stop_gradient`.)
    in_inner = leaves_with_influence(gradient, trainable, despite_stop_gradient=True)
    in_outer = leaves_with_influence(outer, trainable)
    in_start = [False] * len(names)
    if drawn:
        in_start = leaves_with_influence(start, trainable)
    rows = list(zip(names, in_inner, in_outer, in_start, strict=True))
    zero = [f"`{name}`" for name, a, b, c in rows if c and not a]
    if zero:
        raise ValueError(
            f"The derivative with respect to {', '.join(zero)} is zero by construction "
            "under `SelfTuningSolver` where it acts on the initial params, and a "
            "best-response network answers to what enters the inner loss. Use "
            "`metaopt.NestedSolver` with `metaopt.UnrolledAdjoint()`."
        )
    idle = tuple(name for name, a, b, c in rows if not (a or b or c))
    if len(idle) == len(names):
        raise ValueError(
            "Neither loss depends on `hyper`: there is nothing to tune. Compute the inner "
            "or the outer loss from `hyper`. (A best-response network cannot tune learning "
            "rates and other settings of optimizers.)"
        )
    left_out = ["what the response has not learned or cannot represent"]
    left = conversion(params).left
    if left:
        listed = ", ".join(name for name, _ in left[:4]) + (", ..." if left[4:] else "")
        left_out.append(f"the response of {listed}")
    if any(in_start):
        left_out.append("the initial params")
    return idle, tuple(left_out), in_inner
