"""Readable tables, and the words and numbers in them."""

from typing import Any

import equinox as eqx
import jax.core
import numpy as np

from .._core._results import RESULTS


def table(title: str, rows: list[tuple[str, str]], text: str) -> str:
    """A readable table: a title, rows of name and value, and a sentence."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return "\n".join([*lines, "  " + text])


def verdict(result: Any) -> str:
    """A sentence on how a solve ended."""
    values = result._value  # pyright: ignore[reportAttributeAccessIssue]
    if not is_known(values):
        return "The result is known only when the compiled function runs."
    values = np.atleast_1d(np.asarray(values))
    success: Any = RESULTS.successful
    failures = values[values != success._value]
    if values.size == 1 or not failures.size:
        return RESULTS[_item(values[0])]
    text = RESULTS[_item(failures.min())]
    return f"{failures.size} of {values.size} did not succeed. {text}"


def number(x: Any) -> str:
    """A number, the range of several, or a placeholder for one that is not known."""
    if x is None:
        return "-"
    if not is_known(x):
        return "(traced)"
    x = np.asarray(x)
    if x.ndim:
        return f"{x.size} values, {number(x.min())} to {number(x.max())}"
    if np.issubdtype(x.dtype, np.integer):
        return f"{int(x):,}"
    return f"{float(x):.4g}"


def norm(x: Any) -> str:
    """The norm of a hypergradient, which says so if nothing can move by it."""
    is_zero = is_known(x) and np.ndim(x) == 0 and float(x) == 0
    return "0 exactly: it leaves `hyper` where it is" if is_zero else number(x)


def yes_or_no(x: Any) -> str:
    """Whether steps returned to their start, for one run or for several."""
    if not is_known(x):
        return "(traced)"
    x = np.asarray(x)
    if x.ndim:
        return f"{int(x.sum())} of {x.size}"
    return "yes, bit for bit" if x else "NO"


def is_known(x: Any) -> bool:
    """Whether `x` is a number now: no tracer, and no shape or name in its place."""
    return eqx.is_array_like(x) and not isinstance(x, jax.core.Tracer)


def is_positive(x: Any) -> bool:
    """Whether a count is known, and positive anywhere."""
    return x is not None and is_known(x) and bool(np.any(np.asarray(x) > 0))


def is_infinite(x: Any) -> bool:
    """Whether a number is known, and infinite anywhere."""
    return is_known(x) and bool(np.any(np.isinf(np.asarray(x))))


def flat_text(num_flat: Any) -> str:
    """The meaning of a number of gradient entries whose slope was left out."""
    return (
        f"the slope of the update at {number(np.sum(num_flat))} entries of inner "
        "gradients that are zero, about `1 / eps` (to have it, give the optimizer an `eps` "
        "of a hundredth of the largest entry, as in `optax.adam(rate, eps=1e-2)`, or start "
        "away from zero)"
    )


def held_text(names: tuple[str, ...]) -> str:
    """The meaning of leaves that have influence and no derivative."""
    return (
        f"{', '.join(names)} (read behind `stop_gradient` alone, and never changed; "
        "`metaopt.SelfTuningSolver` tunes such leaves)"
    )


def error_text(error: Any, is_bound: bool, allowed: Any = None) -> str:
    """The error of a hypergradient, and how large it may be."""
    if is_infinite(error):
        return "not known: its linear system was not solved"
    text = f"{'at most' if is_bound else 'about'} {number(error)}"
    if allowed is not None:
        text += f" (allowed: {number(allowed)})"
    return text


def _item(value: Any) -> Any:
    template = RESULTS.successful
    return eqx.tree_at(lambda item: item._value, template, np.asarray(value, np.int32))
