"""The best-response versions of recurrent cells."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._core._types import Key
from ._array_response import AbstractArrayResponse, RowScaling
from ._layer import AbstractBestResponse
from ._perturbation import Perturbation


class BestResponseLSTMCell(AbstractBestResponse):
    """A step of a long short-term memory whose weights respond.

    **Attributes:**

    - `layer`: an `equinox.nn.LSTMCell`.
    - `response`: that of `weight_ih`, `weight_hh` and `bias`.
    - `perturbation`: what the cell is bound to, or `None`.
    """

    layer: eqx.nn.LSTMCell
    response: dict[str, AbstractArrayResponse]
    perturbation: Perturbation | None = None

    def __call__(
        self, input: Array, hidden: tuple[Array, Array], *, key: Key | None = None
    ) -> tuple[Array, Array]:
        """Take one step.

        **Arguments:**

        - `input`: of shape `(input_size,)`.
        - `hidden`: a pair of arrays of shape `(hidden_size,)`.
        - `key`: ignored, as by the cell.

        **Returns:**

        The new pair.
        """
        if self.perturbation is None:
            return self.layer(input, hidden)
        h, c = hidden
        gates = _product(self, "weight_ih", input) + _product(self, "weight_hh", h)
        if self.layer.bias is not None:
            gates = gates + self.array("bias")
        i, f, g, o = jnp.split(gates, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c


class BestResponseGRUCell(AbstractBestResponse):
    """A step of a gated recurrent unit whose weights respond.

    **Attributes:**

    - `layer`: an `equinox.nn.GRUCell`.
    - `response`: that of `weight_ih`, `weight_hh`, `bias` and `bias_n`.
    - `perturbation`: what the cell is bound to, or `None`.
    """

    layer: eqx.nn.GRUCell
    response: dict[str, AbstractArrayResponse]
    perturbation: Perturbation | None = None

    def __call__(self, input: Array, hidden: Array, *, key: Key | None = None) -> Array:
        """Take one step.

        **Arguments:**

        - `input`: of shape `(input_size,)`.
        - `hidden`: of shape `(hidden_size,)`.
        - `key`: ignored, as by the cell.

        **Returns:**

        The new hidden state.
        """
        if self.perturbation is None:
            return self.layer(input, hidden)
        from_input = _product(self, "weight_ih", input)
        from_hidden = _product(self, "weight_hh", hidden)
        if self.layer.bias is not None:
            from_input = from_input + self.array("bias")
        reset, update, new = jnp.split(from_input, 3)
        reset_hidden, update_hidden, new_hidden = jnp.split(from_hidden, 3)
        if self.layer.bias_n is not None:
            new_hidden = new_hidden + self.array("bias_n")
        reset = jax.nn.sigmoid(reset + reset_hidden)
        update = jax.nn.sigmoid(update + update_hidden)
        new = jnp.tanh(new + reset * new_hidden)
        return new + update * (hidden - new)


def _product(cell: AbstractBestResponse, name: str, x: Array) -> Array:
    """One of the matrices of a bound cell times `x`."""
    perturbation, scaling = cell.perturbation, cell.response[name]
    assert perturbation is not None and isinstance(scaling, RowScaling)
    product = getattr(cell.layer, name) @ x
    response = product if scaling.weight is None else scaling.weight @ x
    return perturbation.added(product, scaling.scale, response)
