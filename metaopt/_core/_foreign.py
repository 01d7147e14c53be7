"""Arrays and loaders of other libraries, known by their protocols alone."""

import contextlib
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.dlpack
import numpy as np


@runtime_checkable
class HasArray(Protocol):
    """An object that NumPy can read as an array."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class HasDLPack(Protocol):
    """An object whose memory other libraries can read by DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


def is_loader(data: Any) -> bool:
    """Whether `data` is an iterable of batches that can be started anew: no pytree of
    arrays, and no array."""
    return (
        isinstance(data, Iterable)
        and not isinstance(data, str | bytes | HasArray | HasDLPack)
        and jax.tree_util.all_leaves([data])
    )


def batch_on_host(batch: Any, name: str) -> Any:
    """A batch of a loader, with NumPy arrays for lists of numbers and for the arrays of
    other libraries.

    **Raises:**

    `TypeError` naming what cannot be read as an array; `ValueError` for lists of numbers of
    differing lengths.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(batch, is_leaf=is_number_list)
    leaves = []
    for path, leaf in paths:
        where = name + jax.tree_util.keystr(path)
        is_list = is_number_list(leaf)
        leaves.append(_stacked(leaf, where) if is_list else on_host(leaf, where))
    return jax.tree.unflatten(structure, leaves)


def _stacked(numbers: list[Any], name: str) -> np.ndarray:
    """A list of numbers, or of lists of numbers, as an array of the default dtype."""
    try:
        array = np.asarray(numbers)
    except ValueError as error:
        raise ValueError(
            f"`{name}` is a list of lists of differing lengths. Pad them to one length."
        ) from error
    # The numbers of Python have no precision that a cast could lose unseen.
    inexact = array.dtype.kind in "fc"
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype)) if inexact else array


def on_host(leaf: Any, name: str) -> Any:
    """A leaf as a NumPy array, if it is an array of another library than JAX."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | type):
        return leaf
    if not isinstance(leaf, HasArray | HasDLPack):
        return leaf
    convert: Any = np.asarray if isinstance(leaf, HasArray) else np.from_dlpack
    try:
        return convert(leaf)
    except Exception as error:
        # JAX has dtypes that NumPy has not, such as bfloat16.
        if isinstance(leaf, HasDLPack):
            with contextlib.suppress(Exception):
                return np.array(jax.dlpack.from_dlpack(leaf))
        raise TypeError(
            f"`{name}`, of type `{type(leaf).__name__}`, cannot be read as an array: "
            f"{str(error).rstrip('.')}. Move it to the CPU, detach it, and hand over a "
            "NumPy array."
        ) from error


def is_number_list(node: Any) -> bool:
    """Whether a node is a list of numbers, or of lists of them."""
    return isinstance(node, list) and bool(node) and all(map(_is_number, node))


def _is_number(node: Any) -> bool:
    return is_number_list(node) or isinstance(node, int | float | complex)
