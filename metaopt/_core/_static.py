"""The part of a pytree that is no array, as a key of compiled programs."""

from typing import Any

import equinox as eqx
import jax


@jax.tree_util.register_static
class Static:
    """A pytree without arrays, hashed once for all calls of a compiled function.

    At every call such arguments are hashed and compared, which takes longer than a small
    step. One object is equal to itself at once. As a pytree it has no leaves, so that a
    compiled function may return one.
    """

    def __init__(self, tree: Any):
        leaves, structure = jax.tree.flatten(tree)
        self.key = tuple(leaves), structure
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
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return jax.tree.leaves(arrays), cls((rest, jax.tree.structure(arrays)))

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Static) and self.key == other.key)

    @property
    def tree(self) -> Any:
        """The pytree."""
        leaves, structure = self.key
        return jax.tree.unflatten(structure, leaves)

    def joined(self, arrays: list[Any]) -> Any:
        """The pytree that was split, with these arrays."""
        rest, inner = self.tree
        return eqx.combine(jax.tree.unflatten(inner, arrays), rest)
