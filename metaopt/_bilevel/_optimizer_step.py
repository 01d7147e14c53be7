"""One step of an optimizer."""

from typing import Any

import optax

from .._core._types import FloatScalar, PyTree, Vector


def optimizer_step(
    transform: optax.GradientTransformation,
    gradient: Vector,
    state: PyTree,
    variables: Vector,
    value: FloatScalar,
) -> tuple[Any, PyTree]:
    """Variables after one step of their optimizer, and its state."""
    optimizer = optax.with_extra_args_support(transform)
    updates, state = optimizer.update(gradient, state, variables, value=value)
    return optax.apply_updates(variables, updates), state
