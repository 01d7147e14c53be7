"""The derivative of a run that is undone, as a rule for JAX."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..._core._tree import split_trainable
from ..._jaxpr._detach import forbid_derivative
from .._loop import LoopState
from ._run import AbstractRun, Inputs, Reached


Outputs = tuple[Reached, LoopState]


def once(*arguments: Any) -> Any:
    """The arrays of a run, of which no second derivative can be taken."""
    floats, rest = split_trainable(arguments)
    return eqx.combine(forbid_derivative(floats, _ONCE), rest)


def pushed_forward(
    run: AbstractRun, inputs: Inputs, tangents: tuple[Any, Any], throw: bool
) -> tuple[Outputs, Any]:
    """The result of a run, and its tangent, which can be transposed alone.

    **Arguments:**

    - `tangents`: of the run and the inputs, with `None` for zero.
    - `throw`: whether a way back that fails raises; otherwise the derivative is NaN.
    """
    run, inputs = once(run, inputs)
    record = run.record(inputs)
    reached, rest = record.split()
    of_run, of_inputs = tangents
    moving = of_run.evaluate, of_inputs
    mask = jax.tree.map(
        lambda t, _: t is not None,
        moving,
        (run.evaluate, inputs),
        is_leaf=lambda x: x is None,
    )

    def forward(_, tangent):
        # Traced in reverse mode as well, so this may raise only when it runs.
        first = jax.tree.leaves(tangent)[0]
        always = jnp.all(first == first) | jnp.any(first != first)
        return eqx.error_if(tangent, always, _REVERSE_ONLY)

    def backward(_, cotangent):
        _, of_reached = cotangent
        undone = run.undo(inputs, record, of_reached, (mask[0], mask[1].others))
        into = eqx.filter(undone.cotangents, mask)
        if throw:
            into = run.failure.error_if(into, jnp.logical_not(undone.succeeded))
        return into, jax.tree.map(jnp.zeros_like, of_reached)

    # A linear map of the inputs to what was reached, as one on both of them: JAX can
    # transpose and batch it. All of its argument must depend on the tangents.
    zero = 0 * sum(jnp.sum(t) for t in jax.tree.leaves(moving))
    nothing = jax.tree.map(
        lambda a: jnp.broadcast_to(zero, a.shape).astype(a.dtype), reached
    )
    _, tangent = jax.lax.custom_linear_solve(
        lambda x: x, (moving, nothing), forward, backward
    )
    return (reached, rest), (tangent, jax.tree.map(lambda _: None, rest))


@eqx.filter_custom_jvp
def with_reverse_derivative(run: AbstractRun, inputs: Inputs, *, throw: bool) -> Outputs:
    """The result of a run, differentiable once, in reverse mode.

    **Arguments:**

    - `throw`: as in `pushed_forward`.
    """
    return run.record(inputs).split()


@with_reverse_derivative.def_jvp
def _(primals, tangents, *, throw):
    run, inputs = primals
    return pushed_forward(run, inputs, tangents, throw)


_ONCE = (
    "`ReversibleAdjoint` gives first derivatives, and a derivative of one was asked for. "
    "Use `metaopt.UnrolledAdjoint()`."
)
_REVERSE_ONLY = (
    "`ReversibleAdjoint` gives derivatives in reverse mode (`jax.grad`, `jax.vjp`, "
    "`jax.jacrev`), and one in forward mode was asked for. Use `metaopt.ForwardAdjoint()`"
    ", or `metaopt.UnrolledAdjoint()`."
)
