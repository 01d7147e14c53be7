"""Checks of what users hand over, made once at the public boundary."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ._tree import leaf_names, tree_strong
from ._types import Hyper, Key, Params


DESCENT_EXAMPLE = "metaopt.Descent(optax.sgd(0.1), num_steps=100)"
ADJOINT_EXAMPLE = "metaopt.UnrolledAdjoint()"


def check_count(value: Any, name: str, minimum: int = 1) -> None:
    """Raises a `ValueError` unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"`{name}` must be an int; got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}; got {value}.")


def check_flag(value: Any, name: str) -> None:
    """Raises a `ValueError` unless `value` is `True` or `False`."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be `True` or `False`; got {value!r}.")


def check_tolerance(
    value: Any, name: str, *, infinite: bool = False, optional: bool = True
) -> None:
    """Raises a `ValueError` unless `value` is a non-negative number, or `None` where
    that is `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.floating, np.integer)
    ):
        raise ValueError(f"`{name}` must be a non-negative number; got {value!r}.")
    if not value >= 0 or (math.isinf(value) and not infinite):
        raise ValueError(f"`{name}` must be a non-negative, finite number; got {value!r}.")


def canonical_hyper(hyper: Hyper, name: str = "hyper") -> Hyper:
    """`hyper` with Python numbers made arrays, so that a new value never retraces.

    **Raises:**

    `TypeError` for a Python int or bool leaf, or if nothing in `hyper` can be tuned;
    `ValueError` for a leaf that is complex, empty, infinite or NaN.
    """
    names = leaf_names(hyper, name)
    leaves, structure = jax.tree.flatten(hyper)
    out = [_canonical_leaf(leaf_name, leaf) for leaf_name, leaf in zip(names, leaves)]
    if not any(eqx.is_inexact_array(leaf) for leaf in out):
        raise TypeError(
            f"`{name}` holds no floating-point array, so there is nothing to tune"
            + (f": it is {hyper!r}." if len(repr(hyper)) < 80 else ".")
        )
    check_finite(out, names)
    return tree_strong(jax.tree.unflatten(structure, out))


def _canonical_leaf(name: str, leaf: Any) -> Any:
    if isinstance(leaf, (bool, int)) or (
        isinstance(leaf, np.generic) and not isinstance(leaf, np.inexact)
    ):
        raise TypeError(
            f"`{name}` is {leaf!r}: an integer or bool cannot be tuned by hypergradient. "
            "Write it as a float, or keep it out of `hyper` (as a static field). A "
            "`metaopt.SelfTuningSolver` can tune a `metaopt.hyper.Integer`."
        )
    if isinstance(leaf, (float, np.generic, np.ndarray)):
        leaf = _to_jax(leaf, name)
    if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise ValueError(
            f"`{name}` is complex. Split it into its real and imaginary parts."
        )
    if eqx.is_inexact_array(leaf):
        if leaf.size == 0:
            raise ValueError(f"`{name}` is an empty array of shape {leaf.shape}.")
    return leaf


def canonical_arrays(tree: Any, name: str) -> Any:
    """`tree` with NumPy arrays moved to JAX, and checked for NaN and complex numbers.

    **Raises:**

    `ValueError` naming the array.
    """
    if isinstance(tree, Iterator):
        raise ValueError(
            f"`{name}` is an iterator, from which only `metaopt.solve_bilevel` pulls. Hand "
            "over one batch, or a `metaopt.BatchSequence` of several that are stacked."
        )
    names = leaf_names(tree, name)
    leaves, structure = jax.tree.flatten(tree)
    leaves = [
        _to_jax(leaf, where) if isinstance(leaf, (np.ndarray, np.generic)) else leaf
        for where, leaf in zip(names, leaves)
    ]
    for where, leaf in zip(names, leaves):
        if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"`{where}` is complex. Split it into its real and imaginary parts."
            )
        if eqx.is_array(leaf) and leaf.size == 0:
            raise ValueError(f"`{where}` is an empty array, of shape {leaf.shape}.")
    check_finite(leaves, names)
    return tree_strong(jax.tree.unflatten(structure, leaves))


def check_kind(value: Any, kind: type, name: str, example: str) -> None:
    """Raises a `ValueError` unless `value` is an object of this kind."""
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(
            f"`{name}` is the class `{value.__name__}` itself. Call it: write "
            f"`{value.__name__}(...)`."
        )
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` must be something like `{example}`; got {value!r}.")


def canonical_key(key: Any) -> Key:
    """`key`, or key 0 for `None`.

    **Raises:**

    `ValueError` for anything else that is not a key of JAX.
    """
    if key is None:
        return jax.random.key(0)
    check_key(key)
    return key


def check_key(key: Any) -> None:
    """Raises a `ValueError` unless `key` is a key of JAX."""
    is_key = eqx.is_array(key) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if not is_key:
        raise ValueError(f"`key` must come from `jax.random.key(0)`; got {key!r}.")


def canonical_params(params: Any) -> Params:
    """`params` with NumPy arrays moved to JAX, checked for something to train.

    A Python float is an array where it is all there is; inside of a model it is a
    setting, as everywhere in Equinox.

    **Raises:**

    `ValueError` naming the array.
    """
    if isinstance(params, float):
        params = _to_jax(params, "params")
    params = canonical_arrays(params, "params")
    check_params(params)
    return params


def check_params(params: Any) -> None:
    """Raises a `ValueError` unless `params` holds something to train."""
    names = leaf_names(params, "params")
    leaves = jax.tree.leaves(params)
    if not any(eqx.is_inexact_array(leaf) for leaf in leaves):
        raise ValueError(
            "`params` holds no floating-point array, so there is nothing to train."
        )
    for name, leaf in zip(names, leaves):
        if eqx.is_inexact_array(leaf) and leaf.size == 0:
            raise ValueError(f"`{name}` is an empty array of shape {leaf.shape}.")
        if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"`{name}` is complex. Split it into its real and imaginary parts."
            )


def check_finite(leaves: list[Any], names: list[str]) -> None:
    """Raises a `ValueError` naming the first concrete leaf with an infinite or NaN."""
    known = [
        (name, leaf)
        for name, leaf in zip(names, leaves)
        if eqx.is_inexact_array(leaf) and not isinstance(leaf, jax.core.Tracer)
    ]
    # Inside a user's own `jax.jit` a compiled function is staged even for arrays that
    # are known, unless it is told to run now.
    with jax.ensure_compile_time_eval():
        if known and not _all_finite([leaf for _, leaf in known]):
            name = next(name for name, leaf in known if not _all_finite([leaf]))
            raise ValueError(f"`{name}` holds infinite or NaN values.")


@jax.jit
def _all_finite(leaves):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _to_jax(leaf: Any, name: str) -> jax.Array:
    given = np.asarray(leaf).dtype
    with jax.ensure_compile_time_eval():
        array = jnp.asarray(leaf, dtype=jax.dtypes.canonicalize_dtype(given))
    if isinstance(leaf, np.ndarray) and given == np.float64 != array.dtype:
        warnings.warn(
            f"`{name}` is float64 and is used as {array.dtype}, because JAX runs in 32 "
            "bits by default. Cast it, or set `jax.config.update('jax_enable_x64', "
            "True)`.",
            stacklevel=3,
        )
    if given.kind in "iu" and np.any(np.asarray(leaf) != np.asarray(array)):
        raise ValueError(
            f"`{name}` is {given} with numbers that {array.dtype} cannot hold, which JAX "
            "uses by default. Make them smaller, or set `jax.config.update("
            "'jax_enable_x64', True)`."
        )
    return array
