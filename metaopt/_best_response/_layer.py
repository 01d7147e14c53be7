"""Best-response layers, and binding them to outer variables."""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core._tree import tree_dot
from .._core._types import FloatScalar, PyTree
from ._array_response import AbstractArrayResponse
from ._perturbation import Perturbation


_T = TypeVar("_T")


class AbstractBestResponse(eqx.Module):
    """A layer whose arrays depend on outer variables: general ones and their response.

    It is called as the layer that it stands for, and has its attributes: sizes, and arrays
    as they are at the bound perturbation. The perturbation is bound beforehand
    (`metaopt.nn.bind`), under `jax.vmap` with a perturbation of its own for each example;
    unbound, it is the general layer.

    **Attributes:**

    - `layer`: the layer that it stands for, with the general arrays.
    - `response`: how each of its arrays responds, by the name of the array.
    - `perturbation`: what the layer is bound to, or `None`.
    """

    layer: eqx.AbstractVar[Any]
    response: eqx.AbstractVar[dict[str, AbstractArrayResponse]]
    perturbation: eqx.AbstractVar[Perturbation | None]

    def __getattr__(self, name: str) -> Any:
        # Called for attributes that the class itself lacks. Models ask their layers for
        # sizes, such as `cell.hidden_size`, and for arrays that they use elsewhere once
        # more.
        if name.startswith("_") or name in ("layer", "response", "perturbation"):
            raise AttributeError(name)  # a copy under construction has none of these
        if name in self.response:
            return self.array(name)
        return getattr(self.layer, name)

    def __check_init__(self):
        for name, response in self.response.items():
            general, kind = vars(self.layer).get(name), type(self.layer).__name__
            if not isinstance(response, AbstractArrayResponse) or isinstance(general, bool):
                continue  # a pytree of marks
            if general is None:
                raise ValueError(
                    f"`response` has an entry `{name}`, but the `{kind}` has no such array."
                )
            response.check(general, f"response['{name}'] of a `{kind}`")

    @property
    def num_hyper(self) -> int:
        """The length of the perturbation that the layer can be bound to."""
        return next(iter(self.response.values())).num_hyper

    def array(self, name: str) -> Array:
        """The layer's array of that name at the bound perturbation.

        Under `jax.vmap` over perturbations it has a copy for each of them: calling the
        layer, or [`metaopt.nn.squared_norm`][], needs none.
        """
        general = getattr(self.layer, name)
        if self.perturbation is None or name not in self.response:
            return general
        return self.response[name].effective(general, self.perturbation)

    def effective(self) -> Any:
        """An ordinary layer with the arrays that belong to the bound perturbation."""
        layer = self.layer
        for name in self.response:
            layer = _with_array(layer, name, self.array(name))
        return layer

    def squared_norm(self, biases: bool) -> FloatScalar:
        """The sum of the squares of the layer's arrays at the bound perturbation."""
        terms = []
        for name, response in self.response.items():
            general = getattr(self.layer, name)
            if not biases and is_bias(name):
                continue
            if self.perturbation is None:
                terms.append(tree_dot(general, general))
            else:
                terms.append(response.squared_norm(general, self.perturbation))
        return jnp.asarray(sum(terms, start=0.0))


def is_bias(name: str) -> bool:
    """Whether an array of that name is a bias, in the words of Equinox's layers."""
    return name.startswith("bias")


def is_best_response(x: Any) -> bool:
    """Whether `x` is a best-response layer, for `is_leaf=`."""
    return isinstance(x, AbstractBestResponse)


def best_responses(model: PyTree) -> list[AbstractBestResponse]:
    """The best-response layers in a model."""
    leaves = jax.tree.leaves(model, is_leaf=is_best_response)
    return [leaf for leaf in leaves if is_best_response(leaf)]


def leaves_with_paths(model: PyTree) -> list[tuple[Any, Any]]:
    """Best-response layers and all other leaves, each with its path.

    A `StateIndex` is one of them: what it may hold is where a state starts, and nothing
    that is trained.
    """

    def is_leaf(x):
        return is_best_response(x) or isinstance(x, eqx.nn.StateIndex)

    return jax.tree_util.tree_flatten_with_path(model, is_leaf=is_leaf)[0]


def _map_layers(fn, model: _T) -> _T:
    return jax.tree.map(
        lambda x: fn(x) if is_best_response(x) else x, model, is_leaf=is_best_response
    )


