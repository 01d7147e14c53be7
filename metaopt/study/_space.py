"""The ranges that a search draws the values of outer variables from."""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._core._types import Hyper, PyTree
from .._core._validate import check_flag
from ..hyper import AbstractHyper, Integer, Interval, Simplex


Uniforms = Float[np.ndarray, "..."]
"""Numbers between 0 and 1, of any shape."""


class AbstractRange(eqx.Module):
    """The range of the values of one leaf of `hyper`, for a search.

    **Attributes:**

    - `shared`: whether all entries of an array have one number in common; otherwise each
        is drawn by itself.
    """

    shared: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def at(self, u: Uniforms) -> np.ndarray:
        """Map numbers between 0 and 1 to values of equal probability.

        **Arguments:**

        - `u`: numbers between 0 and 1, of the shape of the leaf.

        **Returns:**

        Values of the same shape.
        """


class Uniform(AbstractRange):
    """Values between two bounds, each as likely as the others.

    **Arguments:**

    - `low`, `high`: the bounds.
    - `shared`: whether all entries of an array have one number in common.
    """

    low: float
    high: float
    shared: bool = eqx.field(static=True)

    def __init__(self, low: float, high: float, *, shared: bool = False):
        _check_bounds(low, high, -math.inf)
        check_flag(shared, "shared")
        self.low, self.high, self.shared = float(low), float(high), shared

    def at(self, u):
        return self.low + (self.high - self.low) * u


class LogUniform(AbstractRange):
    """Positive values between two bounds, each order of magnitude as likely as the others.

    **Arguments:**

    - `low`, `high`: the bounds, more than 0.
    - `shared`: whether all entries of an array have one number in common.
    """

    low: float
    high: float
    shared: bool = eqx.field(static=True)

    def __init__(self, low: float, high: float, *, shared: bool = False):
        _check_bounds(low, high, 0.0)
        check_flag(shared, "shared")
        self.low, self.high, self.shared = float(low), float(high), shared

    def at(self, u):
        low, high = math.log(self.low), math.log(self.high)
        return np.exp(low + (high - low) * u)


class Whole(AbstractRange):
    """Whole numbers from one to another, each as likely as the others.

    **Arguments:**

    - `low`, `high`: the least and the greatest, ints.
    - `shared`: whether all entries of an array have one number in common.
    """

    low: int = eqx.field(static=True)
    high: int = eqx.field(static=True)
    shared: bool = eqx.field(static=True)

    def __init__(self, low: int, high: int, *, shared: bool = False):
        for name, bound in (("low", low), ("high", high)):
            if isinstance(bound, bool) or not isinstance(bound, int):
                raise ValueError(f"`{name}` must be an int; got {bound!r}.")
        _check_bounds(low, high, -math.inf)
        check_flag(shared, "shared")
        self.low, self.high, self.shared = low, high, shared

    def at(self, u):
        levels = self.high - self.low + 1
        return self.low + np.minimum(np.floor(levels * u), levels - 1)


class Shares(AbstractRange):
    """Shares that sum to one along the last axis, uniform on the simplex."""

    shared: bool = eqx.field(static=True)

    def __init__(self):
        self.shared = False

    def at(self, u):
        lengths = -np.log(np.clip(u, 1e-12, 1 - 1e-12))
        return lengths / np.sum(lengths, axis=-1, keepdims=True)


def _check_bounds(low: Any, high: Any, least: float) -> None:
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, bool) or not isinstance(bound, int | float | np.number):
            raise ValueError(f"`{name}` must be a number; got {bound!r}.")
        if not (math.isfinite(bound) and bound > least):
            raise ValueError(
                f"`{name}` must be finite{' and positive' if least == 0 else ''}; got "
                f"{bound!r}."
            )
    if not low < high:
        raise ValueError(f"`low` must be less than `high`; got {low!r} and {high!r}.")


class Slot(eqx.Module):
    """One leaf of `hyper` that a search draws.

    **Attributes:**

    - `name`: its name as a user writes it.
    - `range`: its range.
    - `shape`: the shape of what is drawn: `()` where all entries share one number.
    """

    name: str = eqx.field(static=True)
    range: AbstractRange
    shape: tuple[int, ...] = eqx.field(static=True)


