"""Checks of the user's arguments, made once at the public boundary."""

import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ._finite import are_canonical, check_finite
from ._foreign import HasArray, HasDLPack, is_loader, is_number_list, on_host
from ._tree import leaf_names, tree_strong
from ._types import Hyper, Key, Params
from ._warn import warn


DESCENT_EXAMPLE = "metaopt.Descent(optax.sgd(0.1), num_steps=100)"
ADJOINT_EXAMPLE = "metaopt.UnrolledAdjoint()"


def check_count(value: Any, name: str, minimum: int = 1) -> None:
    """Raise a `ValueError` unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"`{name}` must be an int; got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}; got {value}.")


def check_flag(value: Any, name: str) -> None:
    """Raise a `ValueError` unless `value` is `True` or `False`."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be `True` or `False`; got {value!r}.")


def check_tolerance(
    value: Any, name: str, *, infinite: bool = False, optional: bool = True
) -> None:
    """Raise a `ValueError` unless `value` is a non-negative number, or `None` where
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
    leaves, structure = jax.tree.flatten(hyper)
    if are_canonical(leaves, only_real=True):
        return hyper
    names = leaf_names(hyper, name)
    out = [_canonical_leaf(leaf_name, leaf) for leaf_name, leaf in zip(names, leaves)]
    if not any(eqx.is_inexact_array(leaf) for leaf in out):
        raise TypeError(
            f"`{name}` holds no floating-point array, so there is nothing to tune"
            + (f": it is {hyper!r}." if len(repr(hyper)) < 80 else ".")
        )
    _check_not_empty(*_inexact(out, names))
    check_finite(out, names)
    hyper = jax.tree.unflatten(structure, out)
    _warn_of_settings(
        hyper,
        name,
        lambda x: eqx.is_array(x) and _is_whole(x.dtype),
        "is not tuned: an array of integers or bools among the outer variables is a "
        "setting. Write it as floats to tune it; a field of a module to hold it without "
        "this warning.",
    )
    return tree_strong(hyper)


def _is_whole(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_))


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
    check_real(leaf, name)
    return leaf


def check_real(leaf: Any, name: str) -> None:
    """Raise a `ValueError` for a complex array."""
    if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise ValueError(
            f"`{name}` is complex. Split it into its real and imaginary parts."
        )


def _check_not_empty(leaves: list[Any], names: list[str]) -> None:
    """Raise a `ValueError` where every array is empty. Beside others one may be."""
    arrays = [(n, leaf) for n, leaf in zip(names, leaves) if eqx.is_array(leaf)]
    if arrays and all(leaf.size == 0 for _, leaf in arrays):
        name, leaf = arrays[0]
        raise ValueError(f"`{name}` is an empty array, of shape {leaf.shape}.")


def _inexact(leaves: list[Any], names: list[str]) -> tuple[list[Any], list[str]]:
    """The floating-point arrays among some leaves, with their names."""
    pairs = [(leaf, n) for leaf, n in zip(leaves, names) if eqx.is_inexact_array(leaf)]
    return [leaf for leaf, _ in pairs], [name for _, name in pairs]


def canonical_arrays(tree: Any, name: str, *, only_arrays: bool = True) -> Any:
    """`tree` with the arrays of other libraries moved to JAX, and checked for NaN.

    **Arguments:**

    - `tree`: what was handed over as `name`.
    - `only_arrays`: whether loaders, data sets and lists of numbers are refused.

    **Raises:**

    `ValueError` naming the array; `TypeError` for what is no array and no pytree of
    arrays, such as a loader, with what to write.
    """
    if isinstance(tree, Iterator):
        raise ValueError(
            f"`{name}` is an iterator, from which only `metaopt.solve_bilevel` pulls. Hand "
            "over one batch, or a `metaopt.BatchSequence` of several that are stacked."
        )
    leaves, structure = jax.tree.flatten(tree)
    if tree is None or are_canonical(leaves):
        return tree
    names = leaf_names(tree, name)
    if only_arrays:
        _check_lists(tree, name)
        for where, leaf in zip(names, leaves):
            _check_no_loader(leaf, where)
    leaves = [_from_elsewhere(leaf, where) for where, leaf in zip(names, leaves)]
    _check_not_empty(leaves, names)
    check_finite(leaves, names)
    return tree_strong(jax.tree.unflatten(structure, leaves))


@runtime_checkable
class _Indexed(Protocol):
    def __getitem__(self, index: int, /) -> Any: ...

    def __len__(self) -> int: ...


def _from_elsewhere(leaf: Any, name: str) -> Any:
    """A leaf as a JAX array, if it is an array of any library."""
    leaf = on_host(leaf, name)
    return _to_jax(leaf, name) if isinstance(leaf, np.ndarray | np.generic) else leaf


def _check_no_loader(leaf: Any, name: str) -> None:
    if isinstance(leaf, type | str | bytes | jax.Array | HasArray | HasDLPack):
        return
    if is_loader(leaf):
        raise TypeError(
            f"`{name}` is a `{type(leaf).__name__}`, an iterable of batches. Hand over one "
            "batch, `next(iter(loader))`, or one for each step of the inner solver, "
            "`next(iter(metaopt.InnerBatches(loader, num_steps)))`. "
            "`metaopt.solve_bilevel` takes a loader as `train` or `valid`, and pulls one "
            "batch for each outer step."
        )
    if isinstance(leaf, _Indexed):
        raise TypeError(
            f"`{name}` is a `{type(leaf).__name__}`, a data set of rows. Stack them: "
            "`jax.tree.map(lambda *rows: numpy.stack(rows), *[data[i] for i in "
            "range(len(data))])`."
        )


def _check_lists(tree: Any, name: str) -> None:
    """Raise a `TypeError` for an empty list, and for lists of numbers: to JAX each number
    is an array."""
    if isinstance(tree, list) and not tree:
        raise TypeError(f"`{name}` is an empty list. Hand over arrays, or leave it out.")
    paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_number_list)[0]
    for path, node in paths:
        if is_number_list(node):
            where = name + jax.tree_util.keystr(path)
            raise TypeError(
                f"`{where}` is a list of numbers, of which each would be an array by "
                "itself. Write `numpy.asarray(...)` around it; a data set of Hugging Face "
                'gives arrays after `.with_format("numpy")`.'
            )


_MAX_SHOWN = 200  # characters of an object in a message


def check_kind(value: Any, kind: type, name: str, example: str) -> None:
    """Raise a `ValueError` unless `value` is an object of this kind."""
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(
            f"`{name}` is the class `{value.__name__}` itself. Call it: write "
            f"`{value.__name__}(...)`."
        )
    if not isinstance(value, kind):
        if isinstance(value, types.FunctionType) and value.__name__ != "<lambda>":
            called = f"{(value.__module__ or '').partition('.')[0]}.{value.__name__}"
            raise ValueError(
                f"`{name}` is the function `{called.removeprefix('.')}` itself. Call it: "
                f"`{name}` must be something like `{example}`."
            )
        given = repr(value)
        if len(given) > _MAX_SHOWN:
            given = f"a `{type(value).__name__}`"
        raise ValueError(f"`{name}` must be something like `{example}`; got {given}.")


def check_not_compiled(hyper: Any, params: Any) -> None:
    """Raise a `ValueError` inside `jax.jit` and the like, where nothing has a value."""
    leaves = jax.tree.leaves((hyper, params))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(
            "`solve_bilevel` was called inside `jax.jit`, `jax.grad` or `jax.vmap`. It is "
            "a Python loop over steps that are compiled already: call it outside, or use "
            "`metaopt.hypergradient` or the `step` of the solver inside."
        )


def canonical_key(key: Any) -> Key:
    """`key`, or key 0 for `None`.

    **Raises:**

    `ValueError` for anything else that is not a key of JAX.
    """
    if key is None:
        config: Any = jax.config
        # Under a mesh that is set, the key lies on all its devices.
        if config.jax_debug_key_reuse or not jax.sharding.get_abstract_mesh().empty:
            return jax.random.key(0)
        return _first_key(config.jax_default_prng_impl, config.jax_default_device)
    check_key(key)
    return key


@functools.cache
def _first_key(*settings: Any) -> Key:
    """Key 0, which takes longer to make than a small step."""
    with jax.ensure_compile_time_eval():
        return jax.random.key(0)


def check_key(key: Any) -> None:
    """Raise a `ValueError` unless `key` is a key of JAX."""
    is_key = eqx.is_array(key) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if not is_key:
        raise ValueError(f"`key` must come from `jax.random.key(0)`; got {key!r}.")


def canonical_params(params: Any, name: str = "params") -> Params:
    """`params` with NumPy arrays moved to JAX, checked for something to train.

    **Raises:**

    `ValueError` naming the array.
    """
    if are_canonical(jax.tree.leaves(params), only_real=True):
        return params
    params = float_as_array(params, name)
    params = canonical_arrays(params, name, only_arrays=False)
    check_params(params, name)
    return params


def float_as_array(params: Any, name: str) -> Any:
    """`params` as an array if it is a Python float.

    Inside of a model a Python float is a setting, as everywhere in Equinox. Warns where it
    stands in a dictionary, list or tuple of arrays, and may have been meant as one.
    """
    if isinstance(params, float):
        return jnp.asarray(params)
    _warn_of_settings(
        params,
        name,
        lambda x: type(x) is float,
        "is not trained: a Python float among the params is a setting. Write "
        "`jnp.asarray(...)` to train it; a field of a module to hold it without this "
        "warning.",
    )
    return params


def _warn_of_settings(
    tree: Any, name: str, is_setting: Callable[[Any], bool], text: str
) -> None:
    """Warn of leaves of dictionaries, lists and tuples that were perhaps not meant so."""

    def found(tree: Any, name: str) -> list[str]:
        if is_setting(tree):
            return [f"`{name}` = {tree!r}" if type(tree) is float else f"`{name}`"]
        if not isinstance(tree, dict | list | tuple):
            return []
        flatten = jax.tree_util.tree_flatten_with_path
        parts = flatten(tree, is_leaf=lambda x: x is not tree)[0]
        keys = jax.tree_util.keystr
        return [out for path, x in parts for out in found(x, name + keys(path))]

    held = found(tree, name)
    if held:
        warn(f"{', '.join(held)} {text}")


def check_params(params: Any, name: str = "params") -> None:
    """Raise a `ValueError` unless `params` holds something to train."""
    names = leaf_names(params, name)
    leaves = jax.tree.leaves(params)
    if not any(eqx.is_inexact_array(leaf) for leaf in leaves):
        raise ValueError(
            f"`{name}` holds no floating-point array, so there is nothing to train."
        )
    _check_not_empty(*_inexact(leaves, names))
    for name, leaf in zip(names, leaves):
        check_real(leaf, name)


def _to_jax(leaf: Any, name: str) -> jax.Array:
    given = np.asarray(leaf).dtype
    if given.kind in "OSUM":
        raise TypeError(
            f"`{name}` is an array of dtype {given}, which JAX does not have. Make it "
            "one of numbers, such as `numpy.stack(list(array))` for an array of arrays."
        )
    with jax.ensure_compile_time_eval():
        array = jnp.asarray(leaf, dtype=jax.dtypes.canonicalize_dtype(given))
    if isinstance(leaf, np.ndarray) and given == np.float64 != array.dtype:
        warn(
            f"`{name}` is float64 and is used as {array.dtype}, because JAX runs in 32 "
            "bits by default. Cast it, or set `jax.config.update('jax_enable_x64', "
            "True)`."
        )
    if given.kind in "iu" and np.any(np.asarray(leaf) != np.asarray(array)):
        raise ValueError(
            f"`{name}` is {given} with numbers that {array.dtype} cannot hold, which JAX "
            "uses by default. Make them smaller, or set `jax.config.update("
            "'jax_enable_x64', True)`."
        )
    return array
