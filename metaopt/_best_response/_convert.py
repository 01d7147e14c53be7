"""Making a best-response model from an ordinary one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._core._tree import tree_size
from .._core._types import Key, PyTree
from ._array_response import AbstractArrayResponse, RowScaling, Shift
from ._embedding import BestResponseEmbedding
from ._layer import (
    AbstractBestResponse,
    best_responses,
    is_best_response,
    leaves_with_paths,
)
from ._linear import BestResponseLinear
from ._norm import BestResponseNorm
from ._recurrent import BestResponseGRUCell, BestResponseLSTMCell


_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """The conversion of layers of some types.

    - `make`: the best-response class.
    - `scaled`: the arrays that are scaled by rows, each with the axis of its rows.
    - `shifted`: the arrays whose entries answer for themselves.
    - `rank`: how many axes the first of these arrays has; more, and it is a stack.
    """

    make: Callable[..., AbstractBestResponse]
    scaled: dict[str, int]
    shifted: tuple[str, ...]
    rank: Callable[[Any], int]


_LINEAR = _Kind(BestResponseLinear, {"weight": 0}, ("bias",), lambda layer: 2)
_CONVOLUTION = dataclasses.replace(_LINEAR, rank=lambda layer: layer.num_spatial_dims + 2)
_EMBEDDING = _Kind(BestResponseEmbedding, {"weight": 1}, (), lambda layer: 2)
_BY_SHAPE = _Kind(BestResponseNorm, {}, ("weight", "bias"), lambda x: len(x.shape))
_BY_CHANNEL = dataclasses.replace(_BY_SHAPE, rank=lambda layer: 1)
_GATES = {"weight_ih": 0, "weight_hh": 0}
_LSTM = _Kind(BestResponseLSTMCell, _GATES, ("bias",), lambda layer: 2)
_GRU = _Kind(BestResponseGRUCell, _GATES, ("bias", "bias_n"), lambda layer: 2)

# By exact type: a subclass may compute something else.
_KINDS: dict[type, _Kind] = {
    eqx.nn.Linear: _LINEAR,
    eqx.nn.Conv: _CONVOLUTION,
    eqx.nn.Conv1d: _CONVOLUTION,
    eqx.nn.Conv2d: _CONVOLUTION,
    eqx.nn.Conv3d: _CONVOLUTION,
    eqx.nn.ConvTranspose: _CONVOLUTION,
    eqx.nn.ConvTranspose1d: _CONVOLUTION,
    eqx.nn.ConvTranspose2d: _CONVOLUTION,
    eqx.nn.ConvTranspose3d: _CONVOLUTION,
    eqx.nn.Embedding: _EMBEDDING,
    eqx.nn.LayerNorm: _BY_SHAPE,
    eqx.nn.RMSNorm: _BY_SHAPE,
    eqx.nn.GroupNorm: _BY_CHANNEL,
    eqx.nn.BatchNorm: _BY_CHANNEL,
    eqx.nn.LSTMCell: _LSTM,
    eqx.nn.GRUCell: _GRU,
}

# These reach into the layers that they hold, which must stay as they are.
_OPAQUE = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm, eqx.nn.Shared)


def self_tuning(model: _T, num_hyper: int, *, tied: bool = True, key: Key) -> _T:
    """Make the layers of a model respond to outer variables (best-response layers).

    Works by surgery on any pytree: `Linear`, `Conv`, `ConvTranspose`, `Embedding`,
    `LSTMCell`, `GRUCell` and the normalisations of `equinox.nn` are replaced wherever
    they are, so also in `MLP`, `Sequential`, `MultiheadAttention` and modules of your
    own. The response begins at zero, where the new model equals the old one exactly.
    Layers of these very types only, not of a subclass; and not where they are stacked, as
    `jax.vmap` and `MLP(scan=True)` do, nor inside `WeightNorm`, `SpectralNorm` and
    `Shared`. [`metaopt.nn.conversion`][] says what was converted and what was left.

    A [`metaopt.SelfTuningSolver`][] does this by itself; do it by hand in the `init` of
    an inner problem to choose among the options, or to convert parts of a model.

    **Arguments:**

    - `model`: any pytree with layers in it.
    - `num_hyper`: how many outer variables there are: the floating-point numbers in
        `hyper`.
    - `tied`: whether the response weights of a matrix are the general ones, which costs
        next to nothing, or weights of their own, which can answer more freely and cost
        another matrix product and as much memory again.
    - `key`: for response weights that are not tied.

    **Returns:**

    A model of the same kind, with best-response layers in it.

    **Raises:**

    `ValueError` where `num_hyper` is not a positive int, where there is no layer to
    convert, and where a part of the model was converted before.

    **Example:**

    ```python
    import equinox as eqx, jax
    import metaopt as mo

    key = jax.random.key(0)
    mlp = eqx.nn.MLP(64, 10, 32, 2, key=key)
    model = mo.nn.self_tuning(mlp, num_hyper=8, key=key)
    print(mo.nn.conversion(model))
    ```
    """
    if isinstance(num_hyper, bool) or not isinstance(num_hyper, int) or num_hyper < 1:
        raise ValueError(
            "`num_hyper` must be a positive int, the number of floating-point numbers "
            f"in `hyper`; got {num_hyper!r}."
        )
    if best_responses(model):
        raise ValueError(
            "`model` has best-response layers already; convert it once, or convert its "
            "parts one by one."
        )
    leaves, structure = jax.tree.flatten(model, is_leaf=_is_whole)
    keys = jax.random.split(key, max(len(leaves), 1))
    new = [
        _converted(leaf, num_hyper, tied, k) if _is_convertible(leaf) else leaf
        for leaf, k in zip(leaves, keys)
    ]
    if not any(is_best_response(leaf) for leaf in new):
        raise ValueError(
            "There is no layer in the model that could respond: metaopt converts "
            f"{', '.join(sorted({kind.__name__ for kind in _KINDS}))} of `equinox.nn` "
            "(no subclasses, no stacks that `jax.vmap` makes, nothing inside "
            f"{', '.join(kind.__name__ for kind in _OPAQUE)}), and this is "
            f"{_summary(model)}. Write the model with these layers."
        )
    return jax.tree.unflatten(structure, new)


class Conversion(eqx.Module):
    """The layers of a model that respond to outer variables. `print` it.

    **Attributes:**

    - `converted`: for each best-response layer its name in the model, the type of the
        layer, and how many numbers its general and its response part have.
    - `left`: for each array without a response its name and how many numbers it has.
    """

    converted: tuple[tuple[str, str, int, int], ...] = eqx.field(static=True)
    left: tuple[tuple[str, int], ...] = eqx.field(static=True)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [("layer", "type", "general", "response")]
        rows += [(a, b, f"{c:,}", f"{d:,}") for a, b, c, d in self.converted]
        rows += [(name, "left as it is", f"{n:,}", "-") for name, n in self.left]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
            for a, b, c, d in rows
        )


def conversion(model: PyTree) -> Conversion:
    """List the layers that [`metaopt.nn.self_tuning`][] converted, and the others.

    **Arguments:**

    - `model`: any pytree.

    **Returns:**

    A [`metaopt.nn.Conversion`][], to be printed.
    """
    converted, left = [], []
    for path, leaf in leaves_with_paths(model):
        name = "model" + jax.tree_util.keystr(path)
        if is_best_response(leaf):
            general = sum(int(getattr(leaf.layer, n).size) for n in leaf.response)
            response = tree_size(leaf.response)
            converted.append((name, type(leaf.layer).__name__, general, response))
        elif eqx.is_inexact_array(leaf):
            left.append((name, int(leaf.size)))
    return Conversion(tuple(converted), tuple(left))


def _is_whole(x: Any) -> bool:
    return type(x) in _KINDS or isinstance(x, _OPAQUE)


def _is_convertible(x: Any) -> bool:
    if type(x) not in _KINDS:
        return False
    kind = _KINDS[type(x)]
    arrays = [getattr(x, name) for name in (*kind.scaled, *kind.shifted)]
    arrays = [a for a in arrays if eqx.is_array(a) or isinstance(a, np.ndarray)]
    # Not where a layer has no arrays (of real numbers), and not the stacks that `jax.vmap`
    # makes.
    real = len(arrays) > 0 and jnp.issubdtype(arrays[0].dtype, jnp.floating)
    return real and arrays[0].ndim == kind.rank(x)


def _converted(layer: Any, num_hyper: int, tied: bool, key: Key) -> AbstractBestResponse:
    kind = _KINDS[type(layer)]
    response: dict[str, AbstractArrayResponse] = {}
    keys = jax.random.split(key, max(len(kind.scaled), 1))
    for (name, axis), k in zip(kind.scaled.items(), keys):
        array = getattr(layer, name)
        scale = jnp.zeros((array.shape[axis], num_hyper), array.dtype)
        weight = None if tied else _fresh(array, axis, k)
        response[name] = RowScaling(scale, weight, axis)
    for name in kind.shifted:
        array = getattr(layer, name)
        if array is not None:
            shape = (*array.shape, num_hyper)
            response[name] = Shift(jnp.zeros(shape, array.dtype))
    return kind.make(layer, response)


def _fresh(array: Array, axis: int, key: Key) -> Array:
    """Response weights at the start: each row of length one on average."""
    size = math.prod(n for i, n in enumerate(array.shape) if i != axis)
    return jax.random.normal(key, array.shape, array.dtype) / math.sqrt(max(size, 1))


def _summary(model: Any) -> str:
    leaves = jax.tree.leaves(model, is_leaf=_is_whole)
    types = {"array" if eqx.is_array(x) else type(x).__name__ for x in leaves}
    name = "array" if eqx.is_array(model) else type(model).__name__
    if types == {name}:
        return f"one `{name}`"
    if not types:
        return f"a `{name}` without leaves"
    return f"a `{name}` of {', '.join(sorted(types))}"
