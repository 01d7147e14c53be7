"""Compiled functions of pytrees, which are found again for arguments of equal behaviour."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from ._anew import Programs
from ._static import Static


_TOO_LITTLE_MEMORY = (
    "The program takes more memory than the process or the device has left. "
    "`metaopt.memory.memory_report` tells what a hypergradient takes before it is run; "
    '`metaopt.UnrolledAdjoint(memory="2GiB")` keeps to a budget, implicit adjoints store '
    "no path, and `metaopt.Minibatches` take less than all rows at once."
)


def jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function whose first argument is static, with errors in their own words.

    `jax.jit` takes less time to call than `equinox.filter_jit`, which alone shows the
    message of `equinox.error_if`.

    **Arguments:**

    - `function`: a function of a hashable object and of lists of arrays.

    **Returns:**

    The compiled function. Its result is there when it returns.
    """
    fast, in_words = jax.jit(function, static_argnums=0), eqx.filter_jit(function)
    programs = Programs()

    @functools.wraps(function)
    def call(static: Any, *arrays: Any) -> Any:
        programs.see(static)
        try:
            return jax.block_until_ready(fast(static, *arrays))
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
            if text.startswith("RESOURCE_EXHAUSTED"):
                error.add_note(_TOO_LITTLE_MEMORY)
            if "_EquinoxRuntimeError: " not in text:
                raise
        return jax.block_until_ready(in_words(static, *arrays))

    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of pytrees, once for all arguments of equal behaviour.

    Like `equinox.filter_jit`, but it finds a program again although the transforms of
    optax in its arguments are made anew in each call.

    **Arguments:**

    - `function`: a function of positional arguments, any pytrees.

    **Returns:**

    The compiled function.
    """

    @jitted
    def of_arrays(rest: Static, arrays: list[Any]) -> Any:
        return Static.split(function(*rest.joined(arrays)))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        arrays, rest = Static.split(args)
        arrays, rest = of_arrays(rest, arrays)
        return rest.joined(arrays)

    return call
