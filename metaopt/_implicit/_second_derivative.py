"""Refusing the derivative of a linear solution that leaves something out."""

from typing import Any

import equinox as eqx

from .._jaxpr._detach import forbid_derivative


def without_second_derivative(left_out: tuple[str, ...], tree: Any) -> Any:
    """Return `tree`, whose derivative raises where a linear solution leaves something out.

    The derivative of a rough linear solution is not that of the exact one.
    """
    if not left_out:
        return tree
    arrays, static = eqx.partition(tree, eqx.is_array)
    message = _NO_SECOND_DERIVATIVE.format(left_out="; ".join(left_out))
    return eqx.combine(forbid_derivative(arrays, message), static)


_NO_SECOND_DERIVATIVE = (
    "The hypergradient leaves something out by request ({left_out}), and its own "
    "derivative is not known: that of the exact linear solution would belong to another "
    "number. For second derivatives use a linear solver with a tolerance and without "
    "damping, such as `metaopt.CG(rtol=1e-10)`, with `metaopt.linear.ExactCurvature()`, or "
    "`metaopt.UnrolledAdjoint()`."
)