class Space:
    """The leaves of `hyper` that a search draws, and those that it leaves alone.

    **Arguments:**

    - `space`: `None`, or a pytree of ranges that is a prefix of `hyper`, with `None` for
        what stays as it is.
    - `hyper`: the outer variables.

    **Raises:**

    `ValueError` where they do not fit, and for a leaf without a natural range.
    """

    def __init__(self, space: PyTree, hyper: Hyper):
        if space is None:
            space = _natural(hyper)
        space = _filled(space, hyper)
        for path, leaf in jax.tree_util.tree_flatten_with_path(space, _is_range)[0]:
            if not isinstance(leaf, AbstractRange):
                raise ValueError(
                    f"`space{jax.tree_util.keystr(path)}` is {leaf!r}. Write a range, such "
                    "as `metaopt.study.Uniform(0.0, 1.0)`, or `None` for what stays."
                )
        try:
            pairs = jax.tree.map(
                lambda r, part: (r, part), space, hyper, is_leaf=_is_range_or_none
            )
        except ValueError as error:
            raise ValueError(
                "`space` must have the structure of `hyper`, or of the top of it, with a "
                "range such as `metaopt.study.LogUniform(1e-6, 1.0)` for what is drawn "
                f"and `None` for what stays: {error}"
            ) from error
        # A range for a part of `hyper` is one for each leaf in it.
        ranges = [
            found
            for found, part in jax.tree.leaves(pairs, is_leaf=_is_pair)
            for _ in jax.tree.leaves(part, is_leaf=is_hyper)
        ]
        paths, self.structure = jax.tree_util.tree_flatten_with_path(
            hyper, is_leaf=is_hyper
        )
        self.leaves = [leaf for _, leaf in paths]
        self.slots: list[Slot | None] = []
        for (path, leaf), found in zip(paths, ranges, strict=True):
            name = "hyper" + jax.tree_util.keystr(path)
            self.slots.append(None if found is None else _slot(name, found, leaf))
        if not any(self.slots):
            raise ValueError("`space` has no range in it: there is nothing to search.")

    @property
    def drawn(self) -> list[Slot]:
        """The leaves that are drawn."""
        return [slot for slot in self.slots if slot is not None]

    @property
    def pairs(self) -> list[tuple[Slot, Any]]:
        """The leaves that are drawn, each with the leaf of `hyper` that was given."""
        pairs = zip(self.slots, self.leaves)
        return [(slot, leaf) for slot, leaf in pairs if slot is not None]

    def at(self, draws: dict[str, np.ndarray]) -> Hyper:
        """The outer variables at some draws.

        **Arguments:**

        - `draws`: the values of each slot by its name.
        """
        leaves = [
            leaf if slot is None else _with_value(leaf, draws[slot.name])
            for slot, leaf in zip(self.slots, self.leaves)
        ]
        return jax.tree.unflatten(self.structure, leaves)

    def at_uniforms(self, uniforms: dict[str, np.ndarray]) -> Hyper:
        """The outer variables at numbers between 0 and 1 for each slot by its name."""
        return self.at({s.name: s.range.at(uniforms[s.name]) for s in self.drawn})


def is_hyper(node: Any) -> bool:
    """Whether a node of a pytree is a hyperparameter with a range."""
    return isinstance(node, AbstractHyper)


def _filled(space: PyTree, hyper: Hyper) -> PyTree:
    """A space with `None` for the entries of a dictionary that it does not name."""
    if not (isinstance(space, dict) and isinstance(hyper, dict)):
        return space
    for key in space:
        if key not in hyper:
            names = ", ".join(map(repr, hyper))
            raise ValueError(f"`space[{key!r}]`: `hyper` has no {key!r}. It has {names}.")
    return {key: _filled(space.get(key), part) for key, part in hyper.items()}


def _is_range(node: Any) -> bool:
    return isinstance(node, AbstractRange)


def _is_range_or_none(node: Any) -> bool:
    return node is None or isinstance(node, AbstractRange)


def _is_pair(node: Any) -> bool:
    return isinstance(node, tuple) and len(node) == 2 and _is_range_or_none(node[0])


def _natural(hyper: Hyper) -> PyTree:
    """The ranges that follow from the kinds of the leaves."""

    def natural(path, leaf):
        match leaf:
            case Interval(low=low, high=high):
                return Uniform(low, high)
            case Integer(low=low, high=high):
                return Whole(low, high)
            case Simplex():
                return Shares()
        name = "hyper" + jax.tree_util.keystr(path)
        raise ValueError(
            f"`{name}` has no bounds to draw from. Give the search a range for it: "
            "`space=` a pytree like `hyper`, of `metaopt.study.LogUniform(1e-6, 1.0)` and "
            "the like, with `None` for what stays as it is."
        )

    return jax.tree_util.tree_map_with_path(natural, hyper, is_leaf=is_hyper)


def _slot(name: str, found: AbstractRange, leaf: Any) -> Slot:
    if isinstance(leaf, Simplex) != isinstance(found, Shares):
        raise ValueError(
            f"`{name}`: `metaopt.study.Shares()` and a `metaopt.hyper.Simplex` go "
            f"together; got {type(found).__name__} for {type(leaf).__name__}."
        )
    array = leaf.raw if is_hyper(leaf) else leaf
    if not eqx.is_inexact_array(array):
        raise ValueError(f"`{name}` is no floating-point array, and cannot be drawn.")
    whole = isinstance(leaf, Integer)
    if whole and not isinstance(found, Whole):
        raise ValueError(
            f"`{name}` is a whole number. Write `metaopt.study.Whole({leaf.low}, "
            f"{leaf.high})` as its range; got {found!r}."
        )
    slot = Slot(name, found, () if found.shared else array.shape)
    for u in () if isinstance(found, Shares) else (0.0, 1.0):
        try:
            _with_value(leaf, found.at(np.full(slot.shape, u)))
        except ValueError as error:
            raise ValueError(
                f"The range of `{name}`, {found!r}, leaves that of {leaf!r}: {error}"
            ) from error
    return slot


def _with_value(leaf: Any, value: np.ndarray) -> Any:
    array = leaf.raw if is_hyper(leaf) else leaf
    value = np.broadcast_to(value, array.shape)
    if isinstance(leaf, Interval):
        if np.any((value < leaf.low) | (value > leaf.high)):
            raise ValueError(f"`value` must lie from {leaf.low!r} to {leaf.high!r}.")
        # Its ends have no derivative.
        margin = 1e-6 * (leaf.high - leaf.low)
        value = np.clip(value, leaf.low + margin, leaf.high - margin)
    drawn = jnp.asarray(value, array.dtype)
    return leaf.with_value(drawn) if is_hyper(leaf) else drawn
