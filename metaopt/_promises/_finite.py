"""Numbers that are not finite: a result code, and a step that is not taken."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._results import first_failure, mask_result, RESULTS
from .._core._tree import tree_all_finite, tree_where_arrays
from .._core._types import BoolScalar, PyTree


def judged(
    inner: Any,
    outer_is_finite: BoolScalar,
    gradient_is_finite: BoolScalar,
    linear: Any = RESULTS.successful,
) -> Any:
    """The first failure, in the order of the computation.

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


def overflowed(new: PyTree, old: PyTree) -> BoolScalar:
    """Whether a number that was finite is not any more.

    The states of some optimizers begin at infinity, which is no failure.

    **Arguments:**

    - `new`, `old`: pytrees of one structure.
    """
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    lost = [
        jnp.any(jnp.isfinite(a) & ~jnp.isfinite(b))
        for b, a in pairs
        if eqx.is_inexact_array(b)
    ]
    return jnp.any(jnp.stack(lost)) if lost else jnp.zeros((), bool)
