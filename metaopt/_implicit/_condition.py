"""The optimality at an inner solution, in a precision that carries a linear system."""

from collections.abc import Callable

import jax

from .._core._tree import same_structs, split_trainable, tree_structs, tree_widened
from .._core._types import Hyper, Params, Vector
from .._core._warn import warn
from .._solver import Optimality


def widened_condition(
    optimality: Callable[[bool], Optimality], params: Params, hyper: Hyper
) -> tuple[Optimality, Vector]:
    """Trace an optimality once, and return it with the point to linearise it at.

    Params of half precision are widened to float32, unless the problem insists on their
    dtype.

    **Arguments:**

    - `optimality`: `optimality(widen)` returns the condition; with `widen=True` the arrays
        of half precision that it reads are in float32 as well.
    - `params`, `hyper`: the point.

    **Returns:**

    The condition, whose arrays are leaves, and the trainable part of `params`.
    """
    narrow, outer_variables = split_trainable(params)[0], split_trainable(hyper)[0]
    widened = tree_widened(narrow)
    plain = optimality(False)
    if tree_structs(narrow) == tree_structs(widened):
        return plain.converted(narrow, outer_variables), narrow
    condition = optimality(True)
    try:
        found = jax.eval_shape(condition, widened, outer_variables)
    except (TypeError, ValueError):
        found = None
    if found is not None and same_structs(found, widened):
        return condition.converted(widened, outer_variables), widened
    warn(
        "The inner problem cannot be evaluated in float32 at params of half precision: "
        "something in it has a dtype of its own. The linear system is solved in half "
        "precision. Write `x.astype(params.dtype)` for arrays that the loss makes or "
        "closes over.",
    )
    return plain.converted(narrow, outer_variables), narrow
