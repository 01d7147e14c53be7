"""The part of a pytree that is no array, as a key of compiled programs."""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


class _Array:
    """Stands where an array was."""


_ARRAY = _Array()


@jax.tree_util.register_static
class Static:
    """A pytree without arrays, hashed once for all calls of a compiled function.

    At every call such arguments are hashed and compared, which takes longer than a small
    step. One object is equal to itself at once. As a pytree it has no leaves, so that a
    compiled function may return one.
    """

    def __init__(self, tree: Any):
        self._flat(*jax.tree.flatten(tree))

    def _flat(self, leaves: list[Any], structure: Any) -> None:
        self.leaves, self.structure = leaves, structure
        self.key = self.identity()
        try:
            self.hash = hash(self.key)
        except TypeError as error:
            raise TypeError(
                f"`problem` or `solver` holds an object that cannot be hashed ({error}), "
                "by which compiled programs are found again. Give its class a `__hash__`, "
                "or make it an `equinox.Module`."
            ) from error

    @classmethod
    def split(cls, tree: Any) -> tuple[list[Any], "Static"]:
        """The arrays of a pytree as a list, and the rest of it."""
        leaves, structure = jax.tree.flatten(tree)
        arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]
        rest = cls.__new__(cls)
        rest._flat([_ARRAY if eqx.is_array(leaf) else leaf for leaf in leaves], structure)
        return arrays, rest

    def identity(self, own: Callable[[types.FunctionType], Any] | None = None) -> Any:
        """A value that is equal for pytrees of equal behaviour.

        A transform of optax is a pair of closures. Two that were made by the same call are
        equal here, although Python compares functions by their addresses. A function of
        the user may read globals, and is equal to itself alone.

        **Arguments:**

        - `own`: a function that gives another value for a function of the user.
        """
        return tuple(_identity(leaf, own) for leaf in self.leaves), self.structure

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Static) and self.key == other.key)

    @property
    def tree(self) -> Any:
        """The pytree."""
        return jax.tree.unflatten(self.structure, self.leaves)

    def joined(self, arrays: list[Any]) -> Any:
        """The pytree that was split, with these arrays."""
        given = iter(arrays)
        leaves = [next(given) if leaf is _ARRAY else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


# Packages whose functions depend on nothing but their arguments and closures.
_PURE = ("optax", "jax", "equinox", "optimistix", "lineax")


_MAX_DEPTH = 20  # of closures within closures; functions may refer to each other


def _identity(x: Any, own: Callable[..., Any] | None, depth: int = 0) -> Any:
    """The same of one leaf; the leaf itself where it holds an unhashable object."""
    within = functools.partial(_identity, own=own, depth=depth + 1)
    found = type(x), x
    if depth == _MAX_DEPTH:
        return found
    if isinstance(x, tuple):
        found = type(x), *map(within, x)
    elif isinstance(x, functools.partial):
        found = type(x), within(x.func), within(x.args), within(_items(x.keywords))
    elif isinstance(x, types.FunctionType) and _is_pure(x):
        if own is None and x in _known:
            return _known[x]
        cells = tuple(map(_content, x.__closure__ or ()))
        parts = cells, x.__defaults__ or (), _items(x.__kwdefaults__ or {})
        found = x.__code__, *map(within, parts)
    elif isinstance(x, types.FunctionType) and own is not None:
        found = type(x), own(x)
    try:
        hash(found)
    except TypeError:
        return x  # holds an array, or the like
    if own is None and isinstance(x, types.FunctionType) and _is_pure(x):
        _known[x] = found
    return found


# Of a transform that is made once and used in many calls.
_known: weakref.WeakKeyDictionary[types.FunctionType, Any] = weakref.WeakKeyDictionary()


def _is_pure(function: types.FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] in _PURE


def _items(keywords: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(keywords.items(), key=lambda item: item[0]))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None
