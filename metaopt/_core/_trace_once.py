"""Users' functions are traced once for each kind of arguments, not at every use."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

from ._static import Static


_programs: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar(
    "metaopt programs", default=None
)


@contextlib.contextmanager
def tracing_once() -> Iterator[None]:
    """Within it, `call_once` traces a function once for each kind of arguments.

    No longer than one call of the user: a function may read a global that changes after
    that.
    """
    if _programs.get() is not None:
        yield
        return
    token = _programs.set({})
    try:
        yield
    finally:
        _programs.reset(token)


def call_once(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, or evaluate the program that an earlier call of it left behind.

    **Arguments:**

    - `fn`: a function that can be traced. Arrays in it, as in a bound method of an
        `equinox.Module`, are among its arguments.
    - `args`, `kwargs`: handed to it.

    **Returns:**

    The pytree that it returns.
    """
    programs = _programs.get()
    if programs is None:
        return fn(*args, **kwargs)
    try:
        arrays, rest = Static.split((fn, args, kwargs))
    except TypeError:
        return fn(*args, **kwargs)  # holds an object that cannot be hashed
    kind = rest, tuple(map(jax.typeof, arrays))
    if kind not in programs:
        programs[kind] = _traced(rest, arrays)
    program, out = programs[kind]
    values = jax.extend.core.jaxpr_as_fun(program)(*arrays)
    # A constant result is a literal, which is no array.
    avals = program.out_avals
    return out.joined([_as_array(x, aval) for x, aval in zip(values, avals, strict=True)])


def _as_array(x: Any, aval: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x, aval.dtype)


def _traced(rest: Static, arrays: list[Any]) -> tuple[Any, Static]:
    found: list[Static] = []

    def flat(*arrays):
        fn, args, kwargs = rest.joined(list(arrays))
        out, static = Static.split(fn(*args, **kwargs))
        found.append(static)
        return out

    return jax.make_jaxpr(flat)(*arrays), found[0]
