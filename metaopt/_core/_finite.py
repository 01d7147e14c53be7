"""Checks that arrays hold numbers, which most calls pass."""

from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def are_canonical(leaves: list[Any], *, only_real: bool = False) -> bool:
    """Whether all are arrays of JAX that have passed every check here: the usual case, for
    which nothing else is done in a call.

    **Arguments:**

    - `only_real`: whether all must be real floating-point arrays.
    """
    return (
        bool(leaves)
        and all(
            isinstance(leaf, jax.Array)
            and not isinstance(leaf, jax.core.Tracer)
            and leaf.size > 0
            and not jax.typeof(leaf).weak_type
            and (not only_real or jnp.issubdtype(leaf.dtype, jnp.floating))
            for leaf in leaves
        )
        and _all_finite([leaf for leaf in leaves if eqx.is_inexact_array(leaf)])
    )


def check_finite(leaves: list[Any], names: list[str]) -> None:
    """Raise a `ValueError` naming the first concrete leaf with an infinite or NaN."""
    known = [
        (name, leaf)
        for name, leaf in zip(names, leaves)
        if eqx.is_inexact_array(leaf) and not isinstance(leaf, jax.core.Tracer)
    ]
    if not _all_finite([leaf for _, leaf in known]):
        name = next(name for name, leaf in known if not _all_finite([leaf]))
        raise ValueError(f"`{name}` holds infinite or NaN values.")


_FEW = 4096  # numbers that are looked at faster by NumPy than by a compiled function


def _all_finite(leaves: list[jax.Array]) -> bool:
    # Elsewhere every leaf would be a transfer of its own.
    if all(leaf.size <= _FEW and _is_on_host(leaf) for leaf in leaves):
        return all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
    # Inside a user's own `jax.jit` a compiled function is staged even for arrays that
    # are known, unless it is told to run now.
    with jax.ensure_compile_time_eval():
        return bool(_finite_on_device(leaves))


def _is_on_host(leaf: jax.Array) -> bool:
    return leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())


@jax.jit
def _finite_on_device(leaves):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
