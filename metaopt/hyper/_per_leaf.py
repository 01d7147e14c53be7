"""Hyperparameters for the leaves of a model that a pattern names."""

import fnmatch
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._core._types import FloatScalar, PyTree
from .._core._validate import canonical_hyper, check_flag
from ._frozen import values


Where = str | Callable[[str, Any], bool]
"""A pattern such as `"*.weight"`, or a function of the name and the leaf."""


class PerLeaf(eqx.Module):
    """One hyperparameter for each leaf of a model that a pattern names, or one for all.

    !!! example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import metaopt as mo

        model = eqx.nn.MLP(2, 1, 8, 2, key=jax.random.key(0))
        decay = mo.hyper.PerLeaf(mo.hyper.Positive(1e-3), model, "*.weight")
        print(decay)

        def penalty(params, hyper):
            return hyper["decay"].sum(lambda d, w: d * jnp.sum(w**2), params)

        print(penalty(model, {"decay": decay}))
        ```

    **Arguments:**

    - `like`: where each starts: a hyperparameter such as a [`metaopt.hyper.Positive`][], or
        an array.
    - `model`: the model, or any pytree with the structure of the params.
    - `where`: a pattern of names, with `*` for any part of one, or a function of the name
        and the leaf that returns a bool. The names are such as `layers.0.weight`.
    - `shared`: whether all these leaves have one hyperparameter in common.

    **Raises:**

    `ValueError` where no floating-point array of the model has such a name.
    """

    each: tuple[Any, ...]
    names: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, like: Any, model: PyTree, where: Where, *, shared: bool = False):
        check_flag(shared, "shared")
        like = canonical_hyper(like, "like")
        named = [(n, leaf) for n, leaf in named_leaves(model) if eqx.is_inexact_array(leaf)]
        self.names = matching(named, where)
        if repeated := [n for n in self.names if self.names.count(n) > 1]:
            raise ValueError(
                f"Two leaves of `model` have the name `{repeated[0]}`. Rename one of them, "
                "such as a dictionary key with a dot in it."
            )
        self.each = (like,) * (1 if shared else len(self.names))

    @property
    def value(self) -> dict[str, Any]:
        """The values by the names of the leaves."""
        return dict(zip(self.names, values(self._spread)))

    def map(self, fn: Callable[[Any, Array], Any], tree: PyTree) -> PyTree:
        """Apply a function to the leaves that the pattern names, and to no others.

        **Arguments:**

        - `fn`: `fn(value, leaf)`.
        - `tree`: a pytree with the structure of the model, such as updates of its params.

        **Returns:**

        A pytree of the same structure.

        **Raises:**

        `ValueError` for a tree without one of the leaves.
        """
        found, paths = self.value, jax.tree_util.tree_flatten_with_path(tree)
        names = [_name(path) for path, _ in paths[0]]
        if missing := [name for name in self.names if name not in names]:
            raise ValueError(
                f"The tree has no leaf `{missing[0]}`, which `PerLeaf` has a value for. "
                "Hand over params of the structure of the model that it was made with."
            )
        leaves = [
            fn(found[name], leaf) if name in found else leaf
            for name, (_, leaf) in zip(names, paths[0])
        ]
        return jax.tree.unflatten(paths[1], leaves)

    def sum(self, fn: Callable[[Any, Array], Any], params: PyTree) -> FloatScalar:
        """Sum a function of the leaves that the pattern names, such as a penalty.

        **Arguments:**

        - `fn`: `fn(value, leaf)`, a scalar.
        - `params`: a pytree with the structure of the model.

        **Returns:**

        The sum, a scalar.
        """
        terms: list[Any] = []
        self.map(lambda value, leaf: terms.append(fn(value, leaf)), params)
        return jnp.sum(jnp.stack(terms))

    @property
    def _spread(self) -> tuple[Any, ...]:
        return self.each * (len(self.names) if len(self.each) == 1 else 1)

    def __repr__(self) -> str:
        if len(self.each) == 1 and len(self.names) > 1:
            return f"PerLeaf({self.each[0]!r} for all of {', '.join(self.names)})"
        pairs = zip(self.names, self.each)
        return f"PerLeaf({', '.join(f'{name}: {one!r}' for name, one in pairs)})"


def replaced(tree: PyTree, where: Where, value: Any) -> PyTree:
    """Replace the leaves of a model that a pattern names, such as the rates of dropout.

    !!! example

        ```python
        import equinox as eqx
        import jax
        import metaopt as mo

        keys = jax.random.split(jax.random.key(0))
        model = eqx.nn.Sequential([eqx.nn.Linear(2, 2, key=keys[0]), eqx.nn.Dropout(0.1)])
        hyper = {"rate": mo.hyper.Interval(0.3, 0.0, 0.9)}
        model = mo.hyper.replaced(model, "layers.*.p", hyper["rate"].value)
        ```

    **Arguments:**

    - `tree`: the model.
    - `where`: as for [`metaopt.hyper.PerLeaf`][]; Python numbers are leaves, too.
    - `value`: what stands there instead.

    **Returns:**

    A model of the same structure.

    **Raises:**

    `ValueError` where no leaf has such a name.
    """
    names = matching(named_leaves(tree), where)
    swap = lambda path, leaf: value if _name(path) in names else leaf
    return jax.tree_util.tree_map_with_path(swap, tree)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a pytree with names such as `layers.0.weight`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(_name(path), leaf) for path, leaf in paths]


def matching(named: list[tuple[str, Any]], where: Where) -> tuple[str, ...]:
    """The names that a pattern or a function picks.

    **Raises:**

    `ValueError` where it picks none.
    """
    if isinstance(where, str):
        pattern = re.compile(fnmatch.translate(where))
        picks = lambda name, leaf: pattern.match(name) is not None
    elif callable(where):
        picks = where
    else:
        raise ValueError(
            f'`where` must be a pattern such as "*.weight", or a function; got {where!r}.'
        )
    names = tuple(name for name, leaf in named if picks(name, leaf))
    if not names:
        there = ", ".join(name for name, _ in named[:8]) or "none"
        more = ", ..." if len(named) > 8 else ""
        raise ValueError(f"`where` picks no leaf: {where!r}. There are: {there}{more}.")
    return names


def _name(path: Any) -> str:
    text = jax.tree_util.keystr(path)
    return re.sub(r"\[['\"]?(.*?)['\"]?\]", r".\1", text).lstrip(".")