def bind(model: _T, vector: Float[Array, " num_hyper"]) -> _T:
    """Bind the best-response layers of a model to outer variables.

    **Arguments:**

    - `model`: any pytree with best-response layers in it.
    - `vector`: what they answer to, of shape `(num_hyper,)`: how far the numbers in
        `hyper` are from those that the response is written around.

    **Returns:**

    The model, whose layers now compute with the weights that belong to `vector`.

    **Raises:**

    `ValueError` where there is no best-response layer, and where one was made for another
    number of outer variables.

    **Example:**

    ```python
    import equinox as eqx, jax, jax.numpy as jnp
    import metaopt as mo

    key = jax.random.key(0)
    model = mo.nn.self_tuning(eqx.nn.MLP(4, 2, 8, 1, key=key), num_hyper=3, key=key)
    y = mo.nn.bind(model, jnp.array([0.1, 0.0, -0.2]))(jnp.ones(4))
    ```
    """
    return _bound(model, vector, centred=False)


def bind_at_centre(model: _T, zero: Float[Array, " num_hyper"]) -> _T:
    """Bind the best-response layers of a model for a first derivative at zero.

    Only the tangent of the vector counts, as in `jax.jvp`, and it is taken once: a second
    derivative would be wrong without notice.
    """
    return _bound(model, zero, centred=True)


def _bound(model: _T, vector: Float[Array, " num_hyper"], *, centred: bool) -> _T:
    shape = jnp.shape(vector)
    if not best_responses(model):
        raise ValueError(
            "There is no best-response layer in `model`, so that nothing would answer to "
            "`vector`. Make it with `metaopt.nn.self_tuning(model, num_hyper, key=key)`."
        )

    def bound(layer):
        if shape != (layer.num_hyper,):
            raise ValueError(
                f"`vector` has shape {shape}, but a layer of the model responds to "
                f"{layer.num_hyper} outer variables. Give a vector of shape "
                f"({layer.num_hyper},), or make the model with `metaopt.nn.self_tuning("
                f"..., num_hyper={shape[0] if len(shape) == 1 else '...'})`."
            )
        perturbation = Perturbation(jnp.asarray(vector), centred)
        return dataclasses.replace(layer, perturbation=perturbation)

    return _map_layers(bound, model)


def ordinary(model: _T, vector: Float[Array, " num_hyper"] | None = None) -> _T:
    """The ordinary model that a best-response model is at given outer variables.

    **Arguments:**

    - `model`: any pytree with best-response layers in it.
    - `vector`: as for [`metaopt.nn.bind`][]; by default what the layers are bound to,
        or none: the general weights.

    **Returns:**

    The model with each best-response layer replaced by an ordinary layer of Equinox.

    **Raises:**

    `ValueError` as [`metaopt.nn.bind`][] does.
    """
    if vector is not None:
        model = bind(model, vector)
    return _map_layers(lambda layer: layer.effective(), model)


def moved(model: _T, change: Float[Array, " num_hyper"]) -> _T:
    """The model whose general weights have gone along their response by `change`."""

    def move(layer):
        effective = bind(layer, change).effective()
        return dataclasses.replace(layer, layer=effective)

    return _map_layers(move, model)


def squared_norm(model: PyTree, *, biases: bool = True) -> FloatScalar:
    """The sum of the squares of all arrays of a model, for penalties; in float32 at least.

    For an ordinary model it is what it says. For a best-response model it is that of the
    weights which belong to the outer variables that it is bound to, and does not form
    these: write weight decay with it in a loss that a
    [`metaopt.SelfTuningSolver`][] is to solve.

    **Arguments:**

    - `model`: any pytree, such as one layer of a model.
    - `biases`: whether arrays whose name begins with `bias` count. The state of a model
        (`equinox.nn.StateIndex`) never does.

    **Returns:**

    A floating-point scalar.
    """
    terms = []
    for path, leaf in leaves_with_paths(model):
        if is_best_response(leaf):
            terms.append(leaf.squared_norm(biases))
        elif eqx.is_inexact_array(leaf):
            name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
            if biases or not is_bias(name):
                terms.append(tree_dot(leaf, leaf))
    return jnp.asarray(sum(terms, start=0.0))


def response_filter(model: PyTree) -> PyTree[bool]:
    """For each leaf of a model, whether it belongs to a response."""

    def mark(x):
        if not is_best_response(x):
            return False
        marks = jax.tree.map(lambda _: False, x)
        response = jax.tree.map(lambda _: True, x.response)
        return dataclasses.replace(marks, response=response)

    return jax.tree.map(mark, model, is_leaf=is_best_response)


def _with_array(layer: Any, name: str, array: Array) -> Any:
    return eqx.tree_at(lambda x: getattr(x, name), layer, array)
