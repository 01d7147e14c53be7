"""Notes on an error that a user's function raised."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._core._types import Batch, Hyper


_MAX_LEAVES = 6  # of a batch that is described
_HYPER = "metaopt.hyper"


def notes(error: Exception, name: str, hyper: Hyper, batch: Batch) -> Iterator[str]:
    """Sentences that say what a function was called with, and what may be the cause.

    **Arguments:**

    - `error`: what it raised.
    - `name`: its name.
    - `hyper`, `batch`: what it was called with.
    """
    if batch is None:
        yield (
            f"metaopt called `{name}` with `None` as its batch, because no data was handed "
            "over for it."
        )
    elif _is_list_of_batches(batch):
        yield (
            f"metaopt called `{name}` with a {type(batch).__name__} of length "
            f"{len(batch)} as its batch, whose items are alike. If each is a batch, hand "
            "over `iter(batches)`, from which `metaopt.solve_bilevel` takes one for each "
            "outer step, or stack them in a `metaopt.BatchSequence`, one for each inner "
            "step."
        )
    kinds = [kind for kind in _kinds(hyper) if f"'{kind}'" in str(error)]
    is_of_shapes = isinstance(error, TypeError | ValueError) and not kinds
    if is_of_shapes and not _is_list_of_batches(batch) and (shapes := _shapes(batch)):
        yield (
            f"metaopt called `{name}` with a batch of shape {shapes}: all of its rows at "
            "once. A model that takes one row is applied to all by `jax.vmap(model)(x)`."
        )
    for kind in kinds:
        yield f"`hyper` holds a `{_HYPER}.{kind}`, whose number is its `value`."
    if isinstance(error, RuntimeError) and " key" in str(error):  # of layers of Equinox
        yield (
            f"`{name}` is handed a key to draw random numbers with, another one for each "
            "step, if it declares an argument `key`: `def loss(params, hyper, batch, key)`."
        )


def _is_list_of_batches(batch: Batch) -> bool:
    if not isinstance(batch, (list, tuple)) or len(batch) < 2:
        return False
    structures = {jax.tree.structure(item) for item in batch}
    return len(structures) == 1 and not jax.tree_util.all_leaves(batch)


def _shapes(batch: Batch) -> str:
    """The shapes of the arrays of a batch; empty for too many of them."""
    leaves = jax.tree.leaves(batch)
    if not leaves or len(leaves) > _MAX_LEAVES:
        return ""
    return ", ".join(str(np.shape(leaf)) for leaf in leaves)


def _kinds(hyper: Hyper) -> list[str]:
    """The names of the kinds of hyperparameters of metaopt."""
    is_whole: Callable[[Any], bool] = lambda x: isinstance(x, eqx.Module)
    kinds = {type(node) for node in jax.tree.leaves(hyper, is_leaf=is_whole)}
    return sorted(k.__name__ for k in kinds if k.__module__.startswith(_HYPER))
