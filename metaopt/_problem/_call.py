"""Calls of the user's functions, with checks of their outputs."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._trace_once import call_once
from .._core._tree import leaf_names, split_trainable
from .._core._types import Batch, Hyper, Key, LossFn, ModelState, Params
from .._core._validate import float_as_array
from ._base import AbstractProblem, Evaluation
from ._model_state import StepStates
from ._notes import notes


def initialise(
    problem: AbstractProblem, hyper: Hyper, key: Key, given_state: ModelState = None
) -> tuple[Any, Any]:
    """The initial params and model state (`None` for a problem without one).

    **Raises:**

    `ValueError` for a model state that was given without params, and would go unused.
    """
    if given_state is not None:
        raise ValueError(
            "`model_state` was given without `params`, and `init` of the problem makes "
            "both. Give the `params` that belong to it, or leave it out."
        )
    out = problem.init(hyper, key)
    if problem.has_state:
        params, state = unpack(out, "`init`", ("params", "state"))
        return float_as_array(params, "init(...)"), state
    return float_as_array(out, "init(...)"), None


def start(init_fn: Callable[..., Any] | None, hyper: Hyper, key: Key) -> Any:
    """The initial params of a problem made from plain functions.

    **Raises:**

    `ValueError` for a problem that was made without `init_fn`.
    """
    if init_fn is None:
        raise ValueError(
            "The inner problem was made without `init_fn`, so initial params must be "
            "given: pass `params=...`, or make the inner problem with one, such as "
            "`metaopt.InnerProblem(loss, init_fn=lambda hyper, key: ...)`."
        )
    return init_fn(hyper, key)


def call(
    problem: AbstractProblem,
    fn: LossFn,
    name: str,
    params: Params,
    hyper: Hyper,
    batch: Batch,
    key: Key,
    state: ModelState,
) -> Evaluation:
    """Call a user's function with the arguments that it declares, and split its output."""
    optional = declared(fn, {"key": key})
    if problem.has_state:
        # Outside of the solver's steps, which pick their own.
        state = state.last if isinstance(state, StepStates) else state
        # A copy: `equinox.nn.State` refuses to be read again once it was updated.
        optional["state"] = jax.tree.map(lambda leaf: leaf, state)
    out = call_with_note(fn, name, params, hyper, batch, **optional)
    parts = ["value"]
    if problem.has_state:
        parts.append("state")
    if problem.has_aux:
        parts.append("aux")
    if len(parts) == 1:
        return Evaluation(out, None, None)
    named = dict(zip(parts, unpack(out, f"`{name}`", tuple(parts)), strict=True))
    return Evaluation(named["value"], named.get("state"), named.get("aux"))


def returned(problem: AbstractProblem, out: Evaluation) -> Any:
    """The return value of a loss for `out`: the inverse of `call`."""
    parts = (out.value,)
    if problem.has_state:
        parts += (out.state,)
    if problem.has_aux:
        parts += (out.aux,)
    return parts if len(parts) > 1 else out.value


def call_with_note(fn: LossFn, name: str, params, hyper, batch, **optional) -> Any:
    """Call a user's function, whose exceptions stay its own.

    **Raises:**

    `ValueError` for a function that does not take these arguments, and for one that fails
    unless `params` and `hyper` change places.
    """
    check_signature(fn, name, ("params", "hyper", "batch"), optional)
    try:
        return call_once(fn, params, hyper, batch, **optional)
    except Exception as error:
        if isinstance(error, _MISPLACED) and _works(fn, hyper, params, batch, **optional):
            raise ValueError(
                f"`{name}(params, hyper, batch)` failed, and does not with `params` and "
                "`hyper` in each other's place. Write it with `params` first, and name "
                "both where you call metaopt: `hyper=..., params=...`."
            ) from error
        for note in notes(error, name, hyper, batch):
            error.add_note(note)
        raise


def check_signature(
    fn: LossFn, name: str, positional: tuple[str, ...], optional: dict[str, Any]
) -> None:
    """Raise a `ValueError` unless a user's function takes the arguments it is given."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some callables have no signature
        return
    try:
        signature.bind(*positional, **optional)
    except TypeError as error:
        batch = "" if positional[-1] != "batch" else " (`batch` is `None` without data)"
        named = f"{name}({', '.join(positional)})"
        raise ValueError(
            f"`{name}` is called as `{named}`{batch}, and takes `{signature}`: {error}. "
            "It may declare `key` and `state` besides."
        ) from error


# Errors of a function that is given one pytree in the place of another.
_MISPLACED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def _works(fn: LossFn, *args: Any, **optional: Any) -> bool:
    try:
        fn(*args, **optional)
    except Exception:
        return False
    return True


def check_scalar(value: Any, whose: str) -> None:
    """Raise a `ValueError` unless `value` is a floating-point scalar array."""
    if isinstance(value, (tuple, list)):
        raise ValueError(
            f"{whose} returned {describe(value)}. It must return one floating-point "
            "scalar; to return more beside it, declare `has_aux=True` (or `has_state`)."
        )
    is_array = isinstance(value, (jax.Array, np.ndarray, np.generic))
    if not is_array or not jnp.issubdtype(value.dtype, jnp.inexact):
        raise ValueError(
            f"{whose} returned {describe(value)}. It must return a floating-point "
            "scalar that is computed from its arguments with `jax.numpy`."
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise ValueError(f"{whose} returned a complex number; return its real part.")
    if value.shape != ():
        raise ValueError(
            f"{whose} returned {describe(value)}. It must return a scalar: take "
            "`jnp.mean` or `jnp.sum` of it."
        )


def check_like(value: Any, params: Params, whose: str) -> None:
    """Raise a `ValueError` unless `value` has structure, shapes, dtypes of `params`."""
    got, want = split_trainable(value)[0], split_trainable(params)[0]
    if jax.tree.structure(got) != jax.tree.structure(want):
        raise ValueError(
            f"{whose} returned a pytree of structure {jax.tree.structure(got)}; it must "
            f"return one like `params`, {jax.tree.structure(want)}."
        )
    names = leaf_names(want, "params")
    for name, a, b in zip(names, jax.tree.leaves(got), jax.tree.leaves(want)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"{whose} returned {describe(a)} in the place of `{name}`, which is "
                f"{describe(b)}. Shapes and dtypes must agree."
            )


def declared(fn: LossFn, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keyword arguments that `fn` names in its signature."""
    try:
        names = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return {}
    return {name: value for name, value in offered.items() if name in names}


def unpack(out: Any, whose: str, parts: tuple[str, ...]) -> tuple[Any, ...]:
    """`out`; raises a `ValueError` unless it is a tuple of as many things as `parts`."""
    if not isinstance(out, tuple) or len(out) != len(parts):
        raise ValueError(
            f"{whose} must return the tuple ({', '.join(parts)}), because of `has_aux` "
            f"or `has_state`; it returned {describe(out)}."
        )
    return out


def describe(x: Any) -> str:
    """Describe an argument or a return value for an error message."""
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of length {len(x)}"
    if eqx.is_array(x):
        return f"an array of shape {x.shape} and dtype {x.dtype}"
    return f"{x!r} of type `{type(x).__name__}`"
